"""The axes in a jaxtyping annotation, such as ``"#batch *time heads*d_v"``.

A name has one size throughout a call. This file makes shapes from sizes, and compares found shapes
with the declared axes. The documentation of jaxtyping says what each sign means.

    >>> axes = parse_axes("batch *time heads*d_v")
    >>> sizes = {"heads": 2, "d_v": 3}
    >>> fit_axes(axes, (5, 7, 9, 6), sizes), sizes
    (True, {'heads': 2, 'd_v': 3, 'batch': 5, '*time': (7, 9)})
    >>> fit_axes(axes, (4, 7, 9, 6), sizes)
    False
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Size: TypeAlias = int | tuple[int, ...]
"""The size of an axis, or those of a variadic one."""

Sizes: TypeAlias = dict[str, Size]
"""Sizes by name. The name of a variadic axis starts with a star: ``*time`` is not ``time``."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis, or with ``variadic`` any number of them.

    Attributes:
        expression: a name, a number, or an expression of names; empty if it is anonymous.
        broadcasts: whether the size may also be 1.
        variadic: whether it stands for any number of axes.
    """

    expression: str
    broadcasts: bool = False
    variadic: bool = False

    @property
    def key(self) -> str | None:
        """The name under which its size is kept; None if it is anonymous, a number or computed."""
        if not self.expression.isidentifier():
            return None
        return f"*{self.expression}" if self.variadic else self.expression

    @property
    def names(self) -> Iterator[str]:
        """The names whose sizes its expression needs."""
        if self.key is not None:
            yield self.key
        elif self.expression and "{" not in self.expression:
            for node in ast.walk(ast.parse(self.expression, mode="eval")):
                if isinstance(node, ast.Name):
                    yield node.id

    def compute(self, sizes: Mapping[str, Size], scope: Mapping[str, Any]) -> int:
        """Computes the size of its expression. Names in ``{...}`` are looked up in the scope."""
        expression = self.expression
        if "{" in expression:
            expression = str(eval(f"f{expression!r}", dict(scope)))  # noqa: S307  # an annotation is code
        return int(eval(expression, {"__builtins__": {}}, dict(sizes)))  # noqa: S307


def parse_axes(text: str) -> tuple[Axis, ...]:
    """Reads the axes in the text of a jaxtyping annotation.

    >>> parse_axes("#batch 3 ...")[1:]
    (Axis(expression='3', broadcasts=False, variadic=False), \
Axis(expression='', broadcasts=False, variadic=True))
    """
    return tuple(map(_parse_axis, text.split()))


def _parse_axis(text: str) -> Axis:
    if text == "...":
        return Axis("", variadic=True)
    signs = text[: len(text) - len(text.lstrip("#*?_"))]
    expression = text[len(signs) :]
    if expression.count("=") == 1:  # "rows=4" names a number for the reader
        expression = expression.partition("=")[2]
    return Axis("" if "_" in signs else expression, "#" in signs, "*" in signs)


def make_shape(
    axes: Sequence[Axis],
    size_of: Callable[[str], Size],
    ones: Callable[[], bool],
    scope: Mapping[str, Any],
) -> tuple[int, ...]:
    """Makes a shape that the axes describe.

    Args:
        axes: the axes.
        size_of: gives the size of a name; ``"_"`` and ``"*_"`` stand for anonymous axes.
        ones: says whether the size of an axis that broadcasts is 1.
        scope: the names that expressions in braces may use.
    """
    shape: list[int] = []
    for axis in axes:
        if axis.variadic:
            sizes = size_of(axis.key or "*_")
        elif axis.key or not axis.expression:
            sizes = size_of(axis.key or "_")
        else:
            sizes = axis.compute({name: size_of(name) for name in axis.names}, scope)
        several = sizes if isinstance(sizes, tuple) else (sizes,)
        shape += [1 if axis.broadcasts and ones() else size for size in several]
    return tuple(shape)


def fit_axes(
    axes: Sequence[Axis],
    shape: Sequence[int],
    sizes: Sizes,
    scope: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the axes describe a shape. A name that has no size yet gets one."""
    variadic = [index for index, axis in enumerate(axes) if axis.variadic]
    if not variadic:
        return len(shape) == len(axes) and _fit_each(axes, shape, sizes, scope or {})
    (before,) = variadic
    after = len(axes) - before - 1
    if len(shape) < before + after:
        return False
    end = len(shape) - after
    return (
        _fit_each(axes[:before], shape[:before], sizes, scope or {})
        and _fit_variadic(axes[before], tuple(shape[before:end]), sizes)
        and _fit_each(axes[before + 1 :], shape[end:], sizes, scope or {})
    )


def _fit_each(
    axes: Sequence[Axis], shape: Sequence[int], sizes: Sizes, scope: Mapping[str, Any]
) -> bool:
    return all(_fit_one(axis, size, sizes, scope) for axis, size in zip(axes, shape, strict=True))


def _fit_one(axis: Axis, size: int, sizes: Sizes, scope: Mapping[str, Any]) -> bool:
    if not axis.expression or (axis.broadcasts and size == 1):
        return True
    if axis.key is not None:
        return sizes.setdefault(axis.key, size) == size
    return axis.compute(sizes, scope) == size


def _fit_variadic(axis: Axis, shape: tuple[int, ...], sizes: Sizes) -> bool:
    if axis.key is None:
        return True
    known = sizes.setdefault(axis.key, shape)
    if known == shape or not isinstance(known, tuple):
        return known == shape
    aligned = known[len(known) - len(shape) :]
    return (
        axis.broadcasts
        and len(shape) <= len(known)
        and all(size in (1, full) for size, full in zip(shape, aligned, strict=True))
    )
