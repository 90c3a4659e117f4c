"""The LSTM and its cell against linen's, and what lengths, reverse and initial state mean."""

from __future__ import annotations

import functools
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra.layer import _lstm

BATCH, TIME, FEATURES, HIDDEN = 3, 6, 4, 5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(BATCH, TIME, FEATURES)
STATE = normal(BATCH, HIDDEN, seed=1), normal(BATCH, HIDDEN, seed=2)


def cell_params() -> Any:
    """The parameters of a cell, all of them random."""
    shapes = jax.eval_shape(xn.LSTMCell().init, jax.random.key(0), STATE, X[:, 0])["params"]
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [normal(*leaf.shape, seed=seed) / 2 for seed, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


CELL = cell_params()
VARIABLES = {"params": {"Scan_0": {"LSTMCell_0": CELL}}}


def run(x: Any = X, variables: Any = VARIABLES, **options: Any) -> Any:
    fields = {k: options.pop(k) for k in ("return_sequences", "reverse") if k in options}
    return compiled(xn.LSTM(HIDDEN, **fields))(variables, x, **options)


@functools.cache
def compiled(layer: xn.LSTM) -> Any:
    return jax.jit(layer.apply)


def formula(x: np.ndarray, c: Any = 0.0, h: Any = None) -> np.ndarray:
    """The hidden states of every step, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), CELL)
    h = np.zeros((len(x), HIDDEN)) if h is None else h
    states = []
    for t in range(x.shape[1]):
        i, f, g, o = (
            x[:, t] @ params[f"i{gate}"]["kernel"]
            + h @ params[f"h{gate}"]["kernel"]
            + params[f"h{gate}"]["bias"]
            for gate in "ifgo"
        )
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        states.append(h)
    return np.stack(states, 1)


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_the_formula(reverse: bool) -> None:
    ordered = X[:, ::-1] if reverse else X
    expected = formula(ordered, *STATE)
    found = run(reverse=reverse, return_sequences=True, initial_state=STATE)
    np.testing.assert_allclose(found[:, ::-1] if reverse else found, expected, rtol=1e-5, atol=1e-6)
    last = run(reverse=reverse, initial_state=STATE)
    np.testing.assert_allclose(last, expected[:, -1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(), formula(X)[:, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_linens_rnn(reverse: bool) -> None:
    theirs = nn.RNN(nn.LSTMCell(HIDDEN), reverse=reverse, keep_order=True)

    @jax.jit
    def of_ours(params: Any, x: Any) -> Any:
        outputs, pullback = jax.vjp(
            lambda cell, x: run(
                x,
                {"params": {"Scan_0": {"LSTMCell_0": cell}}},
                reverse=reverse,
                return_sequences=True,
            ),
            params,
            x,
        )
        return outputs, pullback(outputs)

    @jax.jit
    def of_theirs(params: Any, x: Any) -> Any:
        outputs, pullback = jax.vjp(
            lambda cell, x: theirs.apply({"params": {"cell": cell}}, x), params, x
        )
        return outputs, pullback(outputs)

    found, gradients = of_ours(CELL, X)
    expected, expected_gradients = of_theirs(CELL, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradients,
        expected_gradients,
    )


def plain(cell: Any, x: Any, state: Any, lengths: Any, *, reverse: bool, every: bool) -> Any:
    """The LSTM as a loop over its cell, which JAX differentiates by itself."""
    c, h = state
    outputs = [jnp.zeros_like(h)] * x.shape[1]
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        (new_c, new_h), _ = xn.LSTMCell().apply({"params": cell}, (c, h), x[:, t])
        valid = (t < lengths)[:, None]
        c, h = jnp.where(valid, new_c, c), jnp.where(valid, new_h, h)
        outputs[t] = jnp.where(valid, new_h, 0)
    return jnp.stack(outputs, 1) if every and outputs else h if not every else x[:, :, :0]


def ours(cell: Any, x: Any, state: Any, lengths: Any, *, reverse: bool, every: bool) -> Any:
    layer = xn.LSTM(HIDDEN, reverse=reverse, return_sequences=every)
    variables = {"params": {"Scan_0": {"LSTMCell_0": cell}}}
    return layer.apply(variables, x, lengths=lengths, initial_state=state)


@settings(max_examples=6)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_gradients_are_those_of_the_loop_over_the_cell(
    lengths: list[int], time: int, reverse: bool, every: bool
) -> None:
    n = len(lengths)
    inputs = CELL, X[:n, :time], (STATE[0][:n], STATE[1][:n])

    def results(f: Any) -> Any:
        run = functools.partial(f, lengths=np.array(lengths), reverse=reverse, every=every)
        output, pull_back = jax.vjp(run, *inputs)
        return output, pull_back(output + 1)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        results(ours),
        results(plain),
    )


@pytest.mark.parametrize("time", [4, 5], ids=["two of two", "and one of one"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_blocks_of_steps_change_nothing(time: int, reverse: bool, every: bool) -> None:
    lengths = np.array([time, 3, 0])
    inputs = CELL, X[:, :time], STATE, lengths
    whole = ours(*inputs, reverse=reverse, every=every)
    with mock.patch.object(_lstm, "GATES_AT_ONCE", 2 * BATCH * 4 * HIDDEN):
        found = ours(*inputs, reverse=reverse, every=every)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_a_run_that_keeps_nothing_holds_the_gates_of_one_block() -> None:
    def temporaries(time: int) -> int:
        x = jax.ShapeDtypeStruct((64, time, 8), jnp.float32)
        layer = xn.LSTM(256)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        program = jax.jit(layer.apply).lower(variables, x).compile()
        return int(program.memory_analysis().temp_size_in_bytes)

    gates_of_all = 4 * 64 * 512 * 4 * 256
    assert temporaries(512) < temporaries(64) * 1.1 < gates_of_all / 8


@pytest.mark.parametrize(
    ("batch", "time", "n_gates", "expected"),
    [
        (32, 128, 1024, 32),
        (64, 64, 2048, 8),
        (1, 1000, 1024, 1000),
        (1, 1026, 1024, 513),
        (1, 1031, 1024, 1024),
        (4096, 7, 4096, 2),
        (0, 5, 16, 5),
    ],
)
def test_how_many_steps_a_block_has(batch: int, time: int, n_gates: int, expected: int) -> None:
    assert _lstm._block_size(batch, time, n_gates) == expected


def test_derivatives_of_any_order_in_reverse_alone() -> None:
    def squares(f: Any) -> Any:
        lengths = np.full(BATCH, TIME)
        return lambda x: (f(CELL, x, STATE, lengths, reverse=False, every=True) ** 2).sum()

    def of_gradient(f: Any) -> Any:
        return jax.grad(lambda x: (jax.grad(squares(f))(x) ** 2).sum())(X)

    np.testing.assert_allclose(of_gradient(ours), of_gradient(plain), rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(squares(ours), (X,), (X,))


def test_it_runs_within_transformations() -> None:
    expected = run(return_sequences=True)
    variables = jax.tree.map(lambda leaf: np.stack([leaf, leaf / 2]), VARIABLES)
    layer = xn.LSTM(HIDDEN, return_sequences=True)
    several = jax.vmap(layer.apply, (0, None))(variables, X)
    np.testing.assert_allclose(several[0], expected, rtol=1e-5, atol=1e-6)
    recomputed = nn.remat(xn.LSTM)(HIDDEN)
    of_ours, of_remat = (
        jax.grad(lambda x, f=f: f.apply(VARIABLES, x).sum())(X)
        for f in (xn.LSTM(HIDDEN), recomputed)
    )
    np.testing.assert_allclose(of_remat, of_ours, rtol=1e-5, atol=1e-6)


def test_no_steps_leave_the_state() -> None:
    nothing = X[:, :0]
    np.testing.assert_array_equal(run(nothing, initial_state=STATE), STATE[1])
    assert run(nothing, return_sequences=True).shape == (BATCH, 0, HIDDEN)
    change = jax.grad(lambda state: run(nothing, initial_state=state).sum())(STATE)
    np.testing.assert_array_equal(change[1], 1)


def test_half_precision_is_as_near_as_it_can_be() -> None:
    exact = run()
    half = xn.LSTM(HIDDEN, dtype=jnp.bfloat16).apply(VARIABLES, X)
    np.testing.assert_allclose(half.astype(np.float32), exact, atol=1e-2)


def test_parameters_are_initialised_as_those_of_a_scanned_cell() -> None:
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return cb.scan(xn.LSTMCell())(*xn.LSTM(HIDDEN).initial_state(x), x)

    found, expected = (m.init(jax.random.key(3), X) for m in (xn.LSTM(HIDDEN), Scanned()))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_cell_is_linens() -> None:
    found = xn.LSTMCell().apply({"params": CELL}, STATE, X[:, 0])
    expected = nn.LSTMCell(HIDDEN).apply({"params": CELL}, STATE, X[:, 0])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_the_cell_in_linens_rnn() -> None:
    rnn = nn.RNN(xn.LSTMCell(features=HIDDEN))
    found = rnn.apply({"params": {"cell": CELL}}, X)
    np.testing.assert_allclose(found, run(return_sequences=True), rtol=1e-6, atol=1e-6)


def test_signatures() -> None:
    cell = cb.infer_signature(xn.LSTMCell())
    assert cell == cb.Signature(3, 3, in_shape=(((), ()), ()))
    assert str(cb.infer_signature(xn.LSTM(3))) == "1 -> 1"


# Lengths.


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, TIME), min_size=BATCH, max_size=BATCH),
    st.booleans(),
    st.booleans(),
)
def test_each_sequence_is_run_within_its_length(
    lengths: list[int], reverse: bool, has_state: bool
) -> None:
    c, h = STATE if has_state else map(np.zeros_like, STATE)
    options = {"reverse": reverse, "lengths": np.array(lengths), "initial_state": (c, h)}
    last, sequence = run(**options), run(return_sequences=True, **options)
    for index, length in enumerate(lengths):
        one = slice(index, index + 1)
        valid = X[one, :length]
        if length == 0:
            expected, states = h[one], np.zeros((1, 0, HIDDEN))
        else:
            states = formula(valid[:, ::-1] if reverse else valid, c[one], h[one])
            expected = states[:, -1]
            states = states[:, ::-1] if reverse else states
        np.testing.assert_allclose(last[one], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sequence[one, :length], states, rtol=1e-5, atol=1e-6)
        assert not np.any(sequence[one, length:])


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_counts_for_nothing(reverse: bool) -> None:
    lengths = np.array([6, 2, 0])
    padding = np.arange(TIME)[None, :] >= lengths[:, None]
    other = np.where(padding[:, :, None], 1e6, X).astype(np.float32)
    np.testing.assert_array_equal(
        run(X, reverse=reverse, lengths=lengths), run(other, reverse=reverse, lengths=lengths)
    )
    gradients = jax.grad(lambda x: run(x, reverse=reverse, lengths=lengths).sum())(other)
    assert np.isfinite(gradients).all()
    assert not np.any(np.asarray(gradients)[padding])


def test_lengths_of_all_steps_are_no_lengths() -> None:
    for options in ({}, {"return_sequences": True}, {"reverse": True}):
        found = run(lengths=[TIME] * BATCH, **options)
        np.testing.assert_allclose(found, run(**options), rtol=1e-6, atol=1e-6)


def test_lengths_do_not_recompile() -> None:
    traced = []

    @jax.jit
    def lstm(lengths: Any) -> Any:
        traced.append(lengths)
        return run(lengths=lengths)

    for lengths in ([1, 2, 3], [6, 0, 4]):
        np.testing.assert_allclose(
            lstm(jnp.array(lengths)), run(lengths=lengths), rtol=1e-6, atol=1e-6
        )
    assert len(traced) == 1


# The initial state.


def test_the_initial_state_is_zeros_and_needs_no_rng() -> None:
    c, h = xn.LSTM(HIDDEN).initial_state(X)
    assert c.shape == h.shape == (BATCH, HIDDEN)
    assert not np.any(c)
    assert not np.any(h)
    np.testing.assert_array_equal(run(), run(initial_state=(c, h)))
    bound = xn.LSTM(HIDDEN).bind(VARIABLES)
    np.testing.assert_array_equal(bound.initial_state(X)[0], c)


def test_the_state_has_the_dtype_of_the_computation() -> None:
    half = xn.LSTM(HIDDEN, dtype=jnp.bfloat16)
    assert half.initial_state(X)[0].dtype == jnp.bfloat16
    assert half.apply(VARIABLES, X).dtype == jnp.bfloat16
    assert half.apply(VARIABLES, X, initial_state=STATE).dtype == jnp.bfloat16
    assert xn.LSTM(HIDDEN).initial_state(jnp.ones((1, 1, 1), jnp.bfloat16))[0].dtype == jnp.float32


def test_the_initial_state_has_gradients() -> None:
    gradients = jax.grad(lambda state: run(initial_state=state).sum())(STATE)
    assert all(np.any(gradient) for gradient in gradients)


# In pipelines.


def test_lstms_stack() -> None:
    stacked = cb.serial(xn.LSTM(4, return_sequences=True), xn.LSTM(HIDDEN))
    lengths = np.array([6, 3, 1])
    found, variables = stacked.init_with_output(jax.random.key(0), X, lengths=lengths)
    first, second = ({"params": variables["params"][name]} for name in ("LSTM_0", "LSTM_1"))
    states = xn.LSTM(4, return_sequences=True).apply(first, X, lengths=lengths)
    expected = xn.LSTM(HIDDEN).apply(second, states, lengths=lengths)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_both_directions() -> None:
    both = cb.branch(xn.LSTM(HIDDEN), xn.LSTM(HIDDEN, reverse=True)) >> cb.concatenate()
    inner = VARIABLES["params"]
    found = both.apply({"params": {"LSTM_0": inner, "LSTM_1": inner}}, X)
    np.testing.assert_allclose(found[:, :HIDDEN], run(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[:, HIDDEN:], run(reverse=True), rtol=1e-6, atol=1e-6)


def test_shapes_with_symbolic_dimensions() -> None:
    b, t = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, FEATURES), jnp.float32)
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    found = jax.eval_shape(lambda x, lengths: run(x, lengths=lengths), x, lengths)
    assert found.shape == (b, HIDDEN)
    found = jax.eval_shape(lambda x: run(x, return_sequences=True), x)
    assert found.shape == (b, t, HIDDEN)


def test_one_exported_program_for_all_lengths() -> None:
    b, t = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, FEATURES), jnp.float32)

    @jax.jit
    def change(x: Any) -> Any:
        return jax.grad(lambda x: run(x).sum())(x)

    found = jax.export.export(change)(x).call(X)
    np.testing.assert_allclose(found, change(X), rtol=1e-6, atol=1e-6)


# What goes wrong.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: run(lengths=np.array([1, 2])),
            "LSTM takes lengths as integers, one for each sequence, of shape [3]; got int32[2].",
        ),
        (lambda: run(lengths=np.ones((3, 1), int)), "of shape [3]; got int32[3, 1]."),
        (lambda: run(lengths=np.ones(3, np.float32)), "of shape [3]; got float32[3]."),
        (lambda: run(lengths=np.ones(3, bool)), "of shape [3]; got bool[3]."),
        (
            lambda: run(initial_state=(STATE[0], STATE[1][:, :2])),
            (
                "LSTM takes an initial_state (c, h), two arrays of shape [3, 5]; got [3, 5] and "
                "[3, 2]."
            ),
        ),
        (lambda: run(initial_state=STATE[:1]), "two arrays of shape [3, 5]; got [3, 5]."),
        (
            lambda: run(X[0]),
            (
                "LSTM takes inputs with axes [batch, time, features]; got shape [6, 4], which has "
                "2 axes."
            ),
        ),
        (lambda: xn.LSTM(0), "LSTM takes d_hidden of at least 1; got 0."),
        (
            lambda: xn.LSTMCell().initialize_carry(jax.random.key(0), (2, 3)),
            (
                "LSTMCell cannot make a carry of unknown size: its field features is None. Say "
                "LSTMCell(features=...)."
            ),
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
