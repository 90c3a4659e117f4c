"""``wire``: a ``select`` whose items have names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_extra import combinator as cb

NAMES = ["x", "memory", "mask", "key", "größe"]


@given(st.permutations(NAMES), st.integers(0, 5), st.data())
def test_it_is_a_select(names, n_in, data):
    inputs = names[:n_in]
    outputs = data.draw(st.lists(st.sampled_from(inputs), max_size=6)) if inputs else []
    p = cb.wire(f"{' '.join(inputs)} -> {' '.join(outputs)}")
    by_index = cb.select(map(inputs.index, outputs), n_in=n_in)
    assert p.signature == by_index.signature
    assert p.input_names == tuple(inputs)
    stack = [f"<{name}>" for name in inputs] + ["beneath", "deeper"]
    assert p(*stack) == by_index(*stack)


@pytest.mark.parametrize("names", ["a b->b a", "  a   b ->b  a ", "a\tb\n->\nb a", "a b  ->  b a"])
def test_spaces_do_not_matter(names):
    p = cb.wire(names)
    assert p == cb.wire("a b -> b a")
    assert str(p) == "wire('a b -> b a')"


def test_errors_name_the_wires():
    with pytest.raises(cb.SignatureError, match=r"^wire\('x mask -> x'\) takes 2 items off"):
        cb.wire("x mask -> x")(1)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            ["x"],
            TypeError,
            "wire takes names as one text, such as 'x memory mask -> memory x mask'; got ['x'].",
        ),
        (
            "x mask",
            ValueError,
            (
                "wire takes the names of items before and after one arrow, such as 'x memory mask "
                "-> memory x mask'; got 'x mask'."
            ),
        ),
        (
            "x -> y -> x",
            ValueError,
            (
                "wire takes the names of items before and after one arrow, such as 'x memory mask "
                "-> memory x mask'; got 'x -> y -> x'."
            ),
        ),
        (
            "x, mask -> x",
            ValueError,
            (
                "wire('x, mask -> x') names an item 'x,'. A name is one word, and names have "
                "spaces between them, as in 'x memory mask -> memory x mask'."
            ),
        ),
        (
            "x x -> x",
            ValueError,
            (
                "wire('x x -> x') takes two items called 'x'. Give each item before the arrow a "
                "name of its own; to copy an item, repeat its name after the arrow."
            ),
        ),
        (
            "x mask -> msak",
            ValueError,
            (
                "wire('x mask -> msak') gives 'msak', and takes no item of that name. It takes: "
                "'mask', 'x'."
            ),
        ),
    ],
)
def test_names_that_are_refused(names, error, message):
    with pytest.raises(error) as caught:
        cb.wire(names)
    assert str(caught.value) == message
