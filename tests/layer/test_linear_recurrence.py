"""The linear recurrence against a loop in float64."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import layer as xn
from flax_extra.layer._linear_recurrence import run_linear_recurrence
from tests.layer.test_recurrent import derivatives, quick_jit

FEATURES = 4


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_params(n_blocks: int) -> Any:
    x = jax.ShapeDtypeStruct((1, 1, FEATURES), jnp.float32)
    shapes = jax.eval_shape(xn.LinearRecurrence(n_blocks).init, jax.random.key(0), x)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def loop(params: Any, x: Any, state: Any, lengths: Any, reverse: bool) -> tuple[Any, Any]:
    """Equations (1) to (4) of the paper, one step of one sequence after the other, in float64."""
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
    state, outputs = np.array(state, np.float64), np.zeros_like(x)

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    def gate(name: str, x: Any) -> Any:
        kernel = params[name]["kernel"]
        n, size, _ = kernel.shape
        whole = np.zeros((n * size, n * size))
        for block in range(n):
            span = slice(block * size, (block + 1) * size)
            whole[span, span] = kernel[block]
        return sigmoid(x @ whole + params[name]["bias"])

    for row, length in enumerate(lengths):
        for t in reversed(range(length)) if reverse else range(length):
            r, i = (gate(name, x[row, t]) for name in ("recurrence_gate", "input_gate"))
            a = sigmoid(params["decay_logit"]) ** (8 * r)
            state[row] = a * state[row] + np.sqrt(1 - a**2) * (i * x[row, t])
            outputs[row, t] = state[row]
    return outputs, state


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 7), min_size=2, max_size=2),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_it_is_the_formula(
    lengths: list[int], time: int, n_blocks: int, reverse: bool, has_state: bool
) -> None:
    lengths = [min(length, time) for length in lengths]
    x, params = normal(2, time, FEATURES), draw_params(n_blocks)
    state = normal(2, FEATURES, seed=9) if has_state else np.zeros((2, FEATURES), np.float32)
    expected, expected_state = loop(params, x, state, lengths, reverse)
    x[np.arange(time)[None, :] >= np.array(lengths)[:, None]] = np.nan
    layer = xn.LinearRecurrence(n_blocks, reverse=reverse, return_state=True)
    outputs, last = quick_jit(layer.apply)(
        {"params": params},
        x,
        lengths=np.array(lengths),
        initial_state=state if has_state else None,
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last, expected_state, rtol=1e-5, atol=1e-6)


def run_plain(decay: Any, forcing: Any, state: Any, *, reverse: bool = False) -> Any:
    """The recurrence as a Python loop, which JAX differentiates by itself."""
    outputs = [state] * decay.shape[1]
    for t in reversed(range(len(outputs))) if reverse else range(len(outputs)):
        outputs[t] = state = decay[:, t] * state + forcing[:, t]
    return jnp.stack(outputs, 1)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_every_derivative_is_that_of_the_loop(reverse: bool) -> None:
    with jax.enable_x64(True):
        inputs = tuple(
            jnp.asarray(normal(*shape, seed=seed), jnp.float64)
            for seed, shape in enumerate([(1, 3, 2), (1, 3, 2), (1, 2)])
        )

        def measure(run: Any) -> Any:
            return lambda *inputs: jnp.sum(jnp.sin(run(*inputs, reverse=reverse)))

        found, expected = (
            quick_jit(lambda *inputs, run=run: list(derivatives(measure(run), *inputs)))(*inputs)
            for run in (run_linear_recurrence, run_plain)
        )
        near = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
        jax.tree.map(near, found, expected)


def test_the_decay_is_stable() -> None:
    """Where memory lasts or is lost at once, values and gradients are finite."""
    x = normal(1, 5, FEATURES) * 100
    for logit in (-1e4, -50.0, 50.0, 1e4):
        params = draw_params(1) | {"decay_logit": np.full(FEATURES, logit, np.float32)}

        def loss(params: Any, x: Any) -> Any:
            return xn.LinearRecurrence().apply({"params": params}, x).sum()

        results = quick_jit(jax.value_and_grad(loss, (0, 1)))(params, x)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_decays_are_drawn_as_in_the_paper() -> None:
    x = jax.ShapeDtypeStruct((1, 1, 4096), jnp.float32)
    layer = xn.LinearRecurrence(4096)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros(x.shape))["params"]
    decay = np.sort(jax.nn.sigmoid(params["decay_logit"]) ** 8)
    np.testing.assert_allclose(decay, np.linspace(0.9, 0.999, 4096), atol=0.01)


def test_one_exported_program_for_all_lengths() -> None:
    b, t = jax.export.symbolic_shape("b, t")
    params = draw_params(2)

    @jax.jit
    def derive(x: Any) -> Any:
        layer = xn.LinearRecurrence(2)
        return jax.grad(lambda x: jnp.sum(layer.apply({"params": params}, x) ** 2))(x)

    exported = jax.export.export(derive)(jax.ShapeDtypeStruct((b, t, FEATURES), jnp.float32))
    x = normal(2, 7, FEATURES)
    np.testing.assert_allclose(exported.call(x), derive(x), rtol=1e-4, atol=1e-5)


def test_the_gradient_takes_few_times_the_memory_of_its_inputs() -> None:
    """Differentiated round by round, the scan would save the states of each round."""
    decay = jax.ShapeDtypeStruct((4, 1024, 64), jnp.float32)

    def loss(decay: Any, forcing: Any) -> Any:
        return jnp.sum(run_linear_recurrence(decay, forcing) ** 2)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(decay, decay).compile()
    assert program.memory_analysis().temp_size_in_bytes < 5 * 4 * 1024 * 64 * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xn.LinearRecurrence(0), "LinearRecurrence takes n_blocks of at least 1; got 0."),
        (
            lambda: xn.LinearRecurrence(3).init(jax.random.key(0), normal(2, 5, 4)),
            (
                "LinearRecurrence splits the features of its inputs evenly among its blocks; the "
                "inputs have 4 features, which n_blocks 3 does not divide."
            ),
        ),
        (
            lambda: xn.LinearRecurrence().init(jax.random.key(0), normal(5, 4)),
            "LinearRecurrence takes inputs with axes [batch, time, features]; got shape [5, 4]",
        ),
        (
            lambda: xn.LinearRecurrence().init(
                jax.random.key(0), normal(2, 5, 4), initial_state=normal(2, 5)
            ),
            "LinearRecurrence takes an initial_state h, an array of shape [2, 4]; got [2, 5].",
        ),
        (
            lambda: xn.LinearRecurrence().init(
                jax.random.key(0), normal(2, 5, 4), lengths=np.array([5, 6])
            ),
            (
                "LinearRecurrence takes lengths from 0 to 5, the number of steps of its inputs; "
                "got 6."
            ),
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
