"""Shape signatures: the shapes of a whole model for every batch and length, before any array is.

>>> from flax import linen as nn
>>> from flax_extra import combinator as cb
>>> encoder = nn.Embed(256, 64) >> cb.repeat(cb.residual(nn.Dense(64), nn.relu), 6)
>>> print(cb.shape_signature(encoder, "i32[b, t]"))
i32[b, t] -> f32[b, t, 64]
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn

from flax_extra.combinator import _errors
from flax_extra.combinator._base import Combinator, only_child, reading
from flax_extra.combinator._children import Children
from flax_extra.combinator._expression import Argument
from flax_extra.combinator._record import Record, Recording, record
from flax_extra.combinator._run import Flow, Steps
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._specs import canonical, names_in, parse_items, with_sizes
from flax_extra.combinator._stack import Stack, describe, describe_item

SIZES = ((48, 96), (64, 128), (7, 11))
"""What a dimension is tried with, two at a time, to find out whether it must be a number."""


@dataclasses.dataclass(frozen=True, eq=False)
class ShapeSignature:
    """The shapes that a pipeline takes and gives.

    Two are equal that differ in the names of dimensions alone, also from their text.

    Args:
        inputs: the items, top first: ``jax.ShapeDtypeStruct`` for arrays.
        outputs: the items, top first.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> shapes = cb.shape_signature(nn.Dense(3), "f32[b, 8]")
        >>> shapes == "f32[batch, 8] -> f32[batch, 3]"
        True
        >>> shapes.outputs[0].shape
        (b, 3)
    """

    inputs: Stack
    outputs: Stack

    @classmethod
    def parse(cls, text: str) -> ShapeSignature:
        """The shapes that a text declares, such as ``"f32[b, 8] -> f32[b, 3]"``.

        Raises:
            ValueError: where the text declares none.
        """
        if text.count("->") != 1:
            raise _errors.bad_declaration(text)
        # Both sides are read together, so that a name means the same on each.
        left, right = text.split("->")
        n_in = len(parse_items(left))
        joined = ", ".join(side.strip() for side in (left, right) if side.strip() not in ("", "()"))
        items = parse_items(joined)
        return cls(items[:n_in], items[n_in:])

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return len(self.inputs), canonical((*self.inputs, *self.outputs))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            other = ShapeSignature.parse(other)
        return self._key == other._key if isinstance(other, ShapeSignature) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return f"{_listed(self.inputs)} -> {_listed(self.outputs)}"

    def __repr__(self) -> str:
        return f"ShapeSignature({str(self)!r})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return ShapeSignature.parse, (str(self),)


class Typed(Combinator):
    """A pipeline with its shapes declared. See :func:`typed`."""

    declared: str = ""
    is_visible: ClassVar[bool] = False

    @functools.cached_property
    def signature(self) -> Signature:
        return self.children[0].signature

    def _check(self) -> None:
        object.__setattr__(
            self, "__doc__", f"A pipeline ``{self.declared}``.\n\n{type(self).__doc__}"
        )

    def flow(self, stack: Stack, steps: Steps) -> Flow:
        return (yield 0, stack)

    @reading
    def parts(self) -> Children:
        structure = self.children[0].structure
        return self.children if structure is None else structure.parts

    def __getitem__(self, index: int | slice) -> Any:
        structure = self.children[0].structure
        if structure is None:
            return super().__getitem__(index)
        return self._view(structure, structure.children)[index]

    @reading
    def arguments(self) -> list[Argument]:
        return [("", self.children[0].target), ("", self.declared)]


def shape_signature(f: Callable[..., Any], *inputs: Any, **context: Any) -> ShapeSignature:
    """The shapes that a pipeline gives for inputs of these shapes. Nothing is computed.

    A name stands for every size at once: the pipeline runs on JAX's symbolic dimensions.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        inputs: the items of the stack, top first. Each is a text such as ``"f32[b, t, 64]"``, an
            array, a ``jax.ShapeDtypeStruct``, a pytree of these, or None for an absent item.
            Other values, such as numbers, are handed on as they are.
        context: keywords for every step that takes them, such as ``deterministic``.

    Returns:
        The shapes, which print as ``f32[b, t, 64] -> f32[b, t, 8]``.

    Raises:
        ShapeError: where a step cannot be decided for every size, or a name sizes a parameter;
            it says which dimension to make a number.
        ValueError: where an input is not a spec.
        Exception: what a step raises, with a note that says which.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb, layer as xn
        >>> attention = cb.residual(nn.LayerNorm(), xn.SelfAttention(n_heads=4))
        >>> print(cb.shape_signature(attention, "f32[b, t, 64]", "bool[b, t, t]"))
        f32[b, t, 64], bool[b, t, t] -> f32[b, t, 64]

    Source:
        "Shape polymorphism", in the documentation of ``jax.export``.
    """
    recording = record(f, inputs, context)
    return _shapes(f, recording, context)


def typed(f: Callable[..., Any], declared: str, **context: Any) -> Typed:
    """Declares the shapes of a pipeline, and checks them before it is used.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        declared: its inputs and outputs, such as ``"i32[b, t] -> f32[b, t, 64]"``.
        context: keywords for the check, such as ``deterministic=True``.

    Returns:
        The pipeline, with the declaration in its text and its documentation.

    Raises:
        ShapeError: where the outputs are other than declared. It shows both, and the step where
            they part.
        ValueError: where the text declares no shapes.
        Exception: what a step raises on the declared inputs, with a note that says which.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> head = cb.typed(cb.serial(nn.LayerNorm(), nn.Dense(10)), "f32[b, 64] -> f32[b, 10]")
        >>> print(head)
        typed(serial(LayerNorm(), Dense(features=10)), 'f32[b, 64] -> f32[b, 10]')

    See Also:
        :func:`shape_signature`, which finds the shapes out.
    """
    asked = ShapeSignature.parse(declared)
    children = only_child("typed", f)
    recording = record(f, asked.inputs, context)
    found = _shapes(f, recording, context)
    if found != asked:
        parted = _parting(recording.root, asked.outputs, found.outputs)
        raise _errors.other_shapes(str(asked), str(found), parted)
    return Typed(children, declared=str(asked))


def _shapes(
    f: Callable[..., Any], recording: Recording, context: Mapping[str, Any]
) -> ShapeSignature:
    root = recording.root
    if (error := recording.error) is not None:
        explained = _explained(f, root.before, context, error)
        if explained is error:
            raise error
        raise explained from error
    sized = next(_symbolic(recording.variables.get("params", {})), None)
    if sized is not None:
        raise _errors.symbolic_parameter(*sized)
    return ShapeSignature(root.before, root.after or ())


def _listed(items: Stack) -> str:
    return describe(items) if items else "()"


# Why a name must be a number: found out by trying numbers.


def _explained(
    f: Callable[..., Any], items: Stack, context: Mapping[str, Any], error: Exception
) -> Exception:
    """The error, or what it comes to where numbers instead of names would have prevented it."""
    names = names_in(items)
    if not names or isinstance(error, _errors.SignatureError):
        return error
    trials = {name: _trial(f, items, context, [name]) for name in names}
    helpful = [name for name, trial in trials.items() if trial is not None]
    if not helpful and _trial(f, items, context, names) is None:
        # By its name, for jax.errors has the class only in newer releases.
        is_undecided = type(error).__name__ == "InconclusiveDimensionOperation"
        return _errors.undecidable(*_told(error), names) if is_undecided else error
    for name in helpful:
        if sized := trials[name]:
            return _errors.symbolic_parameter(*sized, [name])
    return _errors.undecidable(*_told(error), helpful or names)


def _trial(
    f: Callable[..., Any], items: Stack, context: Mapping[str, Any], names: list[str]
) -> tuple[str, str] | tuple[()] | None:
    """What happens if names are numbers: None if it fails, else a parameter that they size."""
    for sizes in SIZES:
        runs = [
            record(f, with_sizes(items, {n: size + 12 * i for i, n in enumerate(names)}), context)
            for size in sizes
        ]
        if all(run.error is None for run in runs):
            first, second = (_parameters(run.variables.get("params", {})) for run in runs)
            for parameter, leaf in first.items():
                other = second.get(parameter)
                if other is None or describe_item(leaf) != describe_item(other):
                    return parameter, _sized(leaf, other, names[0], sizes)
            return ()
    return None


def _sized(leaf: Any, other: Any, name: str, sizes: tuple[int, int]) -> str:
    """The shape of a parameter by the name that sizes it, or if it is no such size, by a number."""
    (dimension,) = jax.export.symbolic_shape(name)
    meant = {**{(size, size): size for size in leaf.shape}, sizes: dimension}
    pairs = list(itertools.zip_longest(leaf.shape, getattr(other, "shape", ())))
    if sizes in pairs and meant.keys() >= set(pairs):
        shape = tuple(meant[pair] for pair in pairs)
        return describe_item(jax.ShapeDtypeStruct(shape, leaf.dtype))  # type: ignore[no-untyped-call]
    return f"{describe_item(leaf)} for {name} = {sizes[0]}"


def _parameters(variables: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(variables))
    return {_joined(path): leaf for path, leaf in leaves}


def _symbolic(variables: Any) -> Iterator[tuple[str, str, list[str]]]:
    """The parameters that have a dimension with a name."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(variables)):
        if names := names_in([leaf]):
            yield _joined(path), describe_item(leaf), names


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _told(error: Exception) -> tuple[str, str]:
    """The operation that an error is about, and where: its first line, and what our note says."""
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith(_errors.NOTE_PREFIX)]
    facts = notes[0].removeprefix(_errors.NOTE_PREFIX).splitlines()[:3] if notes else []
    return str(error).partition("\n")[0], "\n".join(["  " + facts[0], *facts[1:]] if facts else [])


