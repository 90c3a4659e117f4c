"""What counts as an array, and how to keep the other leaves of a pytree out of a transformation.

Items of a stack may hold plain numbers, such as the lengths of modalities. A transformation that
traces its arguments would turn them into arrays:

    >>> import jax.numpy as jnp
    >>> arrays, merge = split_arrays(({"x": jnp.ones(2)}, 3))
    >>> len(arrays), merge(["a traced array"])
    (1, ({'x': 'a traced array'}, 3))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax


def is_array(value: object) -> bool:
    """Whether a value has a shape and a dtype."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Returns the arrays of a pytree, and a function that puts others in their place."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    others = [_ARRAY if is_array(leaf) else leaf for leaf in leaves]  # it keeps no tracer alive

    def merge(arrays: Iterable[Any]) -> Any:
        remaining = iter(arrays)
        merged = [next(remaining) if other is _ARRAY else other for other in others]
        return jax.tree_util.tree_unflatten(structure, merged)

    return list(filter(is_array, leaves)), merge


_ARRAY = object()
"""Stands for an array in the leaves of a pytree."""


@functools.cache
def get_key_shape() -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a random key."""
    key: jax.ShapeDtypeStruct = jax.eval_shape(lambda: jax.random.key(0))
    return key
