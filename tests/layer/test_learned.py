"""Learned vectors: the same ones for each example, whatever the item they are made for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "inputs",
    [
        jnp.ones((3, 7, 2)),
        np.zeros((3,), np.int32),
        [jnp.ones((3, 4)), jnp.zeros((3, 1), int)],
        {"image": jnp.ones((3, 2, 2, 1))},
    ],
    ids=["array", "numpy", "list", "dict"],
)
def test_each_example_gets_the_same_vectors(inputs: Any) -> None:
    given, variables = xn.Learned(4, 5).init_with_output(KEY, inputs)
    vectors = variables["params"]["vectors"]
    assert vectors.shape == (4, 5)
    np.testing.assert_array_equal(given, np.stack([vectors] * 3))


def test_values_of_the_inputs_do_not_matter() -> None:
    inputs = jnp.full((2, 3), jnp.nan)
    given, gradient = jax.value_and_grad(
        lambda x: xn.Learned(4, 5).init_with_output(KEY, x)[0].sum()
    )(inputs)
    assert np.isfinite(given)
    np.testing.assert_array_equal(gradient, 0)


def test_gradients_sum_over_the_batch() -> None:
    learned, inputs = xn.Learned(2, 3), jnp.ones((4, 1))
    weights = jax.random.normal(KEY, (4, 2, 3))
    variables = learned.init(KEY, inputs)
    gradient = jax.grad(lambda v: jnp.sum(weights * learned.apply(v, inputs)))(variables)
    np.testing.assert_allclose(gradient["params"]["vectors"], weights.sum(0), rtol=1e-6)


def test_vectors_are_drawn_from_a_normal_cut_at_two_sigma() -> None:
    vectors = np.asarray(xn.Learned(200, 500).init(KEY, jnp.ones(1))["params"]["vectors"])
    assert 0.0399 < np.abs(vectors).max() <= 0.04
    assert vectors.std() == pytest.approx(0.02 * 0.87962566, rel=0.01)


def test_options() -> None:
    learned = xn.Learned(
        2, 3, kernel_init=nn.initializers.ones, dtype=jnp.bfloat16, param_dtype=jnp.float16
    )
    given, variables = learned.init_with_output(KEY, jnp.ones(4))
    assert (given.dtype, variables["params"]["vectors"].dtype) == (jnp.bfloat16, jnp.float16)
    np.testing.assert_array_equal(given, jnp.ones((4, 2, 3), jnp.bfloat16))
    plain = xn.Learned(2, 3, param_dtype=jnp.float16).init_with_output(KEY, jnp.ones(4))[0]
    assert plain.dtype == jnp.float16


def test_it_puts_vectors_on_top_of_the_inputs() -> None:
    inputs = jax.random.normal(KEY, (2, 5, 6))
    pipeline = cb.branch(xn.Learned(4, 6), cb.identity())
    assert str(cb.infer_signature(pipeline)) == "1 -> 2"
    (vectors, same), variables = pipeline.init_with_output(KEY, inputs)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"Learned_0": {"vectors": (4, 6)}}
    assert vectors.shape == (2, 4, 6)
    np.testing.assert_array_equal(same, inputs)
    assert str(cb.shape_signature(pipeline, "i32[b, t]")) == (
        "i32[b, t] -> f32[b, 4, 6], i32[b, t]"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: xn.Learned(0, 3), "Learned takes n_vectors of at least 1; got 0."),
        (lambda: xn.Learned(3, -1), "Learned takes dimension of at least 1; got -1."),
        *[
            (
                lambda inputs=inputs: xn.Learned(2, 3).init(KEY, inputs),
                (
                    "Learned takes an array [batch, ...], or a pytree of arrays with the same "
                    f"batch size; got {found}."
                ),
            )
            for inputs, found in [
                ([jnp.ones((2, 1)), jnp.ones((3, 1))], "shape [2, 1] and shape [3, 1]"),
                (jnp.ones(()), "shape []"),
                (2, "shape []"),
                (None, "no array"),
            ]
        ],
    ],
)
def test_wording_of_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole text is compared
        wrong()
    assert str(raised.value) == message
