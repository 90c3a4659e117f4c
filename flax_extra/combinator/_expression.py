"""A pipeline as text: the Python expression that builds it.

What takes more room than a line is broken as a formatter would break it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flax import linen as nn

from flax_extra.combinator._inference import is_combinator, name_of, shorten

if TYPE_CHECKING:
    from flax_extra.combinator._base import Combinator

WIDTH = 88
INDENT = 4
ENDLESS = 10**9

Argument: TypeAlias = tuple[str, Any]
"""An argument of an expression: what stands before it (``n_in=``), and its value."""


def representation(combinator: Combinator) -> str:
    """A childless combinator with its signature; any other as its expression."""
    if len(combinator.children):
        return expression(combinator)
    shown = [("signature=", combinator.signature), *settings(combinator, changed=False)]
    arguments = ", ".join(prefix + _render(value, ENDLESS) for prefix, value in shown)
    return f"{type(combinator).__name__}({arguments})"


def expression(f: Any) -> str:
    """The expression that builds a callable, over several lines where one is too short."""
    return _render(f, WIDTH)


def one_line(f: Any) -> str:
    """The expression that builds a callable, on one line, however long."""
    return _render(f, ENDLESS)


def settings(module: nn.Module, changed: bool = True) -> list[Argument]:
    """The fields of a module that are no children: those that differ from their default, or all.

    What a combinator's signature says already (``n_in``) is left out of all.
    """
    hidden = {"children", "bound", "parent", *(() if changed else ("n_in", "n_out"))}
    return [
        (f"{field.name}=", getattr(module, field.name))
        for field in dataclasses.fields(module)
        if field.init and field.repr and field.name not in hidden
        if not _is_default(module, field) or not (changed or field.name == "name")
    ]


def _is_default(module: nn.Module, field: dataclasses.Field[Any]) -> bool:
    value, default = getattr(module, field.name), field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    try:
        return value is default or bool(value == default)
    except Exception:  # arrays have no one truth value; then it was given
        return False


def _render(value: Any, room: int) -> str:
    """A value in at most ``room`` columns where it can be broken so."""
    flat = _flat(value, room)
    if flat is not None:
        return flat
    parts = _parts(value)
    if isinstance(parts, str):
        return parts
    start, arguments, end = parts
    lines = [prefix + _render(v, room - INDENT - len(prefix) - 1) for prefix, v in arguments]
    body = "".join(f"{line},\n" for line in lines)
    return f"{start}\n{_indent(body)}{end}"


def _flat(value: Any, room: int) -> str | None:
    """A value on one line, or None as soon as that is known to be too long."""
    parts = _parts(value)
    if isinstance(parts, str):
        return parts if len(parts) <= room else None
    text, arguments, end = parts
    for index, (prefix, argument) in enumerate(arguments):
        text += f", {prefix}" if index else prefix
        left = room - len(text) - len(end)
        flat = _flat(argument, left) if left > 0 else None
        if flat is None:
            return None
        text += flat
    text += end
    return text if len(text) <= room else None


def _parts(value: Any) -> str | tuple[str, Sequence[Argument], str]:
    """The text of a value, or of what holds others how it starts, what it holds, how it ends."""
    if is_combinator(value):
        return f"{value.kind}(", value.arguments, ")"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}(", settings(value), ")"
    if isinstance(value, functools.partial):
        positional = [("", argument) for argument in (value.func, *value.args)]
        return "partial(", [*positional, *_keywords(value.keywords)], ")"
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return f"{_render(value.__self__, ENDLESS)}.{value.__name__}"
    if type(value) in (tuple, list) and any(map(callable, value)):
        return "[", [("", part) for part in value], "]"
    return name_of(value) if _has_name(value) else shorten(repr(value))


def _keywords(keywords: dict[str, Any]) -> list[Argument]:
    return [(f"{name}=", value) for name, value in keywords.items()]


def _has_name(value: Any) -> bool:
    return callable(value) and isinstance(getattr(value, "__name__", None), str)


def _indent(text: str) -> str:
    return "".join(f"{' ' * INDENT}{line}" for line in text.splitlines(keepends=True))
