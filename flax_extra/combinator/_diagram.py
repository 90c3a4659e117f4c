"""The wiring picture of a pipeline, as SVG.

>>> from flax_extra import combinator as cb
>>> picture = cb.diagram(cb.residual(abs))
>>> picture.svg.splitlines()[-1]
'</svg>'
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from flax_extra.combinator import _errors
from flax_extra.combinator._base import Combinator
from flax_extra.combinator._captions import ADDRESS, NAME_SIZE, SMALL_SIZE
from flax_extra.combinator._expression import expression
from flax_extra.combinator._inference import shorten
from flax_extra.combinator._picture import (
    BESIDE_LABEL,
    CORNER,
    DETAIL_HEIGHT,
    RADIUS,
    Box,
    Dot,
    Frame,
    Label,
    Picture,
    Route,
    Shape,
    Wire,
)
from flax_extra.combinator._record import Recording, as_pipeline, record
from flax_extra.combinator._stack import Stack, describe_item
from flax_extra.combinator._wiring import Position, Stacks, read

MARGIN = 16
LONGEST_LABEL = 48
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LINE_WIDTH = 1.5
COPY_OFFSET = 4
FONT = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
CLASS = "flax-extra-diagram"
"""The class of the picture, so that its colours reach nothing else on the page that shows it."""

COLOURS = {
    "canvas": (("#ffffff", "none"), ("#14181f", "none")),
    "frame": (("none", "#8592a3"), ("none", "#66758a")),
    "wire": (("none", "#5a6675"), ("none", "#93a1b3")),
    "layer": (("#e8f0fe", "#4a76c0"), ("#1d2f4d", "#6d9be8")),
    "function": (("#f7f7f8", "#7b8694"), ("#242a33", "#8894a5")),
    "pill": (("#fdf3e1", "#b7822c"), ("#3a2e18", "#d0a050")),
    "dot": (("#5a6675", "none"), ("#93a1b3", "none")),
    "end": (("#ffffff", "#5a6675"), ("#14181f", "#93a1b3")),
    "name": (("#16202c", "none"), ("#eef2f7", "none")),
    "small": (("#4c5866", "none"), ("#b3becc", "none")),
}
"""Fill and stroke of each class, in light and in dark.

