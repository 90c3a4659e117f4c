"""What a callable's annotations declare of the shapes that it takes and gives.

Annotations are read once, into values that :mod:`_inputs` draws calls from and that found outputs
are held against. Arrays are declared as jaxtyping writes them. Unions, ``None``, tuples, lists and
sequences of them are understood; ``Annotated[int, "time-1"]`` is a number that sizes compute.
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
from flax_extra.combinator._hints import Names, python_signature, text_of
from flax_extra.combinator._inference import name_of
from flax_extra.combinator._stack import describe_item
from flax_extra.testing import _errors
from flax_extra.testing._axes import Axis, Size, Sizes, fit, parse_axes


@dataclasses.dataclass(frozen=True)
class ArrayOf:
    """An array of declared axes. ``dtypes`` are those it may have; None for all."""

    text: str
    axes: tuple[Axis, ...]
    dtypes: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Number:
    """A Python integer that an expression of sizes gives."""

    text: str
    axis: Axis


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A value that is always the same: ``None``, or one that the user gives."""

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
    """An annotation that says no shape."""

    text: str


Declared: TypeAlias = ArrayOf | Number | Fixed | OneOf | Group | AnyNumberOf | Unknown


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter and what it takes. An optional one may also be left out."""

    name: str
    declared: Declared
    by_keyword: bool
    optional: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Declaration:
    """All that a callable declares.

    Attributes:
        f: the callable.
        parameters: what a call must pass, in order, and what it may.
        output: what it gives.
        known: the sizes that its fields fix.
    """

    f: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    output: Declared
    known: Mapping[str, Size]

    @property
    def name(self) -> str:
        """The callable's name, for messages."""
        return name_of(self.f)

    @property
    def axes(self) -> frozenset[str]:
        """The names of all axes that it declares."""
        every = [*(parameter.declared for parameter in self.parameters), self.output]
        return frozenset(name for declared in every for name in names_of(declared))

    def drawable(self) -> Declaration:
        """The same, each parameter with what inputs can be drawn from; optional ones as can be.

        Raises:
            InvalidArgument: where nothing says what to pass for a parameter.
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
        """What an expression in braces may refer to."""
        return {"self": self.f}


def declaration_of(
    f: Callable[..., Any], annotations: Mapping[str, Any] | None = None
) -> Declaration:
    """Reads what a callable declares; ``annotations`` take the place of those it has."""
    target, fixed, n_taken = _meant(f)
    given = annotations or {}
    signature = python_signature(target) or inspect.Signature()
    scope = Names(target)
    parameters = tuple(
        parameter
        for parameter in _parameters(signature, given, scope, n_taken, fixed)
        if parameter.name not in fixed
    )
    if "return" in given:
        output = read(given["return"], scope)
    else:
        output = read(signature.return_annotation, scope)
    unknown = given.keys() - {*signature.parameters, "return"}
    if unknown:
        known = {*signature.parameters, "return"}
        raise _errors.unknown_names(name_of(f), "the annotation", unknown, known)
    declaration = Declaration(f, parameters, output, {})
    sizes = _sizes_of_fields(target, declaration.axes, scope)
    return dataclasses.replace(declaration, known=sizes)


def _meant(f: Callable[..., Any]) -> tuple[Callable[..., Any], Mapping[str, Any], int | None]:
    """The callable with the annotations, what is bound of it, and how many arguments it takes."""
    if not isinstance(f, cb.Fn):
        return f, {}, None
    child = f.children[0]
    return child.target, child.fixed, len(child.signature.in_shape)


def _parameters(
    signature: inspect.Signature,
    given: Mapping[str, Any],
    scope: Names,
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
        declared = read(given.get(name, parameter.annotation), scope, name)
        if required or name in given or any(map(_is_array, _parts(declared))):
            optional = not required
            if optional and parameter.default is None:
                declared = _present(declared)
            yield Parameter(name, declared, by_keyword or optional, optional)


def read(annotation: Any, scope: Names, name: str = "") -> Declared:
    """What an annotation declares; of a parameter that is an integer, that it has its own size.

    >>> from jax import Array
    >>> from jaxtyping import Float
    >>> read(tuple[Float[Array, "batch 2"], None], Names(abs)).text
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
        parts = tuple(read(part, scope) for part in annotation)
        return Group(_join(parts), type(annotation), parts)
    if typing.get_origin(annotation):
        return _read_generic(annotation, scope)
    return _read_plain(annotation)


def _read_plain(annotation: Any) -> Declared:
    """What is neither an array nor made of others: ``None``, a class, or a value."""
    if annotation is None or annotation is types.NoneType:
        return Fixed(None)
    if annotation is inspect.Parameter.empty:
        return Unknown("none")
    if isinstance(annotation, type) or callable(annotation):
        return Unknown(text_of(annotation))
    return Fixed(annotation)


def _read_generic(annotation: Any, scope: Names) -> Declared:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        alternatives = tuple(read(argument, scope) for argument in arguments)
        return OneOf(" or ".join(part.text for part in alternatives), alternatives)
    if origin is tuple and Ellipsis not in arguments:
        parts = tuple(read(argument, scope) for argument in arguments)
        return Group(_join(parts), tuple, parts)
    if origin in (tuple, list, collections.abc.Sequence):
        part = read(arguments[0], scope)
        kind = tuple if origin is tuple else list
        return AnyNumberOf(f"{kind.__name__}({part.text}, ...)", kind, part)
    return Unknown(text_of(annotation))


