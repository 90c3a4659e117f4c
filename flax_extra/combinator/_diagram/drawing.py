"""Draws a picture from the top down, with the stack as wires.

There is one wire for each item of the stack, the top one on the left. A box takes wires off the
left; the others pass by on its right. So a wire runs straight down from the box that gives it to
the box that takes it. Wires cross only where items are moved.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._diagram.captions import SMALL_SIZE, Caption, measure_width
from flax_extra.combinator._diagram.columns import Column, Columns
from flax_extra.combinator._diagram.picture import (
    BESIDE_LABEL,
    CORNER,
    DETAIL_HEIGHT,
    RADIUS,
    Box,
    Dot,
    Frame,
    Item,
    Label,
    Picture,
    Route,
    Shape,
    Wire,
)

BETWEEN_WIRES, BETWEEN_BOXES, BESIDE_WIRE = 28, 18, 14
"""Pixels from left to right; the last is between a wire and the side of what it enters."""

BELOW_STEP, BELOW_STEP_WITH_LABELS, LABEL_DROP = 18, 30, 18
"""Pixels below a step to the next, and to the foot of a label."""

NAME_HEIGHT, FRAME_HEAD, FRAME_FOOT = 28, 26, 2

DROP, LANE, CROSSING = 10, 12, 40
"""Pixels from the top down where wires are moved: see ``_MovePlan``."""

SLOPE = 35
"""How far down a wire that crosses goes at least, in percent of how far aside it goes."""


@dataclasses.dataclass(frozen=True)
class OpenWire:
    """A wire that has not ended yet, and where it started."""

    column: Column
    top: int
    item: Item = dataclasses.field(default_factory=Item)


OpenWires: TypeAlias = tuple[OpenWire, ...]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The columns between which the steps of a frame, or of a side of ``parallel``, stand."""

    left: Column
    right: Column
    margin: int = 0


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The lower edge of the drawing: the stack as open wires, and the height it has reached."""

    wires: OpenWires
    bounds: Bounds
    y: int

    def split(self, n: int) -> tuple[OpenWires, OpenWires]:
        return self.wires[:n], self.wires[n:]


class Drawing:
    """A picture that grows: each method draws a part below a frontier, and returns the new one.

    Args:
        has_labels: whether to leave room for labels beside the wires.
        spans: how far aside wires go wherever some cross, as ``spans`` of a first drawing says. A
            wire that goes far aside must go far down, or the eye cannot follow it.
    """

    def __init__(self, has_labels: bool, spans: Sequence[int] = ()) -> None:
        self.has_labels = has_labels
        self._heights = [max(CROSSING, span * SLOPE // 100) for span in spans]
        self._crossings: list[list[Wire]] = []
        self._picture = Picture()
        self._columns = Columns()
        self._below = BELOW_STEP_WITH_LABELS if has_labels else BELOW_STEP
        self._neighbours: list[tuple[Label, Column]] = []

    def begin(self, n_wires: int) -> Frontier:
        """Starts the wires that come in at the top."""
        bounds = self._add_bounds()
        wires = tuple(OpenWire(self._columns.add(), 0) for _ in range(n_wires))
        self._label_wires(wires, wires, bounds)
        return Frontier(wires, bounds, self._below)

    def finish(self, frontier: Frontier) -> Picture:
        """Ends all wires, and computes the position of everything."""
        for wire in frontier.wires:
            self._end_wire(wire, frontier.y)
        for label, neighbour in self._neighbours:
            if label.item.label:
                room = measure_width(label.item.label, SMALL_SIZE) + 2 * BESIDE_LABEL
                neighbour.stay_right_of(label.column, room)
        self._columns.settle()
        self._picture.width, self._picture.height = frontier.bounds.right.x, frontier.y
        return self._picture

    @property
    def spans(self) -> list[int]:
        """How far aside a wire goes at most, wherever wires cross. It is known once finished."""
        return [max(abs(w.end.x - w.start.x) for w in wires) for wires in self._crossings]

    def add_box(
        self, caption: Caption, shape: Shape, signature: Signature, frontier: Frontier
    ) -> Frontier:
        """Adds a box over the wires that it takes."""
        taken, rest = frontier.split(signature.n_in)
        bottom = frontier.y + NAME_HEIGHT + DETAIL_HEIGHT * len(caption.details)
        outputs = [wire.column for wire in taken[: signature.n_out]]
        outputs += [self._columns.add() for _ in range(signature.n_out - len(outputs))]
        sides = self._add_bounds()
        room = caption.width + 2 * BESIDE_LABEL
        sides.right.stay_right_of(sides.left, room)
        ports = {*outputs, *(wire.column for wire in taken)}
        for port in ports:
            least = (room + 1) // 2 if len(ports) == 1 else BESIDE_WIRE
            port.stay_right_of(sides.left, least)
            sides.right.stay_right_of(port, least)
        self._keep_between(frontier.bounds, sides, rest)
        for wire in taken:
            self._end_wire(wire, frontier.y)
        box = Box(caption, shape, sides.left, sides.right, frontier.y, bottom)
        self._picture.boxes.append(box)
        return self._add_outputs(outputs, rest, frontier.bounds, bottom)

    def add_join(self, caption: Caption, n_in: int, frontier: Frontier) -> Frontier:
        """Adds a round box on the first wire. The others turn into it from the side."""
        taken, rest = frontier.split(n_in)
        column, bottom = taken[0].column, frontier.y + 2 * RADIUS
        self._end_wire(taken[0], frontier.y)
        for other, height in zip(taken[1:], _spread_heights(n_in - 1), strict=True):
            inset = round((RADIUS**2 - height**2) ** 0.5)
            end = frontier.y + RADIUS + height
            turning = Wire(other.column, other.top, column, end, Route.JOIN, inset)
            self._picture.wires.append(turning)
        sides, reach = self._add_bounds(), self._add_bounds()
        column.stay_right_of(sides.left, RADIUS)
        sides.right.stay_right_of(column, RADIUS)
        reach.right.stay_right_of(sides.right, 0)
        reach.right.stay_right_of(taken[-1].column, 0)
        sides.left.stay_right_of(reach.left, 0)
        self._keep_between(frontier.bounds, reach, rest)
        box = Box(caption, Shape.ROUND, sides.left, sides.right, frontier.y, bottom)
        self._picture.boxes.append(box)
        return self._add_outputs([column], rest, frontier.bounds, bottom)

    def add_frame(
        self,
        caption: str,
        copies: bool,
        n_in: int,
        frontier: Frontier,
        inside: Callable[[Frontier], Frontier],
    ) -> Frontier:
        """Adds a frame around the part that ``inside`` draws."""
        taken, rest = frontier.split(n_in)
        inner = dataclasses.replace(self._add_bounds(), margin=BESIDE_WIRE)
        self._keep_between(frontier.bounds, inner, rest)
        self._keep_in_order(taken, inner)
        clear_of_caption = taken[0].column if taken else inner.right
        clear_of_caption.stay_right_of(
            inner.left, measure_width(caption, SMALL_SIZE) + 2 * BESIDE_LABEL
        )
        index = len(self._picture.frames)
        end = inside(Frontier(taken, inner, frontier.y + FRAME_HEAD))
        bottom = end.y + FRAME_FOOT
        frame = Frame(caption, copies, inner.left, inner.right, frontier.y, bottom)
        self._picture.frames.insert(index, frame)
        self._keep_in_order(end.wires + rest, frontier.bounds)
        return Frontier(end.wires + rest, frontier.bounds, bottom + BELOW_STEP)

    def add_side_by_side(
        self, sizes: Sequence[int], frontier: Frontier, inside: Callable[[int, Frontier], Frontier]
    ) -> Frontier:
        """Adds parts side by side: ``inside`` draws each, and ``sizes`` are the wires it takes."""
        outputs: OpenWires = ()
        rest, bottom = frontier.wires, frontier.y
        reach, last = self._add_bounds(), None
        for index, size in enumerate(sizes):
            taken, rest = rest[:size], rest[size:]
            side = self._add_bounds()
            side.left.stay_right_of(*((reach.left, 0) if last is None else (last, BETWEEN_BOXES)))
            self._keep_in_order(taken, side)
            end = inside(index, Frontier(taken, side, frontier.y))
            outputs, bottom, last = outputs + end.wires, max(bottom, end.y), side.right
        if last is not None:
            reach.right.stay_right_of(last, 0)
        self._keep_between(frontier.bounds, reach, rest)
        return Frontier(outputs + rest, frontier.bounds, bottom)

    def relabel(self, start: int, stop: int, frontier: Frontier) -> Frontier:
        """Ends wires whose items change here, and starts new ones with labels of their own."""
        if not self.has_labels:
            return frontier
        changed = frontier.wires[start:stop]
        for wire in changed:
            self._end_wire(wire, frontier.y)
        renewed = tuple(OpenWire(wire.column, frontier.y) for wire in changed)
        wires = (*frontier.wires[:start], *renewed, *frontier.wires[stop:])
        self._label_wires(renewed, wires, frontier.bounds)
        return Frontier(wires, frontier.bounds, frontier.y + self._below)

    def name_wires(self, names: Sequence[str], frontier: Frontier) -> Frontier:
        """Ends the first wires here, and starts new ones, each with a name beside it."""
        for wire in frontier.wires[: len(names)]:
            self._end_wire(wire, frontier.y)
        named = tuple(
            OpenWire(wire.column, frontier.y, Item(wire.item.text, name))
            for name, wire in zip(names, frontier.wires, strict=False)
        )
        wires = named + frontier.wires[len(names) :]
        self._label_wires(named, wires, frontier.bounds)
        return Frontier(wires, frontier.bounds, frontier.y + BELOW_STEP_WITH_LABELS)

    def move_wires(self, indices: Sequence[int], n_in: int, frontier: Frontier) -> Frontier:
        """Moves, copies or ends wires: of the first ``n_in``, those at ``indices`` go on."""
        if list(indices) == list(range(n_in)):
            return frontier
        taken, rest = frontier.split(n_in)
        number = len(self._crossings)
        height = self._heights[number] if number < len(self._heights) else CROSSING
        plan = _MovePlan(indices, _choose_columns(indices, n_in), frontier.y, height)
        first = len(self._picture.wires)
        outputs = tuple(self._route_wire(plan, taken, *use) for use in plan.uses)
        for i, wire in enumerate(taken):
            self._leave_column(plan, i, wire)
        if plan.crosses:
            moved = self._picture.wires[first : first + len(outputs)]
            self._crossings.append([w for w in moved if w.route is Route.CROSS])
        wires = outputs + rest
        crossed = tuple(
            s for s, (i, k) in zip(outputs, plan.uses, strict=True) if k not in (None, i)
        )
        self._keep_in_order(wires, frontier.bounds)
        if not crossed or not self.has_labels:
            return Frontier(wires, frontier.bounds, plan.bottom + CORNER)
        self._label_wires(crossed, wires, frontier.bounds)
        return Frontier(wires, frontier.bounds, plan.bottom + self._below)

    def _route_wire(self, plan: _MovePlan, taken: OpenWires, i: int, k: int | None) -> OpenWire:
        """Continues an item in its own column, in a new one, or in that of another wire."""
        source = taken[i]
        if k == i:
            return source
        if k is None:
            top, bottom, column = plan.lanes[i], plan.lanes[i] + CORNER, self._columns.add()
            wire = Wire(source.column, top, column, bottom, Route.BRANCH)
        else:
            bottom, column = plan.bottom, taken[k].column
            wire = Wire(source.column, plan.crossing, column, bottom, Route.CROSS)
        self._picture.wires.append(wire)
        return OpenWire(column, bottom, source.item)

    def _leave_column(self, plan: _MovePlan, i: int, wire: OpenWire) -> None:
        """Ends a wire that leaves its column, with dots where it splits or a ring at its end."""
        uses = [k for index, k in plan.uses if index == i]
        n_crosses = sum(k not in (None, i) for k in uses)
        if not uses:
            self._end_wire(wire, plan.top)
            self._picture.dots.append(Dot(wire.column, plan.top, is_end=True))
        elif i not in uses:
            self._end_wire(wire, plan.crossing if n_crosses else plan.lanes[i])
        if i in plan.lanes and len(uses) > 1:
            self._picture.dots.append(Dot(wire.column, plan.lanes[i], is_end=False))
        if n_crosses and n_crosses + (i in uses) > 1:
            self._picture.dots.append(Dot(wire.column, plan.crossing, is_end=False))

    def _add_outputs(
        self, columns: Sequence[Column], rest: OpenWires, bounds: Bounds, y: int
    ) -> Frontier:
        outputs = tuple(OpenWire(column, y) for column in columns)
        self._label_wires(outputs, outputs + rest, bounds)
        return Frontier(outputs + rest, bounds, y + self._below)

    def _label_wires(self, new: OpenWires, wires: OpenWires, bounds: Bounds) -> None:
        """Adds labels to new wires, which are some of those within the bounds."""
        self._keep_in_order(wires, bounds)
        neighbours = [*(wire.column for wire in wires[1:]), bounds.right]
        for wire, neighbour in zip(wires, neighbours, strict=False):
            if wire in new:
                label = Label(wire.column, wire.top + LABEL_DROP, wire.item)
                self._picture.labels.append(label)
                self._neighbours.append((label, neighbour))

    def _end_wire(self, wire: OpenWire, y: int) -> None:
        self._picture.wires.append(Wire(wire.column, wire.top, wire.column, y))

    def _add_bounds(self) -> Bounds:
        bounds = Bounds(self._columns.add(leans_right=True), self._columns.add())
        bounds.right.stay_right_of(bounds.left, 0)
        return bounds

    def _keep_in_order(self, wires: OpenWires, bounds: Bounds) -> None:
        for one, next_one in itertools.pairwise(wires):
            next_one.column.stay_right_of(one.column, BETWEEN_WIRES)
        if wires:
            wires[0].column.stay_right_of(bounds.left, bounds.margin)
            bounds.right.stay_right_of(wires[-1].column, bounds.margin)

    def _keep_between(self, bounds: Bounds, part: Bounds, rest: OpenWires) -> None:
        """Keeps a part within the bounds, and left of the wires that pass by."""
        part.left.stay_right_of(bounds.left, bounds.margin)
        bounds.right.stay_right_of(part.right, bounds.margin)
        if rest:
            rest[0].column.stay_right_of(part.right, BETWEEN_BOXES)
            self._keep_in_order(rest, bounds)


class _MovePlan:
    """The heights at which wires are moved: first some end, then some branch off, then some cross.

    Args:
        indices: for each wire that goes on, the index of the wire that it comes from.
        columns: for each of them, the old column in which it goes on; None for a new one.
        top: the height at which this begins.
        height: how far down wires go while they cross.
    """

    def __init__(
        self, indices: Sequence[int], columns: Sequence[int | None], top: int, height: int
    ) -> None:
        self.uses = list(zip(indices, columns, strict=True))
        self.top = top
        branching = sorted({i for i, k in self.uses if k is None}, reverse=True)
        lanes = itertools.count(top + DROP, LANE)
        self.lanes: Mapping[int, int] = dict(zip(branching, lanes, strict=False))
        self.crossing = max(self.lanes.values(), default=top) + CORNER
        self.crosses = any(k not in (None, i) for i, k in self.uses)
        self.bottom = self.crossing + (height if self.crosses else 0)


def _choose_columns(indices: Sequence[int], n_in: int) -> list[int | None]:
    """Chooses the old column in which each moved item goes on; None for a new one.

    Items that keep their order keep their columns. Others go to the column of their new index on
    the stack, so that the drawing does not drift to the right.
    """
    if all(a <= b for a, b in itertools.pairwise(indices)):
        return [i if i not in indices[:j] else None for j, i in enumerate(indices)]
    return [j if j < n_in else None for j in range(len(indices))]


def _spread_heights(n: int) -> Sequence[int]:
    """Returns how far below the middle of a round box each wire from the side comes in."""
    return [round(RADIUS * (2 * i - n + 1) / 2) for i in range(n)]
