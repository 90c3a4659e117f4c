"""Many items into one, and one into many. The top of the stack comes first.

>>> from flax_extra import combinator as cb
>>> cb.sub()(10, 4), cb.fold(lambda a, b: f"({a} {b})", n_in=3)("x", "y", "z")
(6, '((x y) z)')
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_extra.combinator import _errors
from flax_extra.combinator._base import Combinator, only_child, reading
from flax_extra.combinator._expression import expression
from flax_extra.combinator._inference import shorten
from flax_extra.combinator._leaf import fn
from flax_extra.combinator._run import Flow, Steps
from flax_extra.combinator._shuffle import check_items, integer
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._stack import Stack, put, take


class Fold(Combinator):
    """A left fold of the top items. See :func:`fold`."""

    n_in: int = 2

    @functools.cached_property
    def signature(self) -> Signature:
        return Signature(self.n_in, 1)

    def flow(self, stack: Stack, steps: Steps) -> Flow:
        items, rest = take(stack, self.n_in)
        folded = items[:1]
        for item in items[1:]:
            folded = yield 0, put(folded, (item,))
        return put(folded, rest)

    def _check(self) -> None:
        check_items("fold", "n_in", self.n_in, least=1)
        signature = self.children[0].signature
        if (signature.n_in, signature.n_out) != (2, 1):
            text = shorten(expression(self.children[0].target))
            raise _errors.not_binary(str(signature), text)


class _Arithmetic(Combinator):
    """What the folds of arithmetic have in common."""

    n_in: int = 2

    operation: ClassVar[str]

    def expand(self) -> Combinator:  # type: ignore[override]  # it has no children
        return fold(getattr(operator, self.operation), self.n_in)

    @reading
    def advice(self) -> str:
        return _errors.advice_on_sum()

    def _check(self) -> None:
        check_items(self.kind, "n_in", self.n_in, least=1)
        super()._check()


class Add(_Arithmetic):
    """The sum of the top items. See :func:`add`."""

    operation = "add"


class Sub(_Arithmetic):
    """The top item less those beneath. See :func:`sub`."""

    operation = "sub"


class Mul(_Arithmetic):
    """The product of the top items. See :func:`mul`."""

    operation = "mul"


class Div(_Arithmetic):
    """The top item divided by those beneath. See :func:`div`."""

    operation = "truediv"


class Concatenate(Combinator):
    """The top items along one axis. See :func:`concatenate`."""

    axis: int = -1
    n_in: int = 2

    def expand(self) -> Combinator:  # type: ignore[override]  # it has no children
        return fn(functools.partial(_concatenate, self.axis), n_in=self.n_in, n_out=1)

    @reading
    def advice(self) -> str:
        return _errors.advice_on_concatenate(self.axis)

    def _check(self) -> None:
        check_items("concatenate", "n_in", self.n_in, least=1)
        super()._check()


class Split(Combinator):
    """The top item, cut along one axis. See :func:`split`."""

    n_out: int = 2
    axis: int = -1

    def expand(self) -> Combinator:  # type: ignore[override]  # it has no children
        cut = functools.partial(_split, self.n_out, self.axis)
        return fn(cut, n_in=1, n_out=self.n_out)

    @reading
    def advice(self) -> str:
        return _errors.advice_on_split(self.n_out, self.axis)

    def _check(self) -> None:
        check_items("split", "n_out", self.n_out, least=1)
        super()._check()


def fold(f: Callable[[Any, Any], Any], n_in: int = 2) -> Fold:
    """A left fold from the top: ``fold(f, 3)`` takes a, b, c and gives ``f(f(a, b), c)``.

    Args:
        f: a callable of two items that gives one.
        n_in: how many items to fold.

    Returns:
        A combinator with signature ``n_in -> 1``.

    Raises:
        SignatureError: where ``f`` is not of two items, or gives other than one.
        TypeError, ValueError: where ``f`` is not callable or ``n_in`` below 1.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> cb.fold(operator.floordiv, n_in=3)(100, 7, 2)
        7
    """
    return Fold(only_child("fold", f), n_in=integer("fold", "n_in", n_in))


def add(n_in: int = 2) -> Add:
    """The sum of the top ``n_in`` items.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.add, n_in)``.

    Raises:
        TypeError, ValueError: where ``n_in`` is not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.add(3)(1, 10, 100)
        111
    """
    return Add(n_in=integer("add", "n_in", n_in))


def sub(n_in: int = 2) -> Sub:
    """The top item less those beneath it.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.sub, n_in)``.

    Raises:
        TypeError, ValueError: where ``n_in`` is not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.sub(3)(100, 10, 1)
        89
    """
    return Sub(n_in=integer("sub", "n_in", n_in))


def mul(n_in: int = 2) -> Mul:
    """The product of the top ``n_in`` items.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.mul, n_in)``.

    Raises:
        TypeError, ValueError: where ``n_in`` is not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.mul()(6, 7)
        42
    """
    return Mul(n_in=integer("mul", "n_in", n_in))


def div(n_in: int = 2) -> Div:
    """The top item divided by those beneath it.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.truediv, n_in)``.

    Raises:
        TypeError, ValueError: where ``n_in`` is not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.div()(1, 4)
        0.25
    """
    return Div(n_in=integer("div", "n_in", n_in))


def concatenate(axis: int = -1, n_in: int = 2) -> Concatenate:
    """Joins the top ``n_in`` arrays along an axis, the top first.

    Args:
        axis: the axis along which they are joined; they agree in all others.
        n_in: how many arrays.

    Returns:
        A combinator with signature ``n_in -> 1``.

    Raises:
        TypeError, ValueError: where an argument is not a number that makes sense.

    Example:
        >>> import numpy as np
        >>> from flax_extra import combinator as cb
        >>> cb.concatenate()(np.zeros((2, 3)), np.zeros((2, 4))).shape
        (2, 7)
        >>> cb.concatenate()
        Concatenate(signature=Signature(n_in=2, n_out=1, start_index=0, in_shape=((), ())), axis=-1)
    """
    return Concatenate(
        axis=integer("concatenate", "axis", axis), n_in=integer("concatenate", "n_in", n_in)
    )


def split(n_out: int, axis: int = -1) -> Split:
    """Cuts the top array into ``n_out`` equal parts along an axis, the first on top.

    Args:
        n_out: how many parts.
        axis: the axis along which it is cut; ``n_out`` divides its length.

    Returns:
        A combinator with signature ``1 -> n_out``.

    Raises:
        TypeError, ValueError: where an argument is not a number that makes sense; at the call,
            where the axis cannot be cut so.

    Example:
        >>> import numpy as np
        >>> from flax_extra import combinator as cb
        >>> [part.shape for part in cb.split(3)(np.zeros((2, 6)))]
        [(2, 2), (2, 2), (2, 2)]
    """
    return Split(n_out=integer("split", "n_out", n_out), axis=integer("split", "axis", axis))


def _concatenate(axis: int, *items: Any) -> jax.Array:
    return jnp.concatenate(items, axis)


def _split(n_out: int, axis: int, item: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.split(item, n_out, axis))
