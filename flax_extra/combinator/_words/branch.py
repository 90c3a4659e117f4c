"""``branch``, ``residual``, ``keep`` and ``dip``, which are written from the others.

>>> from flax_extra import combinator as cb
>>> f, g = cb.fn(abs), cb.fn(round)
>>> cb.branch(f, g)(-1) == (cb.select((0, 0)) >> cb.parallel(f, g))(-1)
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Self

from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.checks import as_integer, check_item_count
from flax_extra.combinator._core.children import (
    Children,
    Shortcut,
    check_only_child,
    make_child,
    make_only_child,
)
from flax_extra.combinator._core.combinator import OPERATORS, Combinator, join_operands
from flax_extra.combinator._core.expression import Argument, format_short
from flax_extra.combinator._core.inference import infer_signature
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._words.compose import parallel, serial
from flax_extra.combinator._words.merge import add
from flax_extra.combinator._words.select import identity, select


class Branch(Combinator):
    """Callables on the same items. See :func:`branch`."""

    def expand(self, *children: Callable[..., Any]) -> Combinator:
        spans = [range(infer_signature(child).n_in) for child in children]
        indices = [index for span in spans for index in span]
        return select(indices, n_in=max(map(len, spans), default=0)) >> parallel(*children)

    def _check(self) -> None:
        """Nothing can be wrong with a branch, so it is not expanded before it runs."""


class Residual(Combinator):
    """A body and a shortcut around it, added. See :func:`residual`."""

    def expand(self, *children: Callable[..., Any]) -> Combinator:
        *body, shortcut = children
        return branch(serial(*body), shortcut) >> add()

    def __post_init__(self) -> None:
        given: object = self.children
        children = given if isinstance(given, Children) else Children.of(given)
        if not children.items or not isinstance(children.items[-1], Shortcut):
            self.children = children.concatenate(_make_shortcut(identity()))
        super().__post_init__()

    @nn.nowrap
    def clone(self, *, parent: Any = None, **updates: Any) -> Self:
        given = updates.get("children")
        if given is not None and not isinstance(given, Children):
            updates["children"] = self._replace_parts(Children.of(given))
        return super().clone(parent=parent, **updates)

    @static_property
    def _advice(self) -> str:
        return errors.advise_on_residual()

    @static_property
    def _body(self) -> Children:
        return Children(self.children.items[:-1])

    @static_property
    def shortcut(self) -> Callable[..., Any]:
        """The callable whose output is added to that of the body.

        Example:
            >>> from flax_extra import combinator as cb
            >>> cb.residual(abs).shortcut
            Identity(signature=Signature(n_in=1, n_out=1, start_index=0, in_shape=((),)))
        """
        shortcut: Callable[..., Any] = self._get_part(self.children[-1])
        return shortcut

    @static_property
    def _parts(self) -> Children:
        return self._body

    def _replace_parts(self, parts: Children) -> Children:
        return parts.concatenate(Children(self.children.items[-1:]))

    def _name_child(self, index: int) -> str:
        is_body = index < len(self.children) - 1
        return super()._name_child(index) if is_body else f"{self._label}[shortcut]"

    def _check(self) -> None:
        body = serial(self._body)
        for side, child in (("body", make_child(body)), ("shortcut", self.children[-1])):
            if child.signature.n_out != 1:
                raise errors.residual_arity(side, str(child.signature), format_short(child.target))
        super()._check()

    @static_property
    def _arguments(self) -> list[Argument]:
        body: list[Argument] = [("", child.target) for child in self._body]
        if type(self.shortcut) is type(identity()) and self.shortcut == identity():
            return body
        return [*body, ("shortcut=", self.shortcut)]


class Keep(Combinator):
    """A callable that leaves its last inputs on the stack. See :func:`keep`."""

    n: int = 1

    def expand(self, f: Callable[..., Any]) -> Combinator:
        n_in = infer_signature(f).n_in
        return select((*range(n_in), *range(n_in - self.n, n_in)), n_in=n_in) >> serial(f)

    def _check(self) -> None:
        check_only_child("keep", self.children)
        self.n = as_integer("keep", "n", self.n)
        check_item_count("keep", "n", self.n)
        child = self.children[0]
        if self.n > child.signature.n_in:
            raise errors.keep_too_deep(self.n, str(child.signature), format_short(child.target))
        super()._check()


class Dip(Combinator):
    """A callable beneath the top of the stack. See :func:`dip`."""

    n: int = 1

    def expand(self, f: Callable[..., Any]) -> Combinator:
        return parallel(identity(self.n), f)

    def _check(self) -> None:
        check_only_child("dip", self.children)
        self.n = as_integer("dip", "n", self.n)
        check_item_count("dip", "n", self.n)
        super()._check()


def branch(*fs: Callable[..., Any] | Iterable[Any], name: str | None = None) -> Branch:
    """Runs callables on the same items: each reads the top of the stack.

    If ``F`` takes a, and ``G`` takes a, b, then ``branch(F, G)`` takes a, b. It gives the outputs
    of ``F`` and, beneath, the outputs of ``G``.

    Args:
        fs: callables or (nested) iterables of callables.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; ``f & g`` builds the same, and so does ``select(spans) >> parallel(f, g)``.

    Raises:
        TypeError: If an argument is not callable.
        SignatureError: If a signature cannot be inferred.
        SharingError: If one layer is used both in a ``repeat`` and outside of it.

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
    """Adds the output of callables in series to that of a shortcut around them.

    Args:
        fs: callables or (nested) iterables of callables: the body. It may take several items, and
            gives one.
        shortcut: the callable whose output is added to that of the body, ``identity()`` by
            default. It reads the same items, and gives one.
        name: opens a scope of that name in the parameter tree.

    Returns:
        A combinator; the same as ``branch(serial(*fs), shortcut) >> add()``. It is a sequence of
        its body.

    Raises:
        SignatureError: If the body or the shortcut does not give exactly one output.
        TypeError: If an argument is not callable.
        SharingError: If one layer is used both in a ``repeat`` and outside of it.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> cb.residual(abs)(-3)
        0
        >>> attend = cb.residual(abs, operator.mul, shortcut=abs)
        >>> attend(-3, 10), str(attend.signature)
        (33, '2 -> 1')
    """
    around = _make_shortcut(identity() if shortcut is None else shortcut)
    return Residual(Children.of(fs).concatenate(around), name=name)


