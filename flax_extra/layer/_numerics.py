"""Numerics that attention and recurrence share: sums in float32, and arrays inside shard_map."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import Array, lax

Tree = TypeVar("Tree")


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


def match_varying_axes(tree: Tree) -> Tree:
    """Makes all arrays of a pytree vary over the same axes of the mesh, inside ``jax.shard_map``.

    Loops and custom derivatives that mix arrays ask for that: a carry must keep its type, and a
    cotangent must have the type of its primal. Outside of ``jax.shard_map`` this does nothing.
    """
    axes = frozenset[str]().union(*map(get_varying_axes, jax.tree.leaves(tree)))
    matched: Tree = jax.tree.map(lambda x: _vary_over(x, axes - get_varying_axes(x)), tree)
    return matched


def get_varying_axes(x: Array) -> frozenset[str]:
    """Returns the axes of the mesh over which the shards of an array differ."""
    aval: Any = jax.typeof(x)
    # jax 0.8 to 0.9 call this vma; 0.10 moved it.
    return frozenset(getattr(getattr(aval, "mat", None), "varying", getattr(aval, "vma", ())))


def _vary_over(x: Any, axes: frozenset[str]) -> Any:
    if not axes:
        return x
    names = tuple(sorted(axes))
    if hasattr(lax, "pcast"):
        return lax.pcast(x, names, to="varying")
    return lax.pvary(x, names)  # type: ignore[attr-defined, unused-ignore]  # jax 0.8
