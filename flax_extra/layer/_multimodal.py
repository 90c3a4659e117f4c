r"""Several modalities as one sequence, and back.

Source: Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs"
(2021), section 4.3 and appendix A.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import Array
from jaxtyping import Float, Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._constructor import Constructor, check_constructor
from flax_extra.layer._positional import TrainablePositionalMasking, TrainablePositionalPadding
from flax_extra.layer._positions import OutputPositions, is_traced

MultimodalPositions: TypeAlias = Sequence[OutputPositions | None]
"""For each modality its output positions; None for all of them."""


class MultimodalEncoding(nn.Module):
    r"""Encodes several modalities as one sequence.

    Each modality is encoded, padded with a learned vector to the same features, masked at its rate,
    and put after those before it:

    .. math:: x_i \in \mathbb{R}^{m \times \dots} \rightarrow
        h \in \mathbb{R}^{m \times (T_1 + \dots + T_n) \times d}, \; [T_1 \dots T_n], \quad
        h = [\mathrm{mask}_i(\mathrm{pad}_i(\mathrm{encode}_i(x_i)))]_{i=1}^{n}, \quad
        d = \max_i d_i + d_{reserved}

    A single modality is not padded.

    The parameters of modality i are under ``encoder_i``, ``padding_i`` and ``masking_i``, counted
    from 0. An encoding made with a name keeps it.

    Args:
        modalities: for each modality a constructor for its encoding, such as
            :class:`~flax_extra.layer.Encoding`.
        mask_rates: for each modality the probability of each of its positions being masked; None
            for one that never is, and has no vector to learn for it.
        d_reserved: how many features are added to those of the widest modality, so that in each of
            them there is room for a vector that tells it apart.
        rng_collection: the rng stream that masked positions are drawn from.
        dtype: of the result; what the modalities and parameters promote to where it is None.
        param_dtype: of the vectors for padding and masking.

    Raises:
        ValueError: where there are no modalities, ``mask_rates`` are of another number or not from
            0 to 1, ``d_reserved`` is below 0, or a constructor is none.

    Shapes:
        ``xn.MultimodalEncoding([partial(xn.Encoding, partial(nn.Dense, 16)),
        partial(xn.Encoding, partial(nn.Dense, 8))])``: ``list(f32[b, t, 4], f32[b, s, 2]) ->
        f32[b, t + s, 17], list(t, s)``

    Example:
        >>> import functools, jax
        >>> from flax import linen as nn
        >>> from flax_extra.layer import Encoding, MultimodalEncoding
        >>> encoding = MultimodalEncoding(
        ...     [
        ...         Encoding,
        ...         functools.partial(Encoding, preprocessing=functools.partial(nn.Embed, 10, 3)),
        ...     ],
        ...     mask_rates=[None, 1.0],
        ... )
        >>> image, label = jax.numpy.ones((2, 4, 4, 6)), jax.numpy.zeros((2, 1), int)
        >>> variables = encoding.init(jax.random.key(0), [image, label])
        >>> sequence, lengths = encoding.apply(variables, [image, label])
        >>> sequence.shape, lengths
        ((2, 17, 7), [16, 1])
        >>> sorted(variables["params"])
        ['encoder_1', 'masking_1', 'padding_0', 'padding_1']
    """

    modalities: Sequence[Constructor]
    mask_rates: Sequence[float | None] | None = None
    d_reserved: int = 1
    rng_collection: str = "masking"
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        _check_modalities(self)
        _check_reserved(self)
        if self.mask_rates is not None:
            self.mask_rates = tuple(self.mask_rates)
            _check_number(self, "mask_rates", self.mask_rates)
            for rate in self.mask_rates:
                if rate is not None and not 0 <= rate <= 1:
                    raise _errors.not_a_probability(type(self).__name__, "mask_rates", rate)
        super().__post_init__()

    @property
    def n_modalities(self) -> int:
        """The number of modalities."""
        return len(self.modalities)

    def setup(self) -> None:
        self.encoder = [construct() for construct in self.modalities]

    @nn.compact
    def __call__(
        self,
        multimodal_inputs: Sequence[Shaped[Array, "batch ..."]],
        multimodal_output_positions: MultimodalPositions | None = None,
    ) -> tuple[Float[Array, "batch time features"], list[int]]:
        """The inputs of all modalities as one sequence.

        Args:
            multimodal_inputs: a list with the inputs of each modality.
            multimodal_output_positions: a list with the positions of each modality that are
                encoded, ``[time]``; None, for one or instead of the list, for all positions.

        Returns:
            The sequence, ``[batch, time, features]``, and a list with the length of each modality
            in it.

        Raises:
            ValueError: where a list is none or has not one item for each modality, or an encoding
                does not give ``[batch, time, features]``.
        """
        _check_number(self, "multimodal_inputs", multimodal_inputs)
        positions = _each_positions(self, multimodal_output_positions)
        encoded = [
            encode(inputs, at)
            for encode, inputs, at in zip(self.encoder, multimodal_inputs, positions, strict=True)
        ]
        sequences = _padded(self, encoded)
        for index, rate in enumerate(self.mask_rates or ()):
            if rate is not None:
                sequences[index] = TrainablePositionalMasking(
                    rate,
                    rng_collection=self.rng_collection,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=f"masking_{index}",
                )(sequences[index])
        return _joined(self, sequences)


class MultimodalPositionalEncoding(nn.Module):
    r"""Positional encodings of several modalities as one sequence: queries for all of them.

    Each is padded with a learned vector to the same features and put after those before it:

    .. math:: m \in \mathbb{N} \rightarrow
        h \in \mathbb{R}^{m \times (T_1 + \dots + T_n) \times d}, \; [T_1 \dots T_n], \quad
        h = [\mathrm{pad}_i(\mathrm{position}_i(m))]_{i=1}^{n}, \quad
        d = \max_i d_i + d_{reserved}

    A single modality is not padded.

    The parameters of modality i are under ``position_encoder_i`` and ``padding_i``, counted from 0.
    An encoding made with a name keeps it.

    Args:
        modalities: for each modality a constructor for its positional encoding, such as
            :class:`~flax_extra.layer.TrainablePositionalEncoding` or
            :class:`~flax_extra.layer.FourierPositionEncoding`.
        d_reserved: how many features are added to those of the widest modality.
        dtype: of the result; what the modalities and parameters promote to where it is None.
        param_dtype: of the vectors for padding.

    Raises:
        ValueError: where there are no modalities, ``d_reserved`` is below 0, or a constructor is
            none.

    Shapes:
        ``xn.MultimodalPositionalEncoding([partial(xn.TrainablePositionalEncoding, 20, 8),
        partial(xn.TrainablePositionalEncoding, 1, 16)])``: ``b -> f32[b, 21, 17], list(20, 1)``

    Example:
        >>> import functools, jax
        >>> from flax_extra.layer import (
        ...     FourierPositionEncoding, MultimodalPositionalEncoding, TrainablePositionalEncoding
        ... )
        >>> queries = MultimodalPositionalEncoding([
        ...     functools.partial(FourierPositionEncoding, (4, 4), n_bands=2),
        ...     functools.partial(TrainablePositionalEncoding, seqlen=1, dimension=8),
        ... ])
        >>> variables = queries.init(jax.random.key(0), 2)
        >>> sequence, lengths = queries.apply(variables, 2, [[0, 5, 10], None])
        >>> sequence.shape, lengths
        ((2, 4, 11), [3, 1])
        >>> sorted(variables["params"])
        ['padding_0', 'padding_1', 'position_encoder_1']
    """

    modalities: Sequence[Constructor]
    d_reserved: int = 1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        _check_modalities(self)
        _check_reserved(self)
        super().__post_init__()

    @property
    def n_modalities(self) -> int:
        """The number of modalities."""
        return len(self.modalities)

    def setup(self) -> None:
        self.position_encoder = [construct() for construct in self.modalities]

    @nn.compact
    def __call__(
        self, batch_size: int, multimodal_output_positions: MultimodalPositions | None = None
    ) -> tuple[Float[Array, "batch time features"], list[int]]:
        """The positional encodings of all modalities as one sequence.

        Args:
            batch_size: how many times they are given.
            multimodal_output_positions: a list with the positions of each modality that are
                encoded, ``[time]``; None, for one or instead of the list, for all positions.

        Returns:
            The sequence, ``[batch, time, features]``, and a list with the length of each modality
            in it.

        Raises:
            ValueError: where the list of positions is none or has not one item for each modality,
                or an encoding does not give ``[batch, time, features]``.
        """
        positions = _each_positions(self, multimodal_output_positions)
        encoded = [
            encode(batch_size, at)
            for encode, at in zip(self.position_encoder, positions, strict=True)
        ]
        return _joined(self, _padded(self, encoded))


class MultimodalDecoding(nn.Module):
    r"""Splits a sequence of several modalities, and decodes each of them.

    .. math:: y \in \mathbb{R}^{m \times (T_1 + \dots + T_n) \times d}, \; [T_1 \dots T_n]
        \rightarrow o_i \in \mathbb{R}^{m \times \dots}, \quad
        o_i = \mathrm{decode}_i(\mathrm{split}(\mathrm{decode}(y))_i)

    Its parameters are under ``embedding_decoder`` and, for modality i, ``decoder_i``, counted from
    0. A decoding made with a name keeps it.

    Args:
        modalities: for each modality a constructor for its decoding, such as
            :class:`~flax_extra.layer.Decoding`.
        multimodal_embedding_decoding: a constructor for a decoder that all modalities share, such
            as :class:`~flax_extra.layer.EmbedDecoding` or ``nn.Dense``.

    Raises:
        ValueError: where there are no modalities, or a constructor is none.

    Shapes:
        ``xn.MultimodalDecoding([partial(xn.Decoding, partial(nn.Dense, 3)),
        partial(xn.Decoding, partial(nn.Dense, 10))])``: ``f32[b, 21, 16], list(20, 1) ->
        list(f32[b, 20, 3], f32[b, 1, 10])``

    Example:
        >>> import functools, jax
        >>> from flax import linen as nn
        >>> from flax_extra.layer import Decoding, MultimodalDecoding
        >>> decoding = MultimodalDecoding([
        ...     lambda: Decoding(postprocessing=lambda: lambda image: image.reshape(-1, 4, 4, 8)),
        ...     lambda: Decoding(embedding_decoding=functools.partial(nn.Dense, 10)),
        ... ])
        >>> outputs = jax.numpy.ones((2, 17, 8))
        >>> decoded, variables = decoding.init_with_output(jax.random.key(0), outputs, [16, 1])
        >>> [modality.shape for modality in decoded]
        [(2, 4, 4, 8), (2, 1, 10)]
        >>> jax.tree.map(jax.numpy.shape, variables["params"])
        {'decoder_1': {'embedding_decoder': {'bias': (10,), 'kernel': (8, 10)}}}
    """

    modalities: Sequence[Constructor]
    multimodal_embedding_decoding: Constructor = cb.identity

    def __post_init__(self) -> None:
        _check_modalities(self)
        check_constructor(
            type(self).__name__, "multimodal_embedding_decoding", self.multimodal_embedding_decoding
        )
        super().__post_init__()

    @property
    def n_modalities(self) -> int:
        """The number of modalities."""
        return len(self.modalities)

    def setup(self) -> None:
        self.embedding_decoder = self.multimodal_embedding_decoding()
        self.decoder = [construct() for construct in self.modalities]

    def __call__(
        self, outputs: Float[Array, "batch time features"], seqlen_outputs: Sequence[int]
    ) -> Shaped[Array, "batch ..."] | list[Shaped[Array, "batch ..."]]:
        """The decoded outputs of each modality.

        Args:
            outputs: the model's outputs, ``[batch, time, features]``.
            seqlen_outputs: a list with the length of each modality in them, Python numbers.

        Returns:
            The decoded outputs of a single modality; a list of them of several.

        Raises:
            ValueError: where lengths are not one for each modality, do not sum to the length of
                the outputs, are below 0 or traced.
        """
        parts = self._split(self.embedding_decoder(outputs), seqlen_outputs)
        decoded = [decode(part) for decode, part in zip(self.decoder, parts, strict=True)]
        return decoded if self.n_modalities > 1 else decoded[0]

    @nn.nowrap
    def _split(self, outputs: Array, lengths: Sequence[int]) -> list[Array]:
        name = type(self).__name__
        _check_number(self, "seqlen_outputs", lengths)
        if any(map(is_traced, lengths)):
            raise _errors.traced_number(name, "seqlen_outputs")
        ends = list(itertools.accumulate(lengths))
        if ends[-1] != outputs.shape[1]:
            raise _errors.wrong_total(name, lengths, ends[-1], outputs.shape[1])
        for length in lengths:
            if length < 0:
                raise _errors.too_small(name, "lengths in seqlen_outputs", 0, length)
        starts = [0, *ends[:-1]]
        return [
            jax.lax.slice_in_dim(outputs, start, end, axis=1)
            for start, end in zip(starts, ends, strict=True)
        ]


Encoder: TypeAlias = MultimodalEncoding | MultimodalPositionalEncoding


def _check_modalities(layer: Encoder | MultimodalDecoding) -> None:
    """A tuple of constructors, so that the layer can be hashed."""
    name = type(layer).__name__
    if callable(layer.modalities):
        raise _errors.not_a_list(name, "modalities", type(layer.modalities).__name__)
    layer.modalities = tuple(layer.modalities)
    if not layer.modalities:
        raise _errors.no_modalities(name)
    for index, construct in enumerate(layer.modalities):
        check_constructor(name, f"modalities[{index}]", construct)


def _check_reserved(layer: Encoder) -> None:
    if layer.d_reserved < 0:
        raise _errors.too_small(type(layer).__name__, "d_reserved", 0, layer.d_reserved)


def _check_number(layer: Encoder | MultimodalDecoding, name: str, items: Sequence[Any]) -> None:
    if not isinstance(items, Sequence):
        raise _errors.not_a_list(type(layer).__name__, name, type(items).__name__)
    if len(items) != layer.n_modalities:
        raise _errors.wrong_number(type(layer).__name__, name, len(items), layer.n_modalities)


def _each_positions(layer: Encoder, positions: MultimodalPositions | None) -> MultimodalPositions:
    if positions is None:
        return [None] * layer.n_modalities
    _check_number(layer, "multimodal_output_positions", positions)
    return positions


def _padded(layer: Encoder, encoded: Sequence[Array]) -> list[Array]:
    """The sequences, with the same features where there are several. For a compact method."""
    for index, sequence in enumerate(encoded):
        if sequence.ndim != 3:
            raise _errors.wrong_rank(
                type(layer).__name__,
                f"the encoding of modality {index}",
                sequence.shape,
                "[batch, time, features]",
            )
    if layer.n_modalities == 1:
        return list(encoded)
    d_max = max(sequence.shape[-1] for sequence in encoded) + layer.d_reserved
    return [
        TrainablePositionalPadding(
            d_max, dtype=layer.dtype, param_dtype=layer.param_dtype, name=f"padding_{index}"
        )(sequence)
        for index, sequence in enumerate(encoded)
    ]


def _joined(layer: Encoder, sequences: Sequence[Array]) -> tuple[Array, list[int]]:
    join = cb.concatenate(axis=1, n_in=layer.n_modalities)
    joined: Array = join(*promote_dtype(*sequences, dtype=layer.dtype))
    return joined, [sequence.shape[1] for sequence in sequences]
