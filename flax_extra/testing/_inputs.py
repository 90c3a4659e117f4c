"""Draws inputs that the declaration of a callable allows: first sizes, then arrays."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.extra import numpy as hnp

from flax_extra import combinator as cb
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.stack import regroup
from flax_extra.combinator._views.specs import (
    are_satisfied,
    find_dimension_names,
    parse_call,
    substitute_sizes,
)
from flax_extra.testing import _errors
from flax_extra.testing._annotations import (
    AnyNumberOf,
    ArrayOf,
    Declaration,
    Declared,
    Fixed,
    Group,
    Number,
    OneOf,
    drawable,
    read_declaration,
)
from flax_extra.testing._axes import Size, Sizes, make_shape

SizeOf: TypeAlias = int | st.SearchStrategy[int]
Dtypes: TypeAlias = str | Sequence[str]

SHAPE = (2, 3, 4)
"""The shape of items without a declaration: batch, time, features."""

MAX_VARIADIC_AXES = 2
"""How many axes a variadic axis stands for, at most."""

DEFAULT_DTYPES = ("float32", "int32", "bool", "complex64")
"""If an annotation allows several dtypes, the first of these that it allows is drawn."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a call, with shapes for arrays, and the sizes of named axes."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    sizes: Sizes


@dataclasses.dataclass(frozen=True)
class Options:
    """The user's restrictions on the calls that are drawn."""

    sizes: Mapping[str, SizeOf]
    dtypes: Mapping[str, Dtypes]
    max_size: int

    def check(self, declaration: Declaration) -> None:
        """Raises an error for unknown names of axes or parameters, and for invalid sizes."""
        parameters = frozenset(parameter.name for parameter in declaration.parameters)
        self.check_names(declaration.name, declaration.axes, parameters)

    def check_names(self, f: str, axes: frozenset[str], parameters: frozenset[str]) -> None:
        """Raises an error for unknown names of axes or parameters, and for invalid sizes."""
        for what, names, known in (
            ("the size", self.sizes.keys(), axes),
            ("the dtype", self.dtypes.keys(), parameters),
        ):
            unknown = set(names) - known
            if unknown:
                raise _errors.unknown_names(f, what, unknown, known)
        for name, size in self.sizes.items():
            is_size = isinstance(size, int) and not isinstance(size, bool)
            if not is_size and not isinstance(size, st.SearchStrategy):
                raise _errors.not_a_size(f, name, repr(size))

    def size_of(self, name: str) -> st.SearchStrategy[int]:
        """Returns a strategy for the size of an axis."""
        given = self.sizes.get(name, st.integers(1, self.max_size))
        return given if isinstance(given, st.SearchStrategy) else st.just(given)


@st.composite
def draw_calls(draw: st.DrawFn, declaration: Declaration, options: Options) -> Call:
    """Draws a call that the declaration allows."""
    drawn = _CallDrawer(draw, options, dict(declaration.known), declaration.scope)
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    for parameter in declaration.parameters:
        if parameter.optional and not draw(st.booleans()):
            continue
        value = drawn.value(parameter.declared, declaration.name, parameter.name)
        if parameter.by_keyword:
            keywords[parameter.name] = value
        else:
            arguments.append(value)
    return Call(tuple(arguments), keywords, drawn.sizes)


