"""The sources as pages of the site, and links to their lines.

``{source}`layer/_lstm.py#LSTM` `` in a page, or ``:source:`` in a docstring, links to the line
where that class or function begins. Without ``#`` it links to the top of the file. Paths start at
the library, or at ``docs/examples``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "flax_extra", ROOT / "docs" / "examples")
LOGGER = logging.getLogger(__name__)


def list_sources() -> list[Path]:
    """Lists the files that have a page."""
    return sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))


def locate(path: Path, qualified_name: str) -> str:
    """Returns where a class or function begins, from the root of the site.

    Raises:
        LookupError: If the file has none of that name.
    """
    page = f"source/{path.relative_to(ROOT).with_suffix('.html').as_posix()}"
    if not qualified_name:
        return page
    body: Any = ast.parse(path.read_text())
    for name in qualified_name.split("."):
        body = next((node for node in body.body if name in _list_defined(node)), None)
        if body is None:
            raise LookupError(f"{path.relative_to(ROOT)} has no {qualified_name}")
    return f"{page}#L-{body.lineno}"


def _list_defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    return [getattr(node, "name", "")]


def link_source(
    role: str, raw: str, text: str, line: int, inliner: Inliner, *_: Any
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """The role ``source``."""
    title, _, target = text.rpartition("<")
    file, _, name = (target.rstrip(">") if title else text).partition("#")
    path = next((f / file for f in FOLDERS if (f / file).exists()), None)
    try:
        if path is None:
            raise LookupError(f"there is no source {file}")
        place = locate(path, name)
    except LookupError as error:
        return [], [inliner.reporter.error(str(error), line=line)]
    docname = inliner.document.settings.env.docname
    node = nodes.reference(raw, "", refuri="../" * docname.count("/") + place, internal=True)
    node += nodes.literal("", title.strip() or name or file)
    return [node], []


def make_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Makes the pages of all sources. Each line has an anchor: ``#L-12``."""
    formatter = HtmlFormatter(
        linenos="inline", lineanchors="L", anchorlinenos=True, cssclass="highlight source"
    )
    for path in list_sources():
        name = path.relative_to(ROOT)
        code = highlight(path.read_text(), PythonLexer(), formatter)
        context = {
            "title": str(name),
            "body": f"<h1>{name}</h1>\n<div class='highlight-python'>{code}</div>",
        }
        yield f"source/{name.with_suffix('').as_posix()}", context, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_role("source", link_source)
    app.connect("html-collect-pages", make_pages)
    return {"parallel_read_safe": True}
