"""Every word that the layers' errors say.

Each function makes one ``ValueError``: which argument, what it was, what was expected. Nothing here
computes; callers hand over the values, so that all wording can be read, and reworded, in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def wrong_rank(layer: str, name: str, shape: Sequence[Any], axes: str) -> ValueError:
    return ValueError(
        f"{layer} takes {name} with axes {axes}; got shape {_shape(shape)}, which has "
        f"{len(shape)} of them."
    )


def too_small(layer: str, name: str, least: int, value: Any) -> ValueError:
    return ValueError(f"{layer} takes {name} of at least {least}; got {value}.")


# Attention.


def indivisible(layer: str, name: str, value: Any, n_heads: int) -> ValueError:
    return ValueError(
        f"{layer} splits {name} among its heads; {name} is {value} and n_heads is {n_heads}, which "
        f"does not divide it. Choose a multiple of {n_heads}."
    )


def mismatched_heads(query: Sequence[Any], key: Sequence[Any], value: Sequence[Any]) -> ValueError:
    return ValueError(
        f"attend takes a query [batch, time_q, heads, d_qk], a key [batch, time_kv, heads, d_qk] "
        f"and a value [batch, time_kv, heads, d_v]; got shapes {_shape(query)}, {_shape(key)} and "
        f"{_shape(value)}, which do not agree."
    )


def wrong_mask_shape(shape: Sequence[Any], logits: Sequence[Any]) -> ValueError:
    batch, _, time_q, time_kv = logits
    return ValueError(
        f"attend takes a mask that broadcasts to [batch, time_q, time_kv], here "
        f"{_shape((batch, time_q, time_kv))}, or to [batch, heads, time_q, time_kv], here "
        f"{_shape(logits)}; got shape {_shape(shape)}. Give a mask of three or four axes, each "
        f"of that size or 1."
    )


def wrong_mask_dtype(dtype: Any) -> ValueError:
    return ValueError(
        f"attend takes a mask of booleans or integers, where what is not zero is attended to; got "
        f"{dtype}. Compare it first, as in mask > 0."
    )


def wrong_padding_masks(mask_q: Sequence[Any], mask_kv: Sequence[Any]) -> ValueError:
    return ValueError(
        f"cross_attention_mask takes padding masks [batch, time_q] and [batch, time_kv]; got "
        f"shapes {_shape(mask_q)} and {_shape(mask_kv)}."
    )


def wrong_rate(layer: str, rate: Any) -> ValueError:
    return ValueError(f"{layer} takes a dropout_rate of at least 0 and below 1; got {rate}.")


def no_dropout_key(rate: float) -> ValueError:
    return ValueError(
        f"attend is to drop weights at rate {rate} and has no key to draw from: dropout_rngkey is "
        f"None. Give a dropout_rngkey, or say deterministic=True."
    )


# Recurrence.


def wrong_lengths(shape: Sequence[Any], dtype: Any, batch: Any) -> ValueError:
    return ValueError(
        f"LSTM takes lengths as integers, one for each sequence, of shape {_shape((batch,))}; got "
        f"{dtype}{_shape(shape)}."
    )


def wrong_state(shapes: Sequence[Sequence[Any]], expected: Sequence[Any]) -> ValueError:
    found = " and ".join(map(_shape, shapes)) or "nothing"
    return ValueError(
        f"LSTM takes an initial_state (c, h), two arrays of shape {_shape(expected)}; got {found}."
    )


def no_state_size(cell: str) -> ValueError:
    return ValueError(
        f"{cell} takes the size of its state from its carry, and here makes a carry of which the "
        f"size is not known. Say {cell}(features=...)."
    )


# Positions.


def wrong_positions(layer: str, dtype: Any, shape: Sequence[Any]) -> ValueError:
    return ValueError(
        f"{layer} takes output positions as integers on one axis, [time]; got {dtype}"
        f"{_shape(shape)}."
    )


def position_out_of_range(layer: str, position: int, seqlen: Any) -> ValueError:
    return ValueError(
        f"{layer} takes output positions from 0 to {seqlen - 1}, in a sequence of length {seqlen}; "
        f"got {position}."
    )


def no_subset(layer: str) -> ValueError:
    return ValueError(
        f"{layer} learns its sequence as a whole and gives no subset of it; got output positions. "
        f"Leave them out, or use FourierPositionEncoding."
    )


def traced_number(layer: str, name: str) -> ValueError:
    return ValueError(
        f"{layer} takes {name} as Python numbers, since they size its result; got a traced array. "
        f"Take them from a shape, or keep them out of what jax.jit traces."
    )


def mismatched_axes(layer: str, name: str, found: int, n_axes: int) -> ValueError:
    return ValueError(
        f"{layer} takes a {name} with one number for each axis of its seqshape; got {found} of "
        f"them for {n_axes} axes."
    )


def wrong_bounds(layer: str, bounds: Sequence[Any]) -> ValueError:
    return ValueError(
        f"{layer} takes spatial_coordinate_bounds as (lower, upper), lower first; got {bounds}."
    )


def too_wide(layer: str, features: int, d_max: int) -> ValueError:
    return ValueError(
        f"{layer} fills features up to d_max; inputs have {features} features and d_max is {d_max}."
    )


def not_a_probability(layer: str, name: str, rate: Any) -> ValueError:
    return ValueError(f"{layer} takes {name} from 0 to 1; got {rate}.")


def no_masking_stream(layer: str, rate: float, stream: str) -> ValueError:
    return ValueError(
        f"{layer} is to mask positions at rate {rate} and has no rng stream {stream!r} to draw "
        f"from. Give one: apply(variables, inputs, rngs={{{stream!r}: key}})."
    )


# Encoding, decoding and modalities.


def not_a_constructor(layer: str, name: str, given: str) -> ValueError:
    return ValueError(
        f"{layer} takes for {name} a constructor, which it calls to make a module of its own; got "
        f"{given}. Give functools.partial(Module, ...) or lambda: Module(...)."
    )


def mismatched_positions(layer: str, inputs: Any, positions: Any) -> ValueError:
    return ValueError(
        f"{layer} aggregates inputs and their positional encoding position by position; the inputs "
        f"have length {inputs} and the positional encoding has length {positions}."
    )


def wrong_embedding(shape: Sequence[Any], features: Any) -> ValueError:
    return ValueError(
        f"EmbedDecoding takes an embedding of shape [n_embeddings, features] for outputs of shape "
        f"[..., features], here {features} features; got an embedding of shape {_shape(shape)}."
    )


def no_embedding(given: str) -> ValueError:
    return ValueError(
        f"EmbedDecoding takes an embedding as an array [n_embeddings, features]; got {given}. Of a "
        f"layer nn.Embed, give its array: EmbedDecoding(embed.embedding)."
    )


def no_modalities(layer: str) -> ValueError:
    return ValueError(f"{layer} takes at least 1 modality; got 0.")


def not_a_list(layer: str, name: str, given: str) -> ValueError:
    return ValueError(
        f"{layer} takes {name} as a list with one item for each modality; got {given}."
    )


def wrong_number(layer: str, name: str, found: int, n_modalities: int) -> ValueError:
    return ValueError(
        f"{layer} takes {name} with one item for each modality; got {found} for {n_modalities} "
        f"{'modality' if n_modalities == 1 else 'modalities'}."
    )


def wrong_total(layer: str, lengths: Sequence[Any], total: Any, seqlen: Any) -> ValueError:
    return ValueError(
        f"{layer} splits its outputs by seqlen_outputs, {_shape(lengths)}, which sum to {total}; "
        f"the outputs have length {seqlen}."
    )


def nothing_to_share(asked: str) -> ValueError:
    return ValueError(
        f"{asked} takes a multimodal_embedding_decoding for several modalities to share; got 1 "
        f"modality. Give it that as its own embedding_decoding."
    )


def _shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"
