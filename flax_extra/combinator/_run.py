"""How a pipeline runs: a walk over the expression, with the stack in hand.

Structural combinators are only read; what is called is layers and functions. So a pipeline leaves
nothing of itself in the compiled program, and every error knows its path.

The walk is a loop, however deep the expression: jax walks Python's frames at every operation that
it traces, and Python allows a thousand of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from flax import linen as nn

from flax_extra.combinator import _errors
from flax_extra.combinator._binding import UNBOUND
from flax_extra.combinator._children import Child
from flax_extra.combinator._frame import Frame, Path, Place, Visit, Watch, place, written
from flax_extra.combinator._inference import name_of
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._stack import (
    Missing,
    Stack,
    describe,
    flatten,
    lacks,
    pad,
    put,
    regroup,
    take,
    unstack,
)

if TYPE_CHECKING:
    from flax_extra.combinator._base import Combinator


Flow: TypeAlias = Generator[tuple[int, Stack], Stack, Stack]
"""Yields the index of a child with the stack for it, is sent the stack after, returns its own."""


class Slot:
    """Stands, in what a derived combinator means, for one of its children."""

    def __init__(self, owner: Combinator, index: int, child: Child) -> None:
        self.owner = owner
        self.index = index
        self.child = child
        self.signature = child.signature
        self.__name__ = name_of(child.target)  # in errors, what it stands for

    def __call__(self, *items: Any) -> Any:
        raise _errors.no_meaning(self.owner.label)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Runs the children of one combinator: ``steps(index, stack)`` gives the stack after one.

    For a flow that has to have it there and then, inside of a transform; others yield and wait.
    """

    owner: Combinator
    frame: Frame

    def __call__(self, index: int, stack: Stack) -> Stack:
        child, frame = _entered(self.owner, index, self.frame)
        if frame.watch is not None:
            return _observed(child, stack, frame, frame.watch)
        return _advance(child, stack, frame)

    def on(self, owner: Combinator) -> Steps:
        """The same steps inside a lifted transform, on the owner as it is bound there."""
        return Steps(owner, self.frame._replace(binding=owner.binding))

    @property
    def path(self) -> tuple[str, ...]:
        return (*written(self.frame.path), self.owner.label)


def run(combinator: Combinator, inputs: Stack, context: Mapping[str, Any]) -> Any:
    """Calls a pipeline: the inputs are the stack, what is left of it at the end is returned."""
    unknown = context.keys() - combinator.keywords
    if unknown:
        raise _errors.unknown_context(combinator.label, unknown, combinator.keywords)
    stack = flatten(inputs)
    signature = combinator.signature
    here = place.get()
    frame = Frame(
        binding=combinator.bound or UNBOUND,
        context=context,
        n_in=signature.n_in,
        given=len(stack),
        watch=here.watch,
        path=here.path,
        position=here.position,
    )
    result = evaluate(combinator, pad(stack, signature.n_in), frame)
    if frame.given < frame.n_in:  # nothing looked at what is missing: it was handed on, or dropped
        raise _too_few(frame, (*frame.path, combinator.label), signature, stack)
    return unstack(result)


def evaluate(combinator: Combinator, stack: Stack, frame: Frame) -> Stack:
    """The stack after a combinator: what it means, where it is derived, else what it does."""
    combinator, frame = _primitive(combinator, frame)
    running = [(combinator, frame, _started(combinator, stack, frame))]
    result: Any = None  # what a flow is sent: None at its start
    while running:
        combinator, frame, flow = running[-1]
        try:
            index, stack = flow.send(result)
        except StopIteration as finished:
            running.pop()
            result = finished.value
            continue
        child, frame = _entered(combinator, index, frame)
        structure = child.structure
        if frame.watch is not None:
            result = _observed(child, stack, frame, frame.watch)
        elif structure is None:
            result = _call(child, stack, frame)
        else:
            combinator, frame = _primitive(structure, _fixing(child, frame))
            running.append((combinator, frame, _started(combinator, stack, frame)))
            result = None
    after: Stack = result
    return after


def _primitive(combinator: Combinator, frame: Frame) -> tuple[Combinator, Frame]:
    """The primitive combinator that one means in the end."""
    while combinator.meaning is not None:
        if frame.derived is None:
            frame = frame._replace(derived=combinator)
        if not len(combinator.children) and frame.operation is None:
            frame = frame._replace(operation=combinator.label)
        combinator = combinator.meaning
    return combinator, frame


