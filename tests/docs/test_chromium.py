"""A browser opens the site from the disk: nothing fails, nothing is asked for from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.docs.chromium import NAMES, Chromium, Page, find_chromium
from tests.docs.site import IS_BUILT, NOT_BUILT, SITE, read_pages

pytestmark = [
    pytest.mark.skipif(not IS_BUILT, reason=NOT_BUILT),
    pytest.mark.skipif(
        find_chromium() is None,
        reason=f"none of {', '.join(NAMES)} is installed; Debian's package is `chromium`",
    ),
]

IS_IN_VIEW = """
[...document.querySelectorAll("{selector}")].map(element => element.getBoundingClientRect())
    .some(box => box.width > 50 && box.top >= 0 && box.bottom <= window.innerHeight)
"""


IS_TYPESET = """
[...document.querySelectorAll(".math")].every(formula => formula.querySelector("svg"))
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


def open_page(chromium: Chromium, name: str, **options) -> Page:
    return chromium.open((SITE / f"{name}.html").as_uri(), **options)


def list_elsewhere(page: Page) -> list[str]:
    """Lists what the page asked for that is no part of the site."""
    return [url for url in page.requests if not re.match(r"file:|data:|blob:", url)]


def check_quiet(page: Page) -> None:
    """The page said nothing on its console, and asked for nothing from elsewhere."""
    assert page.console == []
    assert list_elsewhere(page) == []
    assert page.requests, "the browser told nothing"


def test_the_front_page_shows_the_code_and_its_picture_at_once(chromium):
    page = open_page(chromium, "index", width=1280, height=900)
    assert page.evaluate("document.title") == "flax_extra"
    assert page.evaluate(IS_IN_VIEW.format(selector=".hero .cell-code pre"))
    assert page.evaluate(IS_IN_VIEW.format(selector=".hero svg.flax-extra-diagram"))
    code = page.evaluate("document.querySelector('.hero .cell-code pre').innerText")
    assert len(code.strip().splitlines()) == 6
    check_quiet(page)
    page.close()


def test_search_finds_residual(chromium):
    page = open_page(chromium, "index")
    page.evaluate("document.querySelector('.sidebar-search').value = 'residual'")
    page.follow("document.querySelector('.sidebar-search-container').submit()")
    links = "[...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    for found in ("reference/combinator/residual.html", "guide/stack.html"):
        page.wait_for(f"{links}.some(link => link.includes('{found}'))")
    check_quiet(page)
    page.close()


def test_the_page_of_attention_shows_its_formula(chromium):
    page = open_page(chromium, "reference/layer/Attention")
    page.wait_for("document.querySelectorAll('mjx-container svg').length >= 4")
    assert "attend" in page.evaluate("document.querySelector('mjx-assistive-mml').textContent")
    assert r"\[" not in page.evaluate("document.querySelector('article').innerText")
    check_quiet(page)
    page.close()


def test_a_picture_follows_the_switch_of_the_theme(chromium):
    page = open_page(chromium, "index", is_dark=False)
    fill = "getComputedStyle(document.querySelector('.flax-extra-diagram .layer')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(fill), page.evaluate(ground)
    page.evaluate("document.body.dataset.theme = 'dark'")
    dark = page.evaluate(fill), page.evaluate(ground)
    assert len({*light, *dark}) == 4
    page.close()


def list_pages() -> list[str]:
    return [name for name in read_pages() if not name.startswith("source/")] if IS_BUILT else []


def test_every_page_opens_on_a_telephone_without_an_error(chromium):
    """No console error, no request to elsewhere, all formulas set, nothing wider than the screen."""
    faults = {}
    page = open_page(chromium, "index", width=390, height=844, is_dark=True)
    for name in list_pages():
        page.go_to((SITE / f"{name}.html").as_uri())
        page.wait_for(IS_TYPESET)
        found = [*page.console, *list_elsewhere(page)]
        found += page.evaluate("[...document.querySelectorAll('mjx-merror')].map(e => e.title)")
        width = page.evaluate("document.documentElement.scrollWidth")
        found += [f"{width} pixels wide"] if width > 390 else []
        if found:
            faults[name] = found
    assert faults == {}
