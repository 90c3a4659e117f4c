"""The laws of ``hold``, and how it reads."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from tests.stream.toys import draw, quick_jit

KEY = jax.random.key(0)
X = draw(2, 5, 4)
SPEC = "f32[b, t, 4]"


def zeros(x: Any) -> Any:
    return jnp.zeros_like(x[:, 0])


@cb.fn
def add_up(total, x) -> tuple[jax.Array, jax.Array]:
    totals = total[:, None] + jnp.cumsum(x, axis=1)
    return totals[:, -1], totals


@cb.fn
def delay(last, x) -> tuple[jax.Array, jax.Array]:
    """Gives the step before, from the last one of the block before."""
    return x[:, -1], jnp.concatenate([last[:, None], x[:, :-1]], axis=1)


@cb.fn
def delay_then_add_up(total, last, x) -> tuple[jax.Array, jax.Array, jax.Array]:
    last, x = delay(last, x)
    total, x = add_up(total, x)
    return total, last, x


@cb.fn
def two_zeros(x) -> tuple[jax.Array, jax.Array]:
    return zeros(x), zeros(x)


@functools.cache
def make_stream(p: Any) -> tuple[cb.Stream, Any]:
    stream = cb.stream(p, SPEC)
    return stream, quick_jit(stream.step)


def run_blocks(p: Any, variables: Any, x: Any, cuts: list[int]) -> Any:
    stream, step = make_stream(p)
    state, outputs = stream.start(x.shape[0]), []
    for block in jnp.split(x, cuts, axis=1):
        if block.size:
            state, y = step(variables, state, block)
            outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


# The laws


def test_hold_of_a_function_without_state_is_the_function() -> None:
    testing.assert_same_program(cb.hold(jnp.tanh, cb.drop()), cb.serial(jnp.tanh), X)
    held, plain = cb.hold(cb.sub(), cb.drop()), cb.sub()
    assert held.signature == plain.signature
    assert (held(X, 2 * X) == plain(X, 2 * X)).all()
    stream = cb.stream(cb.hold(jnp.tanh, cb.drop()), SPEC)
    state, y = stream.step({}, stream.start(2), X)
    assert not state.cache
    np.testing.assert_array_equal(y, jnp.tanh(X))


BOTH = cb.hold(delay_then_add_up, two_zeros)
IN_SERIES = cb.hold(delay, zeros) >> cb.hold(add_up, zeros)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), max_size=3).map(sorted))
def test_two_holds_in_series_are_one_with_both_states(cuts: list[int]) -> None:
    expected = np.cumsum(np.pad(X, ((0, 0), (1, 0), (0, 0)))[:, :-1], axis=1)
    for p in (BOTH, IN_SERIES):
        np.testing.assert_allclose(p(X), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(run_blocks(p, {}, X, cuts), expected, rtol=1e-5, atol=1e-6)


SCAN = cb.scan(xn.LSTMCell(), n_carry=2)
HELD_SCAN = cb.hold(SCAN, two_zeros)


@functools.cache
def run_scan() -> tuple[Any, Any]:
    """Returns the variables of the scan held, and what the scan of the whole gives."""
    carry = two_zeros(X)
    variables = quick_jit(SCAN.init)(KEY, *carry, X)
    *_, expected = quick_jit(SCAN.apply)(variables, *carry, X)
    return {"params": {"Scan_0": variables["params"]}}, expected


def test_a_held_scan_is_the_scan() -> None:
    variables, expected = run_scan()
    found = quick_jit(HELD_SCAN.apply)(variables, X)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), max_size=3).map(sorted))
def test_a_held_scan_in_blocks_is_the_scan_of_the_whole(cuts: list[int]) -> None:
    variables, expected = run_scan()
    found = run_blocks(HELD_SCAN, variables, X, cuts)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


HELD = {
    "function": lambda: cb.hold(delay, zeros),
    "scan": lambda: cb.hold(cb.scan(xn.LSTMCell(), n_carry=2), two_zeros),
    "layer": lambda: cb.hold(cb.dip(nn.Dense(4)) >> add_up, zeros),
    "initial from a layer": lambda: cb.hold(
        cb.scan(xn.LSTMCell(), n_carry=2),
        cb.select([0, 0]) >> cb.parallel(cb.serial(zeros, nn.Dense(4)), zeros),
    ),
    "in series": lambda: cb.hold(delay, zeros) >> nn.Dense(4) >> cb.hold(add_up, zeros),
    "in itself": lambda: cb.hold(cb.dip(cb.hold(add_up, zeros)) >> delay, zeros),
    "repeat": lambda: cb.repeat(cb.residual(HELD["scan"]()), 2),
    "repeat, shared": lambda: cb.repeat(cb.residual(HELD["layer"]()), 2, shared=True),
    "remat": lambda: cb.repeat(cb.remat(HELD["scan"]()), 2, remat=True),
}


@pytest.mark.parametrize("name", HELD)
def test_the_streaming_law(name: str) -> None:
    has_gradients = name in {"layer", "in itself"}
    testing.check_streaming(HELD[name](), SPEC, gradients=has_gradients, max_examples=6)


@pytest.mark.parametrize(
    ("axis", "spec"), [(0, "f32[t, b, 3]"), (2, "f32[b, 3, t]"), (-1, "f32[b, 3, t]")]
)
def test_time_on_another_axis(axis: int, spec: str) -> None:
    @cb.fn
    def add_up(total, x) -> tuple[jax.Array, jax.Array]:
        totals = jnp.expand_dims(total, axis) + jnp.cumsum(x, axis=axis)
        return jnp.take(totals, -1, axis=axis), totals

    held = cb.hold(add_up, lambda x: jnp.zeros_like(jnp.take(x, 0, axis=axis)), axis=axis)
    np.testing.assert_allclose(held(X), np.cumsum(X, axis=axis), rtol=1e-6)
    testing.check_streaming(held, spec, gradients=False, max_examples=6)


def test_a_state_may_be_a_pytree_and_a_block_several_sequences() -> None:
    @cb.fn
    def mix(state, x, y) -> tuple[Any, jax.Array, jax.Array]:
        sums = state["sum"][:, None] + jnp.cumsum(x * y, axis=1)
        counts = state["n"][:, None] + jnp.arange(1, 1 + x.shape[1], dtype=jnp.int32)[None]
        state = {"sum": sums[:, -1], "n": counts[:, -1]}
        return state, sums, x + counts[..., None].astype(x.dtype)

    def start(x: Any) -> Any:
        return {"sum": zeros(x), "n": jnp.zeros(x.shape[:1], jnp.int32)}

    held = cb.hold(mix, start)
    assert held.signature == cb.Signature(2, 2)
    testing.check_streaming(held, SPEC, SPEC, gradients=False, max_examples=6)


def test_each_row_stops_after_its_last_valid_step() -> None:
    held = cb.hold(add_up, zeros)
    stream = cb.stream(held, SPEC)
    spoiled = X.at[0, 2:].set(jnp.nan).at[1].set(jnp.nan)
    state, y = stream.step({}, stream.start(2), spoiled, lengths=[2, 0])
    np.testing.assert_allclose(y[0, :2], np.cumsum(X[0, :2], axis=0), rtol=1e-6)
    np.testing.assert_allclose(state.cache["state_0"], [X[0, :2].sum(0), [0] * 4], rtol=1e-6)
    assert stream.position(state).tolist() == [2, 0]


# How it reads


def test_signature_keywords_and_expression() -> None:
    held = cb.hold(cb.scan(xn.LSTMCell(), n_carry=2), two_zeros, name="memory")
    assert held.signature == cb.Signature(1, 1)
    assert held.keywords == {"decode", "lengths"}
    assert repr(held) == "hold(scan(LSTMCell(), n_carry=2), fn(two_zeros), name='memory')"
    assert repr(cb.hold(add_up, zeros, axis=0)) == "hold(fn(add_up), zeros, axis=0)"
    assert cb.hold(add_up, zeros).signature == cb.infer_signature(cb.hold(add_up, zeros))
    assert cb.hold(cb.fn(max, 3, 2), zeros).signature == cb.Signature(2, 1)


def test_the_summary_shows_what_is_held() -> None:
    held = cb.hold(cb.dip(nn.Dense(4)) >> add_up, zeros)
    rows = [re.split(r"  +", line.strip()) for line in str(cb.summary(held, SPEC)).splitlines()]
    assert [row[:2] for row in rows[2:-2]] == [
        ["inputs", "f32[b, t, 4]"],
        ["hold", "1 -> 1"],
        ["zeros", "1 -> 1"],
        ["serial", "2 -> 2"],
        ["dip", "2 -> 2"],
        ["Dense(features=4)", "1 -> 1"],
        ["fn(add_up)", "2 -> 2"],
    ]
    assert str(cb.shape_signature(held, SPEC)) == "f32[b, t, 4] -> f32[b, t, 4]"


def test_the_diagram_shows_a_box_with_the_shapes_around_it() -> None:
    svg = cb.diagram(cb.hold(add_up, zeros), SPEC).svg
    words = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert words == ["f32[b, t, 4]", "hold", "f32[b, t, 4]"]


def test_the_parameters_are_the_same_with_and_without_decode() -> None:
    held = cb.serial(cb.hold(cb.dip(nn.Dense(4)) >> add_up, zeros), nn.Dense(2))
    whole, streaming = held.init(KEY, X), held.init(KEY, X, decode=True)
    jax.tree.map(np.testing.assert_array_equal, whole["params"], streaming["params"])
    assert jax.tree.map(jnp.shape, whole) == {
        "params": {
            "Hold_0": {"Dense_0": {"kernel": (4, 4), "bias": (4,)}},
            "Dense_0": {"kernel": (4, 2), "bias": (2,)},
        }
    }
    assert jax.tree.map(jnp.shape, streaming["cache"]) == {
        "Hold_0": {"position": (2,), "state_0": (2, 4)}
    }


# What it refuses


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: cb.hold(3, zeros), TypeError, "got 3 (int). Pass a function"),
        (lambda: cb.hold(add_up, None), TypeError, "got None"),
        (
            lambda: cb.hold(add_up, zeros, axis=1.5),
            TypeError,
            "takes an integer for axis; got 1.5.",
        ),
        (
            lambda: cb.hold(add_up, two_zeros),
            cb.SignatureError,
            "got f fn(add_up) with signature 2 -> 2 and initial fn(two_zeros) with signature 1 -> 2.",
        ),
        (
            lambda: cb.hold(add_up, cb.add()),
            cb.SignatureError,
            "got f fn(add_up) with signature 2 -> 2 and initial add() with signature 2 -> 1.",
        ),
        (
            lambda: cb.hold(cb.fn(lambda s, x: (s[:, :2], x), n_out=2), zeros)(X),
            cb.SignatureError,
            "item 0 went in as f32[2, 4] and came out as f32[2, 2].",
        ),
        (
            lambda: cb.hold(cb.fn(lambda s, x: (s > 0, x), n_out=2), zeros)(X),
            cb.SignatureError,
            "item 0 went in as f32[2, 4] and came out as bool[2, 4].",
        ),
        (
            lambda: cb.hold(add_up, lambda x: jnp.zeros(4)).init(KEY, X),
            cb.StreamError,
            "so that its first axis has size 2; the initial state 'state_0' is f32[4].",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()
