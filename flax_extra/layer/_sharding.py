"""Lays out parameters on a mesh as the data that they join.

On an Auto mesh XLA decides where arrays lie. On an Explicit mesh the sharding is part of an array's
type, and inside ``jax.shard_map`` so are the mesh axes that it varies over. There a parameter that
is broadcast and joined with data (in a concatenation, a choice, the carry of a loop) needs the type
of the data. Elsewhere these functions change nothing.

The backward pass of a broadcast that is sharded from the start is a sum on each device and an
all-reduce. If it is sharded afterwards, its cotangent is first gathered on every device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec


def broadcast_like(array: Array, shape: tuple[int, ...], like: Array, n_axes: int) -> Array:
    """Broadcasts an array to a shape whose first ``n_axes`` axes are those of ``like``.

    The result is sharded as ``like`` is along these axes, and varies over the same mesh axes.
    """
    sharding = jax.typeof(like).sharding
    spec = PartitionSpec(*sharding.spec[:n_axes])  # type: ignore[no-untyped-call]
    is_sharded = any(axis is not None for axis in spec)
    out_sharding = NamedSharding(sharding.mesh, spec) if is_sharded else None
    return _vary_like(jnp.broadcast_to(array, shape, out_sharding=out_sharding), like)


def shard_like(array: Array, like: Array, n_axes: int) -> Array:
    """Shards the first ``n_axes`` axes of an array as those of ``like`` are."""
    found, expected = jax.typeof(array).sharding, jax.typeof(like).sharding
    spec = PartitionSpec(  # type: ignore[no-untyped-call]
        *expected.spec[:n_axes], *found.spec[n_axes:]
    )
    if found.mesh.empty or spec == found.spec:
        return array
    sharded: Array = jax.sharding.reshard(  # type: ignore[no-untyped-call]
        array, NamedSharding(found.mesh, spec)
    )
    return sharded


def _vary_like(array: Array, like: Array) -> Array:
    axes = tuple(sorted(_get_varying_axes(like) - _get_varying_axes(array)))
    if not axes:
        return array
    lax: Any = jax.lax
    varying: Array
    if hasattr(lax, "pcast"):
        varying = lax.pcast(array, axes, to="varying")
    else:  # before jax 0.8.2
        varying = lax.pvary(array, axes)
    return varying


def _get_varying_axes(array: Array) -> frozenset[str]:
    """The mesh axes over which an array varies inside ``jax.shard_map``; none elsewhere."""
    aval: Any = jax.typeof(array)
    axes: frozenset[str] = aval.mat.varying if hasattr(aval, "mat") else aval.vma  # before jax 0.10
    return axes
