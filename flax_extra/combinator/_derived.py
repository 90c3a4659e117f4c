"""Combinators written from the others.

>>> from flax_extra import combinator as cb
>>> f, g = cb.fn(abs), cb.fn(round)
>>> cb.branch(f, g)(-1) == (cb.select((0, 0)) >> cb.parallel(f, g))(-1)
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from flax_extra.combinator import _errors
from flax_extra.combinator._base import OPERATORS, Combinator, join, only_child, reading
from flax_extra.combinator._children import Child, Children, child_of
from flax_extra.combinator._expression import Argument, expression
from flax_extra.combinator._flow import parallel, serial
from flax_extra.combinator._inference import infer_signature, shorten
from flax_extra.combinator._merge import add
from flax_extra.combinator._shuffle import check_items, identity, integer, select


class Branch(Combinator):
    """Callables on the same items. See :func:`branch`."""

    def expand(self, *children: Callable[..., Any]) -> Combinator:
        spans = [range(infer_signature(child).n_in) for child in children]
        indices = [index for span in spans for index in span]
        return select(indices, n_in=max(map(len, spans), default=0)) >> parallel(*children)

    def _check(self) -> None:
        """Nothing can be wrong with it, so its meaning can wait until it is asked for."""


class Residual(Combinator):
    """A body and a shortcut around it, added. See :func:`residual`."""

    def expand(self, *children: Callable[..., Any]) -> Combinator:
        *body, shortcut = children
        return branch(serial(*body), shortcut) >> add()

    @reading
    def advice(self) -> str:
        return _errors.advice_on_residual()

    @reading
    def body(self) -> Children:
        """The callables in series that the shortcut leads around."""
        return Children(self.children.items[:-1])

    @reading
    def shortcut(self) -> Callable[..., Any]:
        """The callable on the other side.

        Example:
            >>> from flax_extra import combinator as cb
            >>> cb.residual(abs).shortcut
            Identity(signature=Signature(n_in=1, n_out=1, start_index=0, in_shape=((),)))
        """
        around: Callable[..., Any] = self._part(self.children[-1])
        return around

    @reading
    def parts(self) -> Children:
        return self.body

    def with_parts(self, parts: Children) -> Children:
        return parts.joined(Children(self.children.items[-1:]))

    def segment(self, index: int) -> str:
        is_body = index < len(self.children) - 1
        return super().segment(index) if is_body else f"{self.label}[shortcut]"

    def _check(self) -> None:
        body = serial(self.body)
        for side, child in (("body", child_of(body)), ("shortcut", self.children[-1])):
            if child.signature.n_out != 1:
                raise _errors.residual_arity(side, str(child.signature), _text(child))
        super()._check()

    @reading
    def arguments(self) -> list[Argument]:
        body: list[Argument] = [("", child.target) for child in self.body]
        if type(self.shortcut) is type(identity()) and self.shortcut == identity():
            return body
        return [*body, ("shortcut=", self.shortcut)]


class Keep(Combinator):
    """A callable that leaves its last inputs on the stack. See :func:`keep`."""

    n: int = 1

    def expand(self, f: Callable[..., Any]) -> Combinator:  # type: ignore[override]  # one child
        n_in = infer_signature(f).n_in
        return select((*range(n_in), *range(n_in - self.n, n_in)), n_in=n_in) >> serial(f)

    def _check(self) -> None:
        check_items("keep", "n", self.n)
        child = self.children[0]
        if self.n > child.signature.n_in:
            raise _errors.keep_too_deep(self.n, str(child.signature), _text(child))
        super()._check()


class Dip(Combinator):
    """A callable beneath the top of the stack. See :func:`dip`."""

    n: int = 1

    def expand(self, f: Callable[..., Any]) -> Combinator:  # type: ignore[override]  # one child
        return parallel(identity(self.n), f)

    def _check(self) -> None:
        check_items("dip", "n", self.n)
        super()._check()


def branch(*fs: Callable[..., Any] | Iterable[Any], name: str | None = None) -> Branch:
    """Callables on the same items: each reads the top of the stack.

    ``F`` takes a, ``G`` takes a, b: then ``branch(F, G)`` takes a, b and gives what ``F`` gives
    and, beneath, what ``G`` gives.

    Args:
        fs: callables or (nested) iterables of callables.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; ``f & g`` builds the same, and so does ``select(spans) >> parallel(f, g)``.

    Raises:
        TypeError: where an argument is not callable.
        SignatureError: where a signature cannot be inferred.
        SharingError: where one layer is used both in and outside of a ``repeat``.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> cb.branch(abs, operator.add)(-1, 10, 100)
        (1, 9, 100)
    """
    return Branch(Children.of(fs), name=name)


def residual(
    *fs: Callable[..., Any] | Iterable[Any],
    shortcut: Callable[..., Any] | None = None,
    name: str | None = None,
) -> Residual:
    """Callables in series, and a shortcut around them, added.

    Args:
        fs: callables or (nested) iterables of callables: the body. It may take more than one
            item, and gives one.
        shortcut: what is added to the body's output, ``identity()`` by default. It reads the same
            items, and gives one.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; the same as ``branch(serial(*fs), shortcut) >> add()``. It is a sequence of
        its body.

    Raises:
        SignatureError: where body or shortcut give other than one output.
        TypeError: where an argument is not callable.
        SharingError: where one layer is used both in and outside of a ``repeat``.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> cb.residual(abs)(-3)
        0
        >>> attend = cb.residual(abs, operator.mul, shortcut=abs)
        >>> attend(-3, 10), str(attend.signature)
        (33, '2 -> 1')
    """
    body = Children.of(fs)
    around = only_child("residual(shortcut=...)", identity() if shortcut is None else shortcut)
    return Residual(body.joined(around), name=name)


def keep(f: Callable[..., Any], n: int = 1) -> Keep:
    """A callable whose last inputs stay on the stack, beneath its outputs.

    ``F`` takes x, mask and gives y: then ``keep(F)`` gives y, mask, so that the next block finds
    the mask where this one did.

    Args:
        f: a callable.
        n: how many of its last inputs stay.

    Returns:
        A combinator with signature ``n_in -> n_out + n``.

    Raises:
        SignatureError: where ``f`` takes fewer than ``n`` items.
        TypeError, ValueError: where ``f`` is not callable or ``n`` not a number of items.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> p = cb.keep(operator.add)
        >>> p(1, 10), (p >> p)(1, 10)
        ((11, 10), (21, 10))
    """
    return Keep(only_child("keep", f), n=integer("keep", "n", n))


def dip(f: Callable[..., Any], n: int = 1) -> Dip:
    """A callable on what lies beneath the top ``n`` items.

    Args:
        f: a callable.
        n: how many items to leave alone.

    Returns:
        A combinator; the same as ``parallel(identity(n), f)``.

    Raises:
        TypeError, ValueError: where ``f`` is not callable or ``n`` not a number of items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.dip(abs)(-1, -2, -3)
        (-1, 2, -3)
    """
    return Dip(only_child("dip", f), n=integer("dip", "n", n))


def _text(child: Child) -> str:
    return shorten(expression(child.target))


OPERATORS["&"] = functools.partial(join, Branch)
