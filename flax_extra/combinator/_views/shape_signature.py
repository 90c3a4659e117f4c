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
from collections.abc import Callable, Mapping
from typing import Any

import jax

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.arrays import is_array
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._core.tracebacks import api_boundary
from flax_extra.combinator._views.explain import explain_error, find_symbolic_parameters
from flax_extra.combinator._views.record import RunRecord, record_run
from flax_extra.combinator._views.specs import (
    canonicalize_dimensions,
    parse_call,
    parse_declaration,
)
from flax_extra.combinator._views.steps import flatten_variables, measure


@dataclasses.dataclass(frozen=True, eq=False)
class ShapeSignature:
    """The shapes that a pipeline takes and gives.

    Two are equal if they differ only in the names of dimensions. A text equals the signature that
    it declares.

    Args:
        inputs: the items, top first: ``jax.ShapeDtypeStruct`` for arrays.
        outputs: the items, top first.
        context: the context keywords that hold arrays.
        constraints: what is known of the names of dimensions, such as ``"t <= 64"``.
        state: how many bytes a stream of the pipeline remembers, if it ran with ``decode=True``;
            otherwise 0. Equality leaves it out.

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
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constraints: tuple[str, ...] = ()
    state: Any = 0

    @classmethod
    def parse(cls, text: str) -> ShapeSignature:
        """Reads the shapes that a text declares, such as ``"f32[b, 8] -> f32[b, 3]"``.

        Raises:
            ValueError: If the text does not declare shapes.
        """
        call, outputs = parse_declaration(text)
        return cls(call.items, outputs, call.context, call.constraints)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        shapes = self.inputs, dict(self.context), self.outputs
        return canonicalize_dimensions(shapes, self.constraints)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            other = ShapeSignature.parse(other)
        return self._key == other._key if isinstance(other, ShapeSignature) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        is_stream = not isinstance(self.state, int) or self.state > 0
        return f"{self._text}, remembers {self.state} bytes" if is_stream else self._text

    @property
    def _text(self) -> str:
        named = [f"{name}: {describe_item(value)}" for name, value in self.context.items()]
        inputs = ", ".join([*map(describe_item, self.inputs), *named]) or "()"
        where = f" where {' and '.join(self.constraints)}" if self.constraints else ""
        return f"{inputs}{where} -> {', '.join(map(describe_item, self.outputs)) or '()'}"

    def __repr__(self) -> str:
        return f"ShapeSignature({str(self)!r})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return ShapeSignature.parse, (self._text,)


@api_boundary
def shape_signature(f: Callable[..., Any], *inputs: Any, **context: Any) -> ShapeSignature:
    """Finds the shapes that a pipeline gives for inputs of these shapes. It computes nothing.

    A name stands for every size at once: the pipeline runs on JAX's symbolic dimensions.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        inputs: the items of the stack, top first. Each is a text such as ``"f32[b, t, 64]"``, an
            array, a ``jax.ShapeDtypeStruct``, a pytree of these, or None for an absent item.
            Other values, such as numbers, are passed as they are.
            A text may end in constraints: ``"i32[b, t] where t <= 64"``.
        context: keywords for every step that takes them, such as ``deterministic``. For an array,
            a spec serves: ``padding_mask="bool[b, 1, t]"``.

    Returns:
        The shapes, which print as ``f32[b, t, 64] -> f32[b, t, 8]``.

    Raises:
        ShapeError: If a step cannot be decided for every size, or a name sizes a parameter. It
            says which dimension to make a number.
        ValueError: If an input is not a spec.
        Exception: If a step raises one; a note says which step.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb, layer as xn
        >>> attention = cb.residual(nn.LayerNorm(), xn.SelfAttention(n_heads=4))
        >>> print(cb.shape_signature(attention, "f32[b, t, 64]", "bool[b, t, t]"))
        f32[b, t, 64], bool[b, t, t] -> f32[b, t, 64]

        What a stream of it remembers, for b rows and a capacity of t:

        >>> memory = cb.fn(xn.SelfAttention(n_heads=4, causal=True), mask=None)
        >>> print(cb.shape_signature(memory, "f32[b, t, 64]", decode=True))
        f32[b, t, 64] -> f32[b, t, 64], remembers 512*b*t + 4*b bytes

    Source:
        "Shape polymorphism", in the documentation of ``jax.export``.
    """
    return read_shapes(f, record_run(f, parse_call(inputs, context)))


def read_shapes(f: Callable[..., Any], run: RunRecord) -> ShapeSignature:
    """Reads the shapes from the record of a run, or raises the error that stopped it."""
    root, call = run.root, run.call
    if (error := run.error) is not None:
        explained = explain_error(f, call, error)
        if explained is error:
            raise error
        raise explained from error
    sized = next(find_symbolic_parameters(run.variables.get("params", {})), None)
    if sized is not None:
        raise errors.symbolic_parameter(*sized)
    arrays = {
        name: value
        for name, value in call.context.items()
        if any(map(is_array, jax.tree.leaves(value)))
    }
    _, state = measure(flatten_variables(run.variables.get("cache", {})).values())
    return ShapeSignature(root.before, root.after or (), arrays, call.constraints, state)
