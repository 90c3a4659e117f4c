"""The variables of copies in series: stacked, as ``repeat`` holds them, or in a scope for each.

If they are stacked, the compile time does not depend on the depth. If each copy has a scope, the
copies can be told apart: to freeze some, to quantise them, or to load a checkpoint of that form.
Both forms hold the same numbers, and these functions convert one into the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._words.loop import LAYERS_AXIS, number_axis

Tree: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[str, ...]


def unstack_layers(variables: Tree, path: str, into: str = "layers_{}") -> dict[str, Any]:
    """Gives each copy in a ``repeat`` a scope of its own.

    Args:
        variables: the collections that ``init`` returns. Those of a ``repeat`` have a leading axis
            with one entry for each copy. A ``jax.ShapeDtypeStruct`` may stand for an array.
        path: the scope of the ``repeat``, such as ``"encoder/Repeat_0"``; ``""`` if it is the whole
            model.
        into: the names of the scopes that take its place; ``{}`` stands for the number.

    Returns:
        The variables in the new form. Partitioning metadata loses the axis of the copies.

    Raises:
        ValueError: If there are no variables at the path, their leading axes differ, ``into`` has
            no ``{}``, or a name that it makes is taken.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> stacked = nn.Dense(4) >> cb.repeat(nn.Dense(4), 3)
        >>> variables = stacked.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> apart = cb.unstack_layers(variables, "Repeat_0")
        >>> sorted(apart["params"]), apart["params"]["layers_2"]["Dense_0"]["kernel"].shape
        (['Dense_0', 'layers_0', 'layers_1', 'layers_2'], (4, 4))

        A pipeline that has a scope for each copy can use them:

        >>> copies = [cb.serial(nn.Dense(4), name=f"layers_{i}") for i in range(3)]
        >>> y = cb.serial(nn.Dense(4), *copies).apply(apart, jnp.ones((2, 4)))
        >>> bool(jnp.allclose(y, stacked.apply(variables, jnp.ones((2, 4))), atol=1e-6))
        True

        The moments of an optimizer have the same tree as the parameters:

        >>> import optax
        >>> moments = optax.adam(1e-3).init(variables)[0].mu
        >>> sorted(cb.unstack_layers(moments, "Repeat_0")["params"]) == sorted(apart["params"])
        True
    """
    _check_numbered("unstack_layers", "into", into)
    prefix = _split_path(path)
    flat = {collection: _flatten(tree) for collection, tree in variables.items()}
    stacked = {
        (collection, *key): leaf
        for collection, leaves in flat.items()
        for key, leaf in leaves.items()
        if key[: len(prefix)] == prefix
    }
    if not stacked:
        raise errors.no_such_scope("unstack_layers", path, _list_scopes(flat))
    n = _count_copies(path, stacked)
    apart = {}
    for collection, leaves in flat.items():
        kept = {key: leaf for key, leaf in leaves.items() if (collection, *key) not in stacked}
        copies = {
            (*prefix[:-1], into.format(i), *key[len(prefix) :]): _take_copy(leaf, i)
            for key, leaf in leaves.items()
            if key not in kept
            for i in range(n)
        }
        apart[collection] = _merge("unstack_layers", into, kept, copies)
    return apart


def stack_layers(
    variables: Tree, layers: str, into: str, *, axis_name: str | None = LAYERS_AXIS
) -> dict[str, Any]:
    """Stacks the variables of copies that have a scope each, for a ``repeat``.

    Args:
        variables: the collections that ``init`` returns. A ``jax.ShapeDtypeStruct`` may stand for
            an array.
        layers: the scopes of the copies, such as ``"encoder/layers_{}"``; ``{}`` stands for the
            number, counted from 0.
        into: the name of the scope that takes their place, such as ``"Repeat_0"``; ``""`` if the
            ``repeat`` is the whole model.
        axis_name: the ``axis_name`` of the ``repeat``: partitioning metadata gains an axis of that
            name, with a number if the copies have one so named, as with :func:`repeat`.

    Returns:
        The variables in the new form.

    Raises:
        ValueError: If there is no such scope, a number is missing, two copies differ in names,
            shapes or dtypes, ``layers`` has no ``{}``, or the name ``into`` is taken.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> copies = [cb.serial(nn.Dense(4), name=f"layers_{i}") for i in range(3)]
        >>> variables = cb.serial(*copies).init(jax.random.key(0), jnp.ones((2, 4)))
        >>> stacked = cb.stack_layers(variables, "layers_{}", into="")
        >>> jax.tree.map(jnp.shape, stacked)
        {'params': {'Dense_0': {'bias': (3, 4), 'kernel': (3, 4, 4)}}}
        >>> cb.repeat(nn.Dense(4), 3).apply(stacked, jnp.ones((2, 4))).shape
        (2, 4)
    """
    *parent, name = _split_path(layers) or ("",)
    _check_numbered("stack_layers", "layers", name)
    flat = {collection: _flatten(tree) for collection, tree in variables.items()}
    numbered = re.compile(re.escape(name).replace(re.escape("{}"), "(0|[1-9][0-9]*)"))
    target = (*parent, into) if into else tuple(parent)
    parts: dict[str, Any] = {}
    for collection, leaves in flat.items():
        kept: dict[Key, Any] = {}
        copies: dict[Key, dict[int, Any]] = {}
        for key, leaf in leaves.items():
            depth = len(parent)
            match = numbered.fullmatch(key[depth]) if len(key) > depth + 1 else None
            if match is None or list(key[:depth]) != parent:
                kept[key] = leaf
            else:
                copies.setdefault(key[depth + 1 :], {})[int(match[1])] = leaf
        parts[collection] = kept, copies
    if not any(copies for _, copies in parts.values()):
        raise errors.no_such_scope("stack_layers", layers, _list_scopes(flat))
    boxes = [
        box for _, copies in parts.values() for each in copies.values() for box in each.values()
    ]
    axis_name = number_axis(
        axis_name, [name for box in boxes for name in getattr(box, "names", ())]
    )
    stacked: dict[str, Any] = {}
    for collection, (kept, copies) in parts.items():
        together = {
            (*target, *rest): _stack_copies(layers, rest, each, axis_name)
            for rest, each in copies.items()
        }
        stacked[collection] = _merge("stack_layers", into, kept, together)
    return stacked


def _split_path(path: str) -> Key:
    return tuple(path.split("/")) if path else ()


def _flatten(tree: Tree) -> dict[Key, Any]:
    flat: dict[Key, Any] = flatten_dict(dict(tree))  # type: ignore[no-untyped-call]
    return flat


def _merge(asked: str, into: str, kept: dict[Key, Any], new: dict[Key, Any]) -> Any:
    """Returns the variables that were kept and the new ones in one tree."""
    scopes = {key[:depth] for key in kept for depth in range(1, len(key) + 1)}
    for key in new:
        if key in scopes or any(key[:depth] in kept for depth in range(1, len(key))):
            raise errors.taken_scope(asked, into, "/".join(key))
    return unflatten_dict({**kept, **new})  # type: ignore[no-untyped-call]


def _count_copies(path: str, stacked: Mapping[Key, Any]) -> int:
    sizes = {
        "/".join(key): jnp.shape(leaf)[:1]
        for key, boxed in stacked.items()
        for leaf in jax.tree.leaves(boxed)
    }
    several = set(sizes.values())
    if len(several) != 1 or several == {()}:
        raise errors.not_stacked(
            path, {name: size[0] if size else None for name, size in sizes.items()}
        )
    ((n,),) = several
    return n


def _take_copy(leaf: Any, i: int) -> Any:
    """Takes one of the copies. Its metadata loses the axis."""
    taken = jax.tree.map(lambda x: _take(x, i), leaf)
    first_name = next(iter(getattr(leaf, "names", ())), None)
    return nn.meta.remove_axis(taken, 0, {nn.PARTITION_NAME: first_name})


def _stack_copies(layers: str, rest: Key, copies: Mapping[int, Any], axis_name: str | None) -> Any:
    """Stacks all copies. Their metadata gains the axis."""
    name = "/".join(rest)
    missing = [i for i in range(max(copies) + 1) if i not in copies]
    if missing:
        raise errors.missing_copy(layers, name, missing[0], len(copies))
    leaves = [copies[i] for i in range(len(copies))]
    kinds = [describe_item(leaf) for leaf in leaves]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise errors.different_copies(layers, name, kinds[0], i, kind)
    return nn.meta.add_axis(jax.tree.map(_stack, *leaves), 0, {nn.PARTITION_NAME: axis_name})


def _take(stacked: Any, i: int) -> Any:
    if not isinstance(stacked, jax.ShapeDtypeStruct):
        return stacked[i]
    sharding = stacked.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, _spec(*sharding.spec[1:]))
    return _struct(stacked.shape[1:], stacked.dtype, sharding)


def _stack(*copies: Any) -> Any:
    first = copies[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jnp.stack(copies)
    sharding = first.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, _spec(None, *sharding.spec))
    return _struct((len(copies), *first.shape), first.dtype, sharding)


def _struct(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _spec(*entries: Any) -> PartitionSpec:
    return PartitionSpec(*entries)  # type: ignore[no-untyped-call]


def _check_numbered(asked: str, name: str, value: str) -> None:
    if value.count("{}") != 1 or "/" in value:
        raise errors.no_number(asked, name, value)


def _list_scopes(flat: Mapping[str, Mapping[Key, Any]]) -> list[str]:
    """Lists the scopes that hold variables."""
    every = ("/".join(key[:-1]) for leaves in flat.values() for key in leaves)
    return sorted(set(every))
