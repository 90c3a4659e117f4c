"""Gives arrays that are computed together the same layout on a mesh.

On an Auto mesh XLA decides where arrays lie. On an Explicit mesh the sharding is part of an array's
type, and inside ``jax.shard_map`` so are the mesh axes that it varies over. There a parameter that
is broadcast and joined with data (in a concatenation, a choice, the carry of a loop) needs the type
of the data. Elsewhere these functions change nothing.

The backward pass of a broadcast that is sharded from the start is a sum on each device and an
all-reduce. If it is sharded afterwards, its cotangent is first gathered on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def broadcast_like(array: Array, shape: tuple[int, ...], like: Array, n_axes: int) -> Array:
    """Broadcasts an array to a shape whose first ``n_axes`` axes are those of ``like``.

    The result is sharded as ``like`` is along these axes, and varies over the same mesh axes.
    """
    sharding = jax.typeof(like).sharding
    spec = PartitionSpec(*sharding.spec[:n_axes])  # type: ignore[no-untyped-call]
    is_sharded = any(axis is not None for axis in spec)
    out_sharding = NamedSharding(sharding.mesh, spec) if is_sharded else None
    broadcast = jnp.broadcast_to(array, shape, out_sharding=out_sharding)
    varying: Array = _vary_over(broadcast, get_varying_axes(like) - get_varying_axes(broadcast))
    return varying


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


def match_varying_axes(tree: Tree) -> Tree:
    """Makes all arrays of a pytree vary over the same mesh axes, inside ``jax.shard_map``.

    Loops and custom derivatives that mix arrays ask for that: a carry must keep its type, and a
    cotangent must have the type of its primal.
    """
    axes = frozenset[str]().union(*map(get_varying_axes, jax.tree.leaves(tree)))
    matched: Tree = jax.tree.map(lambda x: _vary_over(x, axes - get_varying_axes(x)), tree)
    return matched


def get_varying_axes(array: Array) -> frozenset[str]:
    """Returns the mesh axes over which an array varies inside ``jax.shard_map``; none elsewhere."""
    aval: Any = jax.typeof(array)
    axes: frozenset[str] = aval.mat.varying if hasattr(aval, "mat") else aval.vma  # before jax 0.10
    return axes


def take_rows(table: Array, indices: Array) -> Array:
    """Takes rows of a table, sharded as their indices are: ``[..., features]``."""

    def take(table: Array, indices: Array) -> Array:
        return jnp.take(table, indices, axis=0)

    sharding: Any = jax.typeof(indices).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return take(table, indices)
    spec: Any = PartitionSpec(*sharding.spec, None)  # type: ignore[no-untyped-call]
    taken: Array = jax.sharding.auto_axes(take, out_sharding=spec)(table, indices)
    return taken


def run_with_auto_axes(run: Callable[[Tree], Array], operands: Tree, *, like: Array) -> Array:
    """Runs a function so that XLA chooses shardings in it, on an Explicit mesh, too.

    There each operation would have to say how its result is sharded.

    Args:
        run: returns an array of three axes.
        operands: what it takes.
        like: the array whose first three axes are sharded as those of the result.
    """
    sharding: Any = jax.typeof(like).sharding
    kinds = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return run(operands)
    spec: Any = PartitionSpec(*sharding.spec[:3])  # type: ignore[no-untyped-call]
    run_auto: Any = jax.sharding.auto_axes(run, axes=explicit, out_sharding=spec)
    result: Array = run_auto(operands)
    return result


def _vary_over(array: Any, axes: frozenset[str]) -> Any:
    if not axes:
        return array
    names = tuple(sorted(axes))
    if hasattr(lax, "pcast"):
        return lax.pcast(array, names, to="varying")
    return lax.pvary(array, names)  # type: ignore[attr-defined, unused-ignore]  # before jax 0.8.2
