"""Items and names as text, for errors, summaries and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.export

from flax_extra.combinator._core.arrays import is_array
from flax_extra.combinator._core.stack import Missing

MAX_CONSTANT_LENGTH = 40
"""How many characters of a plain value are shown."""


def describe_stack(stack: Iterable[Any]) -> str:
    """Lists the items of a stack, top first. See :func:`describe_item`."""
    present = [describe_item(item) for item in stack if not isinstance(item, Missing)]
    return ", ".join(present) or "empty"


def describe_item(item: Any) -> str:
    """Writes an item as jaxprs print it.

    >>> import jax.numpy as jnp
    >>> describe_item(jnp.ones((2, 3))), describe_item(None)
    ('f32[2, 3]', 'None')
    >>> describe_item({"a": jnp.ones(2, bool), "b": 1})
    "dict('a': bool[2], 'b': 1)"
    """
    if is_array(item):
        return f"{_shorten_dtype(item.dtype)}[{', '.join(map(str, item.shape))}]"
    if _is_constant(item):
        text = str(item) if jax.export.is_symbolic_dim(item) else repr(item)
        return cut(text, MAX_CONSTANT_LENGTH)
    kind = type(item).__name__
    if isinstance(item, dict):
        return f"{kind}({', '.join(f'{k!r}: {describe_item(v)}' for k, v in item.items())})"
    if isinstance(item, list):
        return f"{kind}({', '.join(map(describe_item, item))})"
    leaves = jax.tree_util.tree_leaves(item)
    if len(leaves) == 1 and leaves[0] is item:
        return f"{kind} object"
    return f"{kind}({', '.join(map(describe_item, leaves))})"


def shorten(text: str, limit: int = 80) -> str:
    """Puts a text on one line, and cuts it at the limit.

    >>> shorten("one   two  three", limit=8)
    'one t...'
    """
    return cut(" ".join(text.split()), limit)


def cut(text: str, limit: int) -> str:
    """Cuts a text at the limit, and shows that it was cut."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _is_constant(item: Any) -> bool:
    is_plain = item is None or isinstance(item, bool | int | float | complex | str)
    return is_plain or jax.export.is_symbolic_dim(item)


def _shorten_dtype(dtype: Any) -> str:
    try:
        text = str(jax.core.ShapedArray((), dtype).str_short(short_dtypes=True))  # type: ignore[no-untyped-call]
    except TypeError:  # a numpy dtype that jax has no arrays of, such as that of strings
        return str(dtype)
    return text.removesuffix("[]")
