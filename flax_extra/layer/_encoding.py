r"""A sequence from raw inputs: preprocessed, flattened, told apart by position.

Source: Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs"
(2021), section 3.2 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flax import linen as nn
from jax import Array
from jaxtyping import Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._constructor import Constructor, check_constructor
from flax_extra.layer._positions import OutputPositions, as_indices, rows


class Encoding(nn.Module):
    r"""Encodes inputs as a sequence: preprocessing, then a positional encoding.

    .. math:: x \in \mathbb{R}^{m \times \dots \times d_x} \rightarrow
        h \in \mathbb{R}^{m \times T \times d}, \quad
        h = \mathrm{aggregate}(\mathrm{flatten}(\mathrm{preprocess}(x)), \mathrm{position}(m))

    With output positions :math:`t \in \mathbb{N}^{T^{\prime}}`, both sides of the aggregation are
    taken at those, and the result is :math:`T^{\prime}` long.

    Its parameters are those of the parts it makes, under ``preprocessor``, ``position_encoder``
    and ``aggregation``. A part made with a name keeps it.

    Args:
        preprocessing: a constructor for a module or function of the inputs.
        positional_encoding: a constructor for a positional encoding, which is called with the
            batch size and the output positions, such as
            :class:`~flax_extra.layer.TrainablePositionalEncoding` or
            :class:`~flax_extra.layer.FourierPositionEncoding`; none where None.
        aggregation: an operation on sequence and positional encoding, such as
            ``cb.concatenate()`` or ``cb.add()``.

    Raises:
        ValueError: where a constructor is none, above all where it is a module.

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
    """

    preprocessing: Constructor = cb.identity
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
        self, inputs: Shaped[Array, "batch ..."], output_positions: OutputPositions | None = None
    ) -> Shaped[Array, "batch time features"]:
        """The inputs as an encoded sequence.

        Args:
            inputs: what is preprocessed to ``[batch, ..., features]``; the axes between are
                flattened, row by row, to one of time.
            output_positions: the positions that are encoded, ``[time]``; all where None. A list, a
                numpy array, or a jax array, which may be traced.

        Returns:
            The encoded sequence, ``[batch, time, features]``.

        Raises:
            ValueError: where preprocessed inputs have fewer than two axes, output positions are no
                integers on one axis or known to be out of range, or the positional encoding is not
                as long as the inputs.
        """
        name = type(self).__name__
        sequence = _flattened(name, self.preprocessor(inputs))
        if output_positions is not None:
            seqlen = sequence.shape[1]
            sequence = rows(sequence, as_indices(name, output_positions, seqlen), axis=1)
        if self.positional_encoding is None:
            return sequence
        positions = self.position_encoder(sequence.shape[0], output_positions)
        if positions.shape[1] != sequence.shape[1]:
            raise _errors.mismatched_positions(name, sequence.shape[1], positions.shape[1])
        return self.aggregation(sequence, positions)


def _flattened(layer: str, inputs: Array) -> Array:
    """All axes between batch and features as one."""
    if inputs.ndim < 2:
        raise _errors.wrong_rank(layer, "inputs", inputs.shape, "[batch, ..., features]")
    batch, *axes, features = inputs.shape
    return inputs.reshape(batch, math.prod(axes), features)
