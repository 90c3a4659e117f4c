"""``serial`` and ``parallel``: callables one after the other, or side by side.

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

from flax_extra.combinator._core.children import Children
from flax_extra.combinator._core.combinator import OPERATORS, Combinator, join_operands
from flax_extra.combinator._core.run import Flow, Steps
from flax_extra.combinator._core.signature import Signature, compose_in_parallel, compose_in_series
from flax_extra.combinator._core.stack import Stack, put, take


class Serial(Combinator):
    """Callables one after the other. See :func:`serial`."""

    @functools.cached_property
    def signature(self) -> Signature:
        return compose_in_series(child.signature for child in self.children)

    def _run(self, stack: Stack, steps: Steps) -> Flow:
        for index in range(len(self.children)):
            stack = yield index, stack
        return stack


class Parallel(Combinator):
    """Callables side by side. See :func:`parallel`."""

    @functools.cached_property
    def signature(self) -> Signature:
        return compose_in_parallel(child.signature for child in self.children)

    def _run(self, stack: Stack, steps: Steps) -> Flow:
        taken, rest = take(stack, self.signature.n_in)
        outputs: Stack = ()
        for index, child in enumerate(self.children):
            given, taken = take(taken, child.signature.n_in)
            outputs = put(outputs, (yield index, given))
        return put(outputs, rest)


def serial(*fs: Callable[..., Any] | Iterable[Any], name: str | None = None) -> Serial:
    """Runs callables one after the other, on one stack.

    If ``F`` takes a and gives b, and ``G`` takes b, c, then ``serial(F, G)`` takes a, c. Items that
    a callable does not take stay where they are.

    Args:
        fs: callables or (nested) iterables of callables. Without any, all items pass through.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; ``f >> g`` builds the same.

    Raises:
        TypeError: If an argument is not callable.
        SignatureError: If a signature cannot be inferred.
        SharingError: If one layer is used both in a ``repeat`` and outside of it.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> p = cb.serial(abs, operator.add)
        >>> p(-1, 10, 100), str(p.signature)
        ((11, 100), '2 -> 1')
    """
    return Serial(Children.of(fs), name=name)


def parallel(*fs: Callable[..., Any] | Iterable[Any], name: str | None = None) -> Parallel:
    """Runs callables side by side: each takes the next span of the stack.

    If ``F`` takes a, and ``G`` takes b, c, then ``parallel(F, G)`` takes a, b, c. It gives the
    outputs of ``F`` and, beneath, the outputs of ``G``.

    Args:
        fs: callables or (nested) iterables of callables.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; ``f @ g`` builds the same.

    Raises:
        TypeError: If an argument is not callable.
        SignatureError: If a signature cannot be inferred.
        SharingError: If one layer is used both in a ``repeat`` and outside of it.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> cb.parallel(abs, operator.add)(-1, 10, 100)
        (1, 110)
    """
    return Parallel(Children.of(fs), name=name)


OPERATORS[">>"] = functools.partial(join_operands, Serial)
OPERATORS["@"] = functools.partial(join_operands, Parallel)
