"""A draft: a picture while it is being drawn, from the top down, with the stack in hand.

What flows down are wires, one for each item of the stack, the top on the left. A box takes wires
off the left, and those that it does not take pass by on its right. So a wire is upright all the way
from the box that gives it to the box that takes it; only where items are moved does one cross
another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from flax_extra.combinator._captions import SMALL_SIZE, Caption, width_of
from flax_extra.combinator._columns import Column, Columns
from flax_extra.combinator._picture import (
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
from flax_extra.combinator._signature import Signature

BETWEEN_WIRES, BETWEEN_BOXES, BESIDE_WIRE = 28, 18, 14
"""Pixels from left to right; the last is between a wire and the side of what it enters."""

BELOW_STEP, BELOW_STEP_WITH_LABELS, LABEL_DROP = 18, 30, 18
"""Pixels below a step to the next, and to the foot of a label."""

NAME_HEIGHT, FRAME_HEAD, FRAME_FOOT = 28, 26, 2

DROP, LANE, CROSSING = 10, 12, 40
"""How far down wires that are moved get their places: see ``_Plan``."""

SLOPE = 35
"""How far wires that cross come down at least, in hundredths of how far aside they go."""


@dataclasses.dataclass(frozen=True)
class Strand:
    """A wire that has not ended yet."""

    column: Column
    top: int
    item: Item = dataclasses.field(default_factory=Item)


Strands: TypeAlias = tuple[Strand, ...]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The columns between which the steps of a frame, or of a side of ``parallel``, stand."""

    left: Column
    right: Column
    margin: int = 0


@dataclasses.dataclass(frozen=True)
class Front:
    """How far the drawing has come: the stack as wires, and the height they have come down to."""

    strands: Strands
    bounds: Bounds
    y: int

    def split(self, n: int) -> tuple[Strands, Strands]:
        return self.strands[:n], self.strands[n:]


