"""Wiring: a pipeline as boxes, wires and frames.

It walks over the expression, as a run does, with a stack of wires.

    >>> from flax_extra import combinator as cb
    >>> picture = read_wiring(cb.residual(abs))
    >>> [box.caption.name for box in picture.boxes], [frame.caption for frame in picture.frames]
    (['abs', '+'], ['residual'])
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.run import Placeholder
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._diagram.captions import (
    Caption,
    make_caption,
    make_fold_caption,
    make_frame_caption,
    make_operation_caption,
)
from flax_extra.combinator._diagram.drawing import Drawing, Frontier, OpenWires
from flax_extra.combinator._diagram.picture import Picture, Shape
from flax_extra.combinator._views.typed import Typed
from flax_extra.combinator._words.choose import Cond, Switch
from flax_extra.combinator._words.compose import Parallel, Serial
from flax_extra.combinator._words.fn import Fn
from flax_extra.combinator._words.merge import Add, Concatenate, Div, Fold, Mul, Split, Sub
from flax_extra.combinator._words.remat import Remat
from flax_extra.combinator._words.repeat import Repeat
from flax_extra.combinator._words.scan import Scan
from flax_extra.combinator._words.select import Select
from flax_extra.combinator._words.vmap import Vmap
from flax_extra.combinator._words.wire import Wire

Position: TypeAlias = tuple[int, ...]
"""The indices of children that lead from the outermost pipeline to a step."""

StackTexts: TypeAlias = tuple[Sequence[str], Sequence[str]]
"""The items of the stack before a step and after it, as text."""

MAX_JOINED = 3
"""How many wires meet in a round box. If there are more, the box is long."""


def read_wiring(f: Combinator, stacks: Mapping[Position, StackTexts] | None = None) -> Picture:
    """Draws the wiring of a pipeline, with the items of the stack as labels, if they are known."""
    first = Drawing(has_labels=stacks is not None)
    picture = _draw_once(f, stacks, first)
    if not first.spans:
        return picture
    return _draw_once(f, stacks, Drawing(has_labels=stacks is not None, spans=first.spans))


def _draw_once(
    f: Combinator, stacks: Mapping[Position, StackTexts] | None, drawing: Drawing
) -> Picture:
    before, after = ((), ()) if stacks is None else stacks[()]
    frontier = drawing.begin(max(f.signature.n_in, len(before)))
    _label_wires(frontier.wires, before)
    frontier = _Reader(drawing, stacks or {}).draw_pipeline(f, (), frontier)
    _label_wires(frontier.wires, after)
    return drawing.finish(frontier)


class _Reader:
    """Walks over an expression: each method draws a part of it below a frontier.

    A position is None within the expansion of a derived combinator, except for its own children.
    """

    def __init__(self, drawing: Drawing, stacks: Mapping[Position, StackTexts]) -> None:
        self.drawing = drawing
        self.stacks = stacks
        self.positions: dict[int, Position | None] = {}

    def draw_pipeline(
        self, f: Combinator, position: Position | None, frontier: Frontier
    ) -> Frontier:
        if isinstance(f, Wire):
            frontier = self.drawing.name_wires(f.input_names, frontier)
        moved = _find_moved(f)
        if moved is not None:
            return self.drawing.move_wires(moved, f.signature.n_in, frontier)
        if isinstance(f, Add | Sub | Mul | Div | Concatenate | Split | Fold):
            return self.draw_operation(f, frontier)
        if not _shows_steps(f):
            return self.drawing.add_box(make_caption(f, {}), Shape.FUNCTION, f.signature, frontier)
        is_derived = f._expansion is not None and position is not None
        if f._is_lifted or f._label != f._kind or is_derived:
            return self.draw_framed(make_frame_caption(f, {}), f, position, frontier)
        return self.draw_steps(f, position, frontier)

    def draw_operation(
        self, f: Add | Sub | Mul | Div | Concatenate | Split | Fold, frontier: Frontier
    ) -> Frontier:
        """Draws a combinator that merges items, or splits one."""
        if isinstance(f, Fold):
            return self.drawing.add_box(make_fold_caption(f), Shape.PILL, f.signature, frontier)
        caption = make_operation_caption(f)
        if isinstance(f, Concatenate | Split) or f.n_in > MAX_JOINED:
            return self.drawing.add_box(caption, Shape.PILL, f.signature, frontier)
        return self.drawing.add_join(caption, f.n_in, frontier)

    def draw_framed(
        self, caption: str, f: Combinator, position: Position | None, frontier: Frontier
    ) -> Frontier:
        inside = functools.partial(self.draw_steps, f, position)
        frontier = self.drawing.add_frame(
            caption, isinstance(f, Repeat), f.signature.n_in, frontier, inside
        )
        if _has_other_items_inside(f):
            return self.drawing.relabel(_count_unchanged(f), f.signature.n_out, frontier)
        return frontier

    def draw_steps(self, f: Combinator, position: Position | None, frontier: Frontier) -> Frontier:
        if f._expansion is not None:
            self.positions[id(f)] = position
            return self.draw_pipeline(f._expansion, None, frontier)
        if isinstance(f, Parallel):
            sizes = [child.signature.n_in for child in f.children]
            inside = functools.partial(self.draw_child, f, position)
            return self.drawing.add_side_by_side(sizes, frontier, inside)
        if isinstance(f, Cond | Switch):
            return self.draw_branches(f, position, frontier)
        if _has_other_items_inside(f):
            frontier = self.drawing.relabel(_count_unchanged(f), f.signature.n_in, frontier)
            before = () if position is None else self.stacks.get((*position, 0), ((), ()))[0]
            _label_wires(frontier.wires, before)
        for index in range(len(f.children)):
            frontier = self.draw_child(f, position, index, frontier)
        return frontier

    def draw_branches(
        self, f: Cond | Switch, position: Position | None, frontier: Frontier
    ) -> Frontier:
        """Draws branches side by side on copies of the items, and a box that takes those of one."""
        n, branch = len(f.children), f.children[0].signature
        copies = (0, *[1 + index for _ in range(n) for index in range(branch.n_in)])
        frontier = self.drawing.move_wires(copies, f.signature.n_in, frontier)

        def draw_side(index: int, frontier: Frontier) -> Frontier:
            return self.draw_child(f, position, index - 1, frontier) if index else frontier

        sizes = [1, *[branch.n_in] * n]
        frontier = self.drawing.add_side_by_side(sizes, frontier, draw_side)
        signature = Signature(1 + n * branch.n_out, branch.n_out)
        return self.drawing.add_box(Caption("choose"), Shape.PILL, signature, frontier)

    def draw_child(
        self, owner: Combinator, position: Position | None, index: int, frontier: Frontier
    ) -> Frontier:
        child = owner.children[index]
        while isinstance(child.target, Placeholder):
            standing = child.target
            child, index = standing.child, standing.index
            position = self.positions[id(standing.owner)]
        position = None if position is None else (*position, index)
        if not isinstance(child.target, Combinator):
            shape = Shape.FUNCTION if child.module is None else Shape.LAYER
            caption = make_caption(child.target, child.fixed)
            frontier = self.drawing.add_box(caption, shape, child.signature, frontier)
        elif child.fixed:
            caption_text = make_frame_caption(owner, child.fixed)
            frontier = self.draw_framed(caption_text, child.target, position, frontier)
        else:
            frontier = self.draw_pipeline(child.target, position, frontier)
        if position is not None and position in self.stacks:
            _label_wires(frontier.split(child.signature.n_out)[0], self.stacks[position][1])
        return frontier


def _label_wires(wires: OpenWires, texts: Sequence[str]) -> None:
    """Writes the items of wires, unless they are known already."""
    for wire, text in zip(wires, texts, strict=False):
        wire.item.text = wire.item.text or text


def _has_other_items_inside(f: Combinator) -> bool:
    """Whether a wire holds one step, member or copy inside of a frame, and all of them outside."""
    return isinstance(f, Scan | Vmap) or (isinstance(f, Repeat) and f.n_carry is not None)


def _count_unchanged(f: Combinator) -> int:
    """Counts the items from the top that are the same within a loop, or within a map."""
    return f._n_carry if isinstance(f, Scan | Repeat) else 0


def _find_moved(f: Combinator) -> Sequence[int] | None:
    """Returns the indices of the items that go on, if a combinator only moves items."""
    while not isinstance(f, Select):
        if len(f.children) or f._expansion is None:
            return None
        f = f._expansion
    return (*f.indices, *range(f._n_popped, f.signature.n_in))


def _shows_steps(f: Combinator) -> bool:
    """Whether a combinator is drawn by its steps. Otherwise it is a box."""
    if type(f).__call__ is not Combinator.__call__:
        return False
    primitives = (Serial, Parallel, Fn, Typed, Repeat, Scan, Remat, Vmap, Cond, Switch)
    return f._expansion is not None or any(type(f)._run is known._run for known in primitives)
