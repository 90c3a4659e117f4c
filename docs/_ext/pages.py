"""The text of the pages of the reference, as reStructuredText."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

from computed import cut_shapes, draw_examples, list_parameters
from flax_extra import combinator as cb
from public import (
    Package,
    find_assignment,
    find_constant,
    find_source,
    find_word,
    is_alias,
    list_groups,
    list_packages,
    name_page,
    parse,
)
from signatures import format_signature, list_names
from sources import ROOT

OPERATORS = ("__call__", "__getitem__", "__rshift__", "__matmul__", "__and__")
"""Special methods that users meet."""

NAPOLEON = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)


class Docstring(GoogleDocstring):
    """A docstring whose ``Returns:`` is text: the signature has the type."""

    def _consume_returns_section(
        self, preprocess_types: bool = False
    ) -> list[tuple[str, str, list[str]]]:
        return [("", "", self._dedent(self._consume_to_next_section()))]


def write_page(package: Package, name: str) -> str:
    """Writes the page of a public name."""
    value = getattr(package.module, name)
    parts = [_write_title(name, "="), _write_module(package), _write_origin(package, name)]
    if is_alias(value, name):
        parts += [f"Another name of :class:`{value.__name__}`.", f".. py:data:: {name}"]
    elif inspect.isclass(value):
        parts += _write_class(name, value)
    elif callable(value):
        text, stated = cut_shapes(inspect.getdoc(value) or "")
        parts.append(_write_object("function", f"{name}{format_signature(value)}", text))
        parts += _write_shapes(stated)
    else:
        parts.append(_write_constant(name, value, find_constant(package.module, name)[1]))
    word = find_word(value)
    if word is not None:
        parts += _write_wiring(word)
    return _join(parts)


def write_index(package: Package, has_types: bool) -> str:
    """Writes the table of contents of a package."""
    parts = [
        _write_title(package.title, "="),
        f".. py:module:: {package.name}",
        f".. rst-class:: origin\n\n``{package.import_line}``",
        inspect.getdoc(package.module) or "",
    ]
    for comment, names in list_groups(package.module):
        if comment:
            parts.append(_write_title(comment, "-"))
        pages = {name: _find_document(package, name) for name in names}
        rows = [
            f"   * - :doc:`{name} <{page}>`\n     - {_summarize(package, name)}"
            for name, page in pages.items()
        ]
        parts.append(".. list-table::\n   :widths: 25 75\n   :class: names\n\n" + "\n".join(rows))
        parts.append(_write_toctree(f"{name} <{page}>" for name, page in pages.items()))
    if has_types:
        parts.append(_write_toctree(["types"]))
    return _join(parts)


def write_types(package: Package, aliases: Mapping[str, Any]) -> str:
    """Writes the page of the names for types that signatures use."""
    parts = [
        _write_title("Types in signatures", "="),
        _write_module(package),
        "Names for types that signatures use. They are no part of the API.",
    ]
    for name, home in sorted(aliases.items()):
        module, text = find_constant(home, name)
        value = getattr(find_assignment(parse(module).body, name), "value", None)
        code = f".. code-block:: python\n\n   {ast.unparse(value)}" if value else ""
        parts.append(_write_object("data", name, f"{text}\n\n{code}"))
    return _join(parts)


def list_used_names(value: Any) -> Iterator[tuple[str, Any]]:
    """Lists the names in all signatures on the page of a value, with what each stands for."""
    if not inspect.isclass(value):
        yield from list_names(value) if callable(value) else ()
        return
    if not issubclass(value, cb.Combinator | Exception):
        yield from list_names(value)
    for name, owner in list_members(value):
        member = _get_member(owner, name)
        if isinstance(member, classmethod):
            yield from list_names(getattr(owner, name))
        elif inspect.isfunction(member):
            yield from list_names(member)


def list_members(value: type) -> Iterator[tuple[str, type]]:
    """Lists the documented members of a class, and the class that defines each."""
    fields = getattr(value, "__dataclass_fields__", {})
    seen = set()
    for owner in value.__mro__:
        is_ours = owner.__module__.startswith("flax_extra")
        if not is_ours or (owner is cb.Combinator and value is not owner):
            continue
        for name in vars(owner):
            is_shown = name in OPERATORS or not name.startswith("_")
            if is_shown and name not in {*fields, *seen} and _get_doc(owner, name):
                seen.add(name)
                yield name, owner


# The parts of a page


def _join(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _write_title(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}"


def _write_module(package: Package) -> str:
    return f".. py:currentmodule:: {package.name}"


def _write_toctree(pages: Any) -> str:
    return ".. toctree::\n   :hidden:\n\n" + "\n".join(f"   {page}" for page in pages)


def _write_origin(package: Package, name: str) -> str:
    home, qualified = find_source(package.module, name)
    path = Path(inspect.getsourcefile(home) or "").relative_to(ROOT / "flax_extra")
    source = f":source:`source <{path.as_posix()}#{qualified}>`"
    return f".. rst-class:: origin\n\n``{package.import_line}`` · {source}"


def _write_object(kind: str, signature: str, text: str) -> str:
    docstring = str(Docstring(text, NAPOLEON, what=kind))
    return f".. py:{kind}:: {signature}\n\n{textwrap.indent(docstring, '   ')}"


def _write_constant(name: str, value: Any, text: str) -> str:
    items = sorted(value) if isinstance(value, frozenset) else list(value)
    listed = "\n".join(f"- {getattr(item, 'name', f'``{item}``')}" for item in items)
    return _write_object("data", name, f"{text}\n\n{listed}")


def _write_class(name: str, value: type) -> list[str]:
    text, stated = cut_shapes(inspect.getdoc(value) or "")
    is_built = issubclass(value, cb.Combinator | Exception)  # nobody calls the class by hand
    kind = "exception" if issubclass(value, Exception) else "class"
    base = value.__bases__[0]
    package = next((p for p in list_packages() if base.__name__ in p.module.__all__), None)
    if package is not None:
        text += f"\n\nA subclass of :class:`~{package.name}.{base.__name__}`."
    members = [textwrap.indent(_write_member(*member), "   ") for member in list_members(value)]
    head = _write_object(kind, f"{name}{'' if is_built else format_signature(value)}", text)
    return [head, *members, *_write_shapes(stated)]


def _write_member(name: str, owner: type) -> str:
    member, text = _get_member(owner, name), _get_doc(owner, name)
    if isinstance(member, classmethod):
        signature = format_signature(getattr(owner, name))
        return _write_object("classmethod", f"{name}{signature}", text)
    if inspect.isfunction(member):
        return _write_object("method", f"{name}{format_signature(member)}", text)
    return _write_object("property", name, text)


def _get_member(owner: type, name: str) -> Any:
    member = vars(owner)[name]
    return getattr(member, "wrapped", member)  # linen wraps descriptors


def _get_doc(owner: type, name: str) -> str:
    """Returns what is written of a method or a property, and nothing for other members."""
    member = _get_member(owner, name)
    is_method = inspect.isfunction(member) or isinstance(member, classmethod)
    of_property = getattr(member, "fget", None) or getattr(member, "func", None)
    function = member if is_method else of_property
    return inspect.cleandoc(getattr(function, "__doc__", None) or "")


def _write_shapes(stated: tuple[str, str] | None) -> list[str]:
    """Writes the shapes of a layer, and its parameters: a cell as in the guides."""
    if stated is None:
        return []
    layer, shapes = stated
    tree = list_parameters(layer, shapes)
    parts = [
        _write_title("Shapes and parameters" if tree else "Shapes", "-"),
        _write_code("python", "cell-code", layer),
        _write_code("text", "cell-output", shapes),
    ]
    if tree:
        width = max(len(path) for path, _ in tree)
        lines = "\n".join(f"{path.ljust(width)}   {shape}" for path, shape in tree)
        parts.append(_write_code("text", "cell-output", lines))
    return parts


def _write_wiring(word: Any) -> list[str]:
    parts = [_write_title("Wiring", "-")]
    for expression, diagram in draw_examples(word):
        parts.append(_write_code("python", "cell-code", expression))
        svg = textwrap.indent(f'<div class="cell-display">{diagram.svg}</div>', "   ")
        parts.append(f".. raw:: html\n\n{svg}")
    return parts


def _write_code(language: str, kind: str, code: str) -> str:
    return f".. code-block:: {language}\n   :class: {kind}\n\n{textwrap.indent(code, '   ')}"


def _find_document(package: Package, name: str) -> str:
    if inspect.ismodule(getattr(package.module, name)):
        return f"{name}/index"
    return name_page(package.module, name)


def _summarize(package: Package, name: str) -> str:
    """Returns the first sentence that is written of a name."""
    value = getattr(package.module, name)
    if is_alias(value, name):
        return f"Another name of :class:`{value.__name__}`."
    if callable(value) or inspect.ismodule(value):
        text = inspect.getdoc(value) or ""
    else:
        text = find_constant(package.module, name)[1]
    return " ".join(text.partition("\n\n")[0].split())


def find_alias_home(value: Any, name: str, target: Any) -> Any:
    """Finds the module of ours that assigns a name for a type, or None if there is none."""
    if inspect.isclass(target) or target is None:
        return None
    for owner in inspect.getmro(value) if inspect.isclass(value) else [inspect.unwrap(value)]:
        home = sys.modules[owner.__module__]
        if home.__name__.startswith("flax_extra") and hasattr(home, name):
            try:
                module, _ = find_constant(home, name)
            except (LookupError, OSError, TypeError):  # it comes from another library
                continue
            if module.__name__.startswith("flax_extra"):
                return module
    return None
