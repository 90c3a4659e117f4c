"""The site as ``make docs`` has built it."""

from __future__ import annotations

import html
import re
from functools import cached_property
from pathlib import Path

SITE = Path(__file__).parents[2] / "build" / "docs" / "html"
IS_BUILT = (SITE / "index.html").exists()
NOT_BUILT = "the site is not built: `make docs` builds it"

TAG = re.compile(r"<(/?)([a-zA-Z][\w-]*)((?:[^>\"']|\"[^\"]*\"|'[^']*')*)>")
ATTRIBUTE = re.compile(r"([\w:-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")
INVISIBLE = re.compile(r"<(script|style|head)\b.*?</\1>|<!--.*?-->", re.DOTALL)


class HtmlPage:
    """A page, by its place in the site."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.html = path.read_text()

    @property
    def name(self) -> str:
        return self.path.relative_to(SITE).with_suffix("").as_posix()

    @cached_property
    def tags(self) -> list[tuple[str, dict[str, str]]]:
        """All opening tags, each with its attributes."""
        return [
            (
                tag,
                {
                    key: html.unescape(double or single)
                    for key, double, single in ATTRIBUTE.findall(attributes)
                },
            )
            for closing, tag, attributes in TAG.findall(self.html)
            if not closing
        ]

    @cached_property
    def anchors(self) -> set[str]:
        return {values[key] for _, values in self.tags for key in ("id", "name") if key in values}

    @cached_property
    def text(self) -> str:
        """What a reader reads, on one line."""
        visible = TAG.sub(" ", INVISIBLE.sub(" ", self.html))
        return " ".join(html.unescape(visible).split())


def read_pages() -> dict[str, HtmlPage]:
    """Reads all pages, by their names, such as ``guide/start``."""
    pages = [HtmlPage(path) for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts]
    return {page.name: page for page in pages}


def list_words(text: str) -> list[str]:
    """Lists the words of a text, without roles and other marks of docstrings."""
    return re.findall(r"\w+", re.sub(r":\w+:(?=`)|`~[\w.]*\.(?=\w+`)", "", text))
