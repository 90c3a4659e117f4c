"""The stack: a tuple with its top on the left, at index 0.

Only this file knows which end is the top.

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

from flax_extra.combinator._core.signature import Nesting

Stack: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Missing:
    """Stands for an input that the caller did not give.

    It is an error only when a step takes it: until then it may be moved or dropped.
    """

    index: int


def take(stack: Stack, n: int) -> tuple[Stack, Stack]:
    """Splits a stack into its top ``n`` items and the rest."""
    return stack[:n], stack[n:]


def put(items: Stack, stack: Stack) -> Stack:
    """Puts items on top of a stack."""
    return items + stack


def pick(stack: Stack, indices: Iterable[int]) -> Stack:
    """Picks the items at ``indices``, counted from the top.

    >>> pick(("a", "b", "c"), (2, 0, 0))
    ('c', 'a', 'a')
    """
    return tuple(stack[i] for i in indices)


def flatten(value: Any) -> Stack:
    """Returns the items in a value: a plain tuple is several, anything else is one.

    >>> flatten((1, (2, [3, 4]), None, ()))
    (1, 2, [3, 4], None)
    """
    if type(value) is not tuple:
        return (value,)
    return tuple(item for part in value for item in flatten(part))


def regroup(items: Stack, nesting: Nesting) -> Stack:
    """Groups items into the arguments of a call.

    >>> regroup((1, 2, 3), (((), ()), ()))
    ((1, 2), 3)
    """
    remaining = iter(items)

    def group(shape: Nesting) -> Any:
        return tuple(map(group, shape)) if shape else next(remaining)

    return tuple(map(group, nesting))


def unwrap_stack(stack: Stack) -> Any:
    """Returns what a pipeline returns: ``()`` for no items, the item for one, else the tuple.

    >>> unwrap_stack(()), unwrap_stack((1,)), unwrap_stack((1, 2))
    ((), 1, (1, 2))
    """
    return stack[0] if len(stack) == 1 else stack


def pad(stack: Stack, n: int) -> Stack:
    """Fills a stack up to ``n`` items with :class:`Missing` ones."""
    return stack + tuple(Missing(index) for index in range(len(stack), n))


def has_missing(items: Iterable[Any]) -> bool:
    """Whether one of the items is :class:`Missing`."""
    return Missing in map(type, items)
