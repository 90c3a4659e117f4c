"""The Python signature of a callable, and what its type hints mean in items of the stack.

Hints that are strings, and aliases, are resolved as Python would. A hint that cannot be resolved is
one item: it is never guessed to be a tuple.
"""

from __future__ import annotations

import builtins
import collections.abc
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typing_extensions
from flax import linen as nn

from flax_extra.combinator._core.signature import Nesting


class NoNesting:
    """A tuple annotation that does not say how its items are grouped."""


VARIADIC = NoNesting()
"""A tuple of any length."""

EMPTY = NoNesting()
"""The empty tuple."""


def read_nesting(annotation: Any, scope: AnnotationScope, depth: int = 0) -> Nesting | NoNesting:
    """Reads how the items of an annotated value are grouped: ``()`` for one item.

    >>> read_nesting(tuple[int, tuple[str, "Unknown"]], AnnotationScope(abs))
    ((), ((), ()))
    """
    annotation = scope.resolve(annotation)
    if annotation is tuple or annotation is _TUPLE_ALIAS:
        return VARIADIC
    if typing.get_origin(annotation) is not tuple:
        return ()
    arguments = typing.get_args(annotation)
    if not arguments:
        return EMPTY
    if Ellipsis in arguments or any(map(_is_unpacked, arguments)) or depth > _MAX_DEPTH:
        return VARIADIC
    parts = tuple(read_nesting(argument, scope, depth + 1) for argument in arguments)
    nested: list[Nesting] = []
    for part in parts:
        if not isinstance(part, tuple):
            return VARIADIC
        nested.append(part)
    return tuple(nested)


def read_optional_nesting(annotation: Any, scope: AnnotationScope) -> Nesting | NoNesting:
    """Reads the nesting of an optional parameter that becomes an input: ``None`` is not counted.

    >>> read_optional_nesting(tuple[int, str] | None, AnnotationScope(abs))
    ((), ())
    """
    annotation = scope.resolve(annotation)
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return read_nesting(annotation, scope)
    others = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    return read_nesting(others[0], scope) if len(others) == 1 else ()


_TUPLE_ALIAS: Any = typing.Tuple  # noqa: UP006  # people write the bare alias
_MAX_DEPTH = 32  # a recursive alias has no last level


def _is_unpacked(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (
        typing_extensions.Unpack,
        getattr(typing, "Unpack", None),
    ) or isinstance(annotation, typing_extensions.TypeVarTuple)


def format_annotation(annotation: Any) -> str:
    """Writes an annotation as the user wrote it."""
    if isinstance(annotation, str):
        return annotation
    plain = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return annotation.__name__ if plain else str(annotation)


class _Unresolved:
    """Stands for a name in an annotation that nothing defines. It counts as one item."""

    def __getattr__(self, name: str) -> _Unresolved:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> _Unresolved:
        return self

    def __or__(self, other: object) -> _Unresolved:
        return self

    __ror__ = __or__

    def __call__(self, *args: object, **kwargs: object) -> _Unresolved:
        return self


class AnnotationScope(collections.abc.Mapping[str, Any]):
    """The names that the annotations of a callable may use, for annotations that are strings.

    A name that nothing defines stands for one item. It may be imported under ``TYPE_CHECKING``, or
    be local to a function that has returned.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        function = find_function(f)
        self._namespaces: list[Mapping[str, Any]] = []
        if isinstance(function, types.FunctionType):
            self._namespaces.append(inspect.getclosurevars(function).nonlocals)
            self._namespaces.append(function.__globals__)
        else:
            module = sys.modules.get(get_attribute(function, "__module__") or "")
            self._namespaces.append(vars(module) if module else {})
        self._namespaces.append(vars(builtins))

    def __getitem__(self, name: str) -> Any:
        for namespace in self._namespaces:
            if name in namespace:
                return namespace[name]
        return _Unresolved()

    def __iter__(self) -> Iterator[str]:
        return iter({name for namespace in self._namespaces for name in namespace})

    def __len__(self) -> int:
        return sum(map(len, self._namespaces))

    def resolve(self, annotation: Any, *, extras: bool = False) -> Any:
        """Evaluates strings and opens aliases, down to the type that an annotation means.

        With ``extras``, ``Annotated`` types keep their metadata.
        """
        for _ in range(_MAX_DEPTH):
            if isinstance(annotation, typing.ForwardRef):
                annotation = annotation.__forward_arg__
            if isinstance(annotation, str):
                annotation = self._evaluate(annotation)
            elif typing.get_origin(annotation) is typing.Annotated and not extras:
                annotation = typing.get_args(annotation)[0]
            elif isinstance(annotation, _ALIASES):
                annotation = annotation.__value__  # type: ignore[attr-defined]
            elif isinstance(typing.get_origin(annotation), _ALIASES):
                alias: Any = typing.get_origin(annotation)
                annotation = alias.__value__[typing.get_args(annotation)]
            elif isinstance(annotation, typing.NewType):
                annotation = annotation.__supertype__
            else:
                break
        return annotation

    def _evaluate(self, annotation: str) -> Any:
        try:
            return eval(annotation, {"__builtins__": {}}, self)  # noqa: S307  # as Python itself does
        except Exception:  # a hint may raise anything; then it cannot be resolved
            return _Unresolved()


_ALIASES: tuple[type, ...] = tuple(
    {
        typing_extensions.TypeAliasType,
        getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType),
    }
)


def find_function(f: Any) -> Any:
    """Finds the function whose parameters and annotations a callable has."""
    while isinstance(f, functools.partial):
        f = f.func
    wrapped_class = find_nnx_class(f)
    if wrapped_class is not None:
        return find_function(wrapped_class.__call__)
    if not isinstance(f, type | types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        wrapped = None if isinstance(f, nn.Module) else get_attribute(f, "__wrapped__")
        f = wrapped if callable(wrapped) else type(f).__call__
    f = inspect.unwrap(f)
    return f.__func__ if isinstance(f, types.MethodType) else f


def get_python_signature(f: Callable[..., Any]) -> inspect.Signature | None:
    """Returns the Python signature of a callable, or None if it has none."""
    if isinstance(f, nn.Module):
        signature = get_python_signature((find_nnx_class(f) or type(f)).__call__)
        if signature is None:
            return None
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    try:
        if sys.version_info >= (3, 14):
            import annotationlib

            return inspect.signature(f, annotation_format=annotationlib.Format.FORWARDREF)
        return inspect.signature(f)
    except Exception:  # builtins have none, and an arbitrary object may raise anything
        return None


def find_nnx_class(f: object) -> Any:
    """Returns the NNX class that ``nnx.bridge.to_linen`` wraps, or None for other callables."""
    bridge = sys.modules.get("flax.nnx.bridge")  # if it was not imported, nothing is wrapped
    if bridge is None or not isinstance(f, bridge.ToLinen):
        return None
    wrapped = object.__getattribute__(f, "nnx_class")
    return wrapped if isinstance(wrapped, type) else None


def is_nnx_module(f: object) -> bool:
    """Whether an object is a module of NNX, which holds its own parameters."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(f, nnx.Module)


def get_attribute(f: object, name: str) -> Any:
    """Returns an attribute of any object, or None if it has none."""
    try:
        if isinstance(f, nn.Module):  # a bound module runs setup when it misses an attribute
            return object.__getattribute__(f, name)
        return getattr(f, name, None)
    except Exception:  # __getattr__ of an arbitrary object may raise anything
        return None
