"""The shapes that a callable takes and gives, as its annotations declare them.

Annotations are read once. :mod:`_inputs` draws calls from the result, and checks compare outputs
with it. Arrays are annotated with jaxtyping. Unions, ``None``, tuples, lists and sequences of
arrays are understood. ``Annotated[int, "time-1"]`` is a number that is computed from sizes.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._core.hints import (
    AnnotationScope,
    format_annotation,
    get_python_signature,
)
from flax_extra.combinator._core.naming import get_name
from flax_extra.testing import _errors
from flax_extra.testing._axes import Axis, Size, Sizes, fit_axes, parse_axes


@dataclasses.dataclass(frozen=True)
class ArrayOf:
    """An array of declared axes. ``dtypes`` are the dtypes that it may have; None for any."""

    text: str
    axes: tuple[Axis, ...]
    dtypes: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Number:
    """A Python integer, computed from sizes by an expression."""

    text: str
    axis: Axis


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A value that is always the same: ``None``, or one from the user."""

    value: Any

    @property
    def text(self) -> str:
        return describe_item(self.value)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of several alternatives."""

    text: str
    alternatives: tuple[Declared, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """A tuple or list of a known length."""

    text: str
    kind: type
    parts: tuple[Declared, ...]


@dataclasses.dataclass(frozen=True)
class AnyNumberOf:
    """A tuple or list of any length."""

    text: str
    kind: type
    part: Declared


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An annotation without a shape."""

    text: str


Declared: TypeAlias = ArrayOf | Number | Fixed | OneOf | Group | AnyNumberOf | Unknown


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter and its declaration. An optional one may also be left out."""

    name: str
    declared: Declared
    by_keyword: bool
    optional: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Declaration:
    """The declarations of a callable.

    Attributes:
        f: the callable.
        parameters: those that a call must pass, in order, and those that it may pass.
        output: the declaration of what it returns.
        known: the sizes that its fields determine.
    """

    f: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    output: Declared
    known: Mapping[str, Size]

    @property
    def name(self) -> str:
        """The callable's name, for messages."""
        return get_name(self.f)

    @property
    def axes(self) -> frozenset[str]:
        """The names of all declared axes."""
        every = [*(parameter.declared for parameter in self.parameters), self.output]
        return frozenset(name for declared in every for name in list_axis_names(declared))

    def drawable(self) -> Declaration:
        """Returns the same with declarations that inputs can be drawn from.

        An optional parameter without one is left out.

        Raises:
            InvalidArgument: If a required parameter has none.
        """
        parameters = []
        for parameter in self.parameters:
            declared = drawable(parameter.declared)
            if declared is None and parameter.optional:
                continue
            if declared is None:
                raise _errors.no_shape(self.name, parameter.name, parameter.declared.text)
            parameters.append(dataclasses.replace(parameter, declared=declared))
        return dataclasses.replace(self, parameters=tuple(parameters))

    @property
    def scope(self) -> dict[str, Any]:
        """The names that an expression in braces may use."""
        return {"self": self.f}


def read_declaration(
    f: Callable[..., Any], annotations: Mapping[str, Any] | None = None
) -> Declaration:
    """Reads the annotations of a callable; ``annotations`` take precedence over its own."""
    target, fixed, n_taken = _unwrap_fn(f)
    given = annotations or {}
    signature = get_python_signature(target) or inspect.Signature()
    scope = AnnotationScope(target)
    parameters = tuple(
        parameter
        for parameter in _read_parameters(signature, given, scope, n_taken, fixed)
        if parameter.name not in fixed
    )
    if "return" in given:
        output = read_annotation(given["return"], scope)
    else:
        output = read_annotation(signature.return_annotation, scope)
    unknown = given.keys() - {*signature.parameters, "return"}
    if unknown:
        known = {*signature.parameters, "return"}
        raise _errors.unknown_names(get_name(f), "the annotation", unknown, known)
    declaration = Declaration(f, parameters, output, {})
    sizes = _read_field_sizes(target, declaration.axes, scope)
    return dataclasses.replace(declaration, known=sizes)


