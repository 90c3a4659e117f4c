"""Moving items on the stack, without looking at them.

>>> from flax_extra import combinator as cb
>>> (cb.swap() >> cb.swap())(1, 2), (cb.dup() >> cb.drop())(1)
((1, 2), 1)
>>> (cb.select((2, 0)) >> cb.select((1, 1)))("a", "b", "c") == cb.select((0, 0), n_in=3)(*"abc")
True
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

from flax_extra.combinator import _errors
from flax_extra.combinator._base import Combinator, reading
from flax_extra.combinator._expression import Argument
from flax_extra.combinator._run import Steps
from flax_extra.combinator._signature import MOST_ITEMS, Signature
from flax_extra.combinator._stack import Stack, pick, put, take


class Select(Combinator):
    """Items of the stack by their index. See :func:`select`."""

    indices: tuple[int, ...] = ()
    n_in: int | None = None

    @reading
    def n_popped(self) -> int:
        """How many items are taken away: ``n_in``, or as many as the deepest index needs."""
        return max(self.indices, default=-1) + 1 if self.n_in is None else self.n_in

    @functools.cached_property
    def signature(self) -> Signature:
        # Reading deeper than it pops, it takes what it reads, and gives back what it only read.
        n_read = max(self.n_popped, max(self.indices, default=-1) + 1)
        return Signature(n_read, len(self.indices) + n_read - self.n_popped)

    def flow(self, stack: Stack, steps: Steps) -> Stack:
        return put(pick(stack, self.indices), take(stack, self.n_popped)[1])

    def _check(self) -> None:
        for index in self.indices:
            if index < 0:
                raise _errors.negative_index(index)
        check_items("select", "n_in", self.n_popped)

    @reading
    def arguments(self) -> list[Argument]:
        asked = [] if self.n_in is None else [("n_in=", self.n_in)]
        return [("", self.indices), *asked]


class _Shuffle(Combinator):
    """What a named selection of the top ``n_in`` items has in common."""

    n_in: int = 1

    def _check(self) -> None:
        check_items(self.kind, "n_in", self.n_in)
        super()._check()


class Dup(_Shuffle):
    """The top items twice. See :func:`dup`."""

    def expand(self) -> Combinator:  # type: ignore[override]  # it has no children
        return select((*range(self.n_in), *range(self.n_in)), n_in=self.n_in)


class Drop(_Shuffle):
    """Without the top items. See :func:`drop`."""

    def expand(self) -> Combinator:  # type: ignore[override]  # it has no children
        return select((), n_in=self.n_in)


class Identity(_Shuffle):
    """The top items as they are. See :func:`identity`."""

    def expand(self) -> Combinator:  # type: ignore[override]  # it has no children
        return select(range(self.n_in), n_in=self.n_in)


class Swap(Combinator):
    """The top two items exchanged. See :func:`swap`."""

    def expand(self) -> Combinator:  # type: ignore[override]  # it has no children
        return select((1, 0))


def select(indices: Iterable[int], n_in: int | None = None) -> Select:
    """Takes items off the stack, and puts there those at the given indices.

    Args:
        indices: which items to put on the stack, counted from the top, index 0; an index may
            come more than once.
        n_in: how many items to take off. By default as many as the deepest index needs. An item
            that is read deeper than that stays where it was.

    Returns:
        A combinator.

    Raises:
        SignatureError: where an index is negative.
        TypeError: where an index is not an integer.
        ValueError: where ``n_in`` is negative.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.select((1, 1))("a", "b", "c")
        ('b', 'b', 'c')
        >>> p = cb.select((2,), n_in=0)
        >>> p("a", "b", "c"), str(p.signature)
        (('c', 'a', 'b', 'c'), '3 -> 4')
    """
    try:
        indices = tuple(indices)
    except Exception as error:  # whatever an arbitrary object raises when it is iterated
        raise _errors.not_integers("select", "indices", repr(indices)) from error
    return Select(indices=tuple(integer("select", "indices", i) for i in indices), n_in=n_in)


def dup(n_in: int = 1) -> Dup:
    """The top ``n_in`` items twice: ``dup(2)`` takes a, b and gives a, b, a, b.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``select((0, .., n_in - 1, 0, .., n_in - 1))``.

    Raises:
        TypeError, ValueError: where ``n_in`` is not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.dup(2)("a", "b", "c")
        ('a', 'b', 'a', 'b', 'c')
    """
    return Dup(n_in=integer("dup", "n_in", n_in))


def drop(n_in: int = 1) -> Drop:
    """Takes the top ``n_in`` items away.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``select((), n_in)``.

    Raises:
        TypeError, ValueError: where ``n_in`` is not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.drop()("a", "b")
        'b'
    """
    return Drop(n_in=integer("drop", "n_in", n_in))


def swap() -> Swap:
    """Exchanges the top two items.

    Returns:
        A combinator; the same as ``select((1, 0))``.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.swap()("a", "b", "c")
        ('b', 'a', 'c')
    """
    return Swap()


def identity(n_in: int = 1) -> Identity:
    """The top ``n_in`` items as they are.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``select((0, .., n_in - 1))``.

    Raises:
        TypeError, ValueError: where ``n_in`` is not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.identity(2)("a", "b")
        ('a', 'b')
    """
    return Identity(n_in=integer("identity", "n_in", n_in))


def integer(asked: str, name: str, value: Any) -> int:
    """A value that must be an integer: a Python one, or anything that stands for one."""
    try:
        return operator.index(value)
    except Exception as error:  # whatever an arbitrary object's __index__ raises
        raise _errors.not_an_integer(asked, name, repr(value)) from error


def check_items(asked: str, name: str, value: int, least: int = 0) -> None:
    """Refuses what is not a number of items of a stack."""
    at_least(asked, name, least, value)
    if value > MOST_ITEMS:
        raise _errors.too_many_items(asked, name, MOST_ITEMS, value)


def at_least(asked: str, name: str, least: int, value: int) -> None:
    """Refuses a number below the least that makes sense."""
    if value < least:
        raise _errors.too_small(asked, name, least, value)
