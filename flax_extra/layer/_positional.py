r"""Positional layers: learned and Fourier encodings of positions, learned padding and masking.

Source of the definitions: Jaegle et al., "Perceiver IO: A General Architecture for Structured
Inputs & Outputs" (2021), and Jaegle et al., "Perceiver: General Perception with Iterative
Attention" (2021), appendix D, for the Fourier features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Float, Float32, Int32, Integer, Shaped

from flax_extra.layer import _errors
from flax_extra.layer._initializers import TRUNCATED_NORMAL
from flax_extra.layer._positions import (
    OutputPositions,
    convert_to_indices,
    is_traced,
    locate_block,
    take_first_rows,
    take_rows,
)
from flax_extra.layer._sharding import broadcast_like


class TrainablePositionalEncoding(nn.Module):
    r"""Learns a vector for each position of a sequence.

    .. math:: m \in \mathbb{N} \rightarrow
        h \in \mathbb{R}^{m \times T \times d}, \quad h_{b,t} = w_t, \quad
        w \in \mathbb{R}^{T \times d}

    Args:
        seqlen: the length of the sequence, T.
        dimension: the features of each vector, d.
        kernel_init: initializer of the vectors; by default a normal distribution of sigma 0.02,
            cut at two sigma.
        dtype: of the result; None for the dtype of the parameter.
        param_dtype: of the parameter.

    Raises:
        ValueError: If ``seqlen`` or ``dimension`` is below 1.

    Shapes:
        ``xn.TrainablePositionalEncoding(256, 64)``: ``b -> f32[b, 256, 64]``

    Example:
        >>> import jax
        >>> from flax_extra.layer import TrainablePositionalEncoding
        >>> encoding = TrainablePositionalEncoding(seqlen=5, dimension=3)
        >>> encoded, variables = encoding.init_with_output(jax.random.key(0), 2)
        >>> encoded.shape, jax.tree.map(jax.numpy.shape, variables)
        ((2, 5, 3), {'params': {'positional_encoding': (5, 3)}})

        The first vectors serve a shorter sequence:

        >>> encoding.apply(variables, 2, length=4).shape
        (2, 4, 3)
    """

    seqlen: int
    dimension: int
    kernel_init: Initializer = TRUNCATED_NORMAL
    dtype: Dtype | None = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        _check_at_least(self, "seqlen", 1)
        _check_at_least(self, "dimension", 1)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        batch_size: int,
        output_positions: OutputPositions | None = None,
        *,
        length: int | None = None,
        like: Shaped[Array, "batch ..."] | None = None,
        lengths: Integer[Array, " batch"] | None = None,
        decode: bool = False,
    ) -> Float[Array, "batch time features"]:
        """Gives the vectors of all positions, or of the first ones, to each example of a batch.

        Args:
            batch_size: the number of examples.
            output_positions: not supported by this encoding; leave it None.
            length: the length of the sequence; ``seqlen`` by default.
            like: an array of the batch, ``[batch, ...]``. On a mesh with explicit axes, and inside
                ``jax.shard_map``, the result is sharded along the batch as this array is.
            decode: whether the positions go on from the last block of a stream; see
                :func:`flax_extra.combinator.stream`. It needs ``length``.
            lengths: how many steps of the block are valid in each row, ``[batch]``.

        Returns:
            The same vectors for each example, ``[batch, length, dimension]``; in a stream, those at
            the positions of each row. Past ``seqlen`` they are NaN in a compiled program.

        Raises:
            ValueError: If output positions are given, ``length`` is more than ``seqlen``,
                ``batch_size`` or ``length`` is traced, ``like`` has another batch size, or a row of
                a stream is known to run over ``seqlen``.
            StreamError: If ``decode`` is true and there is no state.
        """
        if output_positions is not None:
            raise _errors.no_subset(type(self).__name__)
        shape = (self.seqlen, self.dimension)
        vectors = self.param("positional_encoding", self.kernel_init, shape, self.param_dtype)
        if decode:
            positions = locate_block(self, batch_size, length, lengths, self.seqlen)
            if positions is not None:
                return take_rows(vectors.astype(self.dtype or vectors.dtype), positions, axis=0)
        vectors = take_first_rows(type(self).__name__, vectors, length)
        vectors = vectors.astype(self.dtype or vectors.dtype)
        return _broadcast_to_batch(self, vectors, batch_size, like)


class FourierPositionEncoding(nn.Module):
    r"""Computes sines and cosines of each position's coordinates, at several frequencies.

    The positions of a sequence of shape :math:`n_1 \times \dots \times n_k` form a grid. Along axis
    i, coordinates run from the lower to the upper bound, both included, and frequencies from 1 to
    half the resolution:

    .. math::

        c_i(p) &= \mathrm{linspace}(lower, upper, n_i)_p \\
        f_i &= \mathrm{linspace}(1, r_i / 2, n_{bands}) \\
        h(p) &= [c_1 \dots c_k, \; \sin(\pi c_1 f_1) \dots \sin(\pi c_k f_k), \;
            \cos(\pi c_1 f_1) \dots \cos(\pi c_k f_k)]

    There are :math:`k \cdot (2 \cdot n_{bands} + 1)` features. They are computed in float32.
    Output positions give the same rows as the whole grid, to the last bit.

    Args:
        seqshape: the shape of the sequence, n. Positions are counted in row-major order.
        n_bands: the number of frequencies for each axis.
        spatial_coordinate_bounds: the coordinates of the first and last position of each axis.
        use_spatial_coordinates: whether the coordinates are among the features.
        use_sine_only: whether to leave the cosines out.
        max_resolution: for each axis, twice its highest frequency, r; ``seqshape`` by default.
        deepmind_subset: whether output positions have the coordinates lower + (upper - lower) * p /
            n, as in the code of DeepMind and of Hugging Face's transformers. Weights that were
            trained with that code need it. The whole grid is as above in both cases.
        dtype: of the result.

    Raises:
        ValueError: If an axis or ``n_bands`` is below 1, ``max_resolution`` and ``seqshape`` have
            different numbers of axes, or the lower bound is not below the upper.

    Shapes:
        ``xn.FourierPositionEncoding((28, 28), n_bands=8)``: ``b -> f32[b, 784, 34]``

    Example:
        >>> from flax_extra.layer import FourierPositionEncoding
        >>> encoding = FourierPositionEncoding(seqshape=(4, 6), n_bands=3)
        >>> encoding(2).shape, encoding(2, [0, 23, 7]).shape
        ((2, 24, 14), (2, 3, 14))
        >>> bool((encoding(2)[:, [0, 23, 7]] == encoding(2, [0, 23, 7])).all())
        True
    """

    seqshape: tuple[int, ...]
    n_bands: int
    spatial_coordinate_bounds: tuple[float, float] = (-1.0, 1.0)
    use_spatial_coordinates: bool = True
    use_sine_only: bool = False
    max_resolution: tuple[float, ...] | None = None
    deepmind_subset: bool = False
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        self.seqshape = tuple(self.seqshape)
        lower, upper = self.spatial_coordinate_bounds
        self.spatial_coordinate_bounds = (lower, upper)
        _check_at_least(self, "n_bands", 1)
        if not self.seqshape or min(self.seqshape) < 1:
            raise _errors.too_small(type(self).__name__, "axes in seqshape", 1, self.seqshape)
        if self.max_resolution is not None:
            self.max_resolution = tuple(self.max_resolution)
            found, expected = len(self.max_resolution), len(self.seqshape)
            if found != expected:
                name = type(self).__name__
                raise _errors.mismatched_axes(name, "max_resolution", found, expected)
        if not lower < upper:
            raise _errors.wrong_bounds(type(self).__name__, self.spatial_coordinate_bounds)
        super().__post_init__()

    def __call__(
        self,
        batch_size: int,
        output_positions: OutputPositions | None = None,
        *,
        length: int | None = None,
        like: Shaped[Array, "batch ..."] | None = None,
        lengths: Integer[Array, " batch"] | None = None,
        decode: bool = False,
    ) -> Float[Array, "batch time features"]:
        """Gives the features of all positions, or of some, to each example of a batch.

        Args:
            batch_size: the number of examples.
            output_positions: the positions to encode, ``[time]``; all by default. A list, a numpy
                array, or a jax array, which may be traced.
            length: the length of the sequence: the first positions of a grid with one axis are
                encoded. A grid with several axes is encoded as a whole.
            like: an array of the batch, ``[batch, ...]``. On a mesh with explicit axes, and inside
                ``jax.shard_map``, the result is sharded along the batch as this array is.
            decode: whether the positions go on from the last block of a stream; see
                :func:`flax_extra.combinator.stream`. It needs ``length``.
            lengths: how many steps of the block are valid in each row, ``[batch]``.

        Returns:
            The same features for each example, ``[batch, time, features]``; in a stream, those at
            the positions of each row. If a traced position is out of range, its features are NaN.

        Raises:
            ValueError: If output positions are not integers on one axis, or known to be out of
                range; if ``length`` is more than the grid has positions, not all of them for a
                grid with several axes, or given together with output positions; if ``batch_size``
                or ``length`` is traced, ``like`` has another batch size, or a row of a stream is
                known to run over the grid.
            StreamError: If ``decode`` is true and there is no state.
        """
        name, seqlen = type(self).__name__, math.prod(self.seqshape)
        if decode:
            if output_positions is not None:
                raise _errors.positions_in_stream(name)
            positions = self._locate_block(batch_size, length, lengths)
            if positions is not None:
                features = self._encode_rows(positions, self._compute_tables(endpoint=True))
                return features.astype(self.dtype)
        if output_positions is None:
            is_grid = len(self.seqshape) > 1
            if is_grid and not is_traced(length) and length not in (None, seqlen):
                raise _errors.part_of_grid(name, length, self.seqshape, seqlen)
            features = self._encode(self._compute_tables(endpoint=True), self._spread_over_grid)
            features = take_first_rows(name, features, length)
        else:
            if length is not None:
                raise _errors.length_and_positions(name, length)
            indices = convert_to_indices(name, output_positions, seqlen)
            tables = self._compute_tables(endpoint=not self.deepmind_subset)
            features = self._encode_rows(indices, tables)
        return _broadcast_to_batch(self, features.astype(self.dtype), batch_size, like)

    @nn.compact
    def _locate_block(self, batch_size: int, length: int | None, lengths: Any) -> Array | None:
        return locate_block(self, batch_size, length, lengths, math.prod(self.seqshape))

    @nn.nowrap
    def _encode_rows(
        self,
        indices: Int32[Array, "*time"],
        tables: Sequence[Sequence[Float32[Array, "axis _"]]],
    ) -> Float32[Array, "*time features"]:
        axis_indices = _unravel_indices(indices, self.seqshape)
        return self._encode(
            tables, lambda table, axis: take_rows(table, axis_indices[axis], axis=0)
        )

    @nn.nowrap
    def _compute_tables(self, endpoint: bool) -> list[Sequence[Float32[Array, "axis _"]]]:
        """Computes coordinates, sines and cosines: for each of them one table for every axis."""
        resolutions = self.max_resolution or self.seqshape
        tables = [
            _compute_axis_tables(
                size, resolution, self.n_bands, self.spatial_coordinate_bounds, endpoint
            )
            for size, resolution in zip(self.seqshape, resolutions, strict=True)
        ]
        coordinates, sines, cosines = zip(*tables, strict=True)
        return [
            *([coordinates] if self.use_spatial_coordinates else []),
            sines,
            *([] if self.use_sine_only else [cosines]),
        ]

    @nn.nowrap
    def _encode(
        self,
        kinds: Sequence[Sequence[Float32[Array, "axis _"]]],
        look_up: Callable[[Float32[Array, "axis _"], int], Float32[Array, "time _"]],
    ) -> Float32[Array, "time features"]:
        """Looks the features of each position up in the tables, and concatenates them."""
        parts = [look_up(table, axis) for kind in kinds for axis, table in enumerate(kind)]
        return jnp.concatenate(parts, axis=-1)

    @nn.nowrap
    def _spread_over_grid(
        self, table: Float32[Array, "axis features"], axis: int
    ) -> Float32[Array, "time features"]:
        """Repeats the table of one axis along the other axes of the grid."""
        features = table.shape[-1]
        grid = (*self.seqshape, features)
        spread = jax.lax.broadcast_in_dim(table, grid, (axis, len(self.seqshape)))
        return spread.reshape(math.prod(self.seqshape), features)


class TrainablePositionalPadding(nn.Module):
    r"""Pads the features of each position up to ``d_max`` with a learned vector.

    .. math:: x \in \mathbb{R}^{m \times T \times d} \rightarrow
        h \in \mathbb{R}^{m \times T \times d_{max}}, \quad h_{b,t} = [x_{b,t}, w], \quad
        w \in \mathbb{R}^{1 \times (d_{max} - d)}

    Args:
        d_max: the number of features of the result. If the inputs have as many, they are returned
            unchanged and there is no parameter.
        kernel_init: initializer of the vector; by default a normal distribution of sigma 0.02, cut
            at two sigma.
        dtype: of the result; the dtype to which inputs and parameter promote by default.
        param_dtype: of the parameter.

    Shapes:
        ``xn.TrainablePositionalPadding(d_max=64)``: ``f32[b, t, 32] -> f32[b, t, 64]``

    Example:
        >>> import jax
        >>> from flax_extra.layer import TrainablePositionalPadding
        >>> padding = TrainablePositionalPadding(d_max=8)
        >>> inputs = jax.numpy.ones((2, 5, 3))
        >>> padded, variables = padding.init_with_output(jax.random.key(0), inputs)
        >>> padded.shape, jax.tree.map(jax.numpy.shape, variables)
        ((2, 5, 8), {'params': {'padding': (1, 5)}})
    """

    d_max: int
    kernel_init: Initializer = TRUNCATED_NORMAL
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Shaped[Array, "batch *time features"]
    ) -> Float[Array, "batch *time d_max"]:
        """Appends the vector to the features of each position.

        Args:
            inputs: a sequence, ``[batch, ..., features]``.

        Returns:
            The padded sequence, ``[batch, ..., d_max]``.

        Raises:
            ValueError: If the inputs have more features than ``d_max``.
        """
        missing = self.d_max - inputs.shape[-1]
        if missing < 0:
            raise _errors.too_wide(type(self).__name__, inputs.shape[-1], self.d_max)
        if missing == 0:
            (inputs,) = promote_dtype(inputs, dtype=self.dtype)
            return inputs
        padding = self.param("padding", self.kernel_init, (1, missing), self.param_dtype)
        inputs, padding = promote_dtype(inputs, padding, dtype=self.dtype)
        shape = (*inputs.shape[:-1], missing)
        vectors = broadcast_like(padding[0], shape, inputs, n_axes=inputs.ndim - 1)
        return jnp.concatenate([inputs, vectors], axis=-1)


class TrainablePositionalMasking(nn.Module):
    r"""Replaces positions that are drawn at random by a learned vector.

    .. math:: x \in \mathbb{R}^{m \times T \times d} \rightarrow
        h \in \mathbb{R}^{m \times T \times d}, \quad
        h_{b,t} = \begin{cases} w & \text{with probability } rate \\ x_{b,t} & \text{otherwise}
        \end{cases}, \quad w \in \mathbb{R}^{1 \times d}

    Masking is part of the model and not a regularizer: ``deterministic`` does not switch it off.

    Args:
        rate: the probability that a position is masked.
        kernel_init: initializer of the vector; by default a normal distribution of sigma 0.02, cut
            at two sigma.
        rng_collection: the rng stream from which masked positions are drawn. As for every stream
            of linen, the stream ``params`` is used if this one is not given, as in ``init``. A
            rate of exactly 0 or 1 needs no rng.
        dtype: of the result; the dtype to which inputs and parameter promote by default.
        param_dtype: of the parameter.

    Raises:
        ValueError: If ``rate`` is not from 0 to 1.

    Shapes:
        ``xn.TrainablePositionalMasking(rate=0.5)``: ``f32[b, t, 64] -> f32[b, t, 64]``

    Example:
        >>> import jax
        >>> from flax_extra.layer import TrainablePositionalMasking
        >>> masking = TrainablePositionalMasking(rate=0.5)
        >>> inputs = jax.numpy.ones((2, 5, 3))
        >>> variables = masking.init(jax.random.key(0), inputs)
        >>> jax.tree.map(jax.numpy.shape, variables)
        {'params': {'mask': (1, 3)}}
        >>> masking.apply(variables, inputs, rngs={"masking": jax.random.key(1)}).shape
        (2, 5, 3)
    """

    rate: float
    kernel_init: Initializer = TRUNCATED_NORMAL
    rng_collection: str = "masking"
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise _errors.not_a_probability(type(self).__name__, "rate", self.rate)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Shaped[Array, "batch *time features"]
    ) -> Float[Array, "batch *time features"]:
        """Replaces the masked positions by the vector.

        Args:
            inputs: a sequence, ``[batch, ..., features]``.

        Returns:
            The masked sequence, of the same shape.

        Raises:
            ValueError: If the rate is between 0 and 1 and the rng stream is not given.
        """
        mask = self.param("mask", self.kernel_init, (1, inputs.shape[-1]), self.param_dtype)
        inputs, mask = promote_dtype(inputs, mask, dtype=self.dtype)
        vectors = broadcast_like(mask[0], inputs.shape, inputs, n_axes=inputs.ndim)
        if self.rate in (0, 1):
            return vectors if self.rate == 1 else inputs
        if not (self.has_rng(self.rng_collection) or self.has_rng("params")):
            name = type(self).__name__
            raise _errors.no_masking_stream(name, self.rate, self.rng_collection)
        key = self.make_rng(self.rng_collection)
        masked = jax.random.bernoulli(key, self.rate, (*inputs.shape[:-1], 1))
        return jnp.where(masked, vectors, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _compute_axis_tables(
    size: int, resolution: float, n_bands: int, bounds: tuple[float, float], endpoint: bool
) -> tuple[
    Float32[Array, "axis 1"], Float32[Array, "axis n_bands"], Float32[Array, "axis n_bands"]
]:
    """Computes coordinates, sines and cosines at each position of one axis.

    The barrier keeps XLA from fusing this computation into the code that reads the tables, where it
    may round differently. So the rows of output positions are the bits of the whole grid.
    """
    lower, upper = bounds
    steps = max(size - endpoint, 1)
    index = jnp.arange(size, dtype=jnp.float32)[:, None]
    # A rounding error of a coordinate is multiplied by the frequency. This form rounds once if the
    # bounds are integers: the numerator is exact.
    coordinates = (lower * (steps - index) + upper * index) / steps
    bands = np.linspace(1, resolution / 2, n_bands, dtype=np.float32)[None, :]
    phases = np.float32(np.pi) * (coordinates * bands)
    tables = coordinates, jnp.sin(phases), jnp.cos(phases)
    return jax.lax.optimization_barrier(tables)  # type: ignore[no-any-return, no-untyped-call]


def _unravel_indices(indices: Array, shape: Sequence[int]) -> list[Array]:
    """Converts row-major indices of a grid to indices along each axis.

    An index out of range is out of range along every axis, so that all its features are NaN.
    """
    is_inside = indices < math.prod(shape)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return [
        jnp.where(is_inside, indices // stride % size, size)
        for size, stride in zip(shape, strides, strict=True)
    ]


def _broadcast_to_batch(
    layer: nn.Module, vectors: Array, batch_size: int, like: Array | None
) -> Array:
    """Repeats vectors for each example of a batch, sharded as ``like`` is."""
    if is_traced(batch_size):
        raise _errors.traced_number(type(layer).__name__, "batch_size")
    shape = (batch_size, *vectors.shape)
    if like is None:
        return jnp.broadcast_to(vectors, shape)
    if like.shape[:1] != shape[:1]:
        raise _errors.other_batch(type(layer).__name__, batch_size, like.shape)
    return broadcast_like(vectors, shape, like, n_axes=1)


def _check_at_least(layer: nn.Module, name: str, least: int) -> None:
    value: Any = getattr(layer, name)
    if value < least:
        raise _errors.too_small(type(layer).__name__, name, least, value)
