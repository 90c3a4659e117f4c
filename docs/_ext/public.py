"""What is public: the packages, and the names that each exports, grouped as it groups them.

>>> [package.alias for package in list_packages()]
['cb', 'xn', 'io', 'testing']
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

import flax_extra
from flax_extra import combinator as cb

ALIASES = {"combinator": ("cb", "Combinators"), "layer": ("xn", "Layers")}
"""How examples import a package, and the title of its part of the reference."""


class Package(NamedTuple):
    """A public package, or a submodule that one of them exports."""

    module: ModuleType
    alias: str
    title: str

    @property
    def name(self) -> str:
        return self.module.__name__

    @property
    def folder(self) -> str:
        """Where its pages are, in the reference."""
        return self.name.partition(".")[2].replace(".", "/")

    @property
    def import_line(self) -> str:
        parent, _, name = self.name.rpartition(".")
        return f"from {parent} import {name if name == self.alias else f'{name} as {self.alias}'}"


@functools.cache
def list_packages() -> list[Package]:
    """Lists the public packages, each with the submodules that it exports."""
    packages = []
    for name in flax_extra.__all__:
        module = importlib.import_module(f"flax_extra.{name}")
        alias, title = ALIASES.get(name, (name, name.capitalize()))
        packages.append(Package(module, alias, title))
        for member in module.__all__:
            value = getattr(module, member)
            if inspect.ismodule(value):
                packages.append(Package(value, member, f"{title}: {member}"))
    return packages


def list_groups(module: ModuleType) -> list[tuple[str, list[str]]]:
    """Lists the names that a module exports, by the comments between them.

    >>> list_groups(cb)[1]
    ('Where data flows', ['serial', 'parallel', 'branch', 'residual', 'keep', 'dip'])
    """
    exported = find_assignment(parse(module).body, "__all__")
    lines = inspect.getsource(module).splitlines()[exported.lineno - 1 : exported.end_lineno]
    groups: list[tuple[str, list[str]]] = []
    for comment, name in re.findall(r"# (.+)|\"(\w+)\"", "\n".join(lines)):
        if comment or not groups:
            groups.append((comment[:1].upper() + comment[1:], []))
        if name:
            groups[-1][1].append(name)
    return groups


def name_page(module: ModuleType, name: str) -> str:
    """Names the page of a public name. Files whose names differ in case alone would be one.

    >>> name_page(cb, "residual"), name_page(cb, "Residual")
    ('residual', 'Residual-class')
    """
    others = {other.lower() for other in module.__all__ if other != name}
    is_class = inspect.isclass(getattr(module, name))
    return f"{name}-class" if is_class and name.lower() in others else name


def is_alias(value: Any, name: str) -> bool:
    """Tells whether a name stands for a class of another name."""
    return inspect.isclass(value) and value.__name__ != name


def is_lower_word(value: Any, kind: type = cb.Combinator) -> bool:
    """Tells whether a value is a function that builds a combinator, of that kind."""
    if not inspect.isfunction(value):
        return False
    returned = getattr(cb, str(inspect.signature(value).return_annotation), None)
    return inspect.isclass(returned) and issubclass(returned, kind)


def find_word(value: Any) -> Any:
    """Finds the function that builds a combinator: the value itself, or that of its class."""
    if is_lower_word(value):
        return value
    is_kind = inspect.isclass(value) and issubclass(value, cb.Combinator)
    if not is_kind or value is cb.Combinator:
        return None
    words = (getattr(cb, name) for name in cb.__all__)
    return next((word for word in words if is_lower_word(word, value)), None)


def find_source(module: ModuleType, name: str) -> tuple[ModuleType, str]:
    """Finds the module whose source defines a public name, and the name that it has there."""
    value = getattr(module, name)
    if not callable(value) or is_alias(value, name):
        return find_constant(module, name)[0], name
    home = sys.modules[inspect.unwrap(value).__module__]
    if home is module:  # an exception says that it comes from where people find it
        return find_importer(module, name), value.__qualname__
    return home, value.__qualname__


def find_constant(module: ModuleType, name: str) -> tuple[ModuleType, str]:
    """Finds the module that assigns a constant, and what is written of it there.

    Raises:
        LookupError: If there is no such assignment.
    """
    home = find_importer(module, name)
    if home is not module:
        return find_constant(home, name)
    body = parse(module).body
    assignment = find_assignment(body, name)
    if assignment is None:
        raise LookupError(f"{module.__name__} does not assign {name}")
    after = (body[body.index(assignment) + 1 :] or [None])[0]
    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return module, inspect.cleandoc(str(after.value.value)) if is_text else ""


def find_importer(module: ModuleType, name: str) -> ModuleType:
    """Finds the module that a module imports a name from, or returns the module itself."""
    for node in parse(module).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return importlib.import_module(str(node.module))
    return module


def find_assignment(body: list[ast.stmt], name: str) -> Any:
    """Finds the statement that assigns a name, or None."""
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


@functools.cache
def parse(module: ModuleType) -> ast.Module:
    """Parses the source of a module."""
    return ast.parse(inspect.getsource(module))
