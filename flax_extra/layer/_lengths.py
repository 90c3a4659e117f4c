"""Padded batches: which steps of each sequence are valid, and what padding holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Integer

from flax_extra.layer import _errors


def mark_valid_steps(
    layer: str, inputs: Array, lengths: Integer[Array, " batch"] | None
) -> Bool[Array, "batch time"] | None:
    """Marks the steps of each sequence that come before its length; None if all are valid.

    Raises:
        ValueError: If lengths are not integers ``[batch]``, or are known to be out of range.
    """
    if lengths is None:
        return None
    batch, time = inputs.shape[:2]
    known = np.asarray(lengths) if _is_known(lengths) else None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise _errors.wrong_lengths(layer, lengths.shape, lengths.dtype, batch)
    if known is not None and isinstance(time, int):
        is_inside = (known >= 0) & (known <= time)
        if not is_inside.all():
            raise _errors.length_out_of_range(layer, known[~is_inside][0], time)
    return jnp.arange(time)[None, :] < lengths[:, None]


def zero_padding(inputs: Array, valid: Array | None) -> Array:
    """Replaces padding, which may hold anything, NaN included, by zeros."""
    if valid is None:
        return inputs
    n_feature_axes = inputs.ndim - valid.ndim
    return jnp.where(jnp.expand_dims(valid, range(-n_feature_axes, 0)), inputs, 0)


def _is_known(lengths: Any) -> bool:
    """Tells whether the values can be read: they are not traced, and all lie on this host."""
    return not any(
        isinstance(leaf, jax.core.Tracer)
        or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
        for leaf in jax.tree.leaves(lengths)
    )
