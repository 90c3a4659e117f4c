"""``cb.Cache`` against a list of steps for each row, block by block."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from tests.stream.toys import Memory, draw, quick_jit

KEY = jax.random.key(0)
BATCH, CAPACITY, WINDOW, N_PAST = 2, 8, 3, 2


class Everything(nn.Module):
    """Does all that a cache can do, and gives back what it got."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        last = cache.recall("last", {"x": 7 + jnp.zeros_like(x[:, 0])})
        cache.keep("last", {"x": cache.take_last(x)})
        cache.append("all", x)
        cache.append("some", x, window=WINDOW, dtype=jnp.float16)
        return {
            "last": last["x"],
            "take_last": cache.take_last({"x": x})["x"],
            "positions": cache.positions + jnp.zeros((BATCH, 1), int),
            "is_valid": cache.is_valid | jnp.zeros((BATCH, 1), bool),
            "extend": cache.extend("past", x, N_PAST),
            "all": (cache.read("all"), cache.locate("all") + jnp.zeros((BATCH, 1), int)),
            "some": (cache.read("some"), cache.locate("some") + jnp.zeros((BATCH, 1), int)),
        }


@functools.cache
def start() -> Any:
    return Everything().init(KEY, draw(BATCH, CAPACITY), decode=True)


@quick_jit
def step(state: Any, x: Any, lengths: Any) -> Any:
    return Everything().apply(state, x, decode=True, lengths=lengths, mutable=["cache"])


blocks = st.lists(
    st.integers(1, 3).flatmap(
        lambda time: st.tuples(
            st.just(time), st.none() | st.tuples(*[st.integers(0, time)] * BATCH)
        )
    ),
    min_size=1,
    max_size=5,
).filter(lambda blocks: sum(time for time, _ in blocks) <= CAPACITY)


def numbers(row: int, at: int) -> float:
    """The step of a row at a position: a number that float16 holds."""
    return 16 * row + at + 1


def check_seen(read: Any, row: int, at: int, window: int) -> None:
    """A step sees the steps of the window, each once, and tells the others by their position."""
    values, positions = np.asarray(read[0])[row], np.asarray(read[1])[row]
    first = max(0, at - window + 1)
    seen = [i for i, position in enumerate(positions) if first <= position <= at]
    assert sorted(positions[seen]) == list(range(first, at + 1))
    assert [values[i] for i in seen] == [numbers(row, positions[i]) for i in seen]


@settings(max_examples=60)
@given(blocks)
def test_every_row_remembers_its_own_steps(blocks: Any) -> None:
    state, at = start(), [0] * BATCH
    for time, lengths in blocks:
        n_valid = lengths or (time,) * BATCH
        x = np.full((BATCH, time), np.nan, np.float32)  # all padding is NaN
        for row in range(BATCH):
            x[row, : n_valid[row]] = [numbers(row, at[row] + i) for i in range(n_valid[row])]
        found, state = step(state, x, lengths and jnp.array(lengths))
        for row, n in enumerate(n_valid):
            assert found["last"][row] == (numbers(row, at[row] - 1) if at[row] else 7)
            assert found["positions"][row].tolist() == [at[row] + i for i in range(time)]
            assert found["is_valid"][row].tolist() == [i < n for i in range(time)]
            if n:
                assert found["take_last"][row] == numbers(row, at[row] + n - 1)
            before = range(at[row] - N_PAST, at[row] + n)
            expected = [numbers(row, i) if i >= 0 else 0 for i in before]
            assert found["extend"][row, : N_PAST + n].tolist() == expected
            for i in range(n):
                check_seen(found["all"], row, at[row] + i, CAPACITY)
                check_seen(found["some"], row, at[row] + i, WINDOW)
            at[row] += n
        assert state["cache"]["position"].tolist() == at


def test_without_decode_the_block_is_the_whole_sequence() -> None:
    x = np.array([[numbers(row, at) for at in range(5)] for row in range(BATCH)], np.float32)
    found, variables = Everything().apply({}, x, mutable=True)
    assert variables == {}
    assert found["last"].tolist() == [7, 7]
    assert found["take_last"].tolist() == x[:, -1].tolist()
    assert found["positions"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert found["extend"].tolist() == [[0, 0, *row] for row in x.tolist()]
    for row in range(BATCH):
        for at in range(5):
            check_seen(found["all"], row, at, 5)
            check_seen(found["some"], row, at, WINDOW)


def test_a_window_as_long_as_the_capacity_remembers_all_steps() -> None:
    class Windowed(nn.Module):
        @nn.compact
        def __call__(self, x, *, decode=False):
            cache = cb.Cache(self, x, decode=decode)
            cache.append("s", x, window=9)
            return cache.read("s"), cache.locate("s")

    x = draw(1, 3)
    state = Windowed().init(KEY, x, decode=True)
    _, state = Windowed().apply(state, x[:, :2], decode=True, mutable=["cache"])
    found, _ = Windowed().apply(state, x[:, 2:], decode=True, mutable=["cache"])
    assert found[0].tolist() == x.tolist()
    assert found[1].tolist() == [[0, 1, 2]]


def test_nothing_is_written_while_initializing() -> None:
    state = start()["cache"]
    assert all(not leaf.any() for leaf in jax.tree.leaves(state))
    assert {
        name: jax.tree.map(lambda x: (x.shape, x.dtype.name), state[name]) for name in state
    } == {
        "position": ((2,), "int32"),
        "last": {"x": ((2,), "float32")},
        "past": ((2, N_PAST), "float32"),
        "all": ((2, CAPACITY), "float32"),
        "some": ((2, WINDOW), "float16"),
    }


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("whole", (False, False)), ("initializing", (True, False)), ("streaming", (True, True))],
)
def test_what_a_layer_can_know_of_the_mode(mode: str, expected: tuple[bool, bool]) -> None:
    class Mode(nn.Module):
        @nn.compact
        def __call__(self, x, *, decode=False, lengths=None):
            cache = cb.Cache(self, x, decode=decode, lengths=lengths)
            modes.append((cache.decode, cache.is_streaming))
            assert cache.has_padding == (lengths is not None)
            cache.recall("s", x)

    modes: list[tuple[bool, bool]] = []
    x = jnp.zeros((2, 3))
    state = Mode().init(KEY, x, decode=mode != "whole", lengths=jnp.array([1, 2]))
    if mode == "streaming":
        Mode().apply(state, x, decode=True, mutable=["cache"])
    assert modes[-1] == expected


