"""``fn``: says how a callable meets the stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from flax_extra.combinator._base import Combinator, reading
from flax_extra.combinator._children import Children, child_of
from flax_extra.combinator._expression import Argument
from flax_extra.combinator._run import Flow, Steps
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._stack import Stack


class Fn(Combinator):
    """A callable with its place on the stack declared. See :func:`fn`."""

    is_visible: ClassVar[bool] = False

    @functools.cached_property
    def signature(self) -> Signature:
        return self.children[0].signature

    def flow(self, stack: Stack, steps: Steps) -> Flow:
        return (yield 0, stack)

    @reading
    def arguments(self) -> list[Argument]:
        child = self.children[0]
        plain = child_of(child.target, fixed=child.fixed) if _is_inferable(child) else None
        declared = [
            (f"{name}=", getattr(child.signature, name))
            for name in ("n_in", "n_out")
            if plain is None or getattr(plain.signature, name) != getattr(child.signature, name)
        ]
        fixed = [(f"{name}=", value) for name, value in child.fixed.items()]
        return [("", child.target), *declared, *fixed]


def fn(
    f: Callable[..., Any], n_in: int | None = None, n_out: int | None = None, **fixed: Any
) -> Fn:
    """Says how a callable meets the stack, where its Python signature does not.

    Args:
        f: any callable: a function, a linen module, a method of one, a combinator.
        n_in: how many items it takes; inferred where left out. With ``n_in`` above the number of
            required parameters, optional ones become inputs, in their order; ``*args`` takes
            what is left.
        n_out: how many items it gives; inferred where left out.
        fixed: keywords bound to a value. They are no longer inputs, and context does not reach
            them. Of a combinator, they are bound for all its parts that take them.

    Returns:
        A combinator with that signature.

    Raises:
        TypeError: where ``f`` is not callable, or takes no such keyword.
        SignatureError: where the numbers do not fit ``f``, or cannot be inferred.

    Example:
        >>> from flax_extra import combinator as cb
        >>> biggest = cb.fn(max, n_in=3, n_out=1)
        >>> print(biggest, "has signature", biggest.signature)
        fn(max, n_in=3, n_out=1) has signature 3 -> 1
        >>> biggest(1, 5, 2, "untouched")
        (5, 'untouched')
        >>> cb.fn(round, ndigits=1)(3.14159)
        3.1

    See Also:
        :func:`infer_signature`, which says what is inferred.
    """
    return Fn(Children([child_of(f, n_in=n_in, n_out=n_out, fixed=fixed)]))


def _is_inferable(child: Any) -> bool:
    try:
        child_of(child.target, fixed=child.fixed)
    except (TypeError, ValueError):
        return False
    return True
