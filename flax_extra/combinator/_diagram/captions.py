"""The texts on boxes and frames, and the room that they take.

They are set in a monospaced font, so that the width of a text is known without the font: in the
widest fonts in use a letter is 0.62 times as wide as the font size.

    >>> from flax import linen as nn
    >>> caption = make_caption(nn.Dense(64, use_bias=False), {})
    >>> caption.name, caption.details
    ('Dense', ('features=64,', 'use_bias=False'))
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flax import linen as nn

from flax_extra.combinator._core.context import ContextKeyword
from flax_extra.combinator._core.describe import shorten
from flax_extra.combinator._core.expression import format_on_one_line, list_fields
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._words.merge import Add, Concatenate, Div, Fold, Mul, Split, Sub

if TYPE_CHECKING:
    from flax_extra.combinator._core.combinator import Combinator

NAME_SIZE, SMALL_SIZE = 13, 11
"""The font sizes of the names on boxes, and of all other texts, in pixels."""

LETTER_WIDTH = 0.62
MAX_NAME_LENGTH, MAX_LINE_LENGTH = 40, 26
MAX_LINES = 3
_SYMBOLS = {
    "add": "+",
    "sub": "\N{MINUS SIGN}",
    "mul": "\N{MULTIPLICATION SIGN}",
    "truediv": "\N{DIVISION SIGN}",
}
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclasses.dataclass(frozen=True)
class Caption:
    """The texts on a box: its name and, smaller, its settings. ``full`` is shown on hover."""

    name: str
    details: tuple[str, ...] = ()
    full: str = ""

    @property
    def width(self) -> int:
        smaller = (measure_width(line, SMALL_SIZE) for line in self.details)
        return max(measure_width(self.name, NAME_SIZE), *smaller, 0)


def measure_width(text: str, size: int) -> int:
    """Returns the width of a text in pixels, at most. East Asian letters count twice.

    >>> measure_width("norm", 10), measure_width("規格", 10)
    (25, 25)
    """
    letters = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return math.ceil(letters * size * LETTER_WIDTH)


def make_caption(f: Any, fixed: Mapping[str, Any]) -> Caption:
    """Writes the caption of a callable with fixed keywords."""
    name, arguments = _split_call(f)
    given = [*arguments, *(_format_fixed(k, v) for k, v in fixed.items())]
    words = f"{name}({', '.join(given)})" if given else name
    return Caption(shorten(name, MAX_NAME_LENGTH), tuple(_break_lines(given)), words)


def make_frame_caption(combinator: Combinator, fixed: Mapping[str, Any]) -> str:
    """Writes the caption of a frame: the name of a combinator, its kind and its settings.

    >>> from flax_extra import combinator as cb
    >>> sums = cb.scan(cb.add() >> cb.dup(), axis=0, reverse=True, name="sums")
    >>> print(make_frame_caption(sums, {}))
    sums: scan, axis=0, reverse
    """
    kind = combinator._kind
    named = combinator._label != kind
    values = {prefix.removesuffix("="): value for prefix, value in list_fields(combinator)}
    values.pop("name", None)
    if kind == "repeat":
        kind = f"repeat \N{MULTIPLICATION SIGN}{values.pop('n', 1)}"
    if kind in ("serial", "parallel") and named:
        kind = ""
    words = [k if v is True else _format_fixed(k, v) for k, v in {**values, **fixed}.items()]
    head = ": ".join(part for part in (combinator._label if named else "", kind) if part)
    return shorten(", ".join([head, *words]), MAX_NAME_LENGTH)


def make_operation_caption(f: Add | Sub | Mul | Div | Concatenate | Split) -> Caption:
    """Writes the caption of an operation that merges items, or splits one."""
    words = format_on_one_line(f)
    if isinstance(f, Concatenate | Split):
        name = "concat" if isinstance(f, Concatenate) else "split"
        return Caption(name if f.axis == -1 else f"{name}, axis={f.axis}", (), words)
    return Caption(_SYMBOLS[f._operator], (), words)


def make_fold_caption(f: Fold) -> Caption:
    """Writes the caption of a callable that folds items."""
    return Caption(
        "fold", tuple(_break_lines([_format_value(f.children[0].target)])), _format_value(f)
    )


def _split_call(f: Any) -> tuple[str, list[str]]:
    if isinstance(f, functools.partial):
        name, arguments = _split_call(f.func)
        given = [_format_value(value) for value in f.args]
        return name, [
            *arguments,
            *given,
            *(f"{k}={_format_value(v)}" for k, v in f.keywords.items()),
        ]
    if isinstance(f, types.MethodType) and isinstance(f.__self__, nn.Module):
        name, arguments = _split_call(f.__self__)
        return f"{name}.{f.__name__}", arguments
    if isinstance(f, nn.Module):
        return get_name(f), [prefix + _format_value(value) for prefix, value in list_fields(f)]
    return get_name(f), []


def _format_value(value: Any) -> str:
    """Writes a value as an expression, without addresses, which differ between runs."""
    return shorten(ADDRESS.sub("", format_on_one_line(value)), MAX_LINE_LENGTH)


def _format_fixed(name: str, value: Any) -> str:
    """Writes a fixed keyword; of one that comes from context, the name in the context."""
    is_context = isinstance(value, ContextKeyword)
    return f"{name}: {value.name}" if is_context else f"{name}={_format_value(value)}"


def _break_lines(arguments: Iterable[str]) -> list[str]:
    """Puts arguments on a few short lines."""
    lines: list[str] = []
    for argument in arguments:
        text = shorten(argument, MAX_LINE_LENGTH)
        if lines and len(lines[-1]) + len(text) + 2 <= MAX_LINE_LENGTH:
            lines[-1] += f", {text}"
        else:
            lines.append(text)
    shown = lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."]
    return [f"{line}," for line in shown[:-1]] + shown[-1:]
