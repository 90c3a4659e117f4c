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

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import describe_item, shorten
from flax_extra.combinator._core.expression import format_expression
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._core.tracebacks import api_boundary
from flax_extra.combinator._diagram.captions import ADDRESS, NAME_SIZE, SMALL_SIZE
from flax_extra.combinator._diagram.picture import (
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
from flax_extra.combinator._diagram.wiring import Position, StackTexts, read_wiring
from flax_extra.combinator._views.record import RunRecord, record_run, to_pipeline
from flax_extra.combinator._views.specs import parse_call

MARGIN = 16
MAX_LABEL_LENGTH = 48
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LINE_WIDTH = 1.5
COPY_OFFSET = 4
FONT = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
CLASS = "flax-extra-diagram"
"""The CSS class of the picture, so that its colours do not change the page around it."""

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

The light ones are SVG attributes, which every viewer knows; the dark ones are CSS.
"""


@dataclasses.dataclass(frozen=True)
class Diagram:
    """A picture of a pipeline, which a notebook shows. See :func:`diagram`.

    Args:
        svg: the picture as text.
    """

    svg: str

    def save(self, path: str | Path) -> None:
        """Writes the picture to a file whose name ends in ``.svg``.

        Args:
            path: the file.

        Raises:
            ValueError: If the name has another ending.

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
            raise errors.not_svg(str(path))
        path.write_text(self.svg, encoding="utf-8", newline="\n")

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"Diagram({len(self.svg)} bytes of SVG)"

    def __str__(self) -> str:
        return self.svg


@api_boundary
def diagram(f: Callable[..., Any], *inputs: Any, **context: Any) -> Diagram:
    """Draws the wiring of a pipeline: its steps, and the items of the stack as wires.

    Time flows down, and the top of the stack is on the left. Layers and functions are boxes; boxes
    with round ends merge items, or split one. A named, derived or lifted combinator is a frame
    around its steps. A dot shows that an item is used twice, a ring that one is dropped.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        inputs: the items of the stack, top first, as for :func:`shape_signature`: texts such as
            ``"f32[b, t, 64]"``, arrays, ``jax.ShapeDtypeStruct``, None. With them, each wire is
            labelled with its item. Nothing is computed. Items that the pipeline does not take pass
            by it.
        context: keywords for every step that takes them, such as ``deterministic``. For an array,
            a spec serves: ``padding_mask="bool[b, 1, t]"``.

    Returns:
        A picture, to save or to show in a notebook.

    Raises:
        TypeError: If ``f`` is not callable, or no step takes a keyword.
        ValueError: If an input is not a spec.
        Exception: If a step raises one on the inputs.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> block = cb.residual(nn.LayerNorm(), nn.Dense(8))
        >>> picture = cb.diagram(block, "f32[b, 8]")
        >>> picture.svg.count(">f32[b, 8]</text>")
        4

    See Also:
        :func:`summary`, which shows the same as a table.
    """
    pipeline = to_pipeline(f)
    unknown = context.keys() - pipeline.keywords
    if unknown:
        raise errors.unknown_context(pipeline._label, unknown, pipeline.keywords)
    if not inputs:
        return draw_diagram(pipeline)
    return draw_diagram(pipeline, _collect_texts(record_run(pipeline, parse_call(inputs, context))))


def _collect_texts(run: RunRecord) -> dict[Position, StackTexts]:
    """Returns the items on the stack before and after each step, as text."""
    if run.error is not None:
        raise run.error
    steps = [run.root, *run.root.steps()]
    return {
        step.position: (_describe_items(step.before), _describe_items(step.after or ()))
        for step in steps
    }


def _describe_items(stack: Stack) -> list[str]:
    return [shorten(describe_item(item), MAX_LABEL_LENGTH) for item in stack]


def draw_diagram(f: Combinator, stacks: Mapping[Position, StackTexts] | None = None) -> Diagram:
    """Draws a pipeline, with the items of the stack as labels, if they are known."""
    picture = read_wiring(f, stacks)
    width, height = picture.width + 2 * MARGIN, picture.height + 2 * MARGIN
    place = f'width="{width}" height="{height}"'
    box = f"{-MARGIN} {-MARGIN} {width} {height}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{CLASS}" role="img" {place}',
        f'  viewBox="{box}" font-family="{FONT}">',
        f"<title>{_escape(f'Wiring of {f._label}: {f.signature}')}</title>",
        f"<desc>{_escape(format_expression(f))}</desc>",
        f"<style>{_write_dark_style()}</style>",
        f'<rect {_write_paint("canvas")} x="{-MARGIN}" y="{-MARGIN}" {place}/>',
        *itertools.chain.from_iterable(map(_write_frame, picture.frames)),
        f'<g {_write_paint("wire")} stroke-width="{LINE_WIDTH}">',
        *(f'<path d="{_write_path(wire)}"/>' for wire in picture.wires),
        "</g>",
        *map(_write_dot, picture.dots),
        *_write_boxes_and_words(picture),
        "</svg>",
    ]
    return Diagram("\n".join(lines) + "\n")


