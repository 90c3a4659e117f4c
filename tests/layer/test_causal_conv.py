"""The causal convolution against linen's, and its laws."""

from __future__ import annotations

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


def draw(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@settings(max_examples=25)
@given(
    kernel_size=st.integers(1, 4),
    dilation=st.integers(1, 3),
    strides=st.integers(1, 3),
    groups=st.sampled_from([1, 2, None]),
    features=st.sampled_from([None, 6]),
    time=st.integers(1, 9),
)
def test_it_is_linens(
    kernel_size: int,
    dilation: int,
    strides: int,
    groups: int | None,
    features: int | None,
    time: int,
) -> None:
    x = draw(2, time, 6 if groups is None else 4)
    features = None if groups is None else features
    conv = xn.CausalConv(features, kernel_size, strides, dilation, groups)
    theirs = nn.Conv(
        features or x.shape[-1],
        (kernel_size,),
        strides=strides,
        kernel_dilation=dilation,
        feature_group_count=groups or x.shape[-1],
        padding="CAUSAL",
    )
    variables = conv.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, theirs.init(jax.random.key(0), x)
    )

    def loss(layer: Any) -> Any:
        return lambda variables, x: jnp.sum(jnp.sin(layer.apply(variables, x)))

    np.testing.assert_allclose(
        conv.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5
    )
    found, expected = (jax.grad(loss(layer), (0, 1))(variables, x) for layer in (conv, theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_padding_has_no_effect() -> None:
    x, lengths = draw(2, 6, 3), jnp.array([6, 2])
    conv = xn.CausalConv(4)
    variables = conv.init(jax.random.key(0), x)
    spoiled = x.at[1, 2:].set(jnp.nan)

    def loss(variables: Any, x: Any) -> Any:
        y = conv.apply(variables, x, lengths=lengths)
        return jnp.sum(y[0]) + jnp.sum(y[1, :2])

    found = jax.grad(loss, (0, 1))(variables, spoiled)
    expected = jax.grad(loss, (0, 1))(variables, x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_block_that_the_strides_do_not_divide() -> None:
    conv = xn.CausalConv(4, strides=2)
    stream = cb.stream(conv, "f32[b, 2*t, 3]")
    variables = conv.init(jax.random.key(0), draw(1, 2, 3))
    state, y = stream.step(variables, stream.start(1), draw(1, 4, 3))
    assert y.shape == (1, 2, 4)
    with pytest.raises(cb.StreamError, match=re.escape("multiple of 2; got a block of 3 steps.")):
        conv.apply(
            {**variables, "cache": state.cache}, draw(1, 3, 3), decode=True, mutable=["cache"]
        )
    message = (
        "CausalConv with strides 2 takes blocks of a stream without lengths, since rows would come "
        "out of step; got lengths. Give every row a whole block."
    )
    with pytest.raises(cb.StreamError, match=re.escape(message)):
        conv.apply(
            {**variables, "cache": state.cache},
            draw(1, 4, 3),
            decode=True,
            lengths=jnp.array([2]),
            mutable=["cache"],
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: xn.CausalConv(kernel_size=0),
            "CausalConv takes kernel_size of at least 1; got 0.",
        ),
        (
            lambda: xn.CausalConv(4).init(jax.random.key(0), draw(2, 3)),
            (
                "CausalConv takes inputs with axes [batch, time, features]; got shape [2, 3], which has "
                "2 axes."
            ),
        ),
        (
            lambda: xn.CausalConv(4, groups=2).init(jax.random.key(0), draw(1, 2, 3)),
            (
                "CausalConv splits the features of inputs and outputs evenly into groups; the inputs "
                "have 3, the outputs 4, and groups is 2. Choose numbers of features that are multiples "
                "of 2."
            ),
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
