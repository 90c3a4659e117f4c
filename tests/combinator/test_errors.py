"""Errors say what was asked, what was found and what to do. The wording is pinned here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb

KEY = jax.random.key(0)
X = jnp.ones((2, 8, 64))


class SelfAttention(nn.Module):
    """Takes a mask, as attention does."""

    @nn.compact
    def __call__(self, x, mask):
        return nn.MultiHeadDotProductAttention(4)(x, mask=mask)


def block():
    return cb.serial(
        nn.Dense(64), nn.relu, cb.residual(nn.LayerNorm(), SelfAttention(), nn.Dense(64))
    )


def message(error, f):
    with pytest.raises(error) as caught:
        f()
    return str(caught.value).split("\n--------------------\n")[0]


def note(error, f):
    """The one note that we add."""
    with pytest.raises(error) as caught:
        f()
    notes = [n for n in caught.value.__notes__ if n.startswith("flax_extra")]
    assert len(notes) == 1
    return notes[0]


def test_too_few_inputs_deep_inside():
    assert message(cb.SignatureError, lambda: block().init(KEY, X)) == (
        "serial[2] -> residual[1] -> SelfAttention takes 2 items off the stack, and only 1 is there.\n"
        "  signature: 2 -> 1\n"
        "  stack: f32[2, 8, 64]\n"
        "  The pipeline takes 2 inputs and was called with 1. Give it the missing input, copy an item "
        "with cb.dup() or cb.select() before this step, or bind a parameter that is no input: "
        "cb.fn(f, name=value)."
    )


def test_too_few_inputs_at_the_top():
    assert message(cb.SignatureError, cb.add(3)).startswith(
        "add takes 2 items off the stack, and none is there.\n  signature: 2 -> 1\n  stack: empty\n"
        "  The pipeline takes 3 inputs and was called with 0. Give it the missing inputs,"
    )
    assert message(cb.SignatureError, lambda: cb.swap()(1)).startswith(
        "swap takes 2 items off the stack, and only 1 is there.\n  signature: 2 -> 2\n  stack: 1\n"
    )
    assert message(cb.SignatureError, lambda: cb.branch(abs, cb.add(), abs)(1)).startswith(
        "branch[1] -> add takes 2 items"
    )
    assert message(cb.SignatureError, lambda: cb.parallel(abs, cb.dip(abs))(1, 2)).startswith(
        "parallel[1] -> dip[0] -> abs takes 1 item off the stack, and none is there.\n"
    )


def test_too_few_inputs_for_a_pipeline_inside_a_layer():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return cb.serial(nn.Dense(4), cb.add())(x)

    text = message(cb.SignatureError, lambda: cb.serial(nn.relu, Layer()).init(KEY, X))
    assert text.startswith("serial[1] -> Layer -> serial[1] -> add takes 2 items")
    assert "The pipeline takes 2 inputs and was called with 1." in text


def test_wrong_n_out():
    def undeclared(x):
        return x, x

    assert message(cb.SignatureError, lambda: cb.serial(abs, undeclared)(X)) == (
        "serial[1] -> undeclared is declared to give 1 item, and gave 2: f32[2, 8, 64], f32[2, 8, 64].\n"
        "  signature: 1 -> 1\n"
        "  stack: f32[2, 8, 64]\n"
        "  Correct its return annotation, or say how many: cb.fn(f, n_out=2)."
    )

    def nothing(x) -> tuple[int, int]:
        return ()

    assert "is declared to give 2 items, and gave 0: nothing." in message(
        cb.SignatureError, lambda: cb.serial(nothing)(1)
    )

    def something(x) -> None:
        return x

    assert "is declared to give 0 items, and gave 1: 1." in message(
        cb.SignatureError, lambda: cb.serial(something)(1)
    )


def test_residual_with_two_outputs():
    assert message(cb.SignatureError, lambda: cb.residual(nn.Dense(4), cb.dup())) == (
        "residual adds one output of its body to one output of its shortcut; the body "
        "serial(Dense(features=4), dup()) has signature 1 -> 2. Drop or merge the outputs you do not "
        "add, for instance with cb.drop() or cb.add()."
    )
    assert message(cb.SignatureError, lambda: cb.residual(abs, shortcut=cb.drop())).startswith(
        "residual adds one output of its body to one output of its shortcut; the shortcut drop() has "
        "signature 1 -> 0."
    )


def test_negative_select():
    assert message(cb.SignatureError, lambda: cb.select((0, -1))) == (
        "select takes indices counted from the top of the stack, which is index 0; got -1. Use a "
        "non-negative index."
    )


def test_changed_carry_in_repeat():
    p = cb.serial(nn.Dense(8), cb.repeat(cb.parallel(nn.Dense(8), nn.Dense(4)), 3))
    assert message(cb.SignatureError, lambda: p.init(KEY, jnp.ones((2, 3)), jnp.ones((2, 8)))) == (
        "serial[1] -> repeat[0] must give each item back as it took it, since every copy or step is "
        "fed the last one's: item 1 went in as f32[2, 8] and came out as f32[2, 4].\n"
        "  signature: 2 -> 2\n"
        "  stack: f32[2, 8], f32[2, 8]\n"
        "  Keep its shape and dtype, for instance with a final projection or a cast."
    )
    assert "item 0 went in as f32[3] and came out as i32[3]" in message(
        cb.SignatureError, lambda: cb.repeat(lambda x: x.astype(int), 2)(jnp.ones(3))
    )
    assert "item 0 went in as f32[] and came out as dict('a': f32[])" in message(
        cb.SignatureError, lambda: cb.repeat(lambda x: {"a": x}, 2)(jnp.array(1.0))
    )


def test_changed_carry_in_scan():
    cell = cb.fn(lambda c, x: (c.astype(jnp.bfloat16), x), n_out=2)
    assert "scan[0] must give each item back as it took it" in message(
        cb.SignatureError, lambda: cb.scan(cell)(jnp.ones(2), jnp.ones((2, 3)))
    )


def test_no_time_axis():
    cell = cb.fn(lambda c, x: (c, x), n_out=2)
    assert message(cb.SignatureError, lambda: cb.scan(cell)(jnp.ones(2), jnp.ones(3))) == (
        "scan runs over axis 1, and its input f32[3] has no room for one.\n"
        "  stack: f32[2], f32[3]\n"
        "  Choose the axis that holds time: cb.scan(cell, axis=...)."
    )
    summed = cb.fn(lambda c, x: (c, x.sum()), n_out=2)
    assert "scan runs over axis 1, and its output f32[] has no room for one" in message(
        cb.SignatureError, lambda: cb.scan(summed)(jnp.ones(2), jnp.ones((2, 3)))
    )


def test_unknown_context_keyword():
    p = cb.serial(nn.Dense(4), nn.Dropout(0.5), nn.gelu)
    assert message(TypeError, lambda: p.init(KEY, X, training=True, mode=1)) == (
        "serial was called with 'mode', 'training', which none of its parts takes as a "
        "keyword. They take: 'approximate', 'deterministic', 'rng'."
    )
    assert message(TypeError, lambda: cb.swap()(1, 2, deterministic=True)).endswith(
        "They take: none."
    )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_child_that_raises_keeps_its_type_and_gains_one_note(transform):
    p = cb.serial(nn.Dense(5), cb.residual(nn.LayerNorm(), nn.Dense(3)))
    assert note(TypeError, lambda: transform(p.init)(KEY, X)) == (
        "flax_extra: in serial[1] -> residual -> add\n"
        "  signature: 2 -> 1\n"
        "  stack: f32[2, 8, 3], f32[2, 8, 5]\n"
        "  The body and the shortcut of a residual are added, so both give one shape. Project one: "
        "cb.residual(f, shortcut=nn.Dense(features))."
    )


def test_the_note_gives_the_whole_path_through_layers_and_scopes():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            def fails(x):
                raise KeyError("missing")

            return cb.serial(nn.Dense(4), cb.branch(nn.relu, fails))(x)

    p = cb.serial(cb.repeat(cb.serial(Layer(), name="inner"), 2), name="outer")
    assert note(KeyError, lambda: jax.jit(cb.serial(p).init)(KEY, X)) == (
        "flax_extra: in serial[0] -> outer[0] -> repeat[0] -> inner[0] -> Layer -> serial[1] -> "
        "branch[1] -> fails\n"
        "  signature: 1 -> 1\n"
        "  stack: f32[2, 8, 4]"
    )


def test_the_shortcut_has_a_name_on_the_path():
    def fails(x):
        raise RuntimeError

    assert "serial[0] -> residual[shortcut] -> fails\n" in note(
        RuntimeError, lambda: cb.serial(cb.residual(abs, shortcut=fails))(1)
    )


def test_a_layer_that_is_not_bound():
    p = cb.serial(nn.Dense(4))
    from flax.errors import CallCompactUnboundModuleError

    assert "serial[0] -> Dense" in note(CallCompactUnboundModuleError, lambda: p(X))


def test_an_exception_that_is_caught_inside_leaves_no_trace():
    def fails(x):
        raise ValueError("no")

    def careful(x):
        try:
            return cb.serial(fails)(x)
        except ValueError:
            return x

    assert cb.serial(careful, abs)(-1) == 1
    assert "serial[1] -> fails" in note(ValueError, lambda: cb.serial(careful, fails)(1))


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (
            lambda: cb.serial(3),
            TypeError,
            "callables and (nested) iterables of callables; got 3 (int)",
        ),
        (lambda: cb.serial([abs, [None]]), TypeError, "got None (NoneType)"),
        (lambda: cb.serial("abs"), TypeError, "got 'abs' (str)"),
        (lambda: cb.add() >> 3, TypeError, "got 3 (int)"),
        (lambda: np.ones(3) >> cb.add(), TypeError, "got f64[3] (ndarray)"),
        (lambda: jnp.ones(3) @ cb.add(), TypeError, "got f32[3] (ArrayImpl)"),
        (lambda: cb.repeat([abs, abs], 2), TypeError, "repeat takes one callable; got 2"),
        (lambda: cb.repeat(abs, -1), ValueError, "repeat takes n of at least 0; got -1"),
        (lambda: cb.repeat(abs, 2.0), TypeError, "repeat takes an integer for n; got 2.0"),
        (lambda: cb.repeat(abs, 2, unroll=0), ValueError, "unroll of at least 1; got 0"),
        (lambda: cb.repeat(cb.dup(), 2), cb.SignatureError, "got dup() with signature 1 -> 2"),
        (lambda: cb.scan(cb.drop(2)), cb.SignatureError, "with 1 carry item; got drop(n_in=2)"),
        (lambda: cb.scan(lambda: 1), cb.SignatureError, "at least one input beyond its carry"),
        (lambda: cb.scan(abs, n_carry=1), cb.SignatureError, "signature 1 -> 1 and 1 carry item"),
        (
            lambda: cb.remat(abs, policy=3),
            TypeError,
            "remat takes a callable for policy, one of jax.checkpoint_policies; got 3.",
        ),
        (
            lambda: cb.repeat(abs, 2, remat=1),
            TypeError,
            "repeat takes a callable for remat, one of jax.checkpoint_policies; got 1",
        ),
        (lambda: cb.fold(abs), cb.SignatureError, "got abs with signature 1 -> 1"),
        (lambda: cb.add(0), ValueError, "add takes n_in of at least 1; got 0"),
        (lambda: cb.concatenate("x"), TypeError, "concatenate takes an integer for axis; got 'x'"),
        (lambda: cb.split(0), ValueError, "split takes n_out of at least 1; got 0"),
        (lambda: cb.dup(-1), ValueError, "dup takes n_in of at least 0; got -1"),
        (
            lambda: cb.dup(10**9),
            cb.SignatureError,
            "dup takes n_in of at most 100000; got 1000000000",
        ),
        (lambda: cb.select((10**9,)), cb.SignatureError, "n_in of at most 100000; got 1000000001"),
        (lambda: cb.select(1), TypeError, "a sequence of integers for indices; got 1"),
        (lambda: cb.select((0.5,)), TypeError, "an integer for indices; got 0.5"),
        (lambda: cb.select((0,), n_in=-1), ValueError, "select takes n_in of at least 0; got -1"),
        (lambda: cb.keep(abs, 2), cb.SignatureError, "keeps the last 2 of f's inputs; f is abs"),
        (lambda: cb.dip(abs, -1), ValueError, "dip takes n of at least 0; got -1"),
        (lambda: cb.serial(abs)[1], IndexError, "serial has 1 child; there is no child 1"),
        (lambda: cb.repeat(abs, 2)[[2]], IndexError, "repeat has 2 copies, numbered from 0; there"),
    ],
)
def test_what_is_wrong_when_built_is_said_when_built(build, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()


class TestSubclasses:
    def test_that_mean_something(self):
        class PreNorm(cb.Combinator):
            def expand(self, norm, *body):
                return cb.residual(norm, *body)

        p = PreNorm([nn.LayerNorm(), nn.Dense(4)])
        assert repr(p) == "pre_norm(LayerNorm(), Dense(features=4))"
        assert list(p.init(KEY, X[..., :4])["params"]) == ["LayerNorm_0", "Dense_0"]
        from flax.errors import ScopeParamShapeError

        variables = p.init(KEY, X[..., :4])
        assert "serial[0] -> pre_norm[0] -> LayerNorm" in note(
            ScopeParamShapeError, lambda: cb.serial(p).apply(variables, X)
        )
        assert type(p[:1]) is PreNorm

    def test_that_hide_layers(self):
        class Hides(cb.Combinator):
            def expand(self):
                return cb.serial(nn.Dense(4))

        assert "it also uses the layer Dense, which is not one of them" in message(TypeError, Hides)

    def test_that_mean_nothing(self):
        class Empty(cb.Combinator):
            pass

        assert "Empty does not say what it means." in message(TypeError, lambda: cb.serial(Empty()))


def test_a_part_of_a_derived_combinator_goes_by_its_own_name():
    class Twice(cb.Combinator):
        def expand(self, f):
            return cb.residual(f)

    with pytest.raises(cb.SignatureError, match=r"split") as caught:
        Twice(cb.split(2))
    assert "object at" not in str(caught.value)
