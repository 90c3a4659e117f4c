"""Examples as cells: they run when the site is built, and what they show is on the page.

The guides are Markdown with doctests, which pytest runs, too. Here each page runs as a notebook
does, in one namespace. An example becomes a cell of code, with its output beneath. A value that
displays itself in a notebook, such as a diagram or a summary, does so on the page. An output other
than the one that is written is an error.
"""

from __future__ import annotations

import doctest
import io
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
from docutils import nodes
from hypothesis import settings
from sphinx.application import Sphinx
from sphinx.util import logging

from sources import ROOT

LOGGER = logging.getLogger(__name__)
FLAGS = doctest.NORMALIZE_WHITESPACE
ERROR = re.compile(r"Traceback \(most recent call last\):\n(?:[ ].*\n)*(?P<text>\S.*)\Z", re.DOTALL)
"""An error as Python prints it: frames are indented, the message is not."""

DIRECTIVE = re.compile(r"[ ]*# doctest:.*")


class Notebook(doctest.DocTestRunner):
    """Runs the examples of a page, and keeps what displays itself."""

    def __init__(self) -> None:
        super().__init__(verbose=False, optionflags=FLAGS)
        self.displays: dict[int, str] = {}
        self.errors: dict[int, str] = {}
        self.failures_found: list[tuple[int, str]] = []
        self._index = -1

    def report_start(self, out: Any, test: doctest.DocTest, example: doctest.Example) -> None:
        self._index += 1
        sys.displayhook = self._display

    def _display(self, value: Any) -> None:
        sys.__displayhook__(value)
        for method in ("_repr_svg_", "_repr_html_"):
            if hasattr(value, method):
                self.displays[self._index] = getattr(value, method)()
                return

    def report_success(
        self, out: Any, test: doctest.DocTest, example: doctest.Example, got: str
    ) -> None:
        error = ERROR.search(got)
        if example.exc_msg and error:
            self.errors[self._index] = error["text"]

    def report_failure(
        self, out: Any, test: doctest.DocTest, example: doctest.Example, got: str
    ) -> None:
        found = self._checker.output_difference(example, got, self.optionflags)
        self.failures_found.append((example.lineno + 1, f"{example.source}{found}"))

    def report_unexpected_exception(
        self, out: Any, test: doctest.DocTest, example: doctest.Example, exc_info: Any
    ) -> None:
        self.failures_found.append((example.lineno + 1, f"{example.source}{exc_info[1]!r}"))


def run_page(path: Path) -> Notebook:
    """Runs the examples of a page."""
    test = doctest.DocTestParser().get_doctest(path.read_text(), {}, path.name, str(path), 0)
    notebook = Notebook()
    with redirect_stdout(io.StringIO()):
        notebook.run(test, clear_globs=True)
    return notebook


def make_cells(app: Sphinx, document: nodes.document) -> None:
    """Replaces the examples of a page by cells."""
    path = Path(app.env.doc2path(app.env.docname))
    notebook = Notebook()
    if path.suffix == ".md":
        notebook = run_page(path)
        for line, text in notebook.failures_found:
            LOGGER.warning("%s", text, location=(app.env.docname, line), type="cells")
    index = 0
    for block in list(document.findall(nodes.Element)):
        is_code = isinstance(block, nodes.literal_block | nodes.doctest_block)
        if is_code and block.astext().lstrip().startswith(">>>"):
            examples = doctest.DocTestParser().get_examples(block.astext())
            cells = list(_make_cells(examples, index, notebook))
            index += len(examples)
            block.parent.replace(block, cells)


def _make_cells(
    examples: list[doctest.Example], index: int, notebook: Notebook
) -> Iterator[nodes.Node]:
    """Makes cells of the examples in a block. Those without an output share one."""
    code, end = "", 0
    for place, example in enumerate(examples, index):
        if code and example.lineno > end:
            code += "\n"
        code += DIRECTIVE.sub("", example.source)
        end = example.lineno + len(example.source.splitlines())
        is_last = place == index + len(examples) - 1
        if not (example.want or is_last or place in notebook.displays):
            continue
        cell = nodes.container(classes=["cell"])
        cell += _make_block(code, "python", "cell-code")
        code = ""
        if place in notebook.displays:
            cell += nodes.raw("", _wrap(notebook.displays[place]), format="html")
        elif example.want:
            language = "pytb" if example.exc_msg else "text"
            output = notebook.errors.get(place) or _format_output(example.want)
            cell += _make_block(output, language, "cell-output")
        yield cell


def _make_block(text: str, language: str, kind: str) -> nodes.literal_block:
    text = text.rstrip("\n")
    return nodes.literal_block(text, text, language=language, classes=[kind])


def _format_output(want: str) -> str:
    text = want.replace("<BLANKLINE>", "")
    # What a traceback leaves out is no news.
    return text.replace("Traceback (most recent call last):\n    ...\n", "")


def _wrap(display: str) -> str:
    return f'<div class="cell-display">{display}</div>'


def use_settings_of_tests(app: Sphinx) -> None:
    """Runs pages with the settings of the tests, and with the programs that they compiled."""
    settings.register_profile("site", derandomize=True, deadline=None)
    settings.load_profile("site")
    cache = ROOT / ".pytest_cache" / "d" / f"jax-{platform.node()}"  # as conftest.py names it
    cache.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_traceback_filtering", "off")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", use_settings_of_tests)
    app.connect("doctree-read", make_cells)
    return {"parallel_read_safe": True}