def _unwrap_fn(f: Callable[..., Any]) -> tuple[Callable[..., Any], Mapping[str, Any], int | None]:
    """Returns the callable in a ``cb.fn``, its fixed keywords, and how many arguments it takes."""
    if not isinstance(f, cb.Fn):
        return f, {}, None
    child = f.children[0]
    return child.target, child.fixed, len(child.signature.in_shape)


def _read_parameters(
    signature: inspect.Signature,
    given: Mapping[str, Any],
    scope: AnnotationScope,
    n_taken: int | None,
    fixed: Mapping[str, Any],
) -> Iterator[Parameter]:
    positions = 0
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in fixed:
            continue
        by_keyword = parameter.kind is parameter.KEYWORD_ONLY
        required = parameter.default is parameter.empty
        if not by_keyword and n_taken is not None:
            required = positions < n_taken
            positions += 1
        declared = read_annotation(given.get(name, parameter.annotation), scope, name)
        if required or name in given or any(map(_is_array, _walk_parts(declared))):
            optional = not required
            if optional and parameter.default is None:
                declared = _drop_none(declared)
            yield Parameter(name, declared, by_keyword or optional, optional)


def read_annotation(annotation: Any, scope: AnnotationScope, name: str = "") -> Declared:
    """Reads an annotation. A parameter of type ``int`` is a size with the name of the parameter.

    >>> from jax import Array
    >>> from jaxtyping import Float
    >>> read_annotation(tuple[Float[Array, "batch 2"], None], AnnotationScope(abs)).text
    'Float[batch 2], None'
    """
    annotation = scope.resolve(annotation, extras=True)
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return _read_array(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        expression = str(typing.get_args(annotation)[1])
        return Number(f"int {expression}", Axis(expression))
    if annotation is int and name:
        return Number(f"int {name}", Axis(name))
    if isinstance(annotation, list | tuple):
        parts = tuple(read_annotation(part, scope) for part in annotation)
        return Group(_join(parts), type(annotation), parts)
    if typing.get_origin(annotation):
        return _read_generic(annotation, scope)
    return _read_plain(annotation)


def _read_plain(annotation: Any) -> Declared:
    """Reads an annotation that is ``None``, a class or a value."""
    if annotation is None or annotation is types.NoneType:
        return Fixed(None)
    if annotation is inspect.Parameter.empty:
        return Unknown("none")
    if isinstance(annotation, type) or callable(annotation):
        return Unknown(format_annotation(annotation))
    return Fixed(annotation)


def _read_generic(annotation: Any, scope: AnnotationScope) -> Declared:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        alternatives = tuple(read_annotation(argument, scope) for argument in arguments)
        return OneOf(" or ".join(part.text for part in alternatives), alternatives)
    if origin is tuple and Ellipsis not in arguments:
        parts = tuple(read_annotation(argument, scope) for argument in arguments)
        return Group(_join(parts), tuple, parts)
    if origin in (tuple, list, collections.abc.Sequence):
        part = read_annotation(arguments[0], scope)
        kind = tuple if origin is tuple else list
        return AnyNumberOf(f"{kind.__name__}({part.text}, ...)", kind, part)
    return Unknown(format_annotation(annotation))


def _read_array(annotation: Any) -> Declared:
    text = f"{annotation.__name__.partition('[')[0]}[{annotation.dim_str}]"
    dtypes = annotation.dtypes
    named = tuple(map(str, dtypes)) if isinstance(dtypes, tuple | list) else None
    return ArrayOf(text, parse_axes(annotation.dim_str), named)


def _join(parts: Iterable[Declared]) -> str:
    return ", ".join(f"({p.text})" if isinstance(p, Group) else p.text for p in parts) or "nothing"


def _walk_parts(declared: Declared) -> Iterator[Declared]:
    """Yields a declaration and all that it is made of."""
    yield declared
    inner: tuple[Declared, ...] = ()
    if isinstance(declared, OneOf):
        inner = declared.alternatives
    elif isinstance(declared, Group):
        inner = declared.parts
    elif isinstance(declared, AnyNumberOf):
        inner = (declared.part,)
    for part in inner:
        yield from _walk_parts(part)


def _drop_none(declared: Declared) -> Declared:
    """Removes ``None`` from the alternatives, if there are others."""
    if not isinstance(declared, OneOf):
        return declared
    present = tuple(p for p in declared.alternatives if not isinstance(p, Fixed))
    return dataclasses.replace(declared, alternatives=present or declared.alternatives)


def _is_array(declared: Declared) -> bool:
    return isinstance(declared, ArrayOf)


def has_shapes(declared: Declared) -> bool:
    """Whether a declaration has a shape or a value that can be checked."""
    return any(isinstance(part, ArrayOf | Number | Fixed) for part in _walk_parts(declared))


def drawable(declared: Declared) -> Declared | None:
    """Returns the part of a declaration that inputs can be drawn from, or None."""
    if isinstance(declared, OneOf):
        drawn = tuple(part for part in map(drawable, declared.alternatives) if part is not None)
        return dataclasses.replace(declared, alternatives=drawn) if drawn else None
    whole = all(not isinstance(part, Unknown) for part in _walk_parts(declared))
    return declared if whole else None


def list_axis_names(declared: Declared) -> Iterator[str]:
    """Yields the names of the axes in a declaration."""
    for part in _walk_parts(declared):
        if isinstance(part, ArrayOf):
            for axis in part.axes:
                yield from axis.names
        elif isinstance(part, Number):
            yield from part.axis.names


def _read_field_sizes(f: Callable[..., Any], axes: frozenset[str], scope: AnnotationScope) -> Sizes:
    """Reads sizes from the fields of a layer: integers with the name of an axis, and arrays."""
    sizes: Sizes = {}
    if not isinstance(f, nn.Module):
        return sizes
    for field in dataclasses.fields(f):
        value = getattr(f, field.name, None)
        if field.name in axes and isinstance(value, int):
            sizes[field.name] = value
        elif isinstance(value, np.ndarray | jax.Array):
            declared = read_annotation(field.type, scope)
            if isinstance(declared, ArrayOf):
                fit_axes(declared.axes, value.shape, sizes)
    return sizes


def matches(declared: Declared, value: Any, sizes: Sizes, scope: Mapping[str, Any]) -> bool:
    """Whether a value is as declared. A name that has no size yet gets one."""
    if isinstance(declared, ArrayOf):
        return _matches_array(declared, value, sizes, scope)
    if isinstance(declared, Number):
        return isinstance(value, int) and fit_axes((declared.axis,), (value,), sizes, scope)
    if isinstance(declared, OneOf):
        return any(
            _matches_alternative(part, value, sizes, scope) for part in declared.alternatives
        )
    if isinstance(declared, Group | AnyNumberOf):
        return _matches_group(declared, value, sizes, scope)
    return isinstance(declared, Unknown) or _is_equal(declared.value, value)


def _matches_group(
    declared: Group | AnyNumberOf, value: Any, sizes: Sizes, scope: Mapping[str, Any]
) -> bool:
    if not isinstance(value, declared.kind):
        return False
    items: Sequence[Any] = value  # type: ignore[assignment]  # isinstance narrows it to object
    if isinstance(declared, AnyNumberOf):
        return all(matches(declared.part, item, sizes, scope) for item in items)
    return len(items) == len(declared.parts) and all(
        matches(part, item, sizes, scope) for part, item in zip(declared.parts, items, strict=True)
    )


def _is_equal(expected: Any, found: Any) -> bool:
    if expected is None or found is None:
        return expected is found
    return jnp.shape(expected) == jnp.shape(found) and bool(np.all(expected == found))


def _matches_array(declared: ArrayOf, value: Any, sizes: Sizes, scope: Mapping[str, Any]) -> bool:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return False
    if declared.dtypes is not None and _get_dtype_name(value.dtype) not in declared.dtypes:
        return False
    return fit_axes(declared.axes, value.shape, sizes, scope)


def _get_dtype_name(dtype: Any) -> str:
    """Returns the name of a dtype that jaxtyping uses."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return "prng_key" if is_key else str(jnp.dtype(dtype).name)


def _matches_alternative(
    declared: Declared, value: Any, sizes: Sizes, scope: Mapping[str, Any]
) -> bool:
    tried = dict(sizes)
    fits = matches(declared, value, tried, scope)
    if fits:
        sizes.update(tried)
    return fits
