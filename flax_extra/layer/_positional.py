r"""What tells positions of a sequence apart: learned vectors, and Fourier features.

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
from jaxtyping import Float, Float32, Shaped

from flax_extra.layer import _errors
from flax_extra.layer._positions import OutputPositions, as_indices, is_traced, rows

KERNEL_INIT: Initializer = nn.initializers.truncated_normal(stddev=0.02)
"""A normal distribution of sigma 0.02 cut at two sigma; the cut is not corrected for."""


class TrainablePositionalEncoding(nn.Module):
    r"""Learns a vector for each position of a sequence.

    .. math:: m \in \mathbb{N} \rightarrow
        h \in \mathbb{R}^{m \times T \times d}, \quad h_{b,t} = w_t, \quad
        w \in \mathbb{R}^{T \times d}

    Args:
        seqlen: the length of the sequence, T.
        dimension: the features of each vector, d.
        kernel_init: initializes the vectors; a normal of sigma 0.02 cut at two sigma by default.
        dtype: of the result; that of the parameter where it is None.
        param_dtype: of the parameter.

    Raises:
        ValueError: where ``seqlen`` or ``dimension`` is below 1.

    Shapes:
        ``xn.TrainablePositionalEncoding(256, 64)``: ``b -> f32[b, 256, 64]``

    Example:
        >>> import jax
        >>> from flax_extra.layer import TrainablePositionalEncoding
        >>> encoding = TrainablePositionalEncoding(seqlen=5, dimension=3)
        >>> encoded, variables = encoding.init_with_output(jax.random.key(0), 2)
        >>> encoded.shape, jax.tree.map(jax.numpy.shape, variables)
        ((2, 5, 3), {'params': {'positional_encoding': (5, 3)}})
    """

    seqlen: int
    dimension: int
    kernel_init: Initializer = KERNEL_INIT
    dtype: Dtype | None = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        _check_least(self, "seqlen", 1)
        _check_least(self, "dimension", 1)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, batch_size: int, output_positions: OutputPositions | None = None
    ) -> Float[Array, "batch time features"]:
        """The vectors of all positions.

        Args:
            batch_size: how many times they are given.
            output_positions: cannot be used with this encoding, and must be None.

        Returns:
            The same vectors for each of the batch, ``[batch, seqlen, dimension]``.

        Raises:
            ValueError: where output positions are given, or ``batch_size`` is traced.
        """
        if output_positions is not None:
            raise _errors.no_subset(type(self).__name__)
        shape = (self.seqlen, self.dimension)
        vectors = self.param("positional_encoding", self.kernel_init, shape, self.param_dtype)
        return _batched(self, vectors.astype(self.dtype or vectors.dtype), batch_size)


class FourierPositionEncoding(nn.Module):
    r"""Computes sines and cosines of each position's coordinates, at several frequencies.

    A sequence of shape :math:`n_1 \times \dots \times n_k` is a grid. Along axis i, coordinates run
    from the lower to the upper bound, both included, and frequencies from 1 to half the resolution:

    .. math::

        c_i(p) &= \mathrm{linspace}(lower, upper, n_i)_p \\
        f_i &= \mathrm{linspace}(1, r_i / 2, n_{bands}) \\
        h(p) &= [c_1 \dots c_k, \; \sin(\pi c_1 f_1) \dots \sin(\pi c_k f_k), \;
            \cos(\pi c_1 f_1) \dots \cos(\pi c_k f_k)]

    so that there are :math:`k \cdot (2 \cdot n_{bands} + 1)` features. They are computed in
    float32. Positions of a subset give the same rows as the whole grid, to the last bit.

    Args:
        seqshape: the shape of the sequence, n; its positions are counted row by row.
        n_bands: how many frequencies there are for each axis.
        spatial_coordinate_bounds: the coordinates of the first and last position of each axis.
        use_spatial_coordinates: whether the coordinates are among the features.
        use_sine_only: whether the cosines are left out.
        max_resolution: for each axis, twice its highest frequency, r; ``seqshape`` where None.
        deepmind_subset: whether output positions are placed at lower + (upper - lower) * p / n, as
            the code of DeepMind and of Hugging Face's transformers does; weights that were
            trained with it need it. The whole grid stays as above.
        dtype: of the result.

    Raises:
        ValueError: where an axis or ``n_bands`` is below 1, ``max_resolution`` has other axes than
            ``seqshape``, or the lower bound is not below the upper.

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
        _check_least(self, "n_bands", 1)
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
        self, batch_size: int, output_positions: OutputPositions | None = None
    ) -> Float[Array, "batch time features"]:
        """The features of all positions, or of some.

        Args:
            batch_size: how many times they are given.
            output_positions: the positions that are encoded, ``[time]``; all where None. A list, a
                numpy array, or a jax array, which may be traced.

        Returns:
            The same features for each of the batch, ``[batch, time, features]``. Those of a traced
            position out of range are NaN.

        Raises:
            ValueError: where output positions are no integers on one axis, or are known to be out
                of range, or ``batch_size`` is traced.
        """
        if output_positions is None:
            features = self._features(self._tables(endpoint=True), self._over_grid)
        else:
            seqlen = math.prod(self.seqshape)
            indices = as_indices(type(self).__name__, output_positions, seqlen)
            unraveled = _unravel(indices, self.seqshape)
            features = self._features(
                self._tables(endpoint=not self.deepmind_subset),
                lambda table, axis: rows(table, unraveled[axis], axis=0),
            )
        return _batched(self, features.astype(self.dtype), batch_size)

    @nn.nowrap
    def _tables(self, endpoint: bool) -> list[Sequence[Float32[Array, "axis _"]]]:
        """The kinds of features, each with a table for every axis."""
        resolutions = self.max_resolution or self.seqshape
        tables = [
            _axis_tables(size, resolution, self.n_bands, self.spatial_coordinate_bounds, endpoint)
            for size, resolution in zip(self.seqshape, resolutions, strict=True)
        ]
        coordinates, sines, cosines = zip(*tables, strict=True)
        return [
            *([coordinates] if self.use_spatial_coordinates else []),
            sines,
            *([] if self.use_sine_only else [cosines]),
        ]

    @nn.nowrap
    def _features(
        self,
        kinds: Sequence[Sequence[Float32[Array, "axis _"]]],
        spread: Callable[[Float32[Array, "axis _"], int], Float32[Array, "time _"]],
    ) -> Float32[Array, "time features"]:
        parts = [spread(table, axis) for kind in kinds for axis, table in enumerate(kind)]
        return jnp.concatenate(parts, axis=-1)

    @nn.nowrap
    def _over_grid(
        self, table: Float32[Array, "axis features"], axis: int
    ) -> Float32[Array, "time features"]:
        features = table.shape[-1]
        grid = (*self.seqshape, features)
        spread = jax.lax.broadcast_in_dim(table, grid, (axis, len(self.seqshape)))
        return spread.reshape(math.prod(self.seqshape), features)


