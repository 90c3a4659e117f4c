"""Numerics that attention and recurrence share: sums in float32 or better."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import Array


def get_accumulation_dtype(*operands: Array) -> Any:
    """Returns the dtype to sum products of the operands in: the widest, and at least float32."""
    # Under strict promotion JAX would refuse to compare bfloat16 with float32.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, (x.dtype for x in operands), jnp.float32)


def einsum_accumulated(
    subscripts: str, x: Array, y: Array, precision: PrecisionLike = None
) -> Array:
    """Computes an einsum of two arrays that is summed, and returned, in float32 or better."""
    dtype = get_accumulation_dtype(x, y)
    if x.dtype != y.dtype:
        x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=dtype)
