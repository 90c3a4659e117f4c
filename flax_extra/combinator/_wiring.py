"""Wiring: a pipeline as boxes, wires and frames.

A walk over the expression, as a run is, whose stack holds wires.

    >>> from flax_extra import combinator as cb
    >>> picture = read(cb.residual(abs))
    >>> [box.caption.name for box in picture.boxes], [frame.caption for frame in picture.frames]
    (['abs', '+'], ['residual'])
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from flax_extra.combinator._base import Combinator
from flax_extra.combinator._captions import (
    caption_of,
    fold_caption,
    frame_caption,
    operation_caption,
)
from flax_extra.combinator._draft import Draft, Front, Strands
from flax_extra.combinator._flow import Parallel, Serial
from flax_extra.combinator._inference import is_combinator
from flax_extra.combinator._leaf import Fn
from flax_extra.combinator._lift import Remat, Repeat, Scan
from flax_extra.combinator._merge import Add, Concatenate, Div, Fold, Mul, Split, Sub
from flax_extra.combinator._picture import Picture, Shape
from flax_extra.combinator._run import Slot
from flax_extra.combinator._shapes import Typed
from flax_extra.combinator._shuffle import Select

Position: TypeAlias = tuple[int, ...]
"""Where a step is: the indices of children that lead to it from the outermost pipeline."""

Stacks: TypeAlias = tuple[Sequence[str], Sequence[str]]
"""The items of the stack before a step and after it, as text."""

MOST_JOINED = 3
"""How many wires meet in a round box; more end on a long one."""


def read(f: Combinator, stacks: Mapping[Position, Stacks] | None = None) -> Picture:
    """The picture of a pipeline, with labels where it is known what is on the stack."""
    first = Draft(has_labels=stacks is not None)
    picture = _drafted(f, stacks, first)
    if not first.spans:
        return picture
    return _drafted(f, stacks, Draft(has_labels=stacks is not None, spans=first.spans))


def _drafted(f: Combinator, stacks: Mapping[Position, Stacks] | None, draft: Draft) -> Picture:
    before, after = ((), ()) if stacks is None else stacks[()]
    front = draft.begin(max(f.signature.n_in, len(before)))
    _write(front.strands, before)
    front = _Reader(draft, stacks or {}).pipeline(f, (), front)
    _write(front.strands, after)
    return draft.finish(front)


class _Reader:
    """The walk: each method draws a part of the expression below a front.

    A position is None within what a derived combinator means, up to its own children.
    """

    def __init__(self, draft: Draft, stacks: Mapping[Position, Stacks]) -> None:
        self.draft = draft
        self.stacks = stacks
        self.positions: dict[int, Position | None] = {}

    def pipeline(self, f: Combinator, position: Position | None, front: Front) -> Front:
        moved = _moved(f)
        if moved is not None:
            return self.draft.move(moved, f.signature.n_in, front)
        if isinstance(f, Add | Sub | Mul | Div | Concatenate | Split | Fold):
            return self.operation(f, front)
        if not _is_open(f):
            return self.draft.box(caption_of(f, {}), Shape.FUNCTION, f.signature, front)
        is_derived = f.meaning is not None and position is not None
        if f.is_lifted or f.label != f.kind or is_derived:
            return self.framed(frame_caption(f, {}), f, position, front)
        return self.steps(f, position, front)

    def operation(
        self, f: Add | Sub | Mul | Div | Concatenate | Split | Fold, front: Front
    ) -> Front:
        """What merges or cuts items."""
        if isinstance(f, Fold):
            return self.draft.box(fold_caption(f), Shape.PILL, f.signature, front)
        caption = operation_caption(f)
        if isinstance(f, Concatenate | Split) or f.n_in > MOST_JOINED:
            return self.draft.box(caption, Shape.PILL, f.signature, front)
        return self.draft.join(caption, f.n_in, front)

    def framed(self, caption: str, f: Combinator, position: Position | None, front: Front) -> Front:
        inside = functools.partial(self.steps, f, position)
        front = self.draft.frame(caption, isinstance(f, Repeat), f.signature.n_in, front, inside)
        if isinstance(f, Scan):  # inside, a sequence is one item of it
            return self.draft.renew(f.n_carried, f.signature.n_out, front)
        return front

    def steps(self, f: Combinator, position: Position | None, front: Front) -> Front:
        if f.meaning is not None:
            self.positions[id(f)] = position
            return self.pipeline(f.meaning, None, front)
        if isinstance(f, Parallel):
            sizes = [child.signature.n_in for child in f.children]
            inside = functools.partial(self.child, f, position)
            return self.draft.side_by_side(sizes, front, inside)
        if isinstance(f, Scan):
            front = self.draft.renew(f.n_carried, f.signature.n_in, front)
            before = () if position is None else self.stacks.get((*position, 0), ((), ()))[0]
            _write(front.strands, before)
        for index in range(len(f.children)):
            front = self.child(f, position, index, front)
        return front

    def child(
        self, owner: Combinator, position: Position | None, index: int, front: Front
    ) -> Front:
        child = owner.children[index]
        while isinstance(child.target, Slot):
            slot = child.target
            child, index, position = slot.child, slot.index, self.positions[id(slot.owner)]
        position = None if position is None else (*position, index)
        if not is_combinator(child.target):
            shape = Shape.FUNCTION if child.module is None else Shape.LAYER
            caption = caption_of(child.target, child.fixed)
            front = self.draft.box(caption, shape, child.signature, front)
        elif child.fixed:
            caption_text = frame_caption(owner, child.fixed)
            front = self.framed(caption_text, child.target, position, front)
        else:
            front = self.pipeline(child.target, position, front)
        if position is not None and position in self.stacks:
            _write(front.split(child.signature.n_out)[0], self.stacks[position][1])
        return front


def _write(strands: Strands, texts: Sequence[str]) -> None:
    """Says what flows in wires, where that is not known yet."""
    for strand, text in zip(strands, texts, strict=False):
        strand.item.text = strand.item.text or text


def _moved(f: Combinator) -> Sequence[int] | None:
    """The items that a combinator hands on, where that is all it does."""
    while not isinstance(f, Select):
        if len(f.children) or f.meaning is None:
            return None
        f = f.meaning
    return (*f.indices, *range(f.n_popped, f.signature.n_in))


def _is_open(f: Combinator) -> bool:
    """Whether its steps say all that it does; if not, it is a box."""
    if type(f).__call__ is not Combinator.__call__:
        return False
    primitives = (Serial, Parallel, Fn, Typed, Repeat, Scan, Remat)
    return f.meaning is not None or any(type(f).flow is known.flow for known in primitives)
