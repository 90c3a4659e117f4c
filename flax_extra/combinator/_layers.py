"""Variables of copies in series: stacked, as ``repeat`` holds them, or a scope for each copy.

Stacked, a model compiles in a time that does not depend on its depth. With a scope for each, layers
can be told apart: to freeze some, to quantise them, or because a checkpoint has them so. Both hold
the same numbers, and these functions turn one into the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_extra.combinator import _errors
from flax_extra.combinator._lift import LAYERS_AXIS
from flax_extra.combinator._stack import describe_item

Tree: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[str, ...]

AXIS = {nn.PARTITION_NAME: LAYERS_AXIS}
"""What metadata calls the axis of the copies."""


def unstack_layers(variables: Tree, path: str, into: str = "layers_{}") -> dict[str, Any]:
    """Gives each copy in a ``repeat`` a scope of its own.

    Args:
        variables: by collection, as ``init`` gives them. Those of a ``repeat`` in it have a leading
            axis, one entry for each copy.
        path: where the ``repeat`` has its scope, such as ``"encoder/Repeat_0"``; ``""`` where it
            is the whole model.
        into: the names of the scopes that take its place, side by side; ``{}`` is the number.

    Returns:
        The same variables, nothing else changed. Partitioning metadata loses the axis ``"layers"``.

    Raises:
        ValueError: where nothing is at the path, its leading axes differ, ``into`` has no ``{}``,
            or a name that it makes is taken.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> stacked = nn.Dense(4) >> cb.repeat(nn.Dense(4), 3)
        >>> variables = stacked.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> apart = cb.unstack_layers(variables, "Repeat_0")
        >>> sorted(apart["params"]), apart["params"]["layers_2"]["Dense_0"]["kernel"].shape
        (['Dense_0', 'layers_0', 'layers_1', 'layers_2'], (4, 4))

        They are those of a pipeline that has a scope for each copy:

        >>> copies = [cb.serial(nn.Dense(4), name=f"layers_{i}") for i in range(3)]
        >>> y = cb.serial(nn.Dense(4), *copies).apply(apart, jnp.ones((2, 4)))
        >>> bool(jnp.allclose(y, stacked.apply(variables, jnp.ones((2, 4))), atol=1e-6))
        True

        Moments of an optimizer are trees like the parameters, and go the same way:

        >>> import optax
        >>> moments = optax.adam(1e-3).init(variables)[0].mu
        >>> sorted(cb.unstack_layers(moments, "Repeat_0")["params"]) == sorted(apart["params"])
        True
    """
    _check_numbered("unstack_layers", "into", into)
    prefix = _names(path)
    flat = {collection: _flat(tree) for collection, tree in variables.items()}
    stacked = {
        (collection, *key): leaf
        for collection, leaves in flat.items()
        for key, leaf in leaves.items()
        if key[: len(prefix)] == prefix
    }
    if not stacked:
        raise _errors.no_such_scope("unstack_layers", path, _scopes(flat))
    n = _number_of_copies(path, stacked)
    apart = {}
    for collection, leaves in flat.items():
        kept = {key: leaf for key, leaf in leaves.items() if (collection, *key) not in stacked}
        copies = {
            (*prefix[:-1], into.format(i), *key[len(prefix) :]): _copy(leaf, i)
            for key, leaf in leaves.items()
            if key not in kept
            for i in range(n)
        }
        apart[collection] = _joined("unstack_layers", into, kept, copies)
    return apart


def stack_layers(variables: Tree, layers: str, into: str) -> dict[str, Any]:
    """Stacks the variables of copies that have a scope each, as ``repeat`` takes them.

    Args:
        variables: by collection, as ``init`` gives them.
        layers: where the copies have their scopes, such as ``"encoder/layers_{}"``; ``{}`` is the
            number, from 0.
        into: the name of the one scope that takes their place, such as ``"Repeat_0"``; ``""`` for
            none, where the ``repeat`` is the whole model.

    Returns:
        The same variables, nothing else changed. Partitioning metadata gains the axis ``"layers"``.

    Raises:
        ValueError: where there is no such scope, a number is missing, two copies differ in names,
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
    *parent, name = _names(layers) or ("",)
    _check_numbered("stack_layers", "layers", name)
    flat = {collection: _flat(tree) for collection, tree in variables.items()}
    numbered = re.compile(re.escape(name).replace(re.escape("{}"), "(0|[1-9][0-9]*)"))
    place = (*parent, into) if into else tuple(parent)
    stacked: dict[str, Any] = {}
    n_found = 0
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
        n_found += len(copies)
        together = {(*place, *rest): _stacked(layers, rest, each) for rest, each in copies.items()}
        stacked[collection] = _joined("stack_layers", into, kept, together)
    if not n_found:
        raise _errors.no_such_scope("stack_layers", layers, _scopes(flat))
    return stacked


def _names(path: str) -> Key:
    return tuple(path.split("/")) if path else ()


def _flat(tree: Tree) -> dict[Key, Any]:
    flat: dict[Key, Any] = flatten_dict(dict(tree))  # type: ignore[no-untyped-call]
    return flat


def _joined(asked: str, into: str, kept: dict[Key, Any], new: dict[Key, Any]) -> Any:
    """Variables that stayed as they were, and new ones beside them."""
    scopes = {key[:depth] for key in kept for depth in range(1, len(key) + 1)}
    for key in new:
        if key in scopes or any(key[:depth] in kept for depth in range(1, len(key))):
            raise _errors.taken_scope(asked, into, "/".join(key))
    return unflatten_dict({**kept, **new})  # type: ignore[no-untyped-call]


def _number_of_copies(path: str, stacked: Mapping[Key, Any]) -> int:
    sizes = {
        "/".join(key): jnp.shape(leaf)[:1]
        for key, boxed in stacked.items()
        for leaf in jax.tree.leaves(boxed)
    }
    several = set(sizes.values())
    if len(several) != 1 or several == {()}:
        raise _errors.not_stacked(
            path, {name: size[0] if size else None for name, size in sizes.items()}
        )
    ((n,),) = several
    return n


def _copy(leaf: Any, i: int) -> Any:
    """One of the copies; metadata loses the axis."""
    return nn.meta.remove_axis(jax.tree.map(lambda x: x[i], leaf), 0, AXIS)


def _stacked(layers: str, rest: Key, copies: Mapping[int, Any]) -> Any:
    """All copies; metadata gains the axis."""
    name = "/".join(rest)
    missing = [i for i in range(max(copies) + 1) if i not in copies]
    if missing:
        raise _errors.missing_copy(layers, name, missing[0], len(copies))
    leaves = [copies[i] for i in range(len(copies))]
    kinds = [describe_item(leaf) for leaf in leaves]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise _errors.different_copies(layers, name, kinds[0], i, kind)
    return nn.meta.add_axis(jax.tree.map(lambda *x: jnp.stack(x), *leaves), 0, AXIS)


def _check_numbered(asked: str, name: str, value: str) -> None:
    if value.count("{}") != 1 or "/" in value:
        raise _errors.no_number(asked, name, value)


def _scopes(flat: Mapping[str, Mapping[Key, Any]]) -> list[str]:
    """Where variables are, each scope once."""
    every = ("/".join(key[:-1]) for leaves in flat.values() for key in leaves)
    return sorted(set(every))