class _CallDrawer:
    """Draws the values of one call. A name keeps the size that was drawn for it."""

    def __init__(
        self, draw: st.DrawFn, options: Options, sizes: Sizes, scope: Mapping[str, Any]
    ) -> None:
        self.draw = draw
        self.options = options
        self.sizes = sizes
        self.scope = scope

    def value(self, declared: Declared, f: str, name: str) -> Any:
        if isinstance(declared, Fixed):
            return declared.value
        if isinstance(declared, ArrayOf):
            dtype = self._dtype(declared, f, name)
            shape = make_shape(declared.axes, self._size, self._is_one, self.scope)
            return _make_spec(shape, dtype)
        if isinstance(declared, Number):
            return make_shape((declared.axis,), self._size, self._is_one, self.scope)[0]
        if isinstance(declared, OneOf):
            chosen = self.draw(st.sampled_from(_simplest_first(declared)))
            return self.value(chosen, f, name)
        if isinstance(declared, Group):
            return declared.kind(self.value(part, f, name) for part in declared.parts)
        if isinstance(declared, AnyNumberOf):
            n = self.draw(st.integers(0, 3))
            return declared.kind(self.value(declared.part, f, name) for _ in range(n))
        raise _errors.no_shape(f, name, declared.text)  # drawable() has raised this error before

    def _size(self, name: str) -> Size:
        if name in self.sizes:
            return self.sizes[name]
        size = self.options.size_of(name)
        drawn: Size
        if name.startswith("*"):
            drawn = tuple(self.draw(st.lists(size, max_size=MAX_VARIADIC_AXES)))
        else:
            drawn = self.draw(size)
        if name not in ("_", "*_"):
            self.sizes[name] = drawn
        return drawn

    def _is_one(self) -> bool:
        return self.draw(st.booleans())

    def _dtype(self, declared: ArrayOf, f: str, name: str) -> np.dtype[Any]:
        asked = self.options.dtypes.get(name)
        if asked is not None:
            several = [asked] if isinstance(asked, str) else list(asked)
            return jnp.dtype(
                several[0] if len(several) == 1 else self.draw(st.sampled_from(several))
            )
        allowed = [d for d in DEFAULT_DTYPES if declared.dtypes is None or d in declared.dtypes]
        found = allowed or [d for d in declared.dtypes or () if _is_dtype(d)]
        if not found:
            raise _errors.no_strategy_for(f, name, declared.dtypes or ())
        return jnp.dtype(found[0])


def _simplest_first(declared: OneOf) -> list[Declared]:
    """Sorts alternatives: None first, because hypothesis shrinks towards the first."""
    return sorted(declared.alternatives, key=lambda part: not isinstance(part, Fixed))


def _is_dtype(name: str) -> bool:
    try:
        return jnp.dtype(name).kind in "fiubcV"
    except TypeError:
        return False


def draw_arrays(values: Any) -> st.SearchStrategy[Any]:
    """Draws arrays in the place of shapes. Other values stay."""
    leaves, tree = jax.tree.flatten(values)
    drawn = [_draw_array(leaf) if _is_shape(leaf) else st.just(leaf) for leaf in leaves]
    return st.tuples(*drawn).map(lambda arrays: jax.tree.unflatten(tree, arrays))


def _make_spec(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    like: jax.ShapeDtypeStruct = jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]
    return like


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _draw_array(like: jax.ShapeDtypeStruct) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    kind = like.dtype.kind
    if kind == "b":
        elements: st.SearchStrategy[Any] = st.booleans()
    elif kind in "iu":
        elements = st.integers(0, 3)  # few enough to be tokens of any vocabulary
    else:
        elements = st.integers(-8, 8).map(lambda eighths: eighths / 4)
    filled = hnp.arrays(
        np.dtype(bool) if kind == "b" else np.float64, like.shape, elements=elements
    )
    return filled.map(lambda array: array.astype(like.dtype))


