"""Padded batches: what padding holds has no effect."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def zero_padding(inputs: Array, valid: Array | None) -> Array:
    """Replaces padding, which may hold anything, NaN included, by zeros.

    Args:
        inputs: ``[batch, time, ...]``.
        valid: False at padding, ``[batch, time]``; None if there is none.
    """
    if valid is None:
        return inputs
    n_feature_axes = inputs.ndim - valid.ndim
    return jnp.where(jnp.expand_dims(valid, range(-n_feature_axes, 0)), inputs, 0)
