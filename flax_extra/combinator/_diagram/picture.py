"""The parts of a picture of a pipeline: boxes, wires, frames, dots and labels.

From left to right they stand in columns, which get positions later; from the top down, at pixels.
"""

from __future__ import annotations

import dataclasses
import enum

from flax_extra.combinator._diagram.captions import Caption
from flax_extra.combinator._diagram.columns import Column

CORNER = 8
"""The radius of the corners of wires."""

RADIUS = 11
"""The radius of a round box."""

BESIDE_LABEL = 7
"""The room on either side of a text."""

DETAIL_HEIGHT = 14
"""The height of a line below the name in a box."""


class Route(enum.Enum):
    """How a wire goes from its start to its end."""

    STRAIGHT = enum.auto()
    BRANCH = enum.auto()
    """Aside, then down: a copy that leaves a dot."""
    JOIN = enum.auto()
    """Down, then aside, into a round box."""
    CROSS = enum.auto()


class Shape(enum.Enum):
    """The outline of a box."""

    LAYER = enum.auto()
    FUNCTION = enum.auto()
    PILL = enum.auto()
    ROUND = enum.auto()


@dataclasses.dataclass(eq=False)
class Item:
    """The item in a wire. Its text is known once the step that gives it has been read."""

    text: str = ""
    name: str = ""

    @property
    def label(self) -> str:
        """The text beside the wire: the name that a ``wire`` gives the item, and what it is."""
        return ": ".join(filter(None, (self.name, self.text)))


@dataclasses.dataclass(frozen=True)
class Wire:
    """A wire, or a part of one. It ends ``inset`` pixels to the right of its last column."""

    start: Column
    top: int
    end: Column
    bottom: int
    route: Route = Route.STRAIGHT
    inset: int = 0


@dataclasses.dataclass(frozen=True)
class Box:
    """A box for a step."""

    caption: Caption
    shape: Shape
    left: Column
    right: Column
    top: int
    bottom: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame around the steps of a combinator."""

    caption: str
    copies: bool
    left: Column
    right: Column
    top: int
    bottom: int


@dataclasses.dataclass(frozen=True)
class Dot:
    """A dot where a wire splits, or a ring where it ends."""

    column: Column
    y: int
    is_end: bool


@dataclasses.dataclass(frozen=True)
class Label:
    """The text of an item, beside its wire."""

    column: Column
    y: int
    item: Item


@dataclasses.dataclass
class Picture:
    """All parts of a picture. Outer frames come before inner ones."""

    frames: list[Frame] = dataclasses.field(default_factory=list)
    wires: list[Wire] = dataclasses.field(default_factory=list)
    boxes: list[Box] = dataclasses.field(default_factory=list)
    dots: list[Dot] = dataclasses.field(default_factory=list)
    labels: list[Label] = dataclasses.field(default_factory=list)
    width: int = 0
    height: int = 0