# Where shapes part.


def _parting(root: Record, asked: Stack, found: Stack) -> str:
    """The last step that made what is wrong out of items in which it was not."""
    pairs = [
        (old, new)
        for old, new in zip(*map(jax.tree_util.tree_leaves, (asked, found)), strict=False)
        if describe_item(old) != describe_item(new)
    ]
    if len(asked) != len(found) or not pairs:
        return ""
    is_wrong = _fault(*pairs[0])
    # The innermost steps first: they know best.
    for step in reversed([*root.steps(), *root.leaves()]):
        given, taken = (jax.tree_util.tree_leaves(items) for items in (step.given, step.taken))
        if any(map(is_wrong, given)) and not any(map(is_wrong, taken)):
            return _errors.parted_at(step.path, describe(step.taken), describe(step.given))
    return ""


def _fault(asked: Any, found: Any) -> Callable[[Any], bool]:
    """What is wrong with an array: its type, else its number of axes, else the first that differs.

    The result says whether another has the same fault.
    """
    if not all(isinstance(item, jax.ShapeDtypeStruct) for item in (asked, found)):
        return lambda item: describe_item(item) == describe_item(found)
    features: list[Callable[[Any], Any]] = [
        lambda item: getattr(item, "dtype", None),
        lambda item: len(getattr(item, "shape", ())),
        *(functools.partial(_size, axis) for axis in range(len(asked.shape))),
    ]
    differs = next(feature for feature in features if feature(asked) != feature(found))
    return lambda item: bool(differs(item) == differs(found))


def _size(axis: int, item: Any) -> str | None:
    shape = getattr(item, "shape", ())
    return str(shape[axis]) if axis < len(shape) else None
