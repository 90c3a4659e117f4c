"""What goes into a model and comes out of it, for one modality or for several.

A model that takes constructors for its ends need not know how many modalities there are. Each
function here gives such a constructor: for one modality that of its own layer, for several that of
the multimodal layer around them.

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

A modality is a mapping with the fields of its layer, or a constructor. What is built takes further
fields when it is called, such as ``name`` or ``dtype`` where the layer has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._constructor import Constructor, check_constructor
from flax_extra.layer._decoding import Decoding
from flax_extra.layer._encoding import Encoding
from flax_extra.layer._multimodal import (
    MultimodalDecoding,
    MultimodalEncoding,
    MultimodalPositionalEncoding,
)

__all__ = ["input_encoding", "query_encoding", "output_decoding", "target_encoding"]

Modality: TypeAlias = Mapping[str, Any] | Constructor
"""The fields of a modality's layer, or a constructor for a layer of one's own."""


def input_encoding(
    *modalities: Modality,
    mask_rates: Sequence[float | None] | None = None,
    d_reserved: int = 1,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
) -> Constructor:
    """A constructor for the encoding of a model's inputs.

    Args:
        modalities: for each the fields of its :class:`~flax_extra.layer.Encoding`, or a
            constructor.
        mask_rates: for each modality the probability of its positions being masked. Where they are
            given, the encoding of one modality too is multimodal, as it is that which masks.
        d_reserved: the features added to those of the widest of several modalities.
        dtype: of what is learned for padding and masking, and of the joined sequence.
        param_dtype: of the parameters for padding and masking.

    Returns:
        A constructor: of the modality's encoding for one, of a
        :class:`~flax_extra.layer.MultimodalEncoding` for several.

    Raises:
        ValueError: where there are no modalities, or one is neither fields nor a constructor; when
            it is called, as the layers say.

    Shapes:
        ``io.input_encoding({'preprocessing': partial(nn.Dense, 16)}, {'preprocessing':
        partial(nn.Dense, 8)})()``: ``list(f32[b, t, 4], f32[b, s, 2]) -> f32[b, t + s, 17],
        list(t, s)``

    Example:
        >>> from flax_extra.layer import io
        >>> type(io.input_encoding({})()).__name__, type(io.input_encoding({}, {})()).__name__
        ('Encoding', 'MultimodalEncoding')
    """
    constructors = _constructors("input_encoding", Encoding, modalities)
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
    """A constructor for the encoding of a model's targets: that of inputs, none of them masked.

    Args:
        modalities: for each the fields of its :class:`~flax_extra.layer.Encoding`, or a
            constructor.
        d_reserved: the features added to those of the widest of several modalities.
        dtype: of what is learned for padding, and of the joined sequence.
        param_dtype: of the parameters for padding.

    Returns:
        A constructor: of the modality's encoding for one, of a
        :class:`~flax_extra.layer.MultimodalEncoding` for several.

    Raises:
        ValueError: where there are no modalities, or one is neither fields nor a constructor; when
            it is called, as the layers say.

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
    """A constructor for the queries that ask a model for its outputs, position by position.

    Args:
        modalities: for each a constructor for its positional encoding, such as
            :class:`~flax_extra.layer.TrainablePositionalEncoding` or
            :class:`~flax_extra.layer.FourierPositionEncoding`.
        d_reserved: the features added to those of the widest of several modalities.
        dtype: of what is learned for padding, and of the joined sequence.
        param_dtype: of the parameters for padding.

    Returns:
        A constructor: the modality's own for one, of a
        :class:`~flax_extra.layer.MultimodalPositionalEncoding` for several.

    Raises:
        ValueError: where there are no modalities, or one is no constructor; when it is called, as
            the layers say.

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
    constructors = _constructors("query_encoding", None, modalities)
    multimodal = functools.partial(
        MultimodalPositionalEncoding,
        constructors,
        d_reserved=d_reserved,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return constructors[0] if len(constructors) == 1 else multimodal


def output_decoding(
    *modalities: Modality, multimodal_embedding_decoding: Constructor = cb.identity
) -> Constructor:
    """A constructor for the decoding of a model's outputs.

    Args:
        modalities: for each the fields of its :class:`~flax_extra.layer.Decoding`, or a
            constructor.
        multimodal_embedding_decoding: a constructor for a decoder that several modalities share;
            one modality has its own ``embedding_decoding``.

    Returns:
        A constructor: of the modality's decoding for one, of a
        :class:`~flax_extra.layer.MultimodalDecoding` for several.

    Raises:
        ValueError: where there are no modalities, one is neither fields nor a constructor, or a
            single one is given a decoder to share; when it is called, as the layers say.

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
    constructors = _constructors("output_decoding", Decoding, modalities)
    if len(constructors) > 1:
        return functools.partial(MultimodalDecoding, constructors, multimodal_embedding_decoding)
    if multimodal_embedding_decoding is not cb.identity:
        raise _errors.nothing_to_share("output_decoding")
    return constructors[0]


def _constructors(
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
