"""Rebuilding a pipeline from its parts gives the same pipeline, or an error."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb

KEY = jax.random.key(0)
X = jnp.ones((2, 4))


def f(x, mask=None):
    return x


def g(x):
    return x


class TestResidual:
    def test_the_class_takes_what_the_function_takes(self):
        p = cb.residual(nn.LayerNorm(), nn.Dense(4))
        assert cb.Residual([*p]) == p
        assert cb.Residual([nn.LayerNorm(), nn.Dense(4)]) == p
        assert str(cb.Residual(f)) == "residual(f)"

    def test_a_clone_with_another_body_keeps_the_shortcut(self):
        p = cb.residual(f, shortcut=nn.Dense(3))
        assert p.clone(children=[g, f]) == cb.residual(g, f, shortcut=nn.Dense(3))
        assert p.clone() == p
        assert p.clone(children=p.children) == p
        assert cb.residual(g).clone(children=p.children) == p

    def test_its_children_are_no_body(self):
        p = cb.residual(f, shortcut=g)
        assert cb.Residual(p.children) == p
        assert cb.serial(f, g).clone(children=p.children) == cb.serial(f, g)


class TestFn:
    @pytest.mark.parametrize(
        ("p", "declared"),
        [
            (cb.fn(f, mask=None), "fn(f, mask=None) is f alone, without mask=None"),
            (cb.fn(f, n_in=2), "fn(f, n_in=2) is f alone, without n_in=2"),
            (cb.fn(max, n_in=2, n_out=1), "is max alone, without n_in=2, n_out=1"),
            (cb.fn(f, mask=cb.context("m", default=None)), "without mask=context('m', default="),
        ],
    )
    def test_a_child_that_would_lose_what_is_declared_is_refused(self, p, declared):
        for take in (lambda: p[0], lambda: list(p), lambda: cb.fn(*p)):
            with pytest.raises(TypeError, match=re.escape(declared)):
                take()
        assert p[:] == p
        assert len(p) == 1

    def test_one_that_declares_nothing_is_its_child(self):
        assert cb.fn(f)[0] is f
        assert cb.fn(*cb.fn(g)) == cb.fn(g)


class TestRepeat:
    def test_the_whole_is_the_whole(self):
        assert cb.repeat(f, 6)[:] == cb.repeat(f, 6)
        assert cb.Repeat([f], n=6) == cb.repeat(f, 6)


BAD = [
    (lambda: cb.Repeat(f, n=2.5), TypeError, "repeat takes an integer for n; got 2.5"),
    (lambda: cb.Repeat([f, g], n=2), TypeError, "repeat takes one callable; got 2"),
    (lambda: cb.Repeat(f, n=2, remat=3), TypeError, "repeat takes a callable for remat"),
    (lambda: cb.Scan(f, axis="x"), TypeError, "scan takes an integer for axis; got 'x'"),
    (lambda: cb.Remat(f, policy=3), TypeError, "remat takes a callable for policy"),
    (lambda: cb.Select(indices=3), TypeError, "select takes a sequence of integers"),
    (lambda: cb.Select(indices=[-1]), cb.SignatureError, "got -1. Use a non-negative index."),
    (lambda: cb.Dup(n_in=1.5), TypeError, "dup takes an integer for n_in; got 1.5"),
    (lambda: cb.Add(n_in=0), ValueError, "add takes n_in of at least 1; got 0"),
    (lambda: cb.Concatenate(axis=None), TypeError, "concatenate takes an integer for axis"),
    (lambda: cb.Split(n_out="2"), TypeError, "split takes an integer for n_out; got '2'"),
    (lambda: cb.Keep([f, g]), TypeError, "keep takes one callable; got 2"),
    (lambda: cb.Dip([]), TypeError, "dip takes one callable; got 0"),
    (lambda: cb.Fold([f, g]), TypeError, "fold takes one callable; got 2"),
    (lambda: cb.Fn([f, g]), TypeError, "fn takes one callable; got 2"),
    (lambda: cb.Typed([], declared="f32[] -> f32[]"), TypeError, "typed takes one callable"),
]


@pytest.mark.parametrize(("build", "error", "text"), BAD)
def test_constructors_refuse_what_functions_refuse(build, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()


def test_select_takes_any_integers():
    assert cb.Select(indices=iter([1, jnp.int32(0)])) == cb.select((1, 0))