class Draft:
    """A picture that grows: each method draws a part below a front, and gives the front below it.

    Args:
        has_labels: whether to leave room for labels beside the wires.
        spans: how wide each place is where wires cross, as ``spans`` of a first draft says: wires
            that go far aside need to come down far, or nobody can follow them.
    """

    def __init__(self, has_labels: bool, spans: Sequence[int] = ()) -> None:
        self.has_labels = has_labels
        self._heights = [max(CROSSING, span * SLOPE // 100) for span in spans]
        self._crossings: list[list[Wire]] = []
        self._picture = Picture()
        self._columns = Columns()
        self._below = BELOW_STEP_WITH_LABELS if has_labels else BELOW_STEP
        self._neighbours: list[tuple[Label, Column]] = []

    def begin(self, n_wires: int) -> Front:
        """The wires that come in at the top."""
        bounds = self._new_bounds()
        strands = tuple(Strand(self._columns.new(), 0) for _ in range(n_wires))
        self._start(strands, strands, bounds)
        return Front(strands, bounds, self._below)

    def finish(self, front: Front) -> Picture:
        """Ends all wires, and gives everything its place."""
        for strand in front.strands:
            self._end(strand, front.y)
        for label, neighbour in self._neighbours:
            if label.item.text:
                room = width_of(label.item.text, SMALL_SIZE) + 2 * BESIDE_LABEL
                neighbour.right_of(label.column, room)
        self._columns.settle()
        self._picture.width, self._picture.height = front.bounds.right.x, front.y
        return self._picture

    @property
    def spans(self) -> list[int]:
        """How far aside a wire goes at most, wherever wires cross; known once finished."""
        return [max(abs(w.end.x - w.start.x) for w in wires) for wires in self._crossings]

    def box(self, caption: Caption, shape: Shape, signature: Signature, front: Front) -> Front:
        """A box over the wires that it takes."""
        taken, rest = front.split(signature.n_in)
        bottom = front.y + NAME_HEIGHT + DETAIL_HEIGHT * len(caption.details)
        outputs = [strand.column for strand in taken[: signature.n_out]]
        outputs += [self._columns.new() for _ in range(signature.n_out - len(outputs))]
        sides = self._new_bounds()
        room = caption.width + 2 * BESIDE_LABEL
        sides.right.right_of(sides.left, room)
        ports = {*outputs, *(strand.column for strand in taken)}
        for port in ports:
            least = (room + 1) // 2 if len(ports) == 1 else BESIDE_WIRE
            port.right_of(sides.left, least)
            sides.right.right_of(port, least)
        self._between(front.bounds, sides, rest)
        for strand in taken:
            self._end(strand, front.y)
        box = Box(caption, shape, sides.left, sides.right, front.y, bottom)
        self._picture.boxes.append(box)
        return self._given(outputs, rest, front.bounds, bottom)

    def join(self, caption: Caption, n_in: int, front: Front) -> Front:
        """A round box on the first wire, into which the others turn from the side."""
        taken, rest = front.split(n_in)
        column, bottom = taken[0].column, front.y + 2 * RADIUS
        self._end(taken[0], front.y)
        for strand, height in zip(taken[1:], _heights(n_in - 1), strict=True):
            inset = round((RADIUS**2 - height**2) ** 0.5)
            end = front.y + RADIUS + height
            wire = Wire(strand.column, strand.top, column, end, Route.JOIN, inset)
            self._picture.wires.append(wire)
        sides, reach = self._new_bounds(), self._new_bounds()
        column.right_of(sides.left, RADIUS)
        sides.right.right_of(column, RADIUS)
        reach.right.right_of(sides.right, 0)
        reach.right.right_of(taken[-1].column, 0)
        sides.left.right_of(reach.left, 0)
        self._between(front.bounds, reach, rest)
        box = Box(caption, Shape.ROUND, sides.left, sides.right, front.y, bottom)
        self._picture.boxes.append(box)
        return self._given([column], rest, front.bounds, bottom)

    def frame(
        self, caption: str, copies: bool, n_in: int, front: Front, inside: Callable[[Front], Front]
    ) -> Front:
        """A frame around what is drawn inside."""
        taken, rest = front.split(n_in)
        inner = dataclasses.replace(self._new_bounds(), margin=BESIDE_WIRE)
        self._between(front.bounds, inner, rest)
        self._in_order(taken, inner)
        clear_of_caption = taken[0].column if taken else inner.right
        clear_of_caption.right_of(inner.left, width_of(caption, SMALL_SIZE) + 2 * BESIDE_LABEL)
        place = len(self._picture.frames)
        end = inside(Front(taken, inner, front.y + FRAME_HEAD))
        bottom = end.y + FRAME_FOOT
        frame = Frame(caption, copies, inner.left, inner.right, front.y, bottom)
        self._picture.frames.insert(place, frame)
        self._in_order(end.strands + rest, front.bounds)
        return Front(end.strands + rest, front.bounds, bottom + BELOW_STEP)

    def side_by_side(
        self, sizes: Sequence[int], front: Front, inside: Callable[[int, Front], Front]
    ) -> Front:
        """Parts beside one another: the one of each index takes that many of the wires."""
        given: Strands = ()
        rest, bottom = front.strands, front.y
        reach, last = self._new_bounds(), None
        for index, size in enumerate(sizes):
            taken, rest = rest[:size], rest[size:]
            side = self._new_bounds()
            side.left.right_of(*((reach.left, 0) if last is None else (last, BETWEEN_BOXES)))
            self._in_order(taken, side)
            end = inside(index, Front(taken, side, front.y))
            given, bottom, last = given + end.strands, max(bottom, end.y), side.right
        if last is not None:
            reach.right.right_of(last, 0)
        self._between(front.bounds, reach, rest)
        return Front(given + rest, front.bounds, bottom)

    def renew(self, start: int, stop: int, front: Front) -> Front:
        """Wires that hold something else from here on, and are labelled anew."""
        if not self.has_labels:
            return front
        changed = front.strands[start:stop]
        for strand in changed:
            self._end(strand, front.y)
        renewed = tuple(Strand(strand.column, front.y) for strand in changed)
        strands = (*front.strands[:start], *renewed, *front.strands[stop:])
        self._start(renewed, strands, front.bounds)
        return Front(strands, front.bounds, front.y + self._below)

    def move(self, indices: Sequence[int], n_in: int, front: Front) -> Front:
        """Wires in another order, split, or ended: those at ``indices`` of the first ``n_in``."""
        if list(indices) == list(range(n_in)):
            return front
        taken, rest = front.split(n_in)
        number = len(self._crossings)
        height = self._heights[number] if number < len(self._heights) else CROSSING
        plan = _Plan(indices, _kept(indices, n_in), front.y, height)
        first = len(self._picture.wires)
        given = tuple(self._moved(plan, taken, *use) for use in plan.uses)
        for i, strand in enumerate(taken):
            self._leave(plan, i, strand)
        if plan.crosses:
            moved = self._picture.wires[first : first + len(given)]
            self._crossings.append([w for w in moved if w.route is Route.CROSS])
        strands = given + rest
        crossed = tuple(s for s, (i, k) in zip(given, plan.uses, strict=True) if k not in (None, i))
        self._in_order(strands, front.bounds)
        if not crossed or not self.has_labels:
            return Front(strands, front.bounds, plan.bottom + CORNER)
        self._start(crossed, strands, front.bounds)
        return Front(strands, front.bounds, plan.bottom + self._below)

    def _moved(self, plan: _Plan, taken: Strands, i: int, k: int | None) -> Strand:
        """The wire in which an item goes on: in its own column, in a new one, or in another's."""
        source = taken[i]
        if k == i:
            return source
        if k is None:
            top, bottom, column = plan.lanes[i], plan.lanes[i] + CORNER, self._columns.new()
            wire = Wire(source.column, top, column, bottom, Route.BRANCH)
        else:
            bottom, column = plan.bottom, taken[k].column
            wire = Wire(source.column, plan.crossing, column, bottom, Route.CROSS)
        self._picture.wires.append(wire)
        return Strand(column, bottom, source.item)

    def _leave(self, plan: _Plan, i: int, strand: Strand) -> None:
        """Ends a wire that leaves its column; dots where it splits, and a ring where it ends."""
        uses = [k for index, k in plan.uses if index == i]
        n_crosses = sum(k not in (None, i) for k in uses)
        if not uses:
            self._end(strand, plan.top)
            self._picture.dots.append(Dot(strand.column, plan.top, is_end=True))
        elif i not in uses:
            self._end(strand, plan.crossing if n_crosses else plan.lanes[i])
        if i in plan.lanes and len(uses) > 1:
            self._picture.dots.append(Dot(strand.column, plan.lanes[i], is_end=False))
        if n_crosses and n_crosses + (i in uses) > 1:
            self._picture.dots.append(Dot(strand.column, plan.crossing, is_end=False))

    def _given(self, columns: Sequence[Column], rest: Strands, bounds: Bounds, y: int) -> Front:
        given = tuple(Strand(column, y) for column in columns)
        self._start(given, given + rest, bounds)
        return Front(given + rest, bounds, y + self._below)

    def _start(self, new: Strands, strands: Strands, bounds: Bounds) -> None:
        """Labels new wires, which are some of those within the bounds."""
        self._in_order(strands, bounds)
        neighbours = [*(strand.column for strand in strands[1:]), bounds.right]
        for strand, neighbour in zip(strands, neighbours, strict=False):
            if strand in new:
                label = Label(strand.column, strand.top + LABEL_DROP, strand.item)
                self._picture.labels.append(label)
                self._neighbours.append((label, neighbour))

    def _end(self, strand: Strand, y: int) -> None:
        self._picture.wires.append(Wire(strand.column, strand.top, strand.column, y))

    def _new_bounds(self) -> Bounds:
        bounds = Bounds(self._columns.new(leans=True), self._columns.new())
        bounds.right.right_of(bounds.left, 0)
        return bounds

    def _in_order(self, strands: Strands, bounds: Bounds) -> None:
        for one, next_one in itertools.pairwise(strands):
            next_one.column.right_of(one.column, BETWEEN_WIRES)
        if strands:
            strands[0].column.right_of(bounds.left, bounds.margin)
            bounds.right.right_of(strands[-1].column, bounds.margin)

    def _between(self, bounds: Bounds, part: Bounds, rest: Strands) -> None:
        """Keeps a part within the bounds, and left of the wires that pass by it."""
        part.left.right_of(bounds.left, bounds.margin)
        bounds.right.right_of(part.right, bounds.margin)
        if rest:
            rest[0].column.right_of(part.right, BETWEEN_BOXES)
            self._in_order(rest, bounds)


class _Plan:
    """Where wires are moved: first some end, then some branch off, then some cross.

    Args:
        indices: which wire each of those that go on comes from.
        kept: in which of the old columns each goes on; None for a new one.
        top: where the first of this happens.
        height: how far wires come down while they cross.
    """

    def __init__(
        self, indices: Sequence[int], kept: Sequence[int | None], top: int, height: int
    ) -> None:
        self.uses = list(zip(indices, kept, strict=True))
        self.top = top
        branching = sorted({i for i, k in self.uses if k is None}, reverse=True)
        lanes = itertools.count(top + DROP, LANE)
        self.lanes: Mapping[int, int] = dict(zip(branching, lanes, strict=False))
        self.crossing = max(self.lanes.values(), default=top) + CORNER
        self.crosses = any(k not in (None, i) for i, k in self.uses)
        self.bottom = self.crossing + (height if self.crosses else 0)


def _kept(indices: Sequence[int], n_in: int) -> list[int | None]:
    """In which of the old columns each moved item goes on; None for a new one.

    Items that stay in order stay in their columns. Others go where their place on the stack is,
    so that what comes after stands as far left as what came before.
    """
    if all(a <= b for a, b in itertools.pairwise(indices)):
        return [i if i not in indices[:j] else None for j, i in enumerate(indices)]
    return [j if j < n_in else None for j in range(len(indices))]


def _heights(n: int) -> Sequence[int]:
    """How far below the middle of a round box each of the wires from its side comes in."""
    return [round(RADIUS * (2 * i - n + 1) / 2) for i in range(n)]
