r"""Encodes several modalities as one sequence, and decodes each of them from it.

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
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Float, Shaped

from flax_extra.layer import _errors
from flax_extra.layer._constructor import (
    Constructor,
    check_constructor,
    make_identity,
    select_keywords,
)
from flax_extra.layer._initializers import TRUNCATED_NORMAL
from flax_extra.layer._positional import TrainablePositionalMasking, TrainablePositionalPadding
from flax_extra.layer._positions import OutputPositions, is_traced
from flax_extra.layer._sharding import shard_like

MultimodalPositions: TypeAlias = Sequence[OutputPositions | None]
"""For each modality its output positions, or None for all its positions."""


class MultimodalEncoding(nn.Module):
    r"""Encodes several modalities as one sequence.

    Each modality is encoded, padded with a learned vector to a common number of features, and
    masked at its rate. Then the modalities are concatenated along time:

    .. math:: x_i \in \mathbb{R}^{m \times \dots} \rightarrow
        h \in \mathbb{R}^{m \times (T_1 + \dots + T_n) \times d}, \; [T_1 \dots T_n], \quad
        h = [\mathrm{mask}_i(\mathrm{pad}_i(\mathrm{encode}_i(x_i)))]_{i=1}^{n}, \quad
        d = \max_i d_i + d_{reserved}

    A single modality is not padded.

    The parameters of modality i, counted from 0, are in the sub-layers ``encoder_i``, ``padding_i``
    and ``masking_i``. An encoding that is made with a name keeps it.

    Args:
        modalities: for each modality a constructor of its encoding, such as
            :class:`~flax_extra.layer.Encoding`.
        mask_rates: for each modality the probability that a position is masked. A modality with
            the rate None is never masked, and learns no vector for it.
        d_reserved: the number of features that are added to those of the widest modality. So every
            modality is padded, with a vector that distinguishes it from the others.
        rng_collection: the rng stream from which masked positions are drawn.
        dtype: of the result; the dtype to which modalities and parameters promote by default.
        param_dtype: of the vectors for padding and masking.
        padding_init: initializer of the vectors for padding; by default a normal distribution of
            sigma 0.02, cut at two sigma.
        masking_init: initializer of the vectors for masking, with the same default.

    Raises:
        ValueError: If there are no modalities, ``mask_rates`` has not one item for each modality or
            holds a rate that is not from 0 to 1, ``d_reserved`` is below 0, or a modality is not a
            constructor.

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
    padding_init: Initializer = TRUNCATED_NORMAL
    masking_init: Initializer = TRUNCATED_NORMAL

    def __post_init__(self) -> None:
        _check_modalities(self)
        _check_reserved(self)
        if self.mask_rates is not None:
            self.mask_rates = tuple(self.mask_rates)
            _check_one_per_modality(self, "mask_rates", self.mask_rates)
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
        *,
        decode: bool = False,
    ) -> tuple[Float[Array, "batch time features"], list[int]]:
        """Encodes the inputs of all modalities as one sequence.

        Args:
            multimodal_inputs: a list with the inputs of each modality.
            multimodal_output_positions: a list with the positions to encode of each modality,
                ``[time]``, or None for all its positions. None instead of the list stands for all
                positions of all modalities.
            decode: only False is supported: in a stream, one modality would come after another in
                each block.

        Returns:
            The sequence, ``[batch, time, features]``, and a list with the length of each modality
            in it.

        Raises:
            ValueError: If an argument is not a list with one item for each modality, or an encoding
                does not return ``[batch, time, features]``.
            StreamError: If ``decode`` is true.
        """
        _refuse_stream(self, decode)
        _check_one_per_modality(self, "multimodal_inputs", multimodal_inputs)
        positions = _list_positions(self, multimodal_output_positions)
        encoded = [
            encode(inputs, at)
            for encode, inputs, at in zip(self.encoder, multimodal_inputs, positions, strict=True)
        ]
        sequences = _pad_features(self, encoded)
        for index, rate in enumerate(self.mask_rates or ()):
            if rate is not None:
                sequences[index] = TrainablePositionalMasking(
                    rate,
                    kernel_init=self.masking_init,
                    rng_collection=self.rng_collection,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=f"masking_{index}",
                )(sequences[index])
        return _concatenate_time(self, sequences)


