"""Constructors of a model's encodings and decodings, for one modality or for several.

A model that makes its encodings and decodings by constructors need not know how many modalities
there are. Each function here returns such a constructor: of the modality's own layer if there is
one modality, of a multimodal layer around them if there are several.

    >>> import functools, jax
    >>> from flax import linen as nn
    >>> from flax_extra.layer import TrainablePositionalEncoding, io
    >>> text = {
    ...     "preprocessing": functools.partial(nn.Embed, 256, 8),
    ...     "positional_encoding": functools.partial(TrainablePositionalEncoding, 5, 4),
    ... }
    >>> encoding = io.input_encoding(text)()
    >>> tokens = jax.numpy.zeros((2, 5), int)
    >>> encoding.init_with_output(jax.random.key(0), tokens)[0].shape
    (2, 5, 12)
    >>> encoding = io.input_encoding(text, {}, d_reserved=4)()
    >>> (sequence, lengths), _ = encoding.init_with_output(
    ...     jax.random.key(0), [tokens, jax.numpy.ones((2, 4, 4, 3))]
    ... )
    >>> sequence.shape, lengths
    ((2, 21, 16), [5, 16])

A modality is a mapping with the fields of its layer, or a constructor. The constructors that are
returned take further fields of the layer that they make, such as ``name`` or ``padding_init``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from flax_extra.layer import _errors
from flax_extra.layer._constructor import Constructor, check_constructor, make_identity
from flax_extra.layer._decoding import Decoding
from flax_extra.layer._encoding import Encoding
from flax_extra.layer._multimodal import (
    MultimodalDecoding,
    MultimodalEncoding,
    MultimodalPositionalEncoding,
)

__all__ = ["input_encoding", "query_encoding", "output_decoding", "target_encoding"]

Modality: TypeAlias = Mapping[str, Any] | Constructor
"""The fields of a modality's layer, or a constructor of any other layer."""


