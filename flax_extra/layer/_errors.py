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


def _shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"