def _write_dark_style() -> str:
    rules = "".join(
        f".{CLASS} .{name}{{fill:{fill};stroke:{stroke}}}"
        for name, (_, (fill, stroke)) in COLOURS.items()
    )
    return f"@media (prefers-color-scheme:dark){{{rules}}}"


def _write_paint(name: str) -> str:
    fill, stroke = COLOURS[name][0]
    return f'class="{name}" fill="{fill}" stroke="{stroke}"'


def _write_frame(frame: Frame) -> Iterator[str]:
    left, top = frame.left.x, frame.top
    width, height = frame.right.x - left, frame.bottom - top
    if frame.copies:
        # The edges of a second copy show behind it.
        x, y, o = left + width, top + height, COPY_OFFSET
        edge = f"M{x} {top + o}h{o}V{y + o}H{left + o}v{-o}"
        yield f'<path {_write_paint("frame")} d="{edge}"/>'
    yield f'<rect {_write_paint("frame")} {_write_place(left, top, width, height)} rx="6"/>'


def _write_place(x: int, y: int, width: int, height: int) -> str:
    return f'x="{x}" y="{y}" width="{width}" height="{height}"'


def _write_path(wire: Wire) -> str:
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


def _write_dot(dot: Dot) -> str:
    kind = "end" if dot.is_end else "dot"
    return f'<circle {_write_paint(kind)} cx="{dot.column.x}" cy="{dot.y}" r="3.5"/>'


def _write_boxes_and_words(picture: Picture) -> Iterator[str]:
    """Writes boxes and texts from the top down, the order of reading and of selecting text."""
    pieces = [(box.top, box.left.x, _write_box(box)) for box in picture.boxes]
    pieces += [(frame.top, frame.left.x, _write_frame_caption(frame)) for frame in picture.frames]
    pieces += [
        (label.y, label.column.x, _write_label(label))
        for label in picture.labels
        if label.item.label
    ]
    yield from (text for _, _, text in sorted(pieces, key=lambda piece: piece[:2]))


def _write_box(box: Box) -> str:
    left, top, width = box.left.x, box.top, box.right.x - box.left.x
    height = box.bottom - top
    kind = "pill" if box.shape in (Shape.PILL, Shape.ROUND) else box.shape.name.lower()
    radius = 5 if kind != "pill" else min(RADIUS, height // 2)
    middle = (left + box.right.x) // 2
    baseline = top + (height - DETAIL_HEIGHT * len(box.caption.details)) // 2 + 5
    words = [_write_words("name", middle, baseline, box.caption.name, "middle")]
    for line in box.caption.details:
        baseline += DETAIL_HEIGHT
        words.append(_write_words("small", middle, baseline, line, "middle"))
    tip = f"<title>{_escape(box.caption.full)}</title>"
    outline = f'<rect {_write_paint(kind)} {_write_place(left, top, width, height)} rx="{radius}"/>'
    return "\n".join(["<g>" + tip, outline, *words, "</g>"])


def _write_frame_caption(frame: Frame) -> str:
    return _write_words("small", frame.left.x + 8, frame.top + 16, frame.caption)


def _write_label(label: Label) -> str:
    return _write_words("small", label.column.x + BESIDE_LABEL, label.y, label.item.label)


def _write_words(kind: str, x: int, y: int, text: str, anchor: str = "start") -> str:
    size = NAME_SIZE if kind == "name" else SMALL_SIZE
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    place = f'x="{x}" y="{y}" font-size="{size}"{anchored}'
    return f"<text {_write_paint(kind)} {place}>{_escape(text)}</text>"


def _escape(text: str) -> str:
    """Escapes a text for XML, without characters that XML forbids, and without addresses."""
    return escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", ADDRESS.sub("", text)))
