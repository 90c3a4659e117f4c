"""``select`` and its kin: moving items on the stack without looking at them.

>>> from flax_extra import combinator as cb
>>> (cb.swap() >> cb.swap())(1, 2), (cb.dup() >> cb.drop())(1)
((1, 2), 1)
>>> (cb.select((2, 0)) >> cb.select((1, 1)))("a", "b", "c") == cb.select((0, 0), n_in=3)(*"abc")
True
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.checks import as_integer, check_item_count
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.expression import Argument
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack, pick, put, take


class Select(Combinator):
    """Items of the stack by their index. See :func:`select`."""

    indices: tuple[int, ...] = ()
    n_in: int | None = None

    @static_property
    def _n_popped(self) -> int:
        """How many items are taken away: ``n_in``, or as many as the deepest index needs."""
        return max(self.indices, default=-1) + 1 if self.n_in is None else self.n_in

    @functools.cached_property
    def signature(self) -> Signature:
        # If it reads deeper than it pops, it takes all that it reads, and gives the rest back.
        n_read = max(self._n_popped, max(self.indices, default=-1) + 1)
        return Signature(n_read, len(self.indices) + n_read - self._n_popped)

    def _run(self, stack: Stack, steps: Steps) -> Stack:
        return put(pick(stack, self.indices), take(stack, self._n_popped)[1])

    def _check(self) -> None:
        try:
            indices = tuple(self.indices)
        except Exception as error:  # an arbitrary object may raise anything when it is iterated
            raise errors.not_integers("select", "indices", repr(self.indices)) from error
        self.indices = tuple(as_integer("select", "indices", index) for index in indices)
        for index in self.indices:
            if index < 0:
                raise errors.negative_index(index)
        if self.n_in is not None:
            self.n_in = as_integer("select", "n_in", self.n_in)
        check_item_count("select", "n_in", self._n_popped)

    @static_property
    def _arguments(self) -> list[Argument]:
        asked = [] if self.n_in is None else [("n_in=", self.n_in)]
        return [("", self.indices), *asked]


class _NamedSelect(Combinator):
    """A selection of the top ``n_in`` items that has a name."""

    n_in: int = 1

    def _check(self) -> None:
        self.n_in = as_integer(self._kind, "n_in", self.n_in)
        check_item_count(self._kind, "n_in", self.n_in)
        super()._check()


class Dup(_NamedSelect):
    """A copy of the top items. See :func:`dup`."""

    def expand(self) -> Combinator:
        return select((*range(self.n_in), *range(self.n_in)), n_in=self.n_in)


class Drop(_NamedSelect):
    """The removal of the top items. See :func:`drop`."""

    def expand(self) -> Combinator:
        return select((), n_in=self.n_in)


class Identity(_NamedSelect):
    """The top items, unchanged. See :func:`identity`."""

    def expand(self) -> Combinator:
        return select(range(self.n_in), n_in=self.n_in)


class Swap(Combinator):
    """The exchange of the top two items. See :func:`swap`."""

    def expand(self) -> Combinator:
        return select((1, 0))


def select(indices: Iterable[int], n_in: int | None = None) -> Select:
    """Takes items off the stack, and puts those at the given indices there.

    Args:
        indices: the indices of the items to put on the stack, counted from the top, index 0. An
            index may occur more than once.
        n_in: how many items to take off: by default as many as the deepest index needs. An item
            that lies deeper than that is copied, and stays where it was.

    Returns:
        A combinator.

    Raises:
        SignatureError: If an index is negative.
        TypeError: If an index is not an integer.
        ValueError: If ``n_in`` is negative.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.select((1, 1))("a", "b", "c")
        ('b', 'b', 'c')
        >>> p = cb.select((2,), n_in=0)
        >>> p("a", "b", "c"), str(p.signature)
        (('c', 'a', 'b', 'c'), '3 -> 4')
    """
    return Select(indices=indices, n_in=n_in)  # type: ignore[arg-type]  # it makes a tuple of them


def dup(n_in: int = 1) -> Dup:
    """Copies the top ``n_in`` items: ``dup(2)`` takes a, b and gives a, b, a, b.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``select((0, .., n_in - 1, 0, .., n_in - 1))``.

    Raises:
        TypeError: If ``n_in`` is not an integer.
        ValueError: If ``n_in`` is negative.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.dup(2)("a", "b", "c")
        ('a', 'b', 'a', 'b', 'c')
    """
    return Dup(n_in=n_in)


def drop(n_in: int = 1) -> Drop:
    """Removes the top ``n_in`` items.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``select((), n_in)``.

    Raises:
        TypeError: If ``n_in`` is not an integer.
        ValueError: If ``n_in`` is negative.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.drop()("a", "b")
        'b'
    """
    return Drop(n_in=n_in)


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
    """Passes the top ``n_in`` items through.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``select((0, .., n_in - 1))``.

    Raises:
        TypeError: If ``n_in`` is not an integer.
        ValueError: If ``n_in`` is negative.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.identity(2)("a", "b")
        ('a', 'b')
    """
    return Identity(n_in=n_in)
