"""LSTM, GRU and Recurrent against float64 loops and linen, and what their options mean."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra.layer import _gated_recurrence

BATCH, TIME, FEATURES, HIDDEN = 3, 6, 4, 5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(BATCH, TIME, FEATURES)


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """A layer that runs a gated cell, and linen's cell with the same parameters."""

    layer: type[xn.LSTM | xn.GRU]
    cell: type[nn.RNNCellBase]
    n_state: int

    @property
    def name(self) -> str:
        return self.layer.__name__

    @functools.cached_property
    def params(self) -> Any:
        """The parameters of a cell, all of them random."""
        cell = self.cell(HIDDEN)
        carry = cell.initialize_carry(jax.random.key(0), X[:, 0].shape)
        shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, X[:, 0])["params"]
        leaves, tree = jax.tree.flatten(shapes)
        drawn = [normal(*leaf.shape, seed=seed) / 2 for seed, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, drawn)

    def variables(self, params: Any = None) -> Any:
        params = self.params if params is None else params
        return {"params": {"Scan_0": {f"{self.cell.__name__}_0": params}}}

    def state(self, batch: int = BATCH) -> Any:
        """An initial state as the layer takes it."""
        parts = tuple(normal(batch, HIDDEN, seed=1 + index) for index in range(self.n_state))
        return parts if self.n_state > 1 else parts[0]

    def run(self, x: Any = X, variables: Any = None, **options: Any) -> Any:
        names = ("return_sequences", "reverse", "return_state", "dtype")
        fields = {name: options.pop(name) for name in names if name in options}
        layer = self.layer(HIDDEN, **fields)
        leaves = jax.tree.leaves((x, variables, options))
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        apply = layer.apply if is_traced else apply_compiled(layer)
        return apply(self.variables() if variables is None else variables, x, **options)

    def step(self, params: Any, state: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
        """One step in float64; the hidden state is last."""

        def product(name: str, inputs: Any) -> Any:
            return inputs @ params[name]["kernel"] + params[name].get("bias", 0)

        def sigmoid(x: Any) -> Any:
            return 1 / (1 + np.exp(-x))

        h = state[-1]
        if self.cell is nn.LSTMCell:
            i, f, g, o = (product(f"i{gate}", x) + product(f"h{gate}", h) for gate in "ifgo")
            c = sigmoid(f) * state[0] + sigmoid(i) * np.tanh(g)
            return c, sigmoid(o) * np.tanh(c)
        r, z = (sigmoid(product(f"i{gate}", x) + product(f"h{gate}", h)) for gate in "rz")
        n = np.tanh(product("in", x) + r * product("hn", h))
        return ((1 - z) * n + z * h,)

    def loop(self, x: Any, state: Any, lengths: Any, reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """The outputs of every step and the last state, one sequence after the other."""
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.params)
        outputs = np.zeros((*x.shape[:2], HIDDEN))
        last = [np.array(part, np.float64) for part in as_tuple(state)]
        for row, length in enumerate(lengths):
            now = tuple(part[row] for part in last)
            for t in reversed(range(length)) if reverse else range(length):
                now = self.step(params, now, np.asarray(x[row, t], np.float64))
                outputs[row, t] = now[-1]
            for part, value in zip(last, now, strict=True):
                part[row] = value
        return outputs, tuple(last)

    def plain(
        self, params: Any, x: Any, state: Any, lengths: Any, *, reverse: bool, every: bool
    ) -> Any:
        """The layer as a Python loop over linen's cell, which JAX differentiates by itself."""
        cell = self.cell(HIDDEN)
        outputs = [jnp.zeros_like(as_tuple(state)[-1])] * x.shape[1]
        for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
            after, output = cell.apply({"params": params}, state, x[:, t])
            valid = (t < lengths)[:, None]
            state = jax.tree.map(functools.partial(jnp.where, valid), after, state)
            outputs[t] = jnp.where(valid, output, 0)
        return jnp.stack(outputs, 1) if every else as_tuple(state)[-1]

    def ours(
        self, params: Any, x: Any, state: Any, lengths: Any, *, reverse: bool, every: bool
    ) -> Any:
        layer = self.layer(HIDDEN, reverse=reverse, return_sequences=every)
        return layer.apply(self.variables(params), x, lengths=lengths, initial_state=state)


quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""To compile takes most of the time here: a third of it without optimisation."""


def as_tuple(state: Any) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


@functools.cache
def apply_compiled(layer: nn.Module) -> Any:
    return quick_jit(layer.apply)


LSTM, GRU = Kind(xn.LSTM, nn.LSTMCell, 2), Kind(xn.GRU, nn.GRUCell, 1)
KINDS = [LSTM, GRU]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])

assert_near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def assert_trees_near(found: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    near = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(near, found, expected)


# Numbers.


@every_kind
@settings(max_examples=12)
@given(
    time=st.sampled_from([1, TIME]),
    data=st.data(),
    reverse=st.booleans(),
    has_state=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_it_is_the_formula(
    kind: Kind, time: int, data: st.DataObject, reverse: bool, has_state: bool, dtype: Any
) -> None:
    """For all lengths, and whatever padding holds."""
    lengths = np.array(
        data.draw(st.lists(st.integers(0, time), min_size=BATCH, max_size=BATCH), label="lengths")
    )
    x, state = X[:, :time].copy(), kind.state()
    if not has_state:
        state = jax.tree.map(np.zeros_like, state)
    expected, expected_state = kind.loop(x, state, lengths, reverse)
    is_padding = np.arange(time)[None, :] >= lengths[:, None]
    x[is_padding] = np.nan
    options = {"reverse": reverse, "lengths": lengths, "dtype": dtype, "return_state": True}
    options["initial_state"] = state if has_state else None
    near = assert_near
    if dtype == jnp.bfloat16:
        near = functools.partial(np.testing.assert_allclose, atol=0.05)
    output, *last = kind.run(x, **options)
    sequence, *_ = kind.run(x, return_sequences=True, **options)
    assert output.dtype == sequence.dtype == last[0].dtype == dtype
    near(sequence.astype(np.float32), expected)
    assert not np.any(sequence[is_padding])
    np.testing.assert_array_equal(output, last[-1])
    for part, expected_part in zip(last, expected_state, strict=True):
        near(part.astype(np.float32), expected_part)


@both_directions
@every_kind
def test_values_and_gradients_are_those_of_linens_rnn(kind: Kind, reverse: bool) -> None:
    theirs = nn.RNN(kind.cell(HIDDEN), reverse=reverse, keep_order=True)

    def run_ours(params: Any, x: Any) -> Any:
        return kind.run(x, kind.variables(params), reverse=reverse, return_sequences=True)

    def run_theirs(params: Any, x: Any) -> Any:
        return theirs.apply({"params": {"cell": params}}, x)

    @functools.partial(quick_jit, static_argnums=0)
    def run_back(run: Any, params: Any, x: Any) -> Any:
        outputs, pull_back = jax.vjp(run, params, x)
        return outputs, pull_back(outputs)

    found, expected = (run_back(run, kind.params, X) for run in (run_ours, run_theirs))
    assert_trees_near(found, expected)


@every_kind
@settings(max_examples=5)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_gradients_are_those_of_the_loop_over_the_cell(
    kind: Kind, lengths: list[int], time: int, reverse: bool, every: bool
) -> None:
    n = len(lengths)
    lengths = [min(length, time) for length in lengths]
    inputs = kind.params, X[:n, :time], kind.state(n)

    @functools.partial(quick_jit, static_argnums=0)
    def run_back(f: Any, *inputs: Any) -> Any:
        run = functools.partial(f, lengths=np.array(lengths), reverse=reverse, every=every)
        output, pull_back = jax.vjp(run, *inputs)
        return output, pull_back(output + 1)

    assert_trees_near(run_back(kind.ours, *inputs), run_back(kind.plain, *inputs))


def derivatives(f: Any, *inputs: Any) -> Iterator[Any]:
    """Derivatives of f, a number, in every mode and in modes of modes."""
    every = tuple(range(len(inputs)))
    directions = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), inputs)
    gradient = jax.grad(f, every)

    def derive(*inputs: Any) -> Any:
        return jax.jvp(f, inputs, directions)[1]

    def square_gradient(*inputs: Any) -> Any:
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient(*inputs)))

    yield gradient(*inputs)
    yield jax.jvp(f, inputs, directions)
    yield jax.linearize(f, *inputs)[1](*directions)
    yield jax.jvp(gradient, inputs, directions)[1]
    yield jax.grad(derive, every)(*inputs)
    yield jax.jvp(derive, inputs, directions)[1]
    yield jax.grad(square_gradient, every)(*inputs)
    yield jax.hessian(lambda x: f(inputs[0], x, inputs[2]))(inputs[1])
    yield jax.jacfwd(lambda state: f(inputs[0], inputs[1], state))(inputs[2])
    several = jax.tree.map(lambda x: jnp.stack([x, x / 2]), directions)
    yield jax.vmap(lambda direction: jax.jvp(gradient, inputs, direction)[1])(several)
    yield jax.grad(jax.checkpoint(f), every)(*inputs)


@pytest.mark.parametrize(("kind", "reverse"), [(LSTM, False), (GRU, True)], ids=["LSTM", "GRU"])
def test_every_derivative_is_that_of_the_loop(kind: Kind, reverse: bool) -> None:
    with jax.enable_x64(True):
        double = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
        inputs = double((kind.params, X[:2, :2], kind.state(2)))
        lengths = jnp.array([2, 1])

        def measure(run: Any) -> Any:
            def f(*inputs: Any) -> Any:
                outputs = run(*inputs, lengths, reverse=reverse, every=True)
                return jnp.sum(jnp.sin(outputs) * jnp.arange(outputs.size).reshape(outputs.shape))

            return f

        found, expected = (
            quick_jit(lambda *inputs, run=run: list(derivatives(measure(run), *inputs)))(*inputs)
            for run in (kind.ours, kind.plain)
        )
        assert_trees_near(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("time", [4, 5], ids=["two blocks", "two blocks and a rest"])
@both_directions
@pytest.mark.parametrize("every", [False, True], ids=["last", "every"])
def test_blocks_of_steps_change_nothing(time: int, reverse: bool, every: bool) -> None:
    lengths = np.array([time, 3, 0])
    inputs = LSTM.params, X[:, :time], LSTM.state(), lengths
    whole = LSTM.ours(*inputs, reverse=reverse, every=every)
    with mock.patch.object(_gated_recurrence, "MAX_GATES_PER_BLOCK", 2 * BATCH * 4 * HIDDEN):
        found = LSTM.ours(*inputs, reverse=reverse, every=every)
    assert_near(found, whole)


@pytest.mark.parametrize(
    ("batch", "time", "n_columns", "expected"),
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
def test_how_many_steps_a_block_has(batch: int, time: int, n_columns: int, expected: int) -> None:
    assert _gated_recurrence._choose_block_size(batch, time, n_columns) == expected


# Memory and work.


def compile_lstm(time: int, *, batch: int = 64, d_hidden: int = 256, gradient: bool = False) -> Any:
    x = jax.ShapeDtypeStruct((batch, time, 8), jnp.float32)
    layer = xn.LSTM(d_hidden)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def loss(variables: Any, x: Any) -> Any:
        return jnp.sum(layer.apply(variables, x))

    return jax.jit(jax.grad(loss) if gradient else layer.apply).lower(variables, x).compile()


def test_without_a_gradient_only_the_gates_of_one_block_are_in_memory() -> None:
    temporaries = {t: compile_lstm(t).memory_analysis().temp_size_in_bytes for t in (64, 512)}
    gates_of_all = 4 * 64 * 512 * 4 * 256
    assert temporaries[512] < temporaries[64] * 1.1 < gates_of_all / 8


def test_the_gradient_saves_gates_memory_and_hidden_state_only() -> None:
    def measure(time: int) -> int:
        program = compile_lstm(time, batch=8, d_hidden=64, gradient=True)
        return int(program.memory_analysis().temp_size_in_bytes)

    of_each_step = 4 * 8 * 64  # bytes of one number for each hidden unit
    gates_and_their_gradients, states = 4 + 4, 2
    per_step = (measure(512) - measure(256)) / 256
    assert per_step < (gates_and_their_gradients + states) * of_each_step * 1.05


@every_kind
def test_loops_have_one_product_a_step(kind: Kind) -> None:
    """Gradients of kernels are products of all steps, outside of the loops."""

    def list_loops(jaxpr: Any) -> Iterator[str]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield str(equation.params["jaxpr"])
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from list_loops(inner)

    gradient = jax.grad(lambda params, x: kind.run(x, kind.variables(params)).sum(), (0, 1))
    loops = list(list_loops(jax.make_jaxpr(gradient)(kind.params, X).jaxpr))
    assert len(loops) >= 2
    assert {loop.count("dot_general[") for loop in loops} == {1}


# Programs.


@every_kind
def test_it_runs_within_transformations(kind: Kind) -> None:
    expected = kind.run(return_sequences=True)
    variables = jax.tree.map(lambda leaf: np.stack([leaf, leaf / 2]), kind.variables())
    layer = kind.layer(HIDDEN, return_sequences=True)
    several = jax.vmap(layer.apply, (0, None))(variables, X)
    assert_near(several[0], expected)
    gradient, of_remat = (
        jax.grad(lambda x, f=f: f.apply(kind.variables(), x).sum())(X)
        for f in (kind.layer(HIDDEN), nn.remat(kind.layer)(HIDDEN))
    )
    assert_near(of_remat, gradient)


@every_kind
def test_no_steps_leave_the_state(kind: Kind) -> None:
    nothing, state = X[:, :0], kind.state()
    np.testing.assert_array_equal(kind.run(nothing, initial_state=state), as_tuple(state)[-1])
    assert kind.run(nothing, return_sequences=True).shape == (BATCH, 0, HIDDEN)
    gradient = jax.grad(lambda state: kind.run(nothing, initial_state=state).sum())(state)
    np.testing.assert_array_equal(as_tuple(gradient)[-1], 1)


def test_shapes_with_symbolic_dimensions() -> None:
    b, t = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, FEATURES), jnp.float32)
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    found = jax.eval_shape(lambda x, lengths: LSTM.run(x, lengths=lengths), x, lengths)
    assert found.shape == (b, HIDDEN)
    found = jax.eval_shape(lambda x: LSTM.run(x, return_sequences=True), x)
    assert found.shape == (b, t, HIDDEN)


@every_kind
def test_one_exported_program_for_all_lengths(kind: Kind) -> None:
    b, t = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, FEATURES), jnp.float32)

    @jax.jit
    def derive(x: Any) -> Any:
        return jax.grad(lambda x: kind.run(x).sum())(x)

    assert_near(jax.export.export(derive)(x).call(X), derive(X))


def test_lengths_do_not_recompile() -> None:
    traced = []

    @jax.jit
    def lstm(lengths: Any) -> Any:
        traced.append(lengths)
        return LSTM.run(lengths=lengths)

    for lengths in ([1, 2, 3], [6, 0, 4]):
        assert_near(lstm(jnp.array(lengths)), LSTM.run(lengths=lengths))
    assert len(traced) == 1


# Padding.


def layers() -> dict[str, Any]:
    """All layers that run over time, with their state."""
    options = {"return_state": True}
    return {
        "LSTM": xn.LSTM(HIDDEN, return_sequences=True, **options),
        "GRU": xn.GRU(HIDDEN, return_sequences=True, **options),
        "Recurrent": xn.Recurrent(nn.MGUCell(HIDDEN), return_sequences=True, **options),
        "LinearRecurrence": xn.LinearRecurrence(2, **options),
    }


every_layer = pytest.mark.parametrize("name", layers())


@every_layer
@both_directions
def test_padding_reaches_nothing(name: str, reverse: bool) -> None:
    layer = layers()[name].clone(reverse=reverse)
    lengths = np.array([TIME, 2, 0])
    is_padding = np.arange(TIME)[None, :] >= lengths[:, None]
    x = np.where(is_padding[:, :, None], np.float32(np.nan), X)
    x[1, -1] = np.inf
    variables = quick_jit(layer.init)(jax.random.key(0), X)
    state = jax.tree.map(lambda x: x + 0.5, layer.initial_state(X))

    @quick_jit
    def run_back(variables: Any, x: Any, state: Any) -> Any:
        def run(variables: Any, x: Any, state: Any) -> Any:
            return layer.apply(variables, x, lengths=lengths, initial_state=state)

        outputs, pull_back = jax.vjp(run, variables, x, state)
        return outputs, pull_back(jax.tree.map(jnp.cos, outputs))

    found, expected = run_back(variables, x, state), run_back(variables, X, state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    _, (_, x_gradient, _) = found
    assert np.isfinite(x_gradient).all()
    assert not np.any(x_gradient[is_padding])


@every_kind
def test_lengths_of_all_steps_are_no_lengths(kind: Kind) -> None:
    for options in ({}, {"return_sequences": True}, {"reverse": True}):
        assert_near(kind.run(lengths=[TIME] * BATCH, **options), kind.run(**options))


# The state.


@every_layer
@settings(max_examples=4)
@given(cut=st.sampled_from([0, 1, 4, TIME]), reverse=st.booleans())
def test_a_run_goes_on_from_the_state_of_another(name: str, cut: int, reverse: bool) -> None:
    layer = layers()[name].clone(reverse=reverse)
    variables = quick_jit(layer.init)(jax.random.key(0), X)
    apply = apply_compiled(layer)
    outputs, *state = apply(variables, X)
    order = [slice(0, cut), slice(cut, None)]
    first, second = reversed(order) if reverse else order
    first_outputs, *between = apply(variables, X[:, first])
    initial = tuple(between) if len(between) > 1 else between[0]
    second_outputs, *last = apply(variables, X[:, second], initial_state=initial)
    parts = [second_outputs, first_outputs] if reverse else [first_outputs, second_outputs]
    assert_near(np.concatenate(parts, axis=1), outputs)
    assert_trees_near(last, state)


def test_the_initial_state_is_zeros_and_needs_no_rng() -> None:
    c, h = xn.LSTM(HIDDEN).initial_state(X)
    assert c.shape == h.shape == (BATCH, HIDDEN)
    assert not np.any(c)
    assert not np.any(h)
    np.testing.assert_array_equal(LSTM.run(), LSTM.run(initial_state=(c, h)))
    bound = xn.LSTM(HIDDEN).bind(LSTM.variables())
    np.testing.assert_array_equal(bound.initial_state(X)[0], c)
    assert not np.any(xn.GRU(HIDDEN).initial_state(X))


def test_the_state_has_the_dtype_of_the_computation() -> None:
    half = xn.LSTM(HIDDEN, dtype=jnp.bfloat16)
    assert half.initial_state(X)[0].dtype == jnp.bfloat16
    assert half.apply(LSTM.variables(), X, initial_state=LSTM.state()).dtype == jnp.bfloat16
    assert xn.LSTM(HIDDEN).initial_state(jnp.ones((1, 1, 1), jnp.bfloat16))[0].dtype == jnp.float32
    cell = xn.Recurrent(nn.GRUCell(HIDDEN, dtype=jnp.bfloat16))
    assert cell.initial_state(X).dtype == jnp.bfloat16


# Parameters.


def test_parameters_are_initialised_as_those_of_a_scanned_cell() -> None:
    class ScannedLSTM(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return cb.scan(xn.LSTMCell())(*xn.LSTM(HIDDEN).initial_state(x), x)

    class ScannedGRU(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            cell = cb.fn(nn.GRUCell(HIDDEN), n_in=2, n_out=2)
            return cb.scan(cell)(xn.GRU(HIDDEN).initial_state(x), x)

    for layer, scanned in ((xn.LSTM, ScannedLSTM), (xn.GRU, ScannedGRU)):
        found, expected = (m.init(jax.random.key(3), X) for m in (layer(HIDDEN), scanned()))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def initialize(layer: Any) -> Any:
    if isinstance(layer, nn.RNNCellBase):
        return layer.init(jax.random.key(0), LSTM.state(), X[:, 0])
    return layer.init(jax.random.key(0), X)


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(xn.LSTM, HIDDEN),
        xn.LSTMCell,
        functools.partial(xn.GRU, HIDDEN),
        xn.LinearRecurrence,
    ],
)
def test_half_precision_parameters_are_drawn_in_float32(make: Any, half: Any) -> None:
    found, exact = initialize(make(param_dtype=half)), initialize(make())
    rounded = jax.tree.map(lambda x: x.astype(half), exact)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(half)}


@every_kind
def test_float64_parameters_are_linens(kind: Kind) -> None:
    with jax.enable_x64(True):
        found = kind.layer(HIDDEN, param_dtype=jnp.float64).init(jax.random.key(0), X)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float64")}


def test_every_parameter_can_be_partitioned_by_name() -> None:
    def name_axes(init: Any, *names: str) -> Any:
        return nn.with_logical_partitioning(init, names)

    gated = {
        "kernel_init": name_axes(nn.initializers.lecun_normal(), "features", "hidden"),
        "recurrent_kernel_init": name_axes(nn.initializers.orthogonal(), "hidden", "hidden_out"),
        "bias_init": name_axes(nn.initializers.zeros_init(), "hidden"),
    }
    blocks = {
        "kernel_init": name_axes(nn.initializers.lecun_normal(), "blocks", "in", "out"),
        "bias_init": name_axes(nn.initializers.zeros_init(), "features"),
        "decay_init": name_axes(nn.initializers.normal(), "features"),
    }
    shared = {"param_dtype": jnp.bfloat16}
    made = [
        xn.LSTM(HIDDEN, **gated, **shared),
        xn.GRU(HIDDEN, **gated, **shared),
        xn.LSTMCell(**gated, **shared),
        xn.Recurrent(xn.LSTMCell(features=HIDDEN, **gated, **shared)),
        xn.LinearRecurrence(2, **blocks, **shared),
    ]
    for layer in made:
        variables = initialize(layer)
        specs = nn.get_partition_spec(variables)
        ranks = jax.tree.map(jnp.ndim, nn.unbox(variables))
        assert jax.tree.map(len, specs, is_leaf=lambda x: isinstance(x, PartitionSpec)) == ranks
        boxes = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
        assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
        if layer is not made[2]:
            layer.apply(variables, X.astype(jnp.bfloat16))


# Dtypes.


@every_layer
@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_half_precision_under_strict_promotion(name: str, half: Any) -> None:
    makes = {
        "LSTM": functools.partial(xn.LSTM, HIDDEN),
        "GRU": functools.partial(xn.GRU, HIDDEN),
        "Recurrent": lambda dtype: xn.Recurrent(nn.GRUCell(HIDDEN, dtype=dtype)),
        "LinearRecurrence": functools.partial(xn.LinearRecurrence, 2),
    }
    layer = makes[name](dtype=half)
    lengths = np.array([TIME, 2, 0])
    with jax.numpy_dtype_promotion("strict"):
        variables = quick_jit(layer.init)(jax.random.key(0), X)

        def loss(variables: Any, x: Any) -> Any:
            return layer.apply(variables, x, lengths=lengths).sum()

        value, gradients = quick_jit(jax.value_and_grad(loss, (0, 1)))(variables, X)
    assert value.dtype == half
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_half_precision_is_as_near_as_it_can_be() -> None:
    assert_half = functools.partial(np.testing.assert_allclose, atol=1e-2)
    for kind in KINDS:
        assert_half(kind.run(dtype=jnp.bfloat16).astype(np.float32), kind.run())


# Cells.


def test_the_cell_is_linens() -> None:
    cell, theirs = xn.LSTMCell(), nn.LSTMCell(HIDDEN)
    variables = {"params": LSTM.params}
    found = cell.apply(variables, LSTM.state(), X[:, 0])
    expected = theirs.apply(variables, LSTM.state(), X[:, 0])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    inits = (f.init(jax.random.key(1), LSTM.state(), X[:, 0]) for f in (cell, theirs))
    jax.tree.map(np.testing.assert_array_equal, *inits)


def test_the_cell_in_half_precision_is_linens() -> None:
    variables = {"params": LSTM.params}
    options = {"dtype": jnp.bfloat16}
    expected = nn.LSTMCell(HIDDEN, **options).apply(variables, LSTM.state(), X[:, 0])
    with jax.numpy_dtype_promotion("strict"):
        found = xn.LSTMCell(**options).apply(variables, LSTM.state(), X[:, 0])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


CELLS = [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
@both_directions
def test_recurrent_is_linens_rnn(cell: Any, reverse: bool) -> None:
    options = {"reverse": reverse}
    ours = xn.Recurrent(cell(HIDDEN), return_sequences=True, return_state=True, **options)
    theirs = nn.RNN(cell(HIDDEN), keep_order=True, return_carry=True, **options)
    (outputs, *state), variables = ours.init_with_output(jax.random.key(0), X)
    (carry, expected), expected_variables = theirs.init_with_output(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, variables, expected_variables)
    np.testing.assert_array_equal(outputs, expected)
    assert_trees_near(state, list(as_tuple(carry)), rtol=0, atol=0)
    last = xn.Recurrent(cell(HIDDEN), **options).apply(variables, X)
    np.testing.assert_array_equal(last, outputs[:, 0 if reverse else -1])


@both_directions
def test_recurrent_runs_each_sequence_within_its_length(reverse: bool) -> None:
    lengths = np.array([TIME, 2, 0])
    options = {"lengths": lengths, "initial_state": GRU.state()}
    variables = {"params": {"cell": GRU.params}}
    layer = xn.Recurrent(nn.GRUCell(HIDDEN), reverse=reverse, return_state=True)
    last, h = layer.apply(variables, X, **options)
    sequence, _ = layer.clone(return_sequences=True).apply(variables, X, **options)
    expected, (expected_h,) = GRU.loop(X, GRU.state(), lengths, reverse)
    assert_near(sequence, expected)
    assert_near(h, expected_h)
    assert_near(last[:2], expected_h[:2])
    assert not np.any(last[2])


def test_recurrent_over_no_steps() -> None:
    layer = xn.Recurrent(nn.GRUCell(HIDDEN), return_state=True)
    (output, h), variables = layer.init_with_output(jax.random.key(0), X[:, :0])
    assert jax.tree.map(jnp.shape, variables["params"]["cell"]["in"]["kernel"]) == (4, 5)
    assert output.shape == (BATCH, HIDDEN)
    np.testing.assert_array_equal(h, 0)


class NoisyCell(nn.RNNCellBase):
    """Adds noise of its own at each step, and sows it."""

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        noise = jax.random.normal(self.make_rng("noise"), ())
        self.sow("intermediates", "noise", noise)
        return carry, inputs + noise

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Any:
        return {"count": jnp.zeros(input_shape[:-1]), "nested": (jnp.zeros(input_shape[:-1]),)}

    @property
    def num_feature_axes(self) -> int:
        return 1


def test_each_step_of_recurrent_draws_and_sows_by_itself() -> None:
    layer = xn.Recurrent(NoisyCell(), return_sequences=True)
    rngs = {"noise": jax.random.key(0)}
    outputs, state = layer.apply({}, np.zeros_like(X), rngs=rngs, mutable=["intermediates"])
    (noise,) = state["intermediates"]["cell"]["noise"]
    assert len({float(x) for x in outputs[0, :, 0]}) == TIME
    assert_near(np.ravel(noise), outputs[0, :, 0])


# In pipelines.


def test_signatures() -> None:
    cell = cb.infer_signature(xn.LSTMCell())
    assert cell == cb.Signature(3, 3, in_shape=(((), ()), ()))
    expected = {"LSTM": "1 -> 3", "LinearRecurrence": "1 -> 2"}
    for name, layer in layers().items():
        assert str(cb.infer_signature(layer)) == expected.get(name, "1 -> 2")
        assert str(cb.infer_signature(layer.clone(return_state=False))) == "1 -> 1"
    assert str(cb.infer_signature(xn.Recurrent(nn.LSTMCell(3), return_state=True))) == "1 -> 3"
    assert str(cb.infer_signature(xn.Recurrent(NoisyCell(), return_state=True))) == "1 -> 2"


def test_the_state_is_items_of_the_stack() -> None:
    pipeline = xn.LSTM(HIDDEN, return_state=True) >> cb.select((2, 0, 1))
    (h, output, c), variables = pipeline.init_with_output(jax.random.key(0), X)
    np.testing.assert_array_equal(h, output)
    expected = xn.LSTM(HIDDEN, return_state=True).apply(
        {"params": variables["params"]["LSTM_0"]}, X
    )
    np.testing.assert_array_equal(c, expected[1])


def test_lstms_stack() -> None:
    stacked = cb.serial(xn.LSTM(4, return_sequences=True), xn.LSTM(HIDDEN))
    lengths = np.array([6, 3, 1])
    found, variables = stacked.init_with_output(jax.random.key(0), X, lengths=lengths)
    first, second = ({"params": variables["params"][name]} for name in ("LSTM_0", "LSTM_1"))
    states = xn.LSTM(4, return_sequences=True).apply(first, X, lengths=lengths)
    assert_near(found, xn.LSTM(HIDDEN).apply(second, states, lengths=lengths))


def test_both_directions() -> None:
    both = cb.branch(xn.LSTM(HIDDEN), xn.LSTM(HIDDEN, reverse=True)) >> cb.concatenate()
    inner = LSTM.variables()["params"]
    found = both.apply({"params": {"LSTM_0": inner, "LSTM_1": inner}}, X)
    assert_near(found[:, :HIDDEN], LSTM.run())
    assert_near(found[:, HIDDEN:], LSTM.run(reverse=True))


# What goes wrong.


def run_recurrent(x: Any = X, **options: Any) -> Any:
    return xn.Recurrent(nn.LSTMCell(HIDDEN)).init_with_output(jax.random.key(0), x, **options)


C, H = LSTM.state()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LSTM.run(lengths=np.array([1, 2])),
            "LSTM takes lengths as integers, one for each sequence, of shape [3]; got i32[2].",
        ),
        (lambda: LSTM.run(lengths=np.ones((3, 1), int)), "of shape [3]; got i32[3, 1]."),
        (lambda: GRU.run(lengths=np.ones(3, np.float32)), "GRU takes lengths as integers"),
        (lambda: LSTM.run(lengths=np.ones(3, bool)), "of shape [3]; got bool[3]."),
        (
            lambda: xn.LSTM(HIDDEN).apply(LSTM.variables(), X, lengths=[6, 7, 8]),
            "LSTM takes lengths from 0 to 6, the number of steps of its inputs; got 7, 8.",
        ),
        (
            lambda: xn.GRU(HIDDEN).apply(GRU.variables(), X, lengths=[-1, 0, 6]),
            "GRU takes lengths from 0 to 6, the number of steps of its inputs; got -1.",
        ),
        (
            lambda: LSTM.run(initial_state=(C, H[:, :2])),
            (
                "LSTM takes an initial_state (c, h), two arrays of shape [3, 5]; got [3, 5] and "
                "[3, 2]."
            ),
        ),
        (lambda: LSTM.run(initial_state=(C,)), "two arrays of shape [3, 5]; got [3, 5]."),
        (
            lambda: GRU.run(initial_state=H[:2]),
            "GRU takes an initial_state h, an array of shape [3, 5]; got [2, 5].",
        ),
        (
            lambda: LSTM.run(X[0]),
            "LSTM takes inputs with axes [batch, time, features]; got shape [6, 4]",
        ),
        (lambda: xn.LSTM(0), "LSTM takes d_hidden of at least 1; got 0."),
        (
            lambda: xn.LSTMCell().initialize_carry(jax.random.key(0), (2, 3)),
            (
                "LSTMCell cannot make a carry of unknown size: its field features is None. Say "
                "LSTMCell(features=...)."
            ),
        ),
        (
            lambda: xn.Recurrent(nn.Dense),
            (
                "Recurrent takes a cell, a flax.linen.RNNCellBase such as nn.GRUCell(64); got "
                "<class 'flax.linen.linear.Dense'>. Run any other function (carry, inputs) -> "
                "(carry, outputs) over time by cb.scan."
            ),
        ),
        (
            lambda: run_recurrent(X[0]),
            "Recurrent takes inputs with axes [batch, time, features]; got shape [6, 4]",
        ),
        (
            lambda: xn.Recurrent(nn.ConvLSTMCell(2, (3, 3))).init(jax.random.key(0), X),
            "Recurrent takes inputs with axes [batch, time, ..., features]; got shape [3, 6, 4]",
        ),
        (
            lambda: run_recurrent(initial_state=(C, H[:2])),
            (
                "Recurrent takes an initial_state like the carry of its LSTMCell, with shapes "
                "((3, 5), (3, 5)); got ((3, 5), (2, 5))."
            ),
        ),
        (lambda: run_recurrent(lengths=[1, 2]), "Recurrent takes lengths as integers"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