def _make_shortcut(f: Callable[..., Any]) -> Children:
    (child,) = make_only_child("residual(shortcut=...)", f)
    return Children([Shortcut(child.target, child.call_spec, child.fixed)])


def keep(f: Callable[..., Any], n: int = 1) -> Keep:
    """Runs a callable, and keeps its last inputs on the stack, beneath its outputs.

    If ``F`` takes x, mask and gives y, then ``keep(F)`` takes x, mask and gives y, mask. The next
    block finds the mask at the same place.

    Args:
        f: a callable.
        n: how many of its last inputs stay.

    Returns:
        A combinator with signature ``n_in -> n_out + n``.

    Raises:
        SignatureError: If ``f`` takes fewer than ``n`` items.
        TypeError: If ``f`` is not callable, or ``n`` is not an integer.
        ValueError: If ``n`` is negative.

    Example:
        >>> import operator
        >>> from flax_extra import combinator as cb
        >>> p = cb.keep(operator.add)
        >>> p(1, 10), (p >> p)(1, 10)
        ((11, 10), (21, 10))
    """
    return Keep(make_only_child("keep", f), n=n)


def dip(f: Callable[..., Any], n: int = 1) -> Dip:
    """Runs a callable on the items beneath the top ``n``.

    Args:
        f: a callable.
        n: how many items to leave on top, untouched.

    Returns:
        A combinator; the same as ``parallel(identity(n), f)``.

    Raises:
        TypeError: If ``f`` is not callable, or ``n`` is not an integer.
        ValueError: If ``n`` is negative.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.dip(abs)(-1, -2, -3)
        (-1, 2, -3)
    """
    return Dip(make_only_child("dip", f), n=n)


OPERATORS["&"] = functools.partial(join_operands, Branch)
