"""README.md: its picture is what its code draws, its commands exist, its figures are measured ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)]*)\)|src=\"([^\"]*)\"", README)
PICTURE = PROJECT / "docs" / "encoder.svg"


def draw_encoder() -> cb.Diagram:
    attention = cb.residual(nn.LayerNorm(), xn.SelfAttention(n_heads=4))
    block = attention >> cb.residual(nn.LayerNorm(), xn.FeedForward(4))
    encoder = nn.Embed(256, 64) >> cb.repeat(block, 6) >> nn.LayerNorm()
    return cb.diagram(encoder, "i32[b, t]", "bool[b, 1, t]")


def test_the_picture_is_what_the_code_draws():
    """After a change of diagrams, ``python tests/test_readme.py`` draws it anew."""
    assert PICTURE.read_text().strip() == draw_encoder().svg.strip()


@pytest.mark.parametrize("link", sorted({"".join(pair) for pair in LINKS}))
def test_links_into_the_project_are_alive(link):
    path, _, anchor = link.partition("#")
    if link.startswith("https://"):
        return
    text = (PROJECT / path).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert not anchor or anchor in anchors


def test_every_cell_of_the_comparison_has_a_link():
    table = re.search(r"## Why\n\n(.*?)\n\n", README, re.DOTALL)[1].splitlines()
    rows = [line.strip("|").split("|")[1:] for line in table[2:]]
    assert len(rows) >= 5
    assert all("](" in cell for row in rows for cell in row)


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE)))
)
def test_targets_exist(target):
    assert re.search(rf"^{target}:.*## ", (PROJECT / "Makefile").read_text(), re.MULTILINE)


def test_the_figures_of_attention_are_those_of_the_benchmarks():
    page = (PROJECT / "docs" / "benchmarks.md").read_text()
    row = re.search(r"\| attention-16384-forward \| jax.nn \|.*", page)[0]
    ratio = float(re.search(r"\| (\d+\.\d+) \(", row)[1])
    ours, theirs = map(float, re.findall(r"(\d+\.\d) MB", row))
    assert "16,384 keys takes a third of the time" in README
    assert ratio > 3
    assert "a fiftieth of its temporary memory" in README
    assert theirs / ours > 50


def test_the_number_of_mistakes_is_right():
    mistakes = (PROJECT / "docs" / "guide" / "mistakes.md").read_text().count("\n## ")
    assert f"{mistakes} common mistakes" in README


if __name__ == "__main__":
    draw_encoder().save(PICTURE)
