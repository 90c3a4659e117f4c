"""``typed``: a pipeline whose shapes are declared, and checked before it is used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.children import Children, check_only_child, make_only_child
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.expression import Argument
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Flow, Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._core.tracebacks import api_boundary
from flax_extra.combinator._views.record import StepRecord, record_run
from flax_extra.combinator._views.shape_signature import ShapeSignature, read_shapes
from flax_extra.combinator._views.specs import parse_declaration


class Typed(Combinator):
    """A pipeline with its shapes declared. See :func:`typed`."""

    declared: str = ""
    context: tuple[tuple[str, Any], ...] = ()
    _is_visible: ClassVar[bool] = False

    @functools.cached_property
    def signature(self) -> Signature:
        return self.children[0].signature

    def _check(self) -> None:
        check_only_child("typed", self.children)
        object.__setattr__(
            self, "__doc__", f"A pipeline ``{self.declared}``.\n\n{type(self).__doc__}"
        )

    def _run(self, stack: Stack, steps: Steps) -> Flow:
        return (yield 0, stack)

    @static_property
    def _parts(self) -> Children:
        inlined: Any = self.children[0].inlined
        parts: Children = self.children if inlined is None else inlined._parts
        return parts

    def __getitem__(self, index: int | slice) -> Any:
        inlined = self.children[0].inlined
        if inlined is None:
            return super().__getitem__(index)
        return self._view(inlined, inlined.children)[index]

    @static_property
    def _arguments(self) -> list[Argument]:
        return [("", self.children[0].target), ("", self.declared)]


@api_boundary
def typed(f: Callable[..., Any], declared: str, **context: Any) -> Typed:
    """Declares the shapes of a pipeline, and checks them before it is used.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        declared: its inputs and outputs, such as ``"i32[b, t] -> f32[b, t, 64]"``. Context that is
            an array comes after the inputs, by name, and constraints on names before the arrow:
            ``"f32[b, t, 8], mask: bool[b, 1, t] where t <= 64 -> f32[b, t, 8]"``.
        context: other keywords for the check, such as ``deterministic=True``.

    Returns:
        The pipeline, with the declaration in its text and its documentation.

    Raises:
        ShapeError: If the outputs are not as declared. It shows both, and the first step that
            gives a wrong shape.
        ValueError: If the text does not declare shapes.
        Exception: If a step raises one on the declared inputs; a note says which step.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> head = cb.typed(cb.serial(nn.LayerNorm(), nn.Dense(10)), "f32[b, 64] -> f32[b, 10]")
        >>> print(head)
        typed(serial(LayerNorm(), Dense(features=10)), 'f32[b, 64] -> f32[b, 10]')

    See Also:
        :func:`shape_signature`, which finds the shapes out.
    """
    call, outputs = parse_declaration(declared)
    asked = ShapeSignature(call.items, outputs, call.context, call.constraints)
    children = make_only_child("typed", f)
    run = record_run(f, dataclasses.replace(call, context={**call.context, **context}))
    found = read_shapes(f, run)
    if found != asked:
        step = _find_wrong_step(run.root, asked.outputs, found.outputs)
        raise errors.other_shapes(str(asked), str(found), step)
    return Typed(children, declared=str(asked), context=tuple(context.items()))


def _find_wrong_step(root: StepRecord, asked: Stack, found: Stack) -> str:
    """Describes the last step that gave the wrong shape and did not take it."""
    pairs = [
        (old, new)
        for old, new in zip(*map(jax.tree_util.tree_leaves, (asked, found)), strict=False)
        if describe_item(old) != describe_item(new)
    ]
    if len(asked) != len(found) or not pairs:
        return ""
    is_wrong = _make_fault_test(*pairs[0])
    # The innermost steps first: they say most precisely where it is.
    for step in reversed([*root.steps(), *root.leaves()]):
        given, taken = (jax.tree_util.tree_leaves(items) for items in (step.outputs, step.inputs))
        if any(map(is_wrong, given)) and not any(map(is_wrong, taken)):
            return errors.describe_step(
                step.path, describe_stack(step.inputs), describe_stack(step.outputs)
            )
    return ""


def _make_fault_test(asked: Any, found: Any) -> Callable[[Any], bool]:
    """Returns a function that says whether an array differs from ``asked`` as ``found`` does.

    Arrays differ in dtype, else in the number of axes, else in the first axis of another size.
    """
    if not all(isinstance(item, jax.ShapeDtypeStruct) for item in (asked, found)):
        return lambda item: describe_item(item) == describe_item(found)
    features: list[Callable[[Any], Any]] = [
        lambda item: getattr(item, "dtype", None),
        lambda item: len(getattr(item, "shape", ())),
        *(functools.partial(_get_size, axis) for axis in range(len(asked.shape))),
    ]
    differing = next(feature for feature in features if feature(asked) != feature(found))
    return lambda item: bool(differing(item) == differing(found))


def _get_size(axis: int, item: Any) -> str | None:
    shape = getattr(item, "shape", ())
    return str(shape[axis]) if axis < len(shape) else None
