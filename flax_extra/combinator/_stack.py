"""The stack: a tuple with its top on the left, at index 0.

All that knows which end is up is in this file.

    >>> taken, rest = take(("a", "b", "c"), 2)
    >>> taken, rest
    (('a', 'b'), ('c',))
    >>> put(("x",), rest)
    ('x', 'c')
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import jax.export

from flax_extra.combinator._signature import Nesting

Stack: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Missing:
    """Stands for an input that the caller did not give, until something takes it."""

    index: int


def take(stack: Stack, n: int) -> tuple[Stack, Stack]:
    """The top ``n`` items, and what is left beneath."""
    return stack[:n], stack[n:]


def put(items: Stack, stack: Stack) -> Stack:
    """The stack with ``items`` on top."""
    return items + stack


def beneath(stack: Stack, items: Stack) -> Stack:
    """The stack with ``items`` under it."""
    return stack + items


def pick(stack: Stack, indices: Iterable[int]) -> Stack:
    """The items at ``indices``, counted from the top.

    >>> pick(("a", "b", "c"), (2, 0, 0))
    ('c', 'a', 'a')
    """
    return tuple(stack[i] for i in indices)


def flatten(value: Any) -> Stack:
    """The items in what a callable returned: a plain tuple is several, all else is one.

    >>> flatten((1, (2, [3, 4]), None, ()))
    (1, 2, [3, 4], None)
    """
    if type(value) is not tuple:
        return (value,)
    return tuple(item for part in value for item in flatten(part))


def regroup(items: Stack, nesting: Nesting) -> Stack:
    """Items, grouped into arguments.

    >>> regroup((1, 2, 3), (((), ()), ()))
    ((1, 2), 3)
    """
    remaining = iter(items)

    def group(shape: Nesting) -> Any:
        return tuple(map(group, shape)) if shape else next(remaining)

    return tuple(map(group, nesting))


def unstack(stack: Stack) -> Any:
    """What a pipeline returns: nothing is ``()``, one item is itself.

    >>> unstack(()), unstack((1,)), unstack((1, 2))
    ((), 1, (1, 2))
    """
    return stack[0] if len(stack) == 1 else stack


def pad(stack: Stack, n: int) -> Stack:
    """The stack, filled up to ``n`` items with stand-ins for what is missing."""
    return stack + tuple(Missing(index) for index in range(len(stack), n))


def lacks(items: Iterable[Any]) -> bool:
    """Whether an item among these is missing."""
    return Missing in map(type, items)


def describe(stack: Iterable[Any]) -> str:
    """The items of a stack as text, top first. See :func:`describe_item`."""
    present = [describe_item(item) for item in stack if not isinstance(item, Missing)]
    return ", ".join(present) or "empty"


def describe_item(item: Any) -> str:
    """An item as jaxprs print it.

    >>> import jax.numpy as jnp
    >>> describe_item(jnp.ones((2, 3))), describe_item(None)
    ('f32[2, 3]', 'None')
    >>> describe_item({"a": jnp.ones(2, bool), "b": 1})
    "dict('a': bool[2], 'b': 1)"
    """
    if hasattr(item, "shape") and hasattr(item, "dtype"):
        return f"{_short_dtype(item.dtype)}[{', '.join(map(str, item.shape))}]"
    if _is_constant(item):
        return _shorten(str(item) if jax.export.is_symbolic_dim(item) else repr(item))
    kind = type(item).__name__
    if isinstance(item, dict):
        return f"{kind}({', '.join(f'{k!r}: {describe_item(v)}' for k, v in item.items())})"
    if isinstance(item, list):
        return f"{kind}({', '.join(map(describe_item, item))})"
    leaves = jax.tree_util.tree_leaves(item)
    if len(leaves) == 1 and leaves[0] is item:
        return f"{kind} object"
    return f"{kind}({', '.join(map(describe_item, leaves))})"


def _is_constant(item: Any) -> bool:
    is_plain = item is None or isinstance(item, bool | int | float | complex | str)
    return is_plain or jax.export.is_symbolic_dim(item)


def _short_dtype(dtype: Any) -> str:
    try:
        text = str(jax.core.ShapedArray((), dtype).str_short(short_dtypes=True))  # type: ignore[no-untyped-call]
    except TypeError:  # numpy dtypes that jax has no arrays of, such as strings
        return str(dtype)
    return text.removesuffix("[]")


def _shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
