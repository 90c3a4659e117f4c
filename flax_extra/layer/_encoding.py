r"""Encodes raw inputs as a sequence: preprocessing, flattening, positional encoding.

Source: Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs"
(2021), section 3.2 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array
from jaxtyping import Integer, Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._constructor import (
    Constructor,
    check_constructor,
    make_identity,
    select_keywords,
)
from flax_extra.layer._positions import OutputPositions, convert_to_indices, take_rows
from flax_extra.layer._sharding import shard_like


class Encoding(nn.Module):
    r"""Preprocesses inputs, flattens them to a sequence and adds a positional encoding.

    .. math:: x \in \mathbb{R}^{m \times \dots \times d_x} \rightarrow
        h \in \mathbb{R}^{m \times T \times d}, \quad
        h = \mathrm{aggregate}(\mathrm{flatten}(\mathrm{preprocess}(x)), \mathrm{position}(m))

    With output positions :math:`t \in \mathbb{N}^{T^{\prime}}`, both arguments of the aggregation
    are taken at these positions, and the result has length :math:`T^{\prime}`.

    The parameters are those of its sub-layers ``preprocessor``, ``position_encoder`` and
    ``aggregation``. A sub-layer that is made with a name keeps it.

    Args:
        preprocessing: a constructor of a module or function that is applied to the inputs.
        positional_encoding: a constructor of a positional encoding, such as
            :class:`~flax_extra.layer.TrainablePositionalEncoding` or
            :class:`~flax_extra.layer.FourierPositionEncoding`, or None. It is called with the batch
            size and the output positions. If its call has the keyword ``length``, it is also told
            the length of the sequence unless there are output positions; if its call has the
            keyword ``like``, it is also given the sequence.
        aggregation: an operation on the sequence and its positional encoding, such as
            ``cb.concatenate()`` or ``cb.add()``.

    Raises:
        ValueError: If an argument that should be a constructor is not, for instance a module.

    Shapes:
        ``xn.Encoding(partial(nn.Dense, 16), partial(xn.FourierPositionEncoding, (28, 28),
        n_bands=8))``: ``f32[b, 28, 28, 3] -> f32[b, 784, 50]``

    Example:
        >>> import functools, jax
        >>> from flax import linen as nn
        >>> from flax_extra.layer import Encoding, FourierPositionEncoding
        >>> encoding = Encoding(
        ...     preprocessing=functools.partial(nn.Dense, 8),
        ...     positional_encoding=functools.partial(FourierPositionEncoding, (4, 4), n_bands=3),
        ... )
        >>> images = jax.numpy.ones((2, 4, 4, 1))
        >>> encoded, variables = encoding.init_with_output(jax.random.key(0), images)
        >>> encoded.shape, encoding.apply(variables, images, [0, 15]).shape
        ((2, 16, 22), (2, 2, 22))
        >>> jax.tree.map(jax.numpy.shape, variables)
        {'params': {'preprocessor': {'bias': (8,), 'kernel': (1, 8)}}}

        Learned positions serve texts up to their length, here 512:

        >>> from flax_extra import combinator as cb, layer as xn
        >>> text = xn.Encoding(
        ...     preprocessing=functools.partial(nn.Embed, 256, 8),
        ...     positional_encoding=functools.partial(xn.TrainablePositionalEncoding, 512, 8),
        ...     aggregation=cb.add(),
        ... )
        >>> text.init_with_output(jax.random.key(0), jax.numpy.zeros((2, 100), int))[0].shape
        (2, 100, 8)
    """

    preprocessing: Constructor = make_identity
    positional_encoding: Constructor | None = None
    aggregation: Callable[[Array, Array], Array] = cb.concatenate()

    def __post_init__(self) -> None:
        check_constructor(type(self).__name__, "preprocessing", self.preprocessing)
        if self.positional_encoding is not None:
            check_constructor(type(self).__name__, "positional_encoding", self.positional_encoding)
        super().__post_init__()

    def setup(self) -> None:
        self.preprocessor = self.preprocessing()
        if self.positional_encoding is not None:
            self.position_encoder = self.positional_encoding()

    def __call__(
        self,
        inputs: Shaped[Array, "batch ..."],
        output_positions: OutputPositions | None = None,
        *,
        lengths: Integer[Array, " batch"] | None = None,
        decode: bool = False,
    ) -> Shaped[Array, "batch time features"]:
        """Encodes the inputs as a sequence.

        Args:
            inputs: the inputs, ``[batch, ...]``. They are preprocessed to ``[batch, ...,
                features]``; the axes between are flattened to a time axis in row-major order.
            output_positions: the positions to encode, ``[time]``; all by default. A list, a numpy
                array, or a jax array, which may be traced.
            lengths: how many steps of each sequence are valid, integers ``[batch]``: for parts that
                take it.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.

        Returns:
            The encoded sequence, ``[batch, time, features]``.

        Raises:
            ValueError: If the preprocessed inputs have fewer than two axes, output positions are
                not integers on one axis or known to be out of range, or the positional encoding has
                another length than the inputs.
        """
        name = type(self).__name__
        if decode and output_positions is not None:
            raise _errors.positions_in_stream(name)
        stream: dict[str, Any] = {"decode": decode, "lengths": lengths}
        preprocessed = self.preprocessor(inputs, **select_keywords(self.preprocessor, **stream))
        sequence = _flatten_to_sequence(name, preprocessed)
        length = None
        if output_positions is None:
            length = sequence.shape[1]
        else:
            indices = convert_to_indices(name, output_positions, sequence.shape[1])
            sequence = take_rows(sequence, indices, axis=1)
        if self.positional_encoding is None:
            return sequence
        keywords = select_keywords(self.position_encoder, length=length, like=sequence, **stream)
        positions = self.position_encoder(sequence.shape[0], output_positions, **keywords)
        if positions.shape[1] != sequence.shape[1]:
            raise _errors.mismatched_positions(name, sequence.shape[1], positions.shape[1])
        return self.aggregation(sequence, shard_like(positions, sequence, n_axes=2))


def _flatten_to_sequence(layer: str, inputs: Array) -> Array:
    """Flattens all axes between batch and features to one."""
    if inputs.ndim < 2:
        raise _errors.wrong_rank(layer, "inputs", inputs.shape, "[batch, ..., features]")
    batch, *axes, features = inputs.shape
    return inputs.reshape(batch, math.prod(axes), features)