# Rows that cannot go on


def test_a_row_with_an_invalid_length_is_nan_for_good_and_the_other_goes_on() -> None:
    state, x = start(), jnp.ones((BATCH, 2))
    for wrong in (3, -1):
        _, lost = step(state, x, jnp.array([2, wrong]))
        for lengths in (None, jnp.array([1, 1])):
            found, lost = step(lost, x, lengths)
            assert found["last"][0] == 1
            assert np.isnan(found["last"][1])
            assert np.isfinite(found["extend"][0]).all()
            assert np.isnan(found["extend"][1, :N_PAST]).all()
            assert not np.isfinite(found["all"][0][1]).all()
            assert np.isfinite(found["all"][0][0]).all()
        assert np.isnan(found["some"][0][1]).any()


def test_a_row_that_runs_over_the_capacity_holds_nan_in_its_last_place() -> None:
    state, x = start(), jnp.ones((BATCH, 3))
    for taken in (3, 3):
        _, state = step(state, x, jnp.array([taken, 0]))
    found, state = step(state, x, None)
    values = found["all"][0]
    assert np.isnan(values[0, -1])
    assert np.isfinite(values[0, :-1]).all()
    assert np.isfinite(values[1]).all()
    assert np.isfinite(found["some"][0]).all()  # a window never ends
    found, _ = step(state, x[:, :1], jnp.array([0, 1]))
    assert np.isnan(found["all"][0][0, -1])  # also when it stands still


# What is given once


def test_a_value_is_given_once() -> None:
    x, memory = draw(2, 3, 4), draw(2, 4, seed=1)
    variables = Memory().init(KEY, x, memory)
    whole = Memory().apply(variables, x, memory)
    stream = cb.stream(Memory(), "f32[b, t, 4]", "f32[b, 4]")
    state, first = stream.step(variables, stream.start(2), x[:, :1], memory)
    state, second = stream.step(variables, state, x[:, 1:], None)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-6)
    # The last value given counts.
    _, third = stream.step(variables, state, x[:, :1], memory[::-1])
    np.testing.assert_allclose(third, Memory().apply(variables, x[:, :1], memory[::-1]), rtol=1e-6)


def test_a_row_without_a_value_is_nan_and_the_others_go_on() -> None:
    x, memory = draw(2, 1, 4), draw(2, 4, seed=1)
    variables = Memory().init(KEY, x, memory)
    stream = cb.stream(Memory(), "f32[b, t, 4]", "f32[b, 4]")
    state, _ = stream.step(variables, stream.start(2), x, memory)
    state = stream.reset(state, [1])
    with pytest.raises(cb.StreamError, match="rows 1 were not given it before"):
        stream.step(variables, state, x, None)
    _, y = jax.jit(stream.step)(variables, state, x, None)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


def test_a_value_is_remembered_in_the_dtype_asked_for() -> None:
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, *, decode=False):
            cache = cb.Cache(self, x, decode=decode)
            cache.remember("value", x[:, 0], dtype=jnp.bfloat16)
            return cache.read("value")

    x = draw(2, 3)
    state = Half().init(KEY, x, decode=True)
    found, _ = Half().apply(state, x, decode=True, mutable=["cache"])
    assert state["cache"]["value"].dtype == found.dtype == jnp.bfloat16
    assert Half().apply({}, x).dtype == jnp.bfloat16


# Entries of what is stacked for copies


@pytest.mark.parametrize("indices", [(), (1,), (1, 2)])
def test_an_entry_reads_and_writes_a_part_of_what_is_stacked(indices: tuple[int, ...]) -> None:
    stacked = draw(2, 3, 4, 5, 6)
    entry = cb.CacheEntry(stacked, indices)
    expected = np.array(stacked)
    view = expected[indices]
    assert (entry.shape, entry.ndim, entry.dtype) == (view.shape, view.ndim, jnp.float32)
    np.testing.assert_array_equal(entry.unbox(), view)
    starts, sizes = (1,) * view.ndim, (1,) * (view.ndim - 1) + (2,)
    part = view[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))]
    np.testing.assert_array_equal(entry.read(starts, sizes), part)
    flat = (view.shape[0], view.size // view.shape[0])
    np.testing.assert_array_equal(entry.reshape(flat).unbox(), view.reshape(flat))

    rows = draw(view.shape[0], 2, *view.shape[2:], seed=1)
    at = np.arange(2 * view.shape[0]).reshape(-1, 2) % (view.shape[1] + 1)
    written = entry.write_rows(rows, jnp.asarray(at))
    for row, places in enumerate(at):
        for place, value in zip(places, rows[row], strict=True):
            if place < view.shape[1]:  # beyond the end nothing is written
                view[row, place] = value
    np.testing.assert_array_equal(written.stacked, expected)
    view[...] = 1.0
    np.testing.assert_array_equal(entry.replace_boxed(jnp.ones(view.shape)).stacked, expected)
