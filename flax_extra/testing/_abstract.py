"""Tracing a call of anything, without computing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from flax_extra.combinator._core.arrays import get_key_shape, split_arrays


def trace_call(f: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Returns what a call gives, with shapes for arrays. Python numbers are not traced."""
    arrays, merge = split_arrays((arguments, keywords))
    merge_outputs = merge

    def run(key: jax.Array, arrays: list[Any]) -> list[Any]:
        nonlocal merge_outputs
        arguments, keywords = merge(arrays)
        if isinstance(f, nn.Module):
            output, _ = f.init_with_output(key, *arguments, **keywords)
        else:
            output = f(*arguments, **keywords)
        outputs, merge_outputs = split_arrays(output)
        return outputs

    shapes = jax.eval_shape(run, get_key_shape(), arrays)
    return merge_outputs(shapes)