class MultimodalPositionalEncoding(nn.Module):
    r"""Encodes the positions of several modalities as one sequence, for queries to all of them.

    Each positional encoding is padded with a learned vector to a common number of features. Then
    they are concatenated along time:

    .. math:: m \in \mathbb{N} \rightarrow
        h \in \mathbb{R}^{m \times (T_1 + \dots + T_n) \times d}, \; [T_1 \dots T_n], \quad
        h = [\mathrm{pad}_i(\mathrm{position}_i(m))]_{i=1}^{n}, \quad
        d = \max_i d_i + d_{reserved}

    A single modality is not padded.

    The parameters of modality i, counted from 0, are in the sub-layers ``position_encoder_i`` and
    ``padding_i``. An encoding that is made with a name keeps it.

    Args:
        modalities: for each modality a constructor of its positional encoding, such as
            :class:`~flax_extra.layer.TrainablePositionalEncoding` or
            :class:`~flax_extra.layer.FourierPositionEncoding`.
        d_reserved: the number of features that are added to those of the widest modality.
        dtype: of the result; the dtype to which modalities and parameters promote by default.
        param_dtype: of the vectors for padding.
        padding_init: initializer of the vectors for padding; by default a normal distribution of
            sigma 0.02, cut at two sigma.

    Raises:
        ValueError: If there are no modalities, ``d_reserved`` is below 0, or a modality is not a
            constructor.

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
    padding_init: Initializer = TRUNCATED_NORMAL

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
        self,
        batch_size: int,
        multimodal_output_positions: MultimodalPositions | None = None,
        *,
        like: Shaped[Array, "batch ..."] | None = None,
        decode: bool = False,
    ) -> tuple[Float[Array, "batch time features"], list[int]]:
        """Encodes the positions of all modalities as one sequence.

        Args:
            batch_size: the number of examples.
            multimodal_output_positions: a list with the positions to encode of each modality,
                ``[time]``, or None for all its positions. None instead of the list stands for all
                positions of all modalities.
            like: an array of the batch, ``[batch, ...]``. On a mesh with explicit axes, and inside
                ``jax.shard_map``, the result is sharded along the batch as this array is.
            decode: only False is supported: in a stream, one modality would come after another in
                each block.

        Returns:
            The sequence, ``[batch, time, features]``, and a list with the length of each modality
            in it.

        Raises:
            ValueError: If the output positions are not a list with one item for each modality, or
                an encoding does not return ``[batch, time, features]``.
            StreamError: If ``decode`` is true.
        """
        _refuse_stream(self, decode)
        positions = _list_positions(self, multimodal_output_positions)
        encoded = [
            encode(batch_size, at, **select_keywords(encode, like=like))
            for encode, at in zip(self.position_encoder, positions, strict=True)
        ]
        if like is not None:
            encoded = [shard_like(sequence, like, n_axes=1) for sequence in encoded]
        return _concatenate_time(self, _pad_features(self, encoded))


class MultimodalDecoding(nn.Module):
    r"""Splits a sequence into its modalities, and decodes each of them.

    .. math:: y \in \mathbb{R}^{m \times (T_1 + \dots + T_n) \times d}, \; [T_1 \dots T_n]
        \rightarrow o_i \in \mathbb{R}^{m \times \dots}, \quad
        o_i = \mathrm{decode}_i(\mathrm{split}(\mathrm{decode}(y))_i)

    The parameters are in the sub-layers ``embedding_decoder`` and, for modality i, counted from 0,
    ``decoder_i``. A decoding that is made with a name keeps it.

    Args:
        modalities: for each modality a constructor of its decoding, such as
            :class:`~flax_extra.layer.Decoding`.
        multimodal_embedding_decoding: a constructor of a decoder that all modalities share, such as
            :class:`~flax_extra.layer.EmbedDecoding` or ``nn.Dense``. It decodes the whole sequence,
            before the split.

    Raises:
        ValueError: If there are no modalities, or an argument that should be a constructor is not,
            for instance a module.

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
    multimodal_embedding_decoding: Constructor = make_identity

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
        self,
        outputs: Float[Array, "batch time features"],
        seqlen_outputs: Sequence[int],
        *,
        decode: bool = False,
    ) -> Shaped[Array, "batch ..."] | list[Shaped[Array, "batch ..."]]:
        """Decodes the outputs of each modality.

        Args:
            outputs: the model's outputs, ``[batch, time, features]``.
            seqlen_outputs: a list with the length of each modality in the outputs, as Python
                numbers.
            decode: only False is supported: in a stream, one modality would come after another in
                each block.

        Returns:
            The decoded outputs: an array if there is one modality, a list of arrays if there are
            several.

        Raises:
            ValueError: If there is not one length for each modality, the lengths do not sum to the
                length of the outputs, or a length is below 0 or traced.
            StreamError: If ``decode`` is true.
        """
        _refuse_stream(self, decode)
        parts = self._split_time(self.embedding_decoder(outputs), seqlen_outputs)
        decoded = [decode(part) for decode, part in zip(self.decoder, parts, strict=True)]
        return decoded if self.n_modalities > 1 else decoded[0]

    @nn.nowrap
    def _split_time(self, outputs: Array, lengths: Sequence[int]) -> list[Array]:
        """Splits outputs along time into parts of the given lengths."""
        name = type(self).__name__
        _check_one_per_modality(self, "seqlen_outputs", lengths)
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


def _refuse_stream(layer: Encoder | MultimodalDecoding, decode: bool) -> None:
    if decode:
        raise _errors.no_order_in_time(type(layer).__name__)


def _check_modalities(layer: Encoder | MultimodalDecoding) -> None:
    """Checks the constructors, and makes them a tuple, so that the layer can be hashed."""
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


def _check_one_per_modality(
    layer: Encoder | MultimodalDecoding, name: str, items: Sequence[Any]
) -> None:
    if not isinstance(items, Sequence):
        raise _errors.not_a_list(type(layer).__name__, name, type(items).__name__)
    if len(items) != layer.n_modalities:
        raise _errors.wrong_number(type(layer).__name__, name, len(items), layer.n_modalities)


def _list_positions(layer: Encoder, positions: MultimodalPositions | None) -> MultimodalPositions:
    """Lists the output positions of each modality; None means all positions of all modalities."""
    if positions is None:
        return [None] * layer.n_modalities
    _check_one_per_modality(layer, "multimodal_output_positions", positions)
    return positions


def _pad_features(layer: Encoder, encoded: Sequence[Array]) -> list[Array]:
    """Pads the modalities to a common number of features. To be called in a compact method."""
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
            d_max,
            kernel_init=layer.padding_init,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            name=f"padding_{index}",
        )(sequence)
        for index, sequence in enumerate(encoded)
    ]


def _concatenate_time(layer: Encoder, sequences: Sequence[Array]) -> tuple[Array, list[int]]:
    """Concatenates the modalities along time, and lists their lengths."""
    lengths = [sequence.shape[1] for sequence in sequences]
    return jnp.concatenate(promote_dtype(*sequences, dtype=layer.dtype), axis=1), lengths
