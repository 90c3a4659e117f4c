"""The documentation site: ``make docs`` builds it in build/docs/html.

Nothing on a page comes from elsewhere: fonts are the reader's, scripts and MathJax are shipped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from flax_extra.combinator._diagram.svg import CLASS, COLOURS

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS / "examples")]

project = "flax_extra"
author = "the authors of flax_extra"
project_copyright = author
release = importlib.metadata.version("flax_extra")

extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx_copybutton"]
extensions += ["sources", "cells", "reference"]  # in _ext
exclude_patterns = ["_ext", "examples"]

nitpicky = True
nitpick_ignore = [("py:exc", "InvalidArgument")]  # hypothesis raises it; reference.py adds more

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
add_module_names = False
python_maximum_signature_line_length = 72
pygments_style = "friendly"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = "flax_extra"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["diagrams.css", "site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {
    "light_css_variables": {"color-brand-primary": "#2b5db0", "color-brand-content": "#2b5db0"},
    "dark_css_variables": {"color-brand-primary": "#7fb0ff", "color-brand-content": "#7fb0ff"},
}
copybutton_selector = ".cell-code pre, .highlight-python pre, .highlight-shell pre"

mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}
MATHJAX_SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
"""Of tex-svg.js in the release 3.2.2 of MathJax. It has all that it needs in one file."""


def write_colours_of_diagrams(app: Any) -> None:
    """Lets diagrams follow the switch of the theme, not only the system's setting."""
    rules = [
        f'body[data-theme="{theme}"] .{CLASS} .{kind}{{fill:{fill};stroke:{stroke}}}\n'
        for kind, themes in COLOURS.items()
        if kind != "canvas"  # a picture stands on the page
        for theme, (fill, stroke) in zip(("light", "dark"), themes, strict=True)
    ]
    target = Path(app.outdir) / "_static" / "diagrams.css"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(rules))


def ship_mathjax(app: Any, error: Exception | None) -> None:
    """Copies MathJax from the package that carries it into the site."""
    files = importlib.metadata.files("sphinx-mathjax-offline") or []
    (script,) = (file.locate() for file in files if file.name == "tex-svg.js")
    if hashlib.sha256(Path(script).read_bytes()).hexdigest() != MATHJAX_SHA256:
        raise ValueError(f"{script} is not that of MathJax 3.2.2.")
    target = Path(app.outdir) / "_static" / mathjax_path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(script, target)


def list_pages_that_exist(app: Any, docname: str, source: list[str]) -> None:
    """Drops entries such as ``guide/surgery?`` from tables of contents until there is a page."""

    def resolve(entry: re.Match[str]) -> str:
        return f"{entry[1]}\n" if (DOCS / f"{entry[1]}.md").exists() else ""

    source[0] = re.sub(r"^([\w/]+)\?\n", resolve, source[0], flags=re.MULTILINE)


def digest_code() -> str:
    """Changes with all code that pages run or show, so that they are built anew."""
    files = [
        path
        for folder in ("_ext", "examples", "../flax_extra")
        for path in DOCS.joinpath(folder).rglob("*.py")
    ]
    pages = sorted(path.name for path in DOCS.rglob("*.md"))
    texts = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(texts + repr(pages).encode()).hexdigest()


def setup(app: Any) -> None:
    app.add_config_value("code_digest", digest_code(), "env", str)
    app.connect("source-read", list_pages_that_exist)
    app.connect("builder-inited", write_colours_of_diagrams)
    app.connect("build-finished", ship_mathjax)