The light ones are attributes, which every program that shows SVG knows; the dark ones are CSS.
"""


@dataclasses.dataclass(frozen=True)
class Diagram:
    """A picture of a pipeline. A notebook shows it. See :func:`diagram`.

    Args:
        svg: the picture as text.
    """

    svg: str

    def save(self, path: str | Path) -> None:
        """Writes the picture to a file whose name ends in ``.svg``.

        Args:
            path: where to.

        Raises:
            ValueError: where the name ends otherwise.

        Example:
            >>> import pathlib, tempfile
            >>> from flax_extra import combinator as cb
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = pathlib.Path(folder) / "swap.svg"
            ...     cb.diagram(cb.swap()).save(path)
            ...     path.read_text(encoding="utf-8")[:4]
            '<svg'
        """
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise _errors.not_svg(str(path))
        path.write_text(self.svg, encoding="utf-8", newline="\n")

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"Diagram({len(self.svg)} bytes of SVG)"

    def __str__(self) -> str:
        return self.svg


def diagram(f: Callable[..., Any], *inputs: Any, **context: Any) -> Diagram:
    """The wiring picture of a pipeline: steps, and the items of the stack as wires.

    Time flows down, and the top of the stack is on the left. Boxes are what is called: layers,
    functions and, rounded, what merges or cuts. A named, derived or lifted combinator is a frame
    around its steps. A dot is where an item is used twice, a ring where one is dropped.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        inputs: the items of the stack, top first, as for :func:`shape_signature`: texts such as
            ``"f32[b, t, 64]"``, arrays, ``jax.ShapeDtypeStruct``, None. With them, wires are
            labelled with what flows in them; nothing is computed. Items that the pipeline does
            not take pass by it.
        context: keywords for every step that takes them, such as ``deterministic``.

    Returns:
        A picture, to save or for a notebook to show.

    Raises:
        TypeError: where ``f`` is not callable, or a keyword is taken by no step.
        ValueError: where an input is not a spec.
        Exception: what a step raises, where the inputs do not fit.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> block = cb.residual(nn.LayerNorm(), nn.Dense(8))
        >>> picture = cb.diagram(block, "f32[b, 8]")
        >>> picture.svg.count(">f32[b, 8]</text>")
        4

    See Also:
        :func:`summary`, which tells the same as a table.
    """
    pipeline = as_pipeline(f)
    unknown = context.keys() - pipeline.keywords
    if unknown:
        raise _errors.unknown_context(pipeline.label, unknown, pipeline.keywords)
    return draw(pipeline, _stacks(record(pipeline, inputs, context)) if inputs else None)


def _stacks(recording: Recording) -> dict[Position, Stacks]:
    """What is on the stack before and after each step, as text."""
    if recording.error is not None:
        raise recording.error
    steps = [recording.root, *recording.root.steps()]
    return {step.position: (_texts(step.before), _texts(step.after or ())) for step in steps}


def _texts(stack: Stack) -> list[str]:
    return [shorten(describe_item(item), LONGEST_LABEL) for item in stack]


def draw(f: Combinator, stacks: Mapping[Position, Stacks] | None = None) -> Diagram:
    """The picture of a pipeline, with labels where it is known what is on the stack."""
    picture = read(f, stacks)
    width, height = picture.width + 2 * MARGIN, picture.height + 2 * MARGIN
    place = f'width="{width}" height="{height}"'
    box = f"{-MARGIN} {-MARGIN} {width} {height}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{CLASS}" role="img" {place}',
        f'  viewBox="{box}" font-family="{FONT}">',
        f"<title>{_escape(f'Wiring of {f.label}: {f.signature}')}</title>",
        f"<desc>{_escape(expression(f))}</desc>",
        f"<style>{_dark()}</style>",
        f'<rect {_painted("canvas")} x="{-MARGIN}" y="{-MARGIN}" {place}/>',
        *itertools.chain.from_iterable(map(_frame, picture.frames)),
        f'<g {_painted("wire")} stroke-width="{LINE_WIDTH}">',
        *(f'<path d="{_path(wire)}"/>' for wire in picture.wires),
        "</g>",
        *map(_dot, picture.dots),
        *_boxes_and_words(picture),
        "</svg>",
    ]
    return Diagram("\n".join(lines) + "\n")


def _dark() -> str:
    rules = "".join(
        f".{CLASS} .{name}{{fill:{fill};stroke:{stroke}}}"
        for name, (_, (fill, stroke)) in COLOURS.items()
    )
    return f"@media (prefers-color-scheme:dark){{{rules}}}"


def _painted(name: str) -> str:
    fill, stroke = COLOURS[name][0]
    return f'class="{name}" fill="{fill}" stroke="{stroke}"'


def _frame(frame: Frame) -> Iterator[str]:
    left, top = frame.left.x, frame.top
    width, height = frame.right.x - left, frame.bottom - top
    if frame.copies:
        # The edges of one more copy look out behind it.
        x, y, o = left + width, top + height, COPY_OFFSET
        edge = f"M{x} {top + o}h{o}V{y + o}H{left + o}v{-o}"
        yield f'<path {_painted("frame")} d="{edge}"/>'
    yield f'<rect {_painted("frame")} {_place(left, top, width, height)} rx="6"/>'


def _place(x: int, y: int, width: int, height: int) -> str:
    return f'x="{x}" y="{y}" width="{width}" height="{height}"'


def _path(wire: Wire) -> str:
    start, end, top, bottom = wire.start.x, wire.end.x, wire.top, wire.bottom
    match wire.route:
        case Route.STRAIGHT:
            return f"M{start} {top}V{bottom}"
        case Route.BRANCH:
            return f"M{start} {top}H{end - CORNER}Q{end} {top} {end} {bottom}"
        case Route.JOIN:
            turn = f"V{bottom - CORNER}Q{start} {bottom} {start - CORNER} {bottom}"
            return f"M{start} {top}{turn}H{end + wire.inset}"
        case Route.CROSS:
            middle = (top + bottom) // 2
            return f"M{start} {top}C{start} {middle} {end} {middle} {end} {bottom}"


def _dot(dot: Dot) -> str:
    kind = "end" if dot.is_end else "dot"
    return f'<circle {_painted(kind)} cx="{dot.column.x}" cy="{dot.y}" r="3.5"/>'


def _boxes_and_words(picture: Picture) -> Iterator[str]:
    """From the top down, as people read, and select, and have it read to them."""
    pieces = [(box.top, box.left.x, _box(box)) for box in picture.boxes]
    pieces += [(frame.top, frame.left.x, _frame_caption(frame)) for frame in picture.frames]
    pieces += [
        (label.y, label.column.x, _label(label)) for label in picture.labels if label.item.text
    ]
    yield from (text for _, _, text in sorted(pieces, key=lambda piece: piece[:2]))


def _box(box: Box) -> str:
    left, top, width = box.left.x, box.top, box.right.x - box.left.x
    height = box.bottom - top
    kind = "pill" if box.shape in (Shape.PILL, Shape.ROUND) else box.shape.name.lower()
    radius = 5 if kind != "pill" else min(RADIUS, height // 2)
    middle = (left + box.right.x) // 2
    baseline = top + (height - DETAIL_HEIGHT * len(box.caption.details)) // 2 + 5
    words = [_words("name", middle, baseline, box.caption.name, "middle")]
    for line in box.caption.details:
        baseline += DETAIL_HEIGHT
        words.append(_words("small", middle, baseline, line, "middle"))
    tip = f"<title>{_escape(box.caption.full)}</title>"
    outline = f'<rect {_painted(kind)} {_place(left, top, width, height)} rx="{radius}"/>'
    return "\n".join(["<g>" + tip, outline, *words, "</g>"])


def _frame_caption(frame: Frame) -> str:
    return _words("small", frame.left.x + 8, frame.top + 16, frame.caption)


def _label(label: Label) -> str:
    return _words("small", label.column.x + BESIDE_LABEL, label.y, label.item.text)


def _words(kind: str, x: int, y: int, text: str, anchor: str = "start") -> str:
    size = NAME_SIZE if kind == "name" else SMALL_SIZE
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    place = f'x="{x}" y="{y}" font-size="{size}"{anchored}'
    return f"<text {_painted(kind)} {place}>{_escape(text)}</text>"


def _escape(text: str) -> str:
    """Text as XML holds it: without what no XML may hold, and without addresses in memory."""
    return escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", ADDRESS.sub("", text)))