def inputs_for(
    f: Callable[..., Any],
    *,
    specs: Sequence[Any] | None = None,
    context: Mapping[str, Any] | None = None,
    annotations: Mapping[str, Any] | None = None,
    sizes: Mapping[str, SizeOf] | None = None,
    dtypes: Mapping[str, Dtypes] | None = None,
    max_size: int = 5,
    shape: tuple[int, ...] = SHAPE,
) -> st.SearchStrategy[Any]:
    """Draws inputs that a callable can be called with.

    If specs are given, or ``f`` is a ``cb.typed``, the inputs are as specified. Else, if each
    required parameter of ``f`` has a jaxtyping annotation, they are as annotated. A size is drawn
    for each name of an axis. In all other cases, they are float32 arrays of one shape, as many as
    the signature of ``f`` says.

    Args:
        f: a function, a linen module, a combinator or any other callable.
        specs: for each item that ``f`` takes, a spec such as ``"f32[b, t, 64]"``, an array or
            ``jax.ShapeDtypeStruct`` like it, or None for an absent one.
        context: for context keywords a spec, such as ``{"mask": "bool[b, 1, t]"}``, or a value.
            They share the names of dimensions with ``specs``, which must be given.
        annotations: annotations by parameter, which take precedence over those of ``f``.
        sizes: for names of axes a size, or a strategy of sizes.
        dtypes: for names of parameters a dtype, or several to draw from, if the annotation
            allows several.
        max_size: the largest size that is drawn for an axis that ``sizes`` does not name.
        shape: the shape of items without a declaration.

    Returns:
        A strategy of tuples: the positional arguments of a call. With ``context``, a strategy of
        pairs: the positional arguments, and a dict of keywords.

    Raises:
        InvalidArgument: If the annotations do not have a name, a size is not an integer or a
            strategy, or there is not one spec for each item.

    Example:
        >>> from flax_extra import combinator as cb, layer as xn, testing
        >>> from hypothesis import given, settings
        >>> @settings(deadline=None)
        ... @given(testing.inputs_for(xn.cross_attention_mask))
        ... def test_is_an_outer_product(masks):
        ...     mask_q, mask_kv = masks
        ...     mask = xn.cross_attention_mask(mask_q, mask_kv)
        ...     assert mask.shape == (*mask_q.shape, mask_kv.shape[1])
        >>> test_is_an_outer_product()
    """
    options = Options(sizes or {}, dtypes or {}, max_size)
    if specs is None and isinstance(f, cb.Typed):
        declared = cb.ShapeSignature.parse(f.declared)
        specs = declared.inputs
        context = {**declared.context, **context} if context is not None else None
    if context is not None:
        if specs is None:
            raise _errors.context_without_specs(get_name(f))
        return _draw_like(f, specs, options, context)
    if specs is not None:
        return _draw_like(f, specs, options, {}).map(operator.itemgetter(0))
    if isinstance(f, cb.Fn) or not isinstance(f, cb.Combinator):
        declaration = _drop_optional(read_declaration(f, annotations))
        if annotations or sizes or dtypes or _has_input_shapes(declaration):
            options.check(declaration)
            drawn = draw_calls(declaration.drawable(), options)
            return drawn.flatmap(lambda call: draw_arrays(call.arguments))
    signature = cb.infer_signature(f)
    return _group_inputs([_make_spec(shape, jnp.float32)] * signature.n_in, signature)


def _drop_optional(declaration: Declaration) -> Declaration:
    required = tuple(p for p in declaration.parameters if not p.optional)
    return dataclasses.replace(declaration, parameters=required)


def _has_input_shapes(declaration: Declaration) -> bool:
    parameters = declaration.parameters
    return bool(parameters) and all(drawable(p.declared) is not None for p in parameters)


def _draw_like(
    f: Callable[..., Any], specs: Sequence[Any], options: Options, context: Mapping[str, Any]
) -> st.SearchStrategy[tuple[tuple[Any, ...], dict[str, Any]]]:
    signature = cb.infer_signature(f)
    try:
        call = parse_call(specs, context)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    if len(call.items) != signature.n_in:
        raise _errors.wrong_number_of_specs(get_name(f), len(call.items), str(signature))
    names = find_dimension_names([call.items, call.context])
    options.check_names(get_name(f), frozenset(names), frozenset())
    sizes = st.fixed_dictionaries({name: options.size_of(name) for name in names})
    if call.constraints:
        sizes = sizes.filter(functools.partial(are_satisfied, call.constraints))

    def draw_sized(sizes: Mapping[str, int]) -> st.SearchStrategy[Any]:
        items, keywords = substitute_sizes((call.items, dict(call.context)), sizes)
        return st.tuples(_group_inputs(items, signature), draw_arrays(keywords))

    return sizes.flatmap(draw_sized)


def _group_inputs(
    items: Sequence[Any], signature: cb.Signature
) -> st.SearchStrategy[tuple[Any, ...]]:
    return draw_arrays(tuple(items)).map(lambda arrays: regroup(arrays, signature.in_shape))
