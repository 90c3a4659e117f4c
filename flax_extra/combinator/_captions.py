"""What is written in a picture: the words on boxes and frames, and the room that they take.

All of it is set in a font whose letters are equally wide, so that a text's width is known without
the font: the widest such fonts in use give a letter 0.62 of its height.

    >>> from flax import linen as nn
    >>> caption = caption_of(nn.Dense(64, use_bias=False), {})
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

from flax_extra.combinator._expression import one_line, settings
from flax_extra.combinator._inference import name_of, shorten
from flax_extra.combinator._merge import Add, Concatenate, Div, Fold, Mul, Split, Sub

if TYPE_CHECKING:
    from flax_extra.combinator._base import Combinator

NAME_SIZE, SMALL_SIZE = 13, 11
"""The sizes of the letters: of what boxes are called, and of all else."""

LETTER_WIDTH = 0.62
LONGEST_NAME, LONGEST_LINE = 40, 26
MOST_LINES = 3
_SYMBOLS = {
    "add": "+",
    "sub": "\N{MINUS SIGN}",
    "mul": "\N{MULTIPLICATION SIGN}",
    "truediv": "\N{DIVISION SIGN}",
}
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclasses.dataclass(frozen=True)
class Caption:
    """The words on a box: what it is called and, smaller, how it is set."""

    name: str
    details: tuple[str, ...] = ()
    full: str = ""

    @property
    def width(self) -> int:
        smaller = (width_of(line, SMALL_SIZE) for line in self.details)
        return max(width_of(self.name, NAME_SIZE), *smaller, 0)


def width_of(text: str, size: int) -> int:
    """How wide a text is at most, in pixels; letters of East Asian scripts count twice.

    >>> width_of("norm", 10), width_of("規格", 10)
    (25, 25)
    """
    letters = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return math.ceil(letters * size * LETTER_WIDTH)


def caption_of(f: Any, fixed: Mapping[str, Any]) -> Caption:
    """What is written on the box of a callable with fixed keywords."""
    name, arguments = _name_and_arguments(f)
    given = [*arguments, *(f"{k}={_text(v)}" for k, v in fixed.items())]
    words = f"{name}({', '.join(given)})" if given else name
    return Caption(shorten(name, LONGEST_NAME), tuple(_lines(given)), words)


def frame_caption(combinator: Combinator, fixed: Mapping[str, Any]) -> str:
    """What is written on the frame of a combinator: its name, its kind, and how it is set.

    >>> from flax_extra import combinator as cb
    >>> print(frame_caption(cb.scan(cb.add() >> cb.dup(), axis=0, reverse=True, name="sums"), {}))
    sums: scan, axis=0, reverse
    """
    kind = combinator.kind
    named = combinator.label != kind
    values = {prefix.removesuffix("="): value for prefix, value in settings(combinator)}
    values.pop("name", None)
    if kind == "repeat":
        kind = f"repeat \N{MULTIPLICATION SIGN}{values.pop('n', 1)}"
    if kind in ("serial", "parallel") and named:
        kind = ""
    words = [k if v is True else f"{k}={_text(v)}" for k, v in {**values, **fixed}.items()]
    head = ": ".join(part for part in (combinator.label if named else "", kind) if part)
    return shorten(", ".join([head, *words]), LONGEST_NAME)


def operation_caption(f: Add | Sub | Mul | Div | Concatenate | Split) -> Caption:
    """What is written where many items become one, or one becomes many."""
    words = one_line(f)
    if isinstance(f, Concatenate | Split):
        name = "concat" if isinstance(f, Concatenate) else "split"
        return Caption(name if f.axis == -1 else f"{name}, axis={f.axis}", (), words)
    return Caption(_SYMBOLS[f.operation], (), words)


def fold_caption(f: Fold) -> Caption:
    """What is written where a callable folds items."""
    return Caption("fold", tuple(_lines([_text(f.children[0].target)])), _text(f))


def _name_and_arguments(f: Any) -> tuple[str, list[str]]:
    if isinstance(f, functools.partial):
        name, arguments = _name_and_arguments(f.func)
        given = [_text(value) for value in f.args]
        return name, [*arguments, *given, *(f"{k}={_text(v)}" for k, v in f.keywords.items())]
    if isinstance(f, types.MethodType) and isinstance(f.__self__, nn.Module):
        name, arguments = _name_and_arguments(f.__self__)
        return f"{name}.{f.__name__}", arguments
    if isinstance(f, nn.Module):
        return name_of(f), [prefix + _text(value) for prefix, value in settings(f)]
    return name_of(f), []


def _text(value: Any) -> str:
    """A value as an expression, without what differs from one run to the next."""
    return shorten(ADDRESS.sub("", one_line(value)), LONGEST_LINE)


def _lines(arguments: Iterable[str]) -> list[str]:
    """Arguments over a few short lines."""
    lines: list[str] = []
    for argument in arguments:
        text = shorten(argument, LONGEST_LINE)
        if lines and len(lines[-1]) + len(text) + 2 <= LONGEST_LINE:
            lines[-1] += f", {text}"
        else:
            lines.append(text)
    shown = lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]
    return [f"{line}," for line in shown[:-1]] + shown[-1:]
