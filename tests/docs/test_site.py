"""Nothing is missing in the site, no link in it is dead, and nothing comes from elsewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import zlib
from functools import cache
from os.path import normpath
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from flax import linen as nn

import flax_extra
from flax_extra import combinator as cb
from tests.docs.site import IS_BUILT, NOT_BUILT, SITE, HtmlPage, list_words, read_pages

pytestmark = pytest.mark.skipif(not IS_BUILT, reason=NOT_BUILT)

ERRORS = sorted(
    name
    for name, value in vars(cb).items()
    if inspect.isclass(value) and issubclass(value, Exception)
)


def list_public(module: ModuleType) -> list[tuple[str, Any]]:
    """Lists the names that a module exports, and those of modules that it exports."""
    found: list[tuple[str, Any]] = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            found += list_public(value)
        else:
            found.append((f"{module.__name__}.{name}", value))
    return found


PUBLIC = {
    name: value
    for package in flax_extra.__all__
    for name, value in list_public(importlib.import_module(f"flax_extra.{package}"))
}


def is_combinator(value: Any) -> bool:
    """Tells whether a public value is a combinator's class, or a function that builds one."""
    if inspect.isfunction(value):
        value = getattr(cb, str(inspect.signature(value).return_annotation), None)
    is_kind = inspect.isclass(value) and issubclass(value, cb.Combinator)
    return is_kind and value is not cb.Combinator


def is_layer(value: Any) -> bool:
    is_module = inspect.isclass(value) and issubclass(value, nn.Module)
    return is_module and not issubclass(value, cb.Combinator)


def is_alias(name: str) -> bool:
    """Tells whether a name stands for a class of another name."""
    return inspect.isclass(PUBLIC[name]) and PUBLIC[name].__name__ != name.rpartition(".")[2]


COMBINATORS = [name for name, value in PUBLIC.items() if is_combinator(value)]
LAYERS = [
    name
    for name, value in PUBLIC.items()
    if is_layer(value) and not is_alias(name) and "Shapes:" in value.__doc__
]


@pytest.fixture(scope="module")
def pages() -> dict[str, HtmlPage]:
    return read_pages()


@cache
def read_inventory() -> dict[str, str]:
    """Reads which page documents each name: what other sites would link to."""
    raw = (SITE / "objects.inv").read_bytes()
    lines = zlib.decompress(raw.split(b"\n", 4)[4]).decode().splitlines()
    entries = [line.split() for line in lines]
    return {
        name: place.replace("$", name)
        for name, domain, _, place, *_ in entries
        if domain.startswith("py:")
    }


def find_page(pages: dict[str, HtmlPage], name: str) -> HtmlPage:
    place = read_inventory()[name]
    return pages[place.partition("#")[0].removesuffix(".html")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_page_of_its_own(pages, name):
    page = find_page(pages, name)
    others = [other for other in PUBLIC if find_page(pages, other) is page]
    assert others == [name]
    assert f"reference/{'/'.join(name.split('.')[1:-1])}/" in f"{page.name}/"


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if callable(value)])
def test_a_page_says_what_its_name_does_and_links_to_the_source(pages, name):
    page = find_page(pages, name)
    sentence = (inspect.getdoc(PUBLIC[name]) or "").partition("\n\n")[0]
    assert is_alias(name) or " ".join(list_words(sentence)) in " ".join(list_words(page.text))
    links = [values.get("href", "") for tag, values in page.tags if tag == "a"]
    assert any(re.search(r"/source/flax_extra/.*#L-\d+$", link) for link in links)


@pytest.mark.parametrize("name", COMBINATORS)
def test_the_page_of_a_combinator_has_its_wiring(pages, name):
    drawings = re.findall(r"<svg.*?</svg>", find_page(pages, name).html, re.DOTALL)
    drawings = [svg for svg in drawings if "flax-extra-diagram" in svg]
    assert drawings
    assert all("<path" in svg or "<line" in svg for svg in drawings)


@pytest.mark.parametrize("name", LAYERS)
def test_the_page_of_a_layer_has_its_shapes_and_parameters(pages, name):
    page = find_page(pages, name)
    variables = PUBLIC[name].__doc__.partition("Shapes:")[2]
    assert "shapes-and-parameters" in page.anchors or "shapes" in page.anchors
    shapes = re.findall(r"``([^`]*->[^`]*)``", variables)
    assert " ".join(shapes[0].split()) in page.text


def test_some_layers_show_parameters(pages):
    with_tree = [
        name for name in LAYERS if "shapes-and-parameters" in find_page(pages, name).anchors
    ]
    assert len(with_tree) > len(LAYERS) / 2


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_on_the_page_about_errors(pages, name):
    assert re.search(rf"flax_extra\.combinator\.{name}: \w", pages["guide/mistakes"].text)


def test_no_signature_shows_what_no_reader_can_write(pages):
    for name in PUBLIC:
        signature = " ".join(re.findall(r'<dt class="sig .*?</dt>', find_page(pages, name).html))
        assert not re.search(r"functools\.partial\(|object at 0x|&lt;function|&lt;class", signature)


def test_every_page_is_in_the_contents(pages):
    links = {
        values["href"].removesuffix(".html")
        for tag, values in pages["index"].tags
        if tag == "a" and "toc" not in values.get("class", "") and "href" in values
    }
    learn = {name for name in pages if name.startswith(("guide/", "gallery/"))}
    assert learn
    assert learn <= links


def test_no_link_within_the_site_is_dead(pages):
    by_path = {str(page.path): page for page in pages.values()}
    dead = []
    for page in pages.values():
        for tag, values in page.tags:
            link = values.get("href" if tag in ("a", "link") else "src")
            if not link or urlsplit(link).scheme:
                continue
            parts = urlsplit(link)
            target = normpath(page.path.parent / unquote(parts.path)) if parts.path else page.path
            other = by_path.get(str(target))
            is_there = other is not None or Path(target).exists()
            if other is not None and parts.fragment:
                is_there = unquote(parts.fragment) in other.anchors
            if not is_there:
                dead.append(f"{page.name}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(pages):
    loads = [
        f"{page.name}: {link}"
        for page in pages.values()
        for tag, values in page.tags
        if tag != "a"
        for key in ("src", "href", "xlink:href", "data")
        if (link := values.get(key, "")).startswith(("http:", "https:", "//"))
    ]
    assert loads == []
    for path in SITE.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text()), path


def test_mathjax_is_part_of_the_site(pages):
    scripts = [values.get("src", "") for tag, values in pages["reference/layer/Attention"].tags]
    assert any("mathjax/tex-svg.js" in script for script in scripts)
    assert (SITE / "_static" / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000
