"""Where data flows: one after the other, or side by side.

>>> from operator import neg
>>> from flax_extra import combinator as cb
>>> f, g, h, k = map(cb.fn, (abs, round, neg, abs))
>>> cb.serial(f, cb.serial(g, h))(-1.5) == cb.serial(cb.serial(f, g), h)(-1.5)
True
>>> ((f @ h) >> (g @ k))(-1.5, 2) == ((f >> g) @ (h >> k))(-1.5, 2)
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from flax_extra.combinator._base import OPERATORS, Combinator, join, reading
from flax_extra.combinator._children import Children
from flax_extra.combinator._run import Flow, Steps
from flax_extra.combinator._signature import Signature, in_parallel, in_series
from flax_extra.combinator._stack import Stack, put, take


class Serial(Combinator):
    """Callables one after the other. See :func:`serial`."""

    @functools.cached_property
    def signature(self) -> Signature:
        return in_series(child.signature for child in self.children)

    def flow(self, stack: Stack, steps: Steps) -> Flow:
        for index in range(len(self.children)):
            stack = yield index, stack
        return stack


class Parallel(Combinator):
    """Callables side by side. See :func:`parallel`."""

    @functools.cached_property
    def signature(self) -> Signature:
        return in_parallel(child.signature for child in self.children)

    @reading
    def spans(self) -> tuple[Signature, ...]:
        """The children's signatures, each where it reads the stack.

        Example:
            >>> from flax_extra import combinator as cb
            >>> [s.index_bounds for s in cb.parallel(cb.add(), abs, cb.add()).spans]
            [(0, 2), (2, 3), (3, 5)]
        """
        start, spans = 0, []
        for child in self.children:
            spans.append(child.signature.at(start))
            start += child.signature.n_in
        return tuple(spans)

    def flow(self, stack: Stack, steps: Steps) -> Flow:
        taken, rest = take(stack, self.signature.n_in)
        outputs: Stack = ()
        for index, child in enumerate(self.children):
            given, taken = take(taken, child.signature.n_in)
            outputs = put(outputs, (yield index, given))
        return put(outputs, rest)


def serial(*fs: Callable[..., Any] | Iterable[Any], name: str | None = None) -> Serial:
    """Callables one after the other, on one stack.

    ``F`` takes a and gives b, ``G`` takes b, c: then ``serial(F, G)`` takes a, c. What a callable
    does not take passes beneath it.

    Args:
        fs: callables or (nested) iterables of callables. None at all passes everything through.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; ``f >> g`` builds the same.

    Raises:
        TypeError: where an argument is not callable.
        SignatureError: where a signature cannot be inferred.
        SharingError: where one layer is used both in and outside of a ``repeat``.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> p = cb.serial(abs, operator.add)
        >>> p(-1, 10, 100), str(p.signature)
        ((11, 100), '2 -> 1')
    """
    return Serial(Children.of(fs), name=name)


def parallel(*fs: Callable[..., Any] | Iterable[Any], name: str | None = None) -> Parallel:
    """Callables side by side: each takes the next span of the stack.

    ``F`` takes a, ``G`` takes b, c: then ``parallel(F, G)`` takes a, b, c and gives what ``F``
    gives and, beneath, what ``G`` gives.

    Args:
        fs: callables or (nested) iterables of callables.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; ``f @ g`` builds the same.

    Raises:
        TypeError: where an argument is not callable.
        SignatureError: where a signature cannot be inferred.
        SharingError: where one layer is used both in and outside of a ``repeat``.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> cb.parallel(abs, operator.add)(-1, 10, 100)
        (1, 110)
    """
    return Parallel(Children.of(fs), name=name)


OPERATORS[">>"] = functools.partial(join, Serial)
OPERATORS["@"] = functools.partial(join, Parallel)
