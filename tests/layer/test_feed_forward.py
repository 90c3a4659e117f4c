"""FeedForward, by itself and in pipelines."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("activation", [nn.gelu, nn.relu, jnp.tanh, nn.PReLU()])
def test_it_is_two_linen_layers(activation: object) -> None:
    x = normal(2, 3, 4)
    ours = xn.FeedForward(widening_factor=3, activation=activation)
    theirs = nn.Sequential([nn.Dense(12), activation, nn.Dense(4)])
    found, variables = ours.init_with_output(jax.random.key(0), x)
    params = dict(variables["params"])
    renamed = {"layers_0": params.pop("Dense_0"), "layers_2": params.pop("Dense_1")}
    if params:
        renamed["layers_1"] = params.pop("activation")
    assert not params
    expected = theirs.apply({"params": renamed}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_it_is_the_formula() -> None:
    x = normal(2, 4).astype(np.float64)
    layer = xn.FeedForward(kernel_init=nn.initializers.normal(1.0))
    found, variables = layer.init_with_output(jax.random.key(0), x.astype(np.float32))
    hidden, out = (
        {name: np.asarray(leaf, np.float64) for name, leaf in variables["params"][dense].items()}
        for dense in ("Dense_0", "Dense_1")
    )
    h = x @ hidden["kernel"] + hidden["bias"]
    gelu = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(found, gelu @ out["kernel"] + out["bias"], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 5, 4)])
def test_any_axes_before_the_features(shape: tuple[int, ...]) -> None:
    y = jax.eval_shape(
        lambda: xn.FeedForward(2).init_with_output(jax.random.key(0), normal(*shape))[0]
    )
    assert y.shape == shape


def test_a_tower() -> None:
    block = cb.residual(nn.LayerNorm(), xn.FeedForward(widening_factor=2))
    variables = cb.repeat(block, 3).init(jax.random.key(0), normal(2, 4))
    assert variables["params"]["FeedForward_0"]["Dense_0"]["kernel"].shape == (3, 4, 8)


def test_precision_reaches_every_product() -> None:
    layer = xn.FeedForward(precision="highest")
    variables = layer.init(jax.random.key(0), normal(2, 4))
    program = jax.jit(layer.apply).lower(variables, normal(2, 4)).as_text()
    assert program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]") == 2


@pytest.mark.parametrize("activation", [nn.silu, nn.gelu, nn.PReLU()])
def test_the_gated_form_is_the_formula(activation: object) -> None:
    x = normal(2, 4)
    layer = xn.FeedForward(
        activation=activation, bias_init=nn.initializers.normal(1.0), d_hidden=6, gated=True
    )
    found, variables = layer.init_with_output(jax.random.key(0), x)
    params = dict(variables["params"])
    activate = activation
    if "activation" in params:
        activate = nn.PReLU().bind({"params": params.pop("activation")})
    assert jax.tree.map(jnp.shape, params) == {
        "gate": {"kernel": (4, 6), "bias": (6,)},
        "up": {"kernel": (4, 6), "bias": (6,)},
        "out": {"kernel": (6, 4), "bias": (4,)},
    }

    def apply(name: str, inputs: Any) -> np.ndarray:
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name])
        return np.asarray(inputs, np.float64) @ p["kernel"] + p["bias"]

    hidden = np.asarray(activate(apply("gate", x).astype(np.float32))) * apply("up", x)
    np.testing.assert_allclose(found, apply("out", hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_initializers_and_biases(gated: bool) -> None:
    constant = nn.initializers.constant
    fields = {"kernel_init": constant(1), "bias_init": constant(2), "gated": gated}
    first = {"gate", "up"} if gated else {"Dense_0"}
    (last,) = {"out"} if gated else {"Dense_1"}

    def values(**others: Any) -> tuple[set[Any], set[Any]]:
        layer = xn.FeedForward(2, **fields, **others)
        params = jax.tree.map(np.unique, layer.init(jax.random.key(0), normal(2, 3))["params"])
        assert set(params) == {*first, last}
        of_first, of_last = (
            {(name, value.item()) for part in parts for name, value in params[part].items()}
            for parts in (first, [last])
        )
        return of_first, of_last

    given = {("kernel", 1), ("bias", 2)}
    assert values() == (given, given)
    assert values(out_kernel_init=constant(3)) == (given, {("kernel", 3), ("bias", 2)})
    assert values(out_bias_init=constant(4)) == (given, {("kernel", 1), ("bias", 4)})
    assert values(use_bias=False) == ({("kernel", 1)}, {("kernel", 1)})


def test_d_hidden_is_the_width_of_the_hidden_layer() -> None:
    x = normal(2, 4)
    by_number, by_factor = xn.FeedForward(d_hidden=12), xn.FeedForward(widening_factor=3)
    variables = by_factor.init(jax.random.key(0), x)
    np.testing.assert_array_equal(by_number.apply(variables, x), by_factor.apply(variables, x))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: xn.FeedForward(widening_factor=0),
            "FeedForward takes widening_factor of at least 1; got 0.",
        ),
        (lambda: xn.FeedForward(d_hidden=0), "FeedForward takes d_hidden of at least 1; got 0."),
        (
            lambda: xn.FeedForward(widening_factor=4, d_hidden=8),
            (
                "FeedForward takes the width of its hidden layer from d_hidden or from "
                "widening_factor, not from both; got d_hidden 8 and widening_factor 4. Give one of "
                "them."
            ),
        ),
    ],
)
def test_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole text is compared
        wrong()
    assert str(raised.value) == message
