"""A call of anything, traced and not computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn


def abstract_call(f: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What a call gives, arrays as their shapes; Python numbers go in and come out as they are."""
    leaves, tree = jax.tree.flatten((arguments, keywords))
    is_array = [hasattr(leaf, "shape") for leaf in leaves]
    outside: list[Any] = []

    def run(key: jax.Array, arrays: list[Any]) -> list[Any]:
        remaining = iter(arrays)
        merged = [next(remaining) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        arguments, keywords = jax.tree.unflatten(tree, merged)
        if isinstance(f, nn.Module):
            output, _ = f.init_with_output(key, *arguments, **keywords)
        else:
            output = f(*arguments, **keywords)
        outputs, out_tree = jax.tree.flatten(output)
        outside[:] = [out_tree, [None if hasattr(o, "shape") else o for o in outputs]]
        return [o for o in outputs if hasattr(o, "shape")]

    arrays = [leaf for leaf, a in zip(leaves, is_array, strict=True) if a]
    shapes = iter(jax.eval_shape(run, _key_shape(), arrays))
    out_tree, outputs = outside
    return jax.tree.unflatten(out_tree, [next(shapes) if o is None else o for o in outputs])


@functools.cache
def _key_shape() -> jax.ShapeDtypeStruct:
    key: jax.ShapeDtypeStruct = jax.eval_shape(lambda: jax.random.key(0))
    return key
