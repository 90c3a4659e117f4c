"""Signatures as a reader wants them: types as they are written, defaults as an expression.

    >>> from flax_extra import combinator as cb, layer as xn
    >>> print(format_signature(cb.context))
    (name: str, default: Any = ...) -> ContextKeyword
    >>> print(format_signature(xn.TrainablePositionalPadding)[:85])
    (d_max: int, kernel_init: Initializer = nn.initializers.truncated_normal(stddev=0.02)

A default that no public expression gives, such as a sentinel, is ``...``: there is one, and the
text says what it is.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from public import find_assignment, find_importer, parse

PUBLIC: dict[str, ModuleType] = {
    "nn.initializers": nn.initializers,
    "nn": nn,
    "jnp": jnp,
    "jax": jax,
    "cb": cb,
    "xn": xn,
}
"""The modules that users import, by the names that they have in every example."""

OF_LINEN = ("parent", "name")
"""Fields that every linen module has."""


def format_signature(f: Callable[..., Any]) -> str:
    """Writes the signature of a function, of a method, or of a class by its fields."""
    signature = inspect.signature(f)
    parameters = [
        _replace_texts(f, parameter)
        for parameter in signature.parameters.values()
        if parameter.name != "self" and not (_is_module(f) and parameter.name in OF_LINEN)
    ]
    returns = signature.return_annotation
    is_shown = not inspect.isclass(f) and returns is not signature.empty
    return str(
        inspect.Signature(
            parameters,
            return_annotation=_Text(_shorten(str(returns))) if is_shown else signature.empty,
        )
    )


def list_names(f: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Lists the names in the signature of a callable, each with what it stands for.

    >>> from flax_extra import combinator as cb
    >>> dict(list_names(cb.repeat))["Policy"] is not None
    True
    """
    for node in ast.walk(ast.parse(f"def f{format_signature(f)}: pass")):
        if isinstance(node, ast.Name):
            yield node.id, _resolve(f, node.id)


class _Text(str):
    """A text that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _is_module(f: Any) -> bool:
    return inspect.isclass(f) and issubclass(f, nn.Module)


def _replace_texts(f: Callable[..., Any], parameter: inspect.Parameter) -> inspect.Parameter:
    owner, field = _find_field(f, parameter.name)
    annotation, default = parameter.annotation, parameter.default
    if annotation is not parameter.empty:
        is_written = isinstance(annotation, str) or field is None
        annotation = _Text(
            _shorten(str(annotation) if is_written else ast.unparse(field.annotation))
        )
    if default is not parameter.empty:
        default = _Text(_format_default(default, owner, field))
    return parameter.replace(annotation=annotation, default=default)


def _shorten(annotation: str) -> str:
    """Leaves the modules out of the names of types."""
    return re.sub(r"\b(?:[a-zA-Z_]\w*\.)+(?=[a-zA-Z])", "", annotation)


def _find_field(f: Any, name: str) -> tuple[type | None, ast.AnnAssign | None]:
    """Finds where a field of a class is declared: the class, and the statement."""
    for owner in inspect.getmro(f) if inspect.isclass(f) else ():
        if name in vars(owner).get("__annotations__", {}):
            for node in ast.walk(parse(sys.modules[owner.__module__])):
                if isinstance(node, ast.ClassDef) and node.name == owner.__name__:
                    return owner, find_assignment(node.body, name)
    return None, None


def _format_default(value: Any, owner: type | None, field: ast.AnnAssign | None) -> str:
    if value is None or type(value) in (bool, int, float, str, tuple):
        return repr(value)
    named = _find_public_name(value)
    if named is None and field is not None and field.value is not None and owner is not None:
        named = _make_public(field.value, sys.modules[owner.__module__])
    return named or "..."


def _find_public_name(value: Any) -> str | None:
    for alias, module in PUBLIC.items():
        for name, member in vars(module).items():
            if member is value and not name.startswith("_"):
                return f"{alias}.{name}"
    name = getattr(value, "__name__", "_") if inspect.isfunction(value) else "_"
    is_found = getattr(sys.modules[getattr(value, "__module__", __name__)], name, None) is value
    return name if is_found and not name.startswith("_") else None


def _make_public(expression: ast.expr, module: ModuleType) -> str | None:
    """Writes an expression with public names, or returns None."""
    text = ast.unparse(expression)
    if text.partition(".")[0] in PUBLIC:
        return text
    if isinstance(expression, ast.Name):
        home = find_importer(module, expression.id)
        assignment = find_assignment(parse(home).body, expression.id)
        return None if assignment is None else _make_public(assignment.value, home)
    if isinstance(expression, ast.Call) and len(expression.args) == 1:
        # What only adjusts an initializer, such as `draw_in_float32`, is no news to a reader.
        return _make_public(expression.args[0], module)
    return None


def _resolve(f: Any, name: str) -> Any:
    for home in inspect.getmro(f) if inspect.isclass(f) else [inspect.unwrap(f)]:
        namespace = vars(sys.modules[home.__module__])
        if name in namespace:
            return namespace[name]
    return None