def _read_array(annotation: Any) -> Declared:
    text = f"{annotation.__name__.partition('[')[0]}[{annotation.dim_str}]"
    dtypes = annotation.dtypes
    named = tuple(map(str, dtypes)) if isinstance(dtypes, tuple | list) else None
    return ArrayOf(text, parse_axes(annotation.dim_str), named)


def _join(parts: Iterable[Declared]) -> str:
    return ", ".join(f"({p.text})" if isinstance(p, Group) else p.text for p in parts) or "nothing"


def _parts(declared: Declared) -> Iterator[Declared]:
    """A declaration and all that it is made of."""
    yield declared
    inner: tuple[Declared, ...] = ()
    if isinstance(declared, OneOf):
        inner = declared.alternatives
    elif isinstance(declared, Group):
        inner = declared.parts
    elif isinstance(declared, AnyNumberOf):
        inner = (declared.part,)
    for part in inner:
        yield from _parts(part)


def _present(declared: Declared) -> Declared:
    """A declaration without the ``None`` among its alternatives, where there are others."""
    if not isinstance(declared, OneOf):
        return declared
    present = tuple(p for p in declared.alternatives if not isinstance(p, Fixed))
    return dataclasses.replace(declared, alternatives=present or declared.alternatives)


def _is_array(declared: Declared) -> bool:
    return isinstance(declared, ArrayOf)


def says_shapes(declared: Declared) -> bool:
    """Whether a declaration says anything that can be checked."""
    return any(isinstance(part, ArrayOf | Number | Fixed) for part in _parts(declared))


def drawable(declared: Declared) -> Declared | None:
    """What of a declaration inputs can be drawn from: alternatives that say no shape are left."""
    if isinstance(declared, OneOf):
        drawn = tuple(part for part in map(drawable, declared.alternatives) if part is not None)
        return dataclasses.replace(declared, alternatives=drawn) if drawn else None
    whole = all(not isinstance(part, Unknown) for part in _parts(declared))
    return declared if whole else None


def names_of(declared: Declared) -> Iterator[str]:
    """The names of the axes in a declaration."""
    for part in _parts(declared):
        if isinstance(part, ArrayOf):
            for axis in part.axes:
                yield from axis.names
        elif isinstance(part, Number):
            yield from part.axis.names


def _sizes_of_fields(f: Callable[..., Any], axes: frozenset[str], scope: Names) -> Sizes:
    """Sizes that a layer's own fields fix: integers named as an axis is, and arrays."""
    sizes: Sizes = {}
    if not isinstance(f, nn.Module):
        return sizes
    for field in dataclasses.fields(f):
        value = getattr(f, field.name, None)
        if field.name in axes and isinstance(value, int):
            sizes[field.name] = value
        elif isinstance(value, np.ndarray | jax.Array):
            declared = read(field.type, scope)
            if isinstance(declared, ArrayOf):
                fit(declared.axes, value.shape, sizes)
    return sizes


def holds(declared: Declared, value: Any, sizes: Sizes, scope: Mapping[str, Any]) -> bool:
    """Whether a value is what was declared. Names that are met for the first time get a size."""
    if isinstance(declared, ArrayOf):
        return _holds_array(declared, value, sizes, scope)
    if isinstance(declared, Number):
        return isinstance(value, int) and fit((declared.axis,), (value,), sizes, scope)
    if isinstance(declared, OneOf):
        return any(_holds_alternative(part, value, sizes, scope) for part in declared.alternatives)
    if isinstance(declared, Group | AnyNumberOf):
        return _holds_group(declared, value, sizes, scope)
    return isinstance(declared, Unknown) or _equal(declared.value, value)


def _holds_group(
    declared: Group | AnyNumberOf, value: Any, sizes: Sizes, scope: Mapping[str, Any]
) -> bool:
    if not isinstance(value, declared.kind):
        return False
    items: Sequence[Any] = value  # type: ignore[assignment]  # isinstance narrows it to object
    if isinstance(declared, AnyNumberOf):
        return all(holds(declared.part, item, sizes, scope) for item in items)
    return len(items) == len(declared.parts) and all(
        holds(part, item, sizes, scope) for part, item in zip(declared.parts, items, strict=True)
    )


def _equal(expected: Any, found: Any) -> bool:
    if expected is None or found is None:
        return expected is found
    return jnp.shape(expected) == jnp.shape(found) and bool(np.all(expected == found))


def _holds_array(declared: ArrayOf, value: Any, sizes: Sizes, scope: Mapping[str, Any]) -> bool:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return False
    if declared.dtypes is not None and _dtype_name(value.dtype) not in declared.dtypes:
        return False
    return fit(declared.axes, value.shape, sizes, scope)


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype, as jaxtyping knows it."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return "prng_key" if is_key else str(jnp.dtype(dtype).name)


def _holds_alternative(
    declared: Declared, value: Any, sizes: Sizes, scope: Mapping[str, Any]
) -> bool:
    tried = dict(sizes)
    fits = holds(declared, value, tried, scope)
    if fits:
        sizes.update(tried)
    return fits
