"""The Python signature of a callable, and what its type hints mean in items of the stack.

Strings and aliases are resolved as Python would. A hint that cannot be is one item: it is not
guessed to be a tuple.
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

from flax_extra.combinator._signature import Nesting


class Special:
    """A tuple annotation that is not a fixed nesting of items."""


OPEN_ENDED = Special()
EMPTY = Special()


def nesting_of(annotation: Any, scope: Names, depth: int = 0) -> Nesting | Special:
    """How the items of what an annotation describes are grouped: ``()`` for one item.

    >>> nesting_of(tuple[int, tuple[str, "Unknown"]], Names(abs))
    ((), ((), ()))
    """
    annotation = scope.resolve(annotation)
    if annotation is tuple or annotation is _TUPLE_ALIAS:
        return OPEN_ENDED
    if typing.get_origin(annotation) is not tuple:
        return ()
    arguments = typing.get_args(annotation)
    if not arguments:
        return EMPTY
    if Ellipsis in arguments or any(map(_is_unpacked, arguments)) or depth > _DEEPEST:
        return OPEN_ENDED
    parts = tuple(nesting_of(argument, scope, depth + 1) for argument in arguments)
    nested: list[Nesting] = []
    for part in parts:
        if not isinstance(part, tuple):
            return OPEN_ENDED
        nested.append(part)
    return tuple(nested)


_TUPLE_ALIAS: Any = typing.Tuple  # noqa: UP006  # the bare alias is an annotation people write
_DEEPEST = 32  # a recursive alias has no last level


def _is_unpacked(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (
        typing_extensions.Unpack,
        getattr(typing, "Unpack", None),
    ) or isinstance(annotation, typing_extensions.TypeVarTuple)


def text_of(annotation: Any) -> str:
    """An annotation as it was written."""
    if isinstance(annotation, str):
        return annotation
    plain = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return annotation.__name__ if plain else str(annotation)


class _Unresolved:
    """Stands for a name that an annotation uses and nothing defines: one item, whatever it is."""

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


class Names(collections.abc.Mapping[str, Any]):
    """The names that a callable's annotations may use, for those that are strings.

    A name that nothing defines (a type imported for the checker alone, or local to a function that
    has returned) is one item: it is not guessed to be a tuple.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        function = underlying_function(f)
        self._layers: list[Mapping[str, Any]] = []
        if isinstance(function, types.FunctionType):
            self._layers.append(inspect.getclosurevars(function).nonlocals)
            self._layers.append(function.__globals__)
        else:
            module = sys.modules.get(attribute(function, "__module__") or "")
            self._layers.append(vars(module) if module else {})
        self._layers.append(vars(builtins))

    def __getitem__(self, name: str) -> Any:
        for layer in self._layers:
            if name in layer:
                return layer[name]
        return _Unresolved()

    def __iter__(self) -> Iterator[str]:
        return iter({name for layer in self._layers for name in layer})

    def __len__(self) -> int:
        return sum(map(len, self._layers))

    def resolve(self, annotation: Any, *, extras: bool = False) -> Any:
        """The type that an annotation means: strings evaluated, aliases opened.

        With ``extras``, what ``Annotated`` adds to a type stays with it.
        """
        for _ in range(_DEEPEST):
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
            return eval(annotation, {"__builtins__": {}}, self)  # noqa: S307  # what Python itself does with a hint
        except Exception:  # whatever a hint raises, it is then one that cannot be resolved
            return _Unresolved()


_ALIASES: tuple[type, ...] = tuple(
    {
        typing_extensions.TypeAliasType,
        getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType),
    }
)


def underlying_function(f: Any) -> Any:
    """The function whose parameters and annotations a callable has."""
    while isinstance(f, functools.partial):
        f = f.func
    if not isinstance(f, type | types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        wrapped = None if isinstance(f, nn.Module) else attribute(f, "__wrapped__")
        f = wrapped if callable(wrapped) else type(f).__call__
    f = inspect.unwrap(f)
    return f.__func__ if isinstance(f, types.MethodType) else f


def python_signature(f: Callable[..., Any]) -> inspect.Signature | None:
    """The Python signature of a callable, or None where it has none."""
    if isinstance(f, nn.Module):
        signature = python_signature(type(f).__call__)
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


def attribute(f: object, name: str) -> Any:
    """An attribute of any object at all, or None."""
    try:
        if isinstance(f, nn.Module):  # asked for an attribute it has not, a bound module runs setup
            return object.__getattribute__(f, name)
        return getattr(f, name, None)
    except Exception:  # whatever an arbitrary object's __getattr__ raises, it has no such attribute
        return None
