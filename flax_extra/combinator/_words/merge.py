"""``fold``, ``concatenate`` and ``split``: many items into one, and one into many.

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

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.checks import as_integer, check_item_count
from flax_extra.combinator._core.children import check_only_child, make_only_child
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.expression import format_short
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Flow, Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack, put, take
from flax_extra.combinator._words.fn import fn


class Fold(Combinator):
    """A left fold of the top items. See :func:`fold`."""

    n_in: int = 2

    @functools.cached_property
    def signature(self) -> Signature:
        return Signature(self.n_in, 1)

    def _run(self, stack: Stack, steps: Steps) -> Flow:
        items, rest = take(stack, self.n_in)
        folded = items[:1]
        for item in items[1:]:
            folded = yield 0, put(folded, (item,))
        return put(folded, rest)

    def _check(self) -> None:
        check_only_child("fold", self.children)
        self.n_in = as_integer("fold", "n_in", self.n_in)
        check_item_count("fold", "n_in", self.n_in, least=1)
        signature = self.children[0].signature
        if (signature.n_in, signature.n_out) != (2, 1):
            raise errors.not_binary(str(signature), format_short(self.children[0].target))


class _Arithmetic(Combinator):
    """A fold by an operator of arithmetic."""

    n_in: int = 2

    _operator: ClassVar[str]

    def expand(self) -> Combinator:
        return fold(getattr(operator, self._operator), self.n_in)

    @static_property
    def _advice(self) -> str:
        return errors.advise_on_sum()

    def _check(self) -> None:
        self.n_in = as_integer(self._kind, "n_in", self.n_in)
        check_item_count(self._kind, "n_in", self.n_in, least=1)
        super()._check()


class Add(_Arithmetic):
    """The sum of the top items. See :func:`add`."""

    _operator = "add"


class Sub(_Arithmetic):
    """The top item minus those beneath. See :func:`sub`."""

    _operator = "sub"


class Mul(_Arithmetic):
    """The product of the top items. See :func:`mul`."""

    _operator = "mul"


class Div(_Arithmetic):
    """The top item divided by those beneath. See :func:`div`."""

    _operator = "truediv"


class Concatenate(Combinator):
    """The top items along one axis. See :func:`concatenate`."""

    axis: int = -1
    n_in: int = 2

    def expand(self) -> Combinator:
        return fn(functools.partial(_concatenate, self.axis), n_in=self.n_in, n_out=1)

    @static_property
    def _advice(self) -> str:
        return errors.advise_on_concatenate(self.axis)

    def _check(self) -> None:
        self.axis = as_integer("concatenate", "axis", self.axis)
        self.n_in = as_integer("concatenate", "n_in", self.n_in)
        check_item_count("concatenate", "n_in", self.n_in, least=1)
        super()._check()


class Split(Combinator):
    """The top item, cut along one axis. See :func:`split`."""

    n_out: int = 2
    axis: int = -1

    def expand(self) -> Combinator:
        cut = functools.partial(_split, self.n_out, self.axis)
        return fn(cut, n_in=1, n_out=self.n_out)

    @static_property
    def _advice(self) -> str:
        return errors.advise_on_split(self.n_out, self.axis)

    def _check(self) -> None:
        self.n_out = as_integer("split", "n_out", self.n_out)
        self.axis = as_integer("split", "axis", self.axis)
        check_item_count("split", "n_out", self.n_out, least=1)
        super()._check()


def fold(f: Callable[[Any, Any], Any], n_in: int = 2) -> Fold:
    """Folds items from the top: ``fold(f, 3)`` takes a, b, c and gives ``f(f(a, b), c)``.

    Args:
        f: a callable that takes two items and gives one.
        n_in: how many items to fold.

    Returns:
        A combinator with signature ``n_in -> 1``.

    Raises:
        SignatureError: If ``f`` does not take two items and give one.
        TypeError: If ``f`` is not callable, or ``n_in`` is not an integer.
        ValueError: If ``n_in`` is below 1.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> cb.fold(operator.floordiv, n_in=3)(100, 7, 2)
        7
    """
    return Fold(make_only_child("fold", f), n_in=n_in)


def add(n_in: int = 2) -> Add:
    """Adds the top ``n_in`` items.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.add, n_in)``.

    Raises:
        TypeError: If ``n_in`` is not an integer.
        ValueError: If ``n_in`` is below 1.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.add(3)(1, 10, 100)
        111
    """
    return Add(n_in=n_in)


def sub(n_in: int = 2) -> Sub:
    """Subtracts from the top item the ``n_in - 1`` items beneath it.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.sub, n_in)``.

    Raises:
        TypeError: If ``n_in`` is not an integer.
        ValueError: If ``n_in`` is below 1.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.sub(3)(100, 10, 1)
        89
    """
    return Sub(n_in=n_in)


def mul(n_in: int = 2) -> Mul:
    """Multiplies the top ``n_in`` items.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.mul, n_in)``.

    Raises:
        TypeError: If ``n_in`` is not an integer.
        ValueError: If ``n_in`` is below 1.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.mul()(6, 7)
        42
    """
    return Mul(n_in=n_in)


def div(n_in: int = 2) -> Div:
    """Divides the top item by the ``n_in - 1`` items beneath it.

    Args:
        n_in: how many items.

    Returns:
        A combinator; the same as ``fold(operator.truediv, n_in)``.

    Raises:
        TypeError: If ``n_in`` is not an integer.
        ValueError: If ``n_in`` is below 1.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.div()(1, 4)
        0.25
    """
    return Div(n_in=n_in)


def concatenate(axis: int = -1, n_in: int = 2) -> Concatenate:
    """Joins the top ``n_in`` arrays along an axis, the top one first.

    Args:
        axis: the axis along which they are joined. All their other axes must agree.
        n_in: how many arrays.

    Returns:
        A combinator with signature ``n_in -> 1``.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If ``n_in`` is below 1.

    Example:
        >>> import numpy as np
        >>> from flax_extra import combinator as cb
        >>> cb.concatenate()(np.zeros((2, 3)), np.zeros((2, 4))).shape
        (2, 7)
        >>> cb.concatenate()
        Concatenate(signature=Signature(n_in=2, n_out=1, start_index=0, in_shape=((), ())), axis=-1)
    """
    return Concatenate(axis=axis, n_in=n_in)


def split(n_out: int, axis: int = -1) -> Split:
    """Cuts the top array into ``n_out`` equal parts along an axis. The first part is on top.

    Args:
        n_out: how many parts.
        axis: the axis along which it is cut; ``n_out`` divides its length.

    Returns:
        A combinator with signature ``1 -> n_out``.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If ``n_out`` is below 1; at the call, if it does not divide the axis.

    Example:
        >>> import numpy as np
        >>> from flax_extra import combinator as cb
        >>> [part.shape for part in cb.split(3)(np.zeros((2, 6)))]
        [(2, 2), (2, 2), (2, 2)]
    """
    return Split(n_out=n_out, axis=axis)


def _concatenate(axis: int, *items: Any) -> jax.Array:
    return jnp.concatenate(items, axis)


def _split(n_out: int, axis: int, item: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.split(item, n_out, axis))
