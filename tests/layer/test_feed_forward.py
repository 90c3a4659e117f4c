"""FeedForward, by itself and in pipelines."""

from __future__ import annotations

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


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"^FeedForward takes widening_factor of at least 1; got 0\.$"
    ):
        xn.FeedForward(widening_factor=0)
