"""``fn``: says how a callable meets the stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.children import Child, Children, check_only_child, make_child
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import shorten
from flax_extra.combinator._core.expression import Argument
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.run import Flow, Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack


class Fn(Combinator):
    """A callable with its place on the stack declared. See :func:`fn`."""

    _is_visible: ClassVar[bool] = False

    @functools.cached_property
    def signature(self) -> Signature:
        return self.children[0].signature

    def _check(self) -> None:
        check_only_child("fn", self.children)

    def _run(self, stack: Stack, steps: Steps) -> Flow:
        return (yield 0, stack)

    def __getitem__(self, index: int | slice) -> Any:
        declared = self._arguments[1:]
        if not isinstance(index, slice) and declared:
            text = ", ".join(f"{prefix}{shorten(repr(value))}" for prefix, value in declared)
            raise errors.would_lose(get_name(self.children[0].target), text)
        return super().__getitem__(index)

    @static_property
    def _arguments(self) -> list[Argument]:
        child = self.children[0]
        inferred = _infer_child(child)
        declared = [
            (f"{name}=", getattr(child.signature, name))
            for name in ("n_in", "n_out")
            if inferred is None
            or getattr(inferred.signature, name) != getattr(child.signature, name)
        ]
        fixed = [(f"{name}=", value) for name, value in child.fixed.items()]
        return [("", child.target), *declared, *fixed]


def fn(
    f: Callable[..., Any], n_in: int | None = None, n_out: int | None = None, **fixed: Any
) -> Fn:
    """Says how a callable meets the stack, if its Python signature does not.

    Args:
        f: any callable: a function, a linen module, a method of one, a combinator.
        n_in: how many items it takes; inferred if left out. If ``n_in`` is above the number of
            required parameters, optional and then keyword-only ones become inputs, in their order,
            and ``*args`` takes the rest. For a callable that has a ``signature`` of its own, they
            are the parameters beyond that signature.
        n_out: how many items it gives; inferred if left out.
        fixed: keywords bound to a value. They are no longer inputs, and context does not reach
            them. If ``f`` is a combinator, they are bound for all its parts that take them.

    Returns:
        A combinator with that signature.

    Raises:
        TypeError: If ``f`` is not callable, or takes no such keyword.
        SignatureError: If the numbers do not fit ``f``, or cannot be inferred.

    Example:
        >>> from flax_extra import combinator as cb
        >>> biggest = cb.fn(max, n_in=3, n_out=1)
        >>> print(biggest, "has signature", biggest.signature)
        fn(max, n_in=3, n_out=1) has signature 3 -> 1
        >>> biggest(1, 5, 2, "untouched")
        (5, 'untouched')
        >>> cb.fn(round, ndigits=1)(3.14159)
        3.1

        Lengths from the stack, for a layer that takes them by keyword:

        >>> from flax_extra import layer as xn
        >>> print(cb.fn(xn.LSTM(4), n_in=2).signature)
        2 -> 1

    See Also:
        :func:`infer_signature`, which says what is inferred.
    """
    return Fn(Children([make_child(f, n_in=n_in, n_out=n_out, fixed=fixed)]))


def _infer_child(child: Child) -> Child | None:
    """Returns the child without what the user declared; None if that cannot be inferred."""
    try:
        return make_child(child.target, fixed=child.fixed)
    except (TypeError, ValueError):
        return None
