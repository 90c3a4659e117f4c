"""The reference: a page for each public name, written from the code when the site is built.

What a package exports in ``__all__``, grouped by the comments there, is the table of contents. A
page has the signature, the docstring, and what the library itself knows of it: the wiring of a
combinator's examples, the shapes and the parameters of a layer. A new public name needs nothing
here.
"""

from __future__ import annotations

import builtins
import inspect
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from pages import find_alias_home, list_used_names, write_index, write_page, write_types
from public import Package, list_packages, name_page


def write_reference(app: Sphinx) -> None:
    """Writes the pages that are not as they should be, and removes those of no name."""
    folder = Path(app.srcdir) / "reference"
    pages: dict[str, str] = {}
    external = {*vars(builtins), "None"}
    for package in list_packages():
        aliases, others = sort_types(package)
        external |= others
        for name in list_names_of_pages(package):
            page = f"{package.folder}/{name_page(package.module, name)}.rst"
            pages[page] = write_page(package, name)
        pages[f"{package.folder}/index.rst"] = write_index(package, bool(aliases))
        if aliases:
            pages[f"{package.folder}/types.rst"] = write_types(package, aliases)
    save_pages(folder, pages)
    # Types of other libraries are in signatures, and have no page here.
    app.config.nitpick_ignore = {
        *app.config.nitpick_ignore,
        *((f"py:{kind}", name) for kind in ("class", "exc", "obj") for name in external),
    }


def list_names_of_pages(package: Package) -> list[str]:
    """Lists the names that have a page. A submodule has one for each of its own names."""
    names = package.module.__all__
    return [name for name in names if not inspect.ismodule(getattr(package.module, name))]


def sort_types(package: Package) -> tuple[dict[str, Any], set[str]]:
    """Sorts the names in signatures: those that we assign, by their home, and those of others."""
    aliases: dict[str, Any] = {}
    others: set[str] = set()
    for name in list_names_of_pages(package):
        value = getattr(package.module, name)
        for used, target in list_used_names(value):
            if used in package.module.__all__:
                continue
            home = find_alias_home(value, used, target)
            if home is None:
                others.add(used)
            else:
                aliases[used] = home
    return aliases, others


def save_pages(folder: Path, pages: dict[str, str]) -> None:
    """Writes pages where they differ, so that Sphinx reads only those anew."""
    for path in folder.rglob("*.rst"):
        if path.relative_to(folder).as_posix() not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write_reference)
    return {"parallel_read_safe": True}