def input_encoding(
    *modalities: Modality,
    mask_rates: Sequence[float | None] | None = None,
    d_reserved: int = 1,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
) -> Constructor:
    """Makes a constructor of the encoding of a model's inputs.

    Args:
        modalities: for each modality the fields of its :class:`~flax_extra.layer.Encoding`, or a
            constructor.
        mask_rates: for each modality the probability that a position is masked. If they are given,
            a single modality is encoded by a :class:`~flax_extra.layer.MultimodalEncoding`, too,
            because that layer does the masking.
        d_reserved: the number of features that are added to those of the widest of several
            modalities.
        dtype: of the encoding of several modalities.
        param_dtype: of the vectors for padding and masking.

    Returns:
        A constructor of the modality's encoding if there is one modality and no mask rate, of a
        :class:`~flax_extra.layer.MultimodalEncoding` otherwise.

    Raises:
        ValueError: If there are no modalities, or one is neither fields nor a constructor.

    Shapes:
        ``io.input_encoding({'preprocessing': partial(nn.Dense, 16)}, {'preprocessing':
        partial(nn.Dense, 8)})()``: ``list(f32[b, t, 4], f32[b, s, 2]) -> f32[b, t + s, 17],
        list(t, s)``

    Example:
        >>> from flax_extra.layer import io
        >>> type(io.input_encoding({})()).__name__, type(io.input_encoding({}, {})()).__name__
        ('Encoding', 'MultimodalEncoding')
    """
    constructors = _make_constructors("input_encoding", Encoding, modalities)
    multimodal = functools.partial(
        MultimodalEncoding,
        constructors,
        mask_rates=mask_rates,
        d_reserved=d_reserved,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return constructors[0] if len(constructors) == 1 and mask_rates is None else multimodal


def target_encoding(
    *modalities: Modality,
    d_reserved: int = 1,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
) -> Constructor:
    """Makes a constructor of the encoding of a model's targets: an input encoding without masking.

    Args:
        modalities: for each modality the fields of its :class:`~flax_extra.layer.Encoding`, or a
            constructor.
        d_reserved: the number of features that are added to those of the widest of several
            modalities.
        dtype: of the encoding of several modalities.
        param_dtype: of the vectors for padding.

    Returns:
        A constructor of the modality's encoding if there is one modality, of a
        :class:`~flax_extra.layer.MultimodalEncoding` if there are several.

    Raises:
        ValueError: If there are no modalities, or one is neither fields nor a constructor.

    Shapes:
        ``io.target_encoding({'preprocessing': partial(nn.Dense, 16)})()``: ``f32[b, t, 4] ->
        f32[b, t, 16]``

    Example:
        >>> import jax
        >>> from flax_extra.layer import io
        >>> encoding = io.target_encoding({})()
        >>> encoding.init_with_output(jax.random.key(0), jax.numpy.ones((2, 4, 4, 3)))[0].shape
        (2, 16, 3)
    """
    return input_encoding(*modalities, d_reserved=d_reserved, dtype=dtype, param_dtype=param_dtype)


def query_encoding(
    *modalities: Constructor,
    d_reserved: int = 1,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
) -> Constructor:
    """Makes a constructor of the queries for a model's outputs, one for each output position.

    Args:
        modalities: for each modality a constructor of its positional encoding, such as
            :class:`~flax_extra.layer.TrainablePositionalEncoding` or
            :class:`~flax_extra.layer.FourierPositionEncoding`.
        d_reserved: the number of features that are added to those of the widest of several
            modalities.
        dtype: of the encoding of several modalities.
        param_dtype: of the vectors for padding.

    Returns:
        The modality's own constructor if there is one modality, a constructor of a
        :class:`~flax_extra.layer.MultimodalPositionalEncoding` if there are several.

    Raises:
        ValueError: If there are no modalities, or one is not a constructor.

    Shapes:
        ``io.query_encoding(partial(xn.TrainablePositionalEncoding, 20, 8))()``: ``b -> f32[b,
        20, 8]``

    Example:
        >>> import functools
        >>> from flax_extra.layer import FourierPositionEncoding, io
        >>> image = functools.partial(FourierPositionEncoding, (4, 4), n_bands=2)
        >>> io.query_encoding(image)()(batch_size=2).shape
        (2, 16, 10)
    """
    constructors = _make_constructors("query_encoding", None, modalities)
    multimodal = functools.partial(
        MultimodalPositionalEncoding,
        constructors,
        d_reserved=d_reserved,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return constructors[0] if len(constructors) == 1 else multimodal


def output_decoding(
    *modalities: Modality, multimodal_embedding_decoding: Constructor = make_identity
) -> Constructor:
    """Makes a constructor of the decoding of a model's outputs.

    Args:
        modalities: for each modality the fields of its :class:`~flax_extra.layer.Decoding`, or a
            constructor.
        multimodal_embedding_decoding: a constructor of a decoder that several modalities share. A
            single modality has its own ``embedding_decoding`` instead.

    Returns:
        A constructor of the modality's decoding if there is one modality, of a
        :class:`~flax_extra.layer.MultimodalDecoding` if there are several.

    Raises:
        ValueError: If there are no modalities, one is neither fields nor a constructor, or there is
            a shared decoder for a single modality.

    Shapes:
        ``io.output_decoding({'embedding_decoding': partial(nn.Dense, 3)},
        {'embedding_decoding': partial(nn.Dense, 10)})()``: ``f32[b, 21, 16], list(20, 1) ->
        list(f32[b, 20, 3], f32[b, 1, 10])``

    Example:
        >>> import functools, jax
        >>> from flax import linen as nn
        >>> from flax_extra.layer import io
        >>> label = {"embedding_decoding": functools.partial(nn.Dense, 10)}
        >>> decoding, outputs = io.output_decoding({}, label)(), jax.numpy.ones((2, 17, 8))
        >>> decoded, _ = decoding.init_with_output(jax.random.key(0), outputs, [16, 1])
        >>> [modality.shape for modality in decoded]
        [(2, 16, 8), (2, 1, 10)]
    """
    constructors = _make_constructors("output_decoding", Decoding, modalities)
    if len(constructors) > 1:
        return functools.partial(MultimodalDecoding, constructors, multimodal_embedding_decoding)
    if multimodal_embedding_decoding is not make_identity:
        raise _errors.nothing_to_share("output_decoding")
    return constructors[0]


def _make_constructors(
    asked: str, layer: Callable[..., nn.Module] | None, modalities: Sequence[Modality]
) -> list[Constructor]:
    if not modalities:
        raise _errors.no_modalities(asked)
    constructors: list[Constructor] = []
    for index, modality in enumerate(modalities):
        construct: Any = modality
        if layer is not None and isinstance(modality, Mapping):
            construct = functools.partial(layer, **modality)
        check_constructor(asked, f"modalities[{index}]", construct)
        constructors.append(construct)
    return constructors
