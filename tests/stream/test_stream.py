"""``cb.stream``: the state, its rows, and what becomes of rows that cannot go on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.stream.toys import Attention, Conv, Memory, Sum, draw, make_block, quick_jit

KEY = jax.random.key(0)
SPEC = "f32[b, t, 4]"
CAPACITY = 6
X = draw(3, CAPACITY, 4)

MODEL = cb.repeat(make_block(), 2)


class Tried:
    """A stream that has run a block of two steps."""

    def __init__(self) -> None:
        self.stream = cb.stream(MODEL, SPEC, capacity=CAPACITY)
        self.variables = quick_jit(MODEL.init)(KEY, X)
        self.whole = np.asarray(quick_jit(MODEL.apply)(self.variables, X))
        self.jitted = quick_jit(self.stream.step)
        self.state, self.first = self.step(self.stream.start(3), X[:, :2])

    def step(self, state: Any, *inputs: Any, **keywords: Any) -> Any:
        return self.jitted(self.variables, state, *inputs, **keywords)


@functools.cache
def tried() -> Tried:
    return Tried()


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# State


def test_the_state_starts_as_zeros_without_parameters() -> None:
    state = tried().stream.start(2)
    assert all(not leaf.any() for leaf in jax.tree.leaves(state))
    assert jax.tree.map(jnp.shape, state.cache) == {
        "Attention_0": {
            "position": (2, 2),
            "keys": (2, 2, CAPACITY, 2, 2),
            "values": (2, 2, CAPACITY, 2, 2),
        },
        "Conv_0": {"position": (2, 2), "past": (2, 2, 2, 4)},
        "Sum_0": {"position": (2, 2), "total": (2, 2, 4)},
    }
    assert state.position.shape == (2,)
    shapes = tried().stream.state_shapes(2)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


def test_blocks_are_the_whole() -> None:
    state, outputs = tried().state, [tried().first]
    for block in (X[:, 2:3], X[:, 3:]):
        state, y = tried().step(state, block)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), tried().whole)
    assert tried().stream.position(state).tolist() == [CAPACITY] * 3


def test_other_names_have_sizes_of_their_own() -> None:
    stream = cb.stream(Sum(), "f32[n, s, d]", batch="n", time="s")
    state = stream.start(2, d=3)
    assert state.cache["total"].shape == (2, 3)
    assert dict(state.sizes) == {"d": 3}
    variables = Sum().init(KEY, draw(2, 1, 3))
    state, y = stream.step(variables, state, draw(2, 4, 3))
    assert_close(y, np.cumsum(draw(2, 4, 3), axis=1))
    with pytest.raises(cb.StreamError, match="keeps its state 'total' as f32"):
        stream.step(variables, state, draw(2, 4, 5))


def test_what_remembers_nothing_has_no_state() -> None:
    stream = cb.stream(jnp.tanh, SPEC)
    state = stream.start(2)
    assert state.cache == {}
    state, y = stream.step({}, state, X[:2])
    assert_same(y, jnp.tanh(X[:2]))
    assert stream.position(state).tolist() == [CAPACITY] * 2


def test_several_sequences_outputs_and_other_collections() -> None:
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x, y, *, scale, decode=False, lengths=None):
            x = nn.BatchNorm(use_running_average=True)(x)
            total = Sum()(x, decode=decode, lengths=lengths)
            return {"total": scale * total}, Conv()(y, decode=decode, lengths=lengths)

    x, y, scale = draw(2, 4, 4), draw(2, 4, 3, seed=1), jnp.array(2.0)
    both = cb.fn(Both(), n_out=2)
    variables = quick_jit(both.init)(KEY, x, y, scale=scale)
    whole = both.apply(variables, x, y, scale=scale)
    stream = cb.stream(both, SPEC, "f32[b, t, 3]", context={"scale": "f32[]"})
    step, state, blocks = quick_jit(stream.step), stream.start(2), []
    for at in (0, 2):
        state, outputs = step(variables, state, x[:, at : at + 2], y[:, at : at + 2], scale=scale)
        blocks.append(outputs)
    found = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *blocks)
    jax.tree.map(assert_close, found, whole)


def test_layers_that_draw_random_numbers_get_them() -> None:
    model = cb.serial(Sum(), nn.Dropout(0.5, deterministic=False))
    stream = cb.stream(model, SPEC)
    variables = {"params": {"Sum_0": {"scale": jnp.ones(())}}}
    step = quick_jit(stream.step)
    outputs = [
        step(variables, stream.start(3), X, rngs={"dropout": key})[1]
        for key in jax.random.split(KEY)
    ]
    assert not (outputs[0] == outputs[1]).all()
    for y in outputs:
        kept = np.asarray(y) != 0
        assert_close(y[kept], 2 * np.cumsum(X, axis=1)[kept])


def test_a_block_of_strides_is_counted_in_steps_of_the_stream() -> None:
    conv = xn.CausalConv(4, strides=2)
    stream = cb.stream(conv, "f32[b, 2*t, 4]")
    state, y = stream.step(conv.init(KEY, X), stream.start(3), X)
    assert y.shape == (3, 3, 4)
    assert stream.position(state).tolist() == [3, 3, 3]


def test_how_a_stream_reads() -> None:
    stream = cb.stream(cb.serial(Sum(), Attention(window=2)), SPEC, capacity=6)
    assert repr(stream) == "stream(serial(Sum(), Attention(window=2)), 'f32[b, t, 4]', capacity=6)"
    assert stream.takes_lengths
    assert stream.can_reset


# Rows


def test_rows_stand_at_places_of_their_own() -> None:
    lengths, spoiled = [2, 0, 1], X[:, 2:4].at[1].set(jnp.nan).at[2, 1].set(jnp.nan)
    state, y = tried().step(tried().state, spoiled, lengths=jnp.array(lengths))
    assert_close(y[0], tried().whole[0, 2:4])
    assert_close(y[2, 0], tried().whole[2, 2])
    assert tried().stream.position(state).tolist() == [4, 2, 3]
    assert_same(*(tried().stream.take(s, [1]) for s in (state, tried().state)))
    _, y = tried().step(state, jnp.stack([X[0, 4:], X[1, 2:4], X[2, 3:5]]))
    for row, at in enumerate([4, 2, 3]):
        assert_close(y[row], tried().whole[row, at : at + 2])


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2], [0, 2, 1, 0, 1], []])
def test_rows_are_taken_in_any_order_and_number(rows: list[int]) -> None:
    state = tried().stream.take(tried().state, rows)
    assert state.position.shape == (len(rows),)
    if len(rows) == 3:  # one compiled program
        _, y = tried().step(state, X[np.array(rows), 2:3])
        assert_close(y, tried().whole[rows, 2:3])
    again = [tried().stream.take(tried().state, [row]) for row in rows]
    for index, one in enumerate(again):
        assert_same(tried().stream.take(state, [index]), one)


@pytest.mark.parametrize("rows", [[1], np.array([False, True, False]), [False, True, False]])
def test_a_row_that_is_reset_starts_anew_and_the_others_go_on(rows: Any) -> None:
    stream = tried().stream
    state = stream.reset(tried().state, rows)
    assert stream.position(state).tolist() == [2, 0, 2]
    assert_same(stream.take(state, [0, 2]), stream.take(tried().state, [0, 2]))
    assert_same(stream.take(state, [1]), stream.start(1))
    _, y = tried().step(state, jnp.stack([X[0, 2:4], X[1, :2], X[2, 2:4]]))
    assert_close(y[1], tried().whole[1, :2])
    assert_close(y[::2], tried().whole[::2, 2:4])


def test_to_reset_no_rows_changes_nothing() -> None:
    assert_same(tried().stream.reset(tried().state, []), tried().state)


def test_rows_out_of_range_in_a_compiled_program() -> None:
    stream = tried().stream
    state = jax.jit(stream.take)(tried().state, jnp.array([1, -1, 3]))
    assert stream.position(state).tolist() == [2, -1, -1]
    _, y = tried().step(state, X[:, 2:3])
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1:]).all()
    assert_same(jax.jit(stream.reset)(tried().state, jnp.array([-1, 3])), tried().state)


# Rows that cannot go on


def test_a_row_with_an_invalid_length_gives_nan_from_there_on() -> None:
    for wrong in (3, -1):
        state, y = tried().step(tried().state, X[:, 2:4], lengths=jnp.array([2, wrong, 1]))
        assert tried().stream.position(state).tolist() == [4, -1, 3]
        assert np.isnan(y[1]).all()
        assert_close(y[0], tried().whole[0, 2:4])
        state, y = tried().step(state, jnp.stack([X[0, 4:], X[1, 2:4], X[2, 3:5]]))
        assert np.isnan(y[1]).all()
        assert_close(y[0], tried().whole[0, 4:])
        assert_close(y[2], tried().whole[2, 3:5])
    # Outside of a compiled program the row is NaN, too, until it is reset.
    state = tried().stream.reset(state, [1])
    _, y = tried().step(state, X[:, :1], lengths=jnp.array([0, 1, 1]))
    assert_close(y[1], tried().whole[1, :1])


def test_a_row_that_is_lost_is_nan_outside_of_compiled_programs_too() -> None:
    stream = cb.stream(Sum(), SPEC)
    variables = {"params": {"scale": jnp.ones(())}}
    state, _ = jax.jit(stream.step)(variables, stream.start(3), X, lengths=jnp.array([1, 9, 1]))
    _, y = stream.step(variables, state, X)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[::2]).all()


def test_a_row_that_runs_over_the_capacity_gives_nan_and_the_others_go_on() -> None:
    stream = tried().stream
    state, _ = tried().step(tried().state, X[:, 2:4], lengths=jnp.array([2, 1, 0]))
    block = jnp.concatenate([X[:, 4:], X[:, :1]], axis=1)  # to positions 7, 6 and 5
    state, y = tried().step(state, block)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1:]).all()
    assert stream.position(state).tolist() == [7, 6, 5]
    state, y = tried().step(state, X[:, :1])
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2]).all()
    state, y = tried().step(state, X[:, :2], lengths=jnp.array([0, 0, 0]))
    assert np.isnan(y[:2]).all()
    assert stream.position(state).tolist() == [8, 7, 6]
    with pytest.raises(cb.StreamError, match="row 0 is at position 8, row 1 is at position 7"):
        stream.step(tried().variables, state, X[:, :1])


def test_a_window_never_ends() -> None:
    model = Attention(window=2)
    stream = cb.stream(model, SPEC, capacity=CAPACITY)
    variables = quick_jit(model.init)(KEY, X)
    step, state = quick_jit(stream.step), stream.start(3)
    for _ in range(4):
        state, y = step(variables, state, X[:, :3])
    assert np.isfinite(y).all()
    assert stream.position(state).tolist() == [12] * 3


def test_no_gradient_comes_from_padding() -> None:
    spoiled = X[:, 2:4].at[1].set(jnp.nan).at[2, 1].set(jnp.nan)
    lengths = jnp.array([2, 0, 1])

    def loss(variables: Any, x: Any) -> Any:
        _, y = tried().stream.step(variables, tried().state, x, lengths=lengths)
        return jnp.sum(y[0]) + jnp.sum(y[2, :1])

    of_variables, of_inputs = quick_jit(jax.grad(loss, (0, 1)))(tried().variables, spoiled)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_variables))
    assert not of_inputs[1].any()
    assert not of_inputs[2, 1].any()
    assert of_inputs[0].any()


def test_an_input_may_be_left_out_once_it_is_remembered() -> None:
    model = cb.serial(Memory(), Sum())
    stream = cb.stream(model, SPEC, "f32[b, s]")
    memory = draw(3, 5, seed=1)
    variables = model.init(KEY, X, memory)
    state, first = stream.step(variables, stream.start(3, s=5), X[:, :4], memory)
    _, second = stream.step(variables, state, X[:, 4:], None)
    found = jnp.concatenate([first, second], axis=1)
    assert_close(found, model.apply(variables, X, memory))