def _started(combinator: Combinator, stack: Stack, frame: Frame) -> Flow:
    flow = combinator.flow(stack, Steps(combinator, frame))
    return _over(flow) if isinstance(flow, tuple) else flow


def _over(stack: Stack) -> Flow:
    """The flow of a combinator that has run without asking for a child."""
    yield from ()
    return stack


def _entered(owner: Combinator, index: int, frame: Frame) -> tuple[Child, Frame]:
    """A child, or what stands for it, and the frame in which it runs."""
    child = owner.children[index]
    if frame.derived is None:
        frame = frame.into(owner, index)
    while isinstance(child.target, Slot):
        slot = child.target
        child = slot.child
        if slot.owner is frame.derived:
            frame = frame.into(slot.owner, slot.index)
    return child, frame


def _observed(child: Child, stack: Stack, frame: Frame, watch: Watch) -> Stack:
    """The stack after a child, under the eyes of who watches."""
    visit = Visit(
        position=frame.position,
        path=written(frame.leaf_path(child)),
        child=child,
        module=_module(child, frame),
        stack=stack,
        is_wiring=frame.derived is not None,
    )
    return watch(visit, functools.partial(_advance, child, stack, frame))


def _module(child: Child, frame: Frame) -> nn.Module | None:
    if child.structure is not None or child.module is None:
        return None
    return frame.binding.find(child.module)


def _advance(child: Child, stack: Stack, frame: Frame) -> Stack:
    """The stack after a child: its meaning, if its layers are named out here, else its call."""
    structure = child.structure
    if structure is None:
        return _call(child, stack, frame)
    return evaluate(structure, stack, _fixing(child, frame))


def _fixing(child: Child, frame: Frame) -> Frame:
    """The frame with the keywords that are fixed for this child."""
    if not child.fixed:
        return frame
    return frame._replace(context={**frame.context, **child.fixed})


def _call(child: Child, stack: Stack, frame: Frame) -> Stack:
    signature = child.signature
    items, rest = take(stack, signature.n_in)
    path = frame.leaf_path(child)
    if lacks(items):
        raise _too_few(frame, path, signature, stack)
    f = child.target
    if child.module is not None:
        f = child.on(frame.binding.find(child.module))
    if child.combinator is not None:  # it puts its own label on the path, at its first step
        there = Place(path[:-1], frame.position, frame.watch)
    else:
        there = Place(path)
    positional, keywords = _passed(child, items, frame.context)
    token = place.set(there)
    try:
        returned = f(*positional, **keywords)
    except Exception as error:
        advice = "" if frame.derived is None else frame.derived.advice
        _annotate(error, path, signature, stack, advice)
        raise
    finally:
        place.reset(token)
    outputs = () if returned is None and signature.n_out == 0 else flatten(returned)
    if len(outputs) != signature.n_out:
        raise _errors.wrong_n_out(
            written(path),
            str(signature),
            signature.n_out,
            len(outputs),
            describe(outputs) if outputs else "",
            describe(stack),
        )
    return put(outputs, rest)


def _passed(
    child: Child, items: Stack, context: Mapping[str, Any]
) -> tuple[Stack, Mapping[str, Any]]:
    """The arguments of a call, by position and by keyword."""
    contract = child.contract
    keywords = {k: v for k, v in context.items() if k in contract.keywords}
    keywords.update(child.fixed)
    if contract.is_plain:
        return items, keywords
    named = list(zip(regroup(items, contract.signature.in_shape), contract.names, strict=True))
    keywords.update((name, argument) for argument, name in named if name is not None)
    return tuple(argument for argument, name in named if name is None), keywords


def _too_few(
    frame: Frame, path: Path, signature: Signature, stack: Stack
) -> _errors.SignatureError:
    present = sum(not isinstance(item, Missing) for item in take(stack, signature.n_in)[0])
    return _errors.too_few_inputs(
        written(path),
        str(signature),
        signature.n_in,
        present,
        describe(stack),
        frame.n_in,
        frame.given,
    )


def _annotate(
    error: Exception, path: Path, signature: Signature, stack: Stack, advice: str
) -> None:
    """Adds where and on what, once: the innermost pipeline that sees an error knows most."""
    if isinstance(error, _errors.SignatureError) and " -> " in str(error):
        return
    notes = getattr(error, "__notes__", ())
    if not any(str(note).startswith(_errors.NOTE_PREFIX) for note in notes):
        advice = advice or _errors.advice_on(error)
        error.add_note(_errors.raised_in(written(path), str(signature), describe(stack), advice))
