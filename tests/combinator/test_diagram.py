"""A picture tells the truth about the wiring, and can be read."""

import re
from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra.combinator._diagram import COLOURS
from flax_extra.combinator._diagram import draw as drawn_with
from tests.combinator import free
from tests.combinator.drawn import Drawn
from tests.combinator.pictures import FOLDER, PICTURES, draw

# What the picture says is what the expression means.


class Everywhere(dict):
    """What is on the stack at every step, made up."""

    def __init__(self, inputs):
        super().__init__({(): (inputs, ["out"] * 9)})

    def __contains__(self, position):
        return True

    def __missing__(self, position):
        text = "".join(map(str, position))
        return ["f32[b, t, 64]"] * 9, [f"f32[{text}, {i}]" for i in range(9)]


def call(box, items, n_out):
    """What a box gives, in the terms of the free algebra."""
    name = box.words[0].text
    if name == "fold":
        (f,) = (words.text for words in box.words[1:])
        folded = items[0]
        for item in items[1:]:
            folded = free.call(f, (folded, item), 1)
        return (folded,)
    term = free.call("layer " if name in ("Layer", "Other") else name, items, n_out)
    return term if isinstance(term, tuple) else (term,)


def calls_counted(f):
    """What ``f`` gives, and every call of a function or layer that it makes."""
    made, original = Counter(), free.call

    def counting(name, items, n_out):
        made[name, items, n_out] += 1
        return original(name, items, n_out)

    # A picture does not say which parameters a layer has.
    with mock.patch.object(free, "Path", lambda path: ""), mock.patch.object(free, "call", counting):
        return f(), made


@given(p=free.pipelines(), n_extra=st.integers(0, 2), has_labels=st.booleans())
def test_the_wires_lead_where_the_expression_says(p, n_extra, has_labels):
    items = [f"x{i}" for i in range(p.signature.n_in + n_extra * has_labels)]
    output, made = calls_counted(lambda: p.init_with_output(free.KEY, *items)[0])
    expected = output if isinstance(output, tuple) else (output,)
    picture = Drawn(drawn_with(p, Everywhere(items) if has_labels else None).svg)
    given, drawn = calls_counted(lambda: picture.evaluate(call, items))
    assert given == expected
    assert drawn == made


@given(p=free.pipelines(max_leaves=10), n_extra=st.integers(0, 2), has_labels=st.booleans())
def test_nothing_lies_on_anything_else(p, n_extra, has_labels):
    items = ["i32[b, t, 3]"] * (p.signature.n_in + n_extra)
    picture = Drawn(drawn_with(p, Everywhere(items) if has_labels else None).svg)
    assert not list(picture.faults())


@given(p=free.pipelines())
def test_equal_expressions_have_one_picture(p):
    assert cb.diagram(p).svg == cb.diagram(p.clone()).svg


@pytest.mark.parametrize("name", PICTURES)
def test_pinned_pictures_have_no_faults(name):
    assert not list(Drawn((FOLDER / f"{name}.svg").read_text(encoding="utf-8")).faults())


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_as_they_were(name):
    pinned = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert draw(name).svg == pinned, (
        f"{name} is drawn otherwise; look at it: python -m tests.combinator.pictures"
    )


def test_no_pinned_picture_is_left_over():
    assert {path.stem for path in FOLDER.iterdir()} == set(PICTURES)
