"""The guide's page of common mistakes: each is made here, and says what the page says.

After a change of wording, ``python tests/test_mistakes.py`` writes what is said into the page.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "mistakes.md"
PREAMBLE = re.compile(r"```python\n(?P<code>.*?)```", re.DOTALL)
MISTAKE = re.compile(
    r"## (?P<title>[^\n]+)\n(?P<prose>.*?)```python\n(?P<code>.*?)```\n\n```text\n(?P<said>.*?)```",
    re.DOTALL,
)


def mistakes() -> list[re.Match[str]]:
    return list(MISTAKE.finditer(PAGE.read_text()))


def said_by(code: str) -> str:
    """What the first screen of the traceback says: the exception, and its notes of ours."""
    namespace: dict[str, Any] = {}
    preamble = PREAMBLE.search(PAGE.read_text())
    assert preamble is not None
    exec(preamble["code"], namespace)
    try:
        exec(code, namespace)
    except Exception as error:
        text = "".join(traceback.format_exception_only(error))
        text = re.sub(r" \(https://flax[^)]*\)", "", text)  # flax's links, which carry its version
        return text.partition("-----")[0].rstrip() + "\n"
    return "no error\n"


@pytest.mark.parametrize("mistake", mistakes(), ids=lambda mistake: mistake["title"])
def test_a_mistake_says_what_the_page_says(mistake: re.Match[str]) -> None:
    assert said_by(mistake["code"]) == mistake["said"]


def test_there_are_a_dozen_of_them() -> None:
    assert len(mistakes()) >= 12


def write() -> None:
    def rewritten(mistake: re.Match[str]) -> str:
        before = mistake[0][: mistake.start("said") - mistake.start()]
        return f"{before}{said_by(mistake['code'])}```"

    PAGE.write_text(MISTAKE.sub(rewritten, PAGE.read_text()))


if __name__ == "__main__":
    write()