class TrainablePositionalPadding(nn.Module):
    r"""Learns a vector that fills the features of each position up to a number.

    .. math:: x \in \mathbb{R}^{m \times T \times d} \rightarrow
        h \in \mathbb{R}^{m \times T \times d_{max}}, \quad h_{b,t} = [x_{b,t}, w], \quad
        w \in \mathbb{R}^{1 \times (d_{max} - d)}

    Args:
        d_max: the features of the result. Inputs that have as many come back as they are, and
            there is no parameter.
        kernel_init: initializes the vector; a normal of sigma 0.02 cut at two sigma by default.
        dtype: of the result; what inputs and parameter promote to where it is None.
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
    kernel_init: Initializer = KERNEL_INIT
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Shaped[Array, "batch *time features"]
    ) -> Float[Array, "batch *time d_max"]:
        """The inputs, with the vector after the features of each position.

        Args:
            inputs: a sequence, ``[batch, ..., features]``.

        Returns:
            The padded sequence, ``[batch, ..., d_max]``.

        Raises:
            ValueError: where the inputs have more features than ``d_max``.
        """
        missing = self.d_max - inputs.shape[-1]
        if missing < 0:
            raise _errors.too_wide(type(self).__name__, inputs.shape[-1], self.d_max)
        if missing == 0:
            (inputs,) = promote_dtype(inputs, dtype=self.dtype)
            return inputs
        padding = self.param("padding", self.kernel_init, (1, missing), self.param_dtype)
        inputs, padding = promote_dtype(inputs, padding, dtype=self.dtype)
        return jnp.concatenate([inputs, _at_each_position(padding, inputs)], axis=-1)


class TrainablePositionalMasking(nn.Module):
    r"""Learns a vector that takes the place of positions chosen at random.

    .. math:: x \in \mathbb{R}^{m \times T \times d} \rightarrow
        h \in \mathbb{R}^{m \times T \times d}, \quad
        h_{b,t} = \begin{cases} w & \text{with probability } rate \\ x_{b,t} & \text{otherwise}
        \end{cases}, \quad w \in \mathbb{R}^{1 \times d}

    It is a part of the model and not a regularizer: there is no ``deterministic`` to switch it off.

    Args:
        rate: the probability of each position being masked.
        kernel_init: initializes the vector; a normal of sigma 0.02 cut at two sigma by default.
        rng_collection: the rng stream that positions are drawn from. As for every stream of
            linen's, ``params`` stands in where it is missing and that one is given, as in ``init``.
            At a rate of exactly 0 or 1 there is nothing to draw and no rng is needed.
        dtype: of the result; what inputs and parameter promote to where it is None.
        param_dtype: of the parameter.

    Raises:
        ValueError: where ``rate`` is not from 0 to 1.

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
    kernel_init: Initializer = KERNEL_INIT
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
        """The inputs, with the vector in place of masked positions.

        Args:
            inputs: a sequence, ``[batch, ..., features]``.

        Returns:
            The masked sequence, of the same shape.

        Raises:
            ValueError: where positions are to be drawn and the rng stream is missing.
        """
        mask = self.param("mask", self.kernel_init, (1, inputs.shape[-1]), self.param_dtype)
        inputs, mask = promote_dtype(inputs, mask, dtype=self.dtype)
        vectors = _at_each_position(mask, inputs)
        if self.rate in (0, 1):
            return vectors if self.rate == 1 else inputs
        if not (self.has_rng(self.rng_collection) or self.has_rng("params")):
            name = type(self).__name__
            raise _errors.no_masking_stream(name, self.rate, self.rng_collection)
        key = self.make_rng(self.rng_collection)
        masked = jax.random.bernoulli(key, self.rate, (*inputs.shape[:-1], 1))
        return jnp.where(masked, vectors, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _axis_tables(
    size: int, resolution: float, n_bands: int, bounds: tuple[float, float], endpoint: bool
) -> tuple[
    Float32[Array, "axis 1"], Float32[Array, "axis n_bands"], Float32[Array, "axis n_bands"]
]:
    """Coordinates, sines and cosines at each position of one axis.

    The barrier keeps XLA from computing them again, in another way, inside of what reads them:
    rows of a subset are the bits of the whole grid.
    """
    lower, upper = bounds
    steps = max(size - endpoint, 1)
    index = jnp.arange(size, dtype=jnp.float32)[:, None]
    # As few roundings as can be, for high frequencies multiply the error: of whole bounds the
    # numerator is exact.
    coordinates = (lower * (steps - index) + upper * index) / steps
    bands = np.linspace(1, resolution / 2, n_bands, dtype=np.float32)[None, :]
    phases = np.float32(np.pi) * (coordinates * bands)
    tables = coordinates, jnp.sin(phases), jnp.cos(phases)
    return jax.lax.optimization_barrier(tables)  # type: ignore[no-any-return, no-untyped-call]


def _unravel(indices: Array, shape: Sequence[int]) -> list[Array]:
    """Row-major positions as an index for each axis; out of range stays so, on every axis."""
    inside = indices < math.prod(shape)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return [
        jnp.where(inside, indices // stride % size, size)
        for size, stride in zip(shape, strides, strict=True)
    ]


def _batched(layer: nn.Module, vectors: Array, batch_size: int) -> Array:
    if is_traced(batch_size):
        raise _errors.traced_number(type(layer).__name__, "batch_size")
    return jnp.broadcast_to(vectors, (batch_size, *vectors.shape))


def _at_each_position(vector: Array, sequence: Array) -> Array:
    return jnp.broadcast_to(vector[0], (*sequence.shape[:-1], vector.shape[-1]))


def _check_least(layer: nn.Module, name: str, least: int) -> None:
    value: Any = getattr(layer, name)
    if value < least:
        raise _errors.too_small(type(layer).__name__, name, least, value)
