"""Wiring: a pipeline as boxes, wires and frames, each in its place.

A walk over the expression with the stack in hand, as a run is, whose items are wires. Time flows
down; what lies deeper on the stack is further to the right. A step takes wires off the left, and
those that it does not take pass by on its right. So a wire is upright all the way from the step
that made it to the step that takes it; only where items are moved does one cross another.

    >>> from flax_extra import combinator as cb
    >>> wiring = read(cb.residual(abs))
    >>> [box.caption.name for box in wiring.boxes], [frame.caption for frame in wiring.frames]
    (['abs', '+'], ['residual'])
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from flax_extra.combinator._base import Combinator
from flax_extra.combinator._captions import (
    SMALL_SIZE,
    Caption,
    caption_of,
    fold_caption,
    frame_caption,
    join_caption,
    width_of,
)
from flax_extra.combinator._columns import Column, Columns
from flax_extra.combinator._flow import Parallel, Serial
from flax_extra.combinator._inference import is_combinator
from flax_extra.combinator._leaf import Fn
from flax_extra.combinator._lift import Remat, Repeat, Scan
from flax_extra.combinator._merge import Add, Concatenate, Div, Fold, Mul, Split, Sub
from flax_extra.combinator._picture import (
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
from flax_extra.combinator._run import Slot
from flax_extra.combinator._shuffle import Select
from flax_extra.combinator._signature import Signature

Position: TypeAlias = tuple[int, ...]
"""Where a step is: the indices of children that lead to it from the outermost pipeline."""

Stacks: TypeAlias = tuple[Sequence[str], Sequence[str]]
"""The items of the stack before a step and after it, as text."""

BETWEEN_WIRES, BETWEEN_BOXES, BESIDE_WIRE = 28, 18, 14
BELOW_STEP, BELOW_STEP_WITH_LABELS, LABEL_DROP = 18, 30, 18
BESIDE_LABEL = 7
CORNER = 8
RADIUS = 11
MOST_JOINED = 3
NAME_HEIGHT, DETAIL_HEIGHT = 28, 14
FRAME_HEAD, FRAME_FOOT = 26, 2
DROP, LANE, CROSSING = 10, 12, 40


@dataclasses.dataclass(frozen=True)
class _Strand:
    """A wire that has not ended yet."""

    column: Column
    top: int
    item: Item = dataclasses.field(default_factory=Item)


_Strands: TypeAlias = tuple[_Strand, ...]


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """The columns between which the steps of a frame, or of a side of ``parallel``, stand."""

    left: Column
    right: Column
    margin: int = 0


def read(f: Combinator, stacks: Mapping[Position, Stacks] | None = None) -> Picture:
    """A pipeline as a picture, with labels where it is known what is on the stack."""
    return _Reader(stacks).read(f)


class _Reader:
    """The walk: each method draws a part from ``y`` down, and says where it left off."""

    def __init__(self, stacks: Mapping[Position, Stacks] | None) -> None:
        self.picture = Picture()
        self.columns = Columns()
        self.stacks = stacks or {}
        self.below = BELOW_STEP if stacks is None else BELOW_STEP_WITH_LABELS
        self.positions: dict[int, Position | None] = {}
        self.neighbours: list[tuple[Label, Column]] = []

    def read(self, f: Combinator) -> Picture:
        given, _ = self.stacks.get((), ((), ()))
        bounds = _Bounds(self.columns.new(leans=True), self.columns.new())
        bounds.right.right_of(bounds.left, 0)
        strands = tuple(
            _Strand(self.columns.new(), 0) for _ in range(max(f.signature.n_in, len(given)))
        )
        _write(strands, given)
        self._start(strands, strands, bounds)
        strands, end = self._combinator(f, (), strands, bounds, self.below)
        for strand in strands:
            self._end(strand, end)
        for label, neighbour in self.neighbours:
            room = width_of(label.item.text, SMALL_SIZE) + 2 * BESIDE_LABEL
            if label.item.text:
                neighbour.right_of(label.column, room)
        self.columns.settle()
        self.picture.width, self.picture.height = bounds.right.x, end
        return self.picture

    # From the expression to its steps

    def _child(
        self,
        owner: Combinator,
        index: int,
        position: Position | None,
        strands: _Strands,
        bounds: _Bounds,
        y: int,
    ) -> tuple[_Strands, int]:
        child = owner.children[index]
        while isinstance(child.target, Slot):
            slot = child.target
            child, index, position = slot.child, slot.index, self.positions[id(slot.owner)]
        position = None if position is None else (*position, index)
        if not is_combinator(child.target):
            shape = Shape.FUNCTION if child.module is None else Shape.LAYER
            caption = caption_of(child.target, child.fixed)
            after = self._box(caption, shape, child.signature, strands, bounds, y)
        elif child.fixed:
            caption_text = frame_caption(owner, child.fixed)
            after = self._frame(caption_text, child.target, position, strands, bounds, y)
        else:
            after = self._combinator(child.target, position, strands, bounds, y)
        self._name_items(position, child.signature, after[0])
        return after

    def _name_items(
        self, position: Position | None, signature: Signature, strands: _Strands
    ) -> None:
        if position in self.stacks:
            _write(strands[: signature.n_out], self.stacks[position][1])

    def _combinator(
        self,
        f: Combinator,
        position: Position | None,
        strands: _Strands,
        bounds: _Bounds,
        y: int,
    ) -> tuple[_Strands, int]:
        moved = _moved(f)
        if moved is not None:
            return self._moves(moved, f.signature.n_in, strands, bounds, y)
        if isinstance(f, Add | Sub | Mul | Div) and f.n_in <= MOST_JOINED:
            return self._join(join_caption(f), f.n_in, strands, bounds, y)
        if isinstance(f, Add | Sub | Mul | Div | Concatenate | Split):
            return self._box(join_caption(f), Shape.PILL, f.signature, strands, bounds, y)
        if isinstance(f, Fold):
            return self._box(fold_caption(f), Shape.PILL, f.signature, strands, bounds, y)
        if not _is_open(f):
            return self._box(caption_of(f, {}), Shape.FUNCTION, f.signature, strands, bounds, y)
        is_named = f.is_lifted or f.label != f.kind
        if is_named or (f.meaning is not None and position is not None):
            return self._frame(frame_caption(f, {}), f, position, strands, bounds, y)
        return self._steps(f, position, strands, bounds, y)

    def _steps(
        self,
        f: Combinator,
        position: Position | None,
        strands: _Strands,
        bounds: _Bounds,
        y: int,
    ) -> tuple[_Strands, int]:
        if f.meaning is not None:
            self.positions[id(f)] = position
            return self._combinator(f.meaning, None, strands, bounds, y)
        if isinstance(f, Parallel):
            return self._side_by_side(f, position, strands, bounds, y)
        if isinstance(f, Scan):
            return self._time_step(f, position, strands, bounds, y)
        for index in range(len(f.children)):
            strands, y = self._child(f, index, position, strands, bounds, y)
        return strands, y

    def _side_by_side(
        self,
        f: Parallel,
        position: Position | None,
        strands: _Strands,
        bounds: _Bounds,
        y: int,
    ) -> tuple[_Strands, int]:
        given: _Strands = ()
        ends = [y]
        sides = [_Bounds(self.columns.new(leans=True), self.columns.new()) for _ in f.children]
        for index, (side, span) in enumerate(zip(sides, f.spans, strict=True)):
            side.right.right_of(side.left, 0)
            taken = strands[slice(*span.index_bounds)]
            self._in_order(taken, side)
            outputs, end = self._child(f, index, position, taken, side, y)
            given += outputs
            ends.append(end)
        rest = strands[f.signature.n_in :]
        for one, next_one in itertools.pairwise(sides):
            next_one.left.right_of(one.right, BETWEEN_BOXES)
        if sides:
            self._between(bounds, sides[0].left, sides[-1].right, rest)
        return given + rest, max(ends)

    def _time_step(
        self,
        f: Scan,
        position: Position | None,
        strands: _Strands,
        bounds: _Bounds,
        y: int,
    ) -> tuple[_Strands, int]:
        """Inside a scan, a sequence is one item of it: the same wire with another label."""
        inner = None if position is None else (*position, 0)
        before, _ = self.stacks.get(inner, ((), ())) if inner is not None else ((), ())
        strands, y = self._relabelled(strands, f.n_carried, len(strands), bounds, y)
        _write(strands, before)
        return self._child(f, 0, position, strands, bounds, y)

    def _relabelled(
        self, strands: _Strands, start: int, stop: int, bounds: _Bounds, y: int
    ) -> tuple[_Strands, int]:
        changed = strands[start:stop]
        if not self.stacks:
            return strands, y
        for strand in changed:
            self._end(strand, y)
        renewed = tuple(_Strand(strand.column, y) for strand in changed)
        strands = (*strands[:start], *renewed, *strands[stop:])
        self._start(renewed, strands, bounds)
        return strands, y + self.below

    # What is drawn

    def _frame(
        self,
        caption: str,
        f: Combinator,
        position: Position | None,
        strands: _Strands,
        bounds: _Bounds,
        y: int,
    ) -> tuple[_Strands, int]:
        taken, rest = strands[: f.signature.n_in], strands[f.signature.n_in :]
        inner = _Bounds(self.columns.new(leans=True), self.columns.new(), BESIDE_WIRE)
        self._between(bounds, inner.left, inner.right, rest)
        self._in_order(taken, inner)
        clear_of_caption = taken[0].column if taken else inner.right
        clear_of_caption.right_of(inner.left, width_of(caption, SMALL_SIZE) + 2 * BESIDE_LABEL)
        place = len(self.picture.frames)
        given, end = self._steps(f, position, taken, inner, y + FRAME_HEAD)
        copies = isinstance(f, Repeat)
        end += FRAME_FOOT
        frame = Frame(caption, copies, inner.left, inner.right, y, end)
        self.picture.frames.insert(place, frame)
        self._in_order(given + rest, bounds)
        if isinstance(f, Scan) and self.stacks:
            first, last = f.n_carried, f.signature.n_out
            return self._relabelled(given + rest, first, last, bounds, end)
        return given + rest, end + BELOW_STEP

    def _box(
        self,
        caption: Caption,
        shape: Shape,
        signature: Signature,
        strands: _Strands,
        bounds: _Bounds,
        y: int,
    ) -> tuple[_Strands, int]:
        taken, rest = strands[: signature.n_in], strands[signature.n_in :]
        height = NAME_HEIGHT + DETAIL_HEIGHT * len(caption.details)
        columns = self._continued(taken, signature.n_out)
        left, right = self.columns.new(leans=True), self.columns.new()
        room = caption.width + 2 * BESIDE_LABEL
        right.right_of(left, room)
        ports = {strand.column for strand in taken} | set(columns)
        for port in ports:
            least = (room + 1) // 2 if len(ports) == 1 else BESIDE_WIRE
            port.right_of(left, least)
            right.right_of(port, least)
        self._between(bounds, left, right, rest)
        for strand in taken:
            self._end(strand, y)
        self.picture.boxes.append(Box(caption, shape, left, right, y, y + height))
        return self._given(columns, rest, bounds, y + height)

    def _join(
        self, caption: Caption, n_in: int, strands: _Strands, bounds: _Bounds, y: int
    ) -> tuple[_Strands, int]:
        taken, rest = strands[:n_in], strands[n_in:]
        column, centre = taken[0].column, y + RADIUS
        left, right = self.columns.new(leans=True), self.columns.new()
        column.right_of(left, RADIUS)
        right.right_of(column, RADIUS)
        right.right_of(taken[-1].column, 0)
        self._between(bounds, left, right, rest)
        self._end(taken[0], y)
        for strand, height in zip(taken[1:], _heights(n_in - 1), strict=True):
            inset = round((RADIUS**2 - height**2) ** 0.5)
            end = centre + height
            wire = Wire(strand.column, strand.top, column, end, Route.JOIN, inset)
            self.picture.wires.append(wire)
        edges = [self.columns.new(leans=True), self.columns.new()]
        column.right_of(edges[0], RADIUS)
        edges[1].right_of(column, RADIUS)
        box = Box(caption, Shape.ROUND, edges[0], edges[1], y, y + 2 * RADIUS)
        self.picture.boxes.append(box)
        return self._given([column], rest, bounds, y + 2 * RADIUS)

    def _given(
        self, columns: Sequence[Column], rest: _Strands, bounds: _Bounds, y: int
    ) -> tuple[_Strands, int]:
        given = tuple(_Strand(column, y) for column in columns)
        self._start(given, given + rest, bounds)
        return given + rest, y + self.below

    def _moves(
        self, indices: Sequence[int], n_in: int, strands: _Strands, bounds: _Bounds, y: int
    ) -> tuple[_Strands, int]:
        if list(indices) == list(range(n_in)):
            return strands, y
        taken, rest = strands[:n_in], strands[n_in:]
        kept = _kept(indices, n_in)
        dropped = [strand for i, strand in enumerate(taken) if i not in indices]
        branches = [j for j, k in enumerate(kept) if k is None]
        crosses = [j for j, k in enumerate(kept) if k is not None and k != indices[j]]
        sources = sorted({indices[j] for j in branches}, reverse=True)
        start = y + (DROP if dropped else 0)
        lanes = {source: start + LANE * (n + 1) for n, source in enumerate(sources)}
        crossing = max(lanes.values(), default=start) + CORNER
        end = crossing + (CROSSING if crosses else 0)

        for strand in dropped:
            self._end(strand, y)
            self.picture.dots.append(Dot(strand.column, y, is_end=True))
        given: list[_Strand] = []
        for i, k in zip(indices, kept, strict=True):
            source = taken[i]
            if k == i:
                given.append(source)
            elif k is None:
                column = self.columns.new()
                given.append(_Strand(column, lanes[i] + CORNER, source.item))
                corner = lanes[i] + CORNER
                wire = Wire(source.column, lanes[i], column, corner, Route.BRANCH)
                self.picture.wires.append(wire)
            else:
                column = taken[k].column
                given.append(_Strand(column, end, source.item))
                self.picture.wires.append(Wire(source.column, crossing, column, end, Route.CROSS))
        for i, strand in enumerate(taken):
            self._leave(strand, i, indices, kept, lanes, crossing)
        crossed = tuple(given[j] for j in crosses) if self.stacks else ()
        self._start(crossed, (*given, *rest), bounds)
        return (*given, *rest), end + (self.below if crossed else CORNER)

    def _leave(
        self,
        strand: _Strand,
        i: int,
        indices: Sequence[int],
        kept: Sequence[int | None],
        lanes: Mapping[int, int],
        crossing: int,
    ) -> None:
        """Ends a wire where it leaves its column, with dots where it splits."""
        uses = [k for k, index in zip(kept, indices, strict=True) if index == i]
        n_crosses = sum(k not in (None, i) for k in uses)
        if i in lanes and len(uses) > 1:
            self.picture.dots.append(Dot(strand.column, lanes[i], is_end=False))
        if n_crosses and n_crosses + (i in uses) > 1:
            self.picture.dots.append(Dot(strand.column, crossing, is_end=False))
        if i not in uses and uses:
            self._end(strand, crossing if n_crosses else lanes[i])

    # Parts of what is drawn

    def _continued(self, taken: _Strands, n_out: int) -> list[Column]:
        """The columns of outputs: those of the inputs, and new ones where there are more."""
        old = [strand.column for strand in taken[:n_out]]
        return old + [self.columns.new() for _ in range(n_out - len(old))]

    def _start(self, new: _Strands, strands: _Strands, bounds: _Bounds) -> None:
        """Labels new wires, which are some of those in these bounds."""
        self._in_order(strands, bounds)
        neighbours = [*(strand.column for strand in strands[1:]), bounds.right]
        for strand, neighbour in zip(strands, neighbours, strict=True):
            if strand in new:
                label = Label(strand.column, strand.top + LABEL_DROP, strand.item)
                self.picture.labels.append(label)
                self.neighbours.append((label, neighbour))

    def _end(self, strand: _Strand, y: int) -> None:
        self.picture.wires.append(Wire(strand.column, strand.top, strand.column, y))

    def _in_order(self, strands: _Strands, bounds: _Bounds) -> None:
        for one, next_one in itertools.pairwise(strands):
            next_one.column.right_of(one.column, BETWEEN_WIRES)
        if strands:
            strands[0].column.right_of(bounds.left, bounds.margin)
            bounds.right.right_of(strands[-1].column, bounds.margin)

    def _between(self, bounds: _Bounds, left: Column, right: Column, rest: _Strands) -> None:
        """Keeps a box or a frame right of the bounds, and what passes by right of it."""
        left.right_of(bounds.left, bounds.margin)
        if rest:
            rest[0].column.right_of(right, BETWEEN_BOXES)
            self._in_order(rest, dataclasses.replace(bounds, left=right))
        else:
            bounds.right.right_of(right, bounds.margin)


def _write(strands: _Strands, texts: Sequence[str]) -> None:
    for strand, text in zip(strands, texts, strict=False):
        strand.item.text = strand.item.text or text


def _moved(f: Combinator) -> Sequence[int] | None:
    """The items that a combinator hands on, where that is all it does."""
    while not isinstance(f, Select):
        if len(f.children) or f.meaning is None:
            return None
        f = f.meaning
    return (*f.indices, *range(f.n_popped, f.signature.n_in))


def _kept(indices: Sequence[int], n_in: int) -> list[int | None]:
    """In which of the old columns each moved item goes on; None for a new one.

    Items that stay in order stay in their columns. Others go where their place on the stack is,
    so that what comes after stands as far left as what came before.
    """
    if all(a <= b for a, b in itertools.pairwise(indices)):
        return [i if i not in indices[:j] else None for j, i in enumerate(indices)]
    return [j if j < n_in else None for j in range(len(indices))]


def _is_open(f: Combinator) -> bool:
    """Whether its steps say all that it does."""
    if type(f).__call__ is not Combinator.__call__:
        return False
    if f.meaning is not None:
        return len(f.children) > 0
    primitives = (Serial, Parallel, Fn, Repeat, Scan, Remat)
    return any(type(f).flow is primitive.flow for primitive in primitives)


def _heights(n: int) -> Sequence[int]:
    """How far below the middle of a round box each of the wires from its side comes in."""
    return [round(RADIUS * (2 * i - n + 1) / 2) for i in range(n)]
