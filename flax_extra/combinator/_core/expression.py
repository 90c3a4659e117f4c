"""A pipeline as text: the Python expression that builds it.

An expression that does not fit on a line is broken as a formatter would break it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from flax import linen as nn

from flax_extra.combinator._core.children import Pipeline, is_pipeline
from flax_extra.combinator._core.describe import shorten
from flax_extra.combinator._core.naming import get_name

WIDTH = 88
INDENT = 4
UNLIMITED = 10**9

Argument: TypeAlias = tuple[str, Any]
"""An argument of an expression: the text before it (``n_in=``), and its value."""


def format_repr(pipeline: Pipeline) -> str:
    """Writes a childless combinator with its signature, and any other as its expression."""
    if len(pipeline.children):
        return format_expression(pipeline)
    shown = [("signature=", pipeline.signature), *list_fields(pipeline, changed=False)]
    arguments = ", ".join(prefix + _render(value, UNLIMITED) for prefix, value in shown)
    return f"{type(pipeline).__name__}({arguments})"


def format_expression(f: Any) -> str:
    """Writes the expression that builds a callable, over several lines if one is too short."""
    return _render(f, WIDTH)


def format_on_one_line(f: Any) -> str:
    """Writes the expression that builds a callable on one line, however long."""
    return _render(f, UNLIMITED)


def format_short(f: Callable[..., Any]) -> str:
    """Writes the start of the expression that builds a callable, for a message."""
    return shorten(format_expression(f))


def list_fields(module: Any, changed: bool = True) -> list[Argument]:
    """Lists the fields of a module that are no children.

    Args:
        module: a linen module.
        changed: whether to leave out fields that have their default. If False, all fields are
            listed that the signature of a combinator does not show (as it shows ``n_in``).
    """
    hidden = {"children", "_bound", "parent", *(() if changed else ("n_in", "n_out"))}
    return [
        (f"{field.name}=", getattr(module, field.name))
        for field in dataclasses.fields(module)
        if field.init and field.repr and field.name not in hidden
        if not _has_default(module, field) or not (changed or field.name == "name")
    ]


def _has_default(module: nn.Module, field: dataclasses.Field[Any]) -> bool:
    value, default = getattr(module, field.name), field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    try:
        return value is default or bool(value == default)
    except Exception:  # an array has no one truth value, so the user gave it
        return False


def _render(value: Any, room: int) -> str:
    """Writes a value in at most ``room`` columns, if it can be broken into lines."""
    flat = _render_flat(value, room)
    if flat is not None:
        return flat
    parts = _split(value)
    if isinstance(parts, str):
        return parts
    start, arguments, end = parts
    lines = [prefix + _render(v, room - INDENT - len(prefix) - 1) for prefix, v in arguments]
    body = "".join(f"{line},\n" for line in lines)
    return f"{start}\n{_indent(body)}{end}"


def _render_flat(value: Any, room: int) -> str | None:
    """Writes a value on one line; returns None as soon as it is known to be too long."""
    parts = _split(value)
    if isinstance(parts, str):
        return parts if len(parts) <= room else None
    text, arguments, end = parts
    for index, (prefix, argument) in enumerate(arguments):
        text += f", {prefix}" if index else prefix
        left = room - len(text) - len(end)
        flat = _render_flat(argument, left) if left > 0 else None
        if flat is None:
            return None
        text += flat
    text += end
    return text if len(text) <= room else None


def _split(value: Any) -> str | tuple[str, Sequence[Argument], str]:
    """Returns the text of a value, or its start, its arguments and its end."""
    if is_pipeline(value):
        return f"{value._kind}(", value._arguments, ")"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}(", list_fields(value), ")"
    if isinstance(value, functools.partial):
        positional = [("", argument) for argument in (value.func, *value.args)]
        return "partial(", [*positional, *_list_keywords(value.keywords)], ")"
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return f"{_render(value.__self__, UNLIMITED)}.{value.__name__}"
    if type(value) in (tuple, list) and any(map(callable, value)):
        return "[", [("", part) for part in value], "]"
    return get_name(value) if _has_name(value) else shorten(repr(value))


def _list_keywords(keywords: dict[str, Any]) -> list[Argument]:
    return [(f"{name}=", value) for name, value in keywords.items()]


def _has_name(value: Any) -> bool:
    return callable(value) and isinstance(getattr(value, "__name__", None), str)


def _indent(text: str) -> str:
    return "".join(f"{' ' * INDENT}{line}" for line in text.splitlines(keepends=True))
