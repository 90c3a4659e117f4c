"""Decoding and EmbedDecoding: against linen, and tied to an embedding."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn

KEY = jax.random.key(0)
OUTPUTS = jax.random.normal(KEY, (2, 5, 4))
EMBEDDING = jax.random.normal(jax.random.key(1), (7, 4))
BIAS = jax.random.normal(jax.random.key(2), (7,))
TOKENS = jnp.array([[0, 1, 2, 3, 6], [6, 5, 4, 3, 2]])


def test_embed_decoding_is_the_formula_and_linens() -> None:
    decoded = xn.EmbedDecoding(EMBEDDING).apply({"params": {"bias": BIAS}}, OUTPUTS)
    formula = np.float64(OUTPUTS) @ np.float64(EMBEDDING).T + np.float64(BIAS)
    np.testing.assert_allclose(decoded, formula, rtol=1e-5, atol=1e-6)
    embed = nn.Embed(7, 4)
    attended = embed.apply({"params": {"embedding": EMBEDDING}}, OUTPUTS, method=embed.attend)
    np.testing.assert_array_equal(decoded, np.asarray(attended) + np.asarray(BIAS))


def test_embed_decoding_starts_without_bias() -> None:
    variables = xn.EmbedDecoding(EMBEDDING).init(KEY, OUTPUTS)
    np.testing.assert_array_equal(variables["params"]["bias"], np.zeros(7))


def test_embed_decoding_without_bias_is_a_product() -> None:
    decoding = xn.EmbedDecoding(EMBEDDING, use_bias=False)
    assert decoding.init(KEY, OUTPUTS) == {}
    np.testing.assert_array_equal(decoding.apply({}, OUTPUTS), OUTPUTS @ EMBEDDING.T)


def test_embed_decoding_initializes_its_bias() -> None:
    decoding = xn.EmbedDecoding(EMBEDDING, bias_init=nn.initializers.constant(3))
    np.testing.assert_array_equal(decoding.init(KEY, OUTPUTS)["params"]["bias"], np.full(7, 3))


class InSetup(nn.Module):
    """Tokens to features and back, with one table."""

    decoding: Any = xn.Decoding

    def setup(self) -> None:
        self.embed = nn.Embed(7, 4)
        self.decode = self.decoding(lambda: xn.EmbedDecoding(self.embed.embedding))

    def __call__(self, tokens: Any) -> Any:
        return self.decode(self.embed(tokens))


class InCompact(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(7, 4, name="embed")
        decode = xn.Decoding(lambda: xn.EmbedDecoding(embed.embedding), name="decode")
        return cb.serial(embed, decode)(tokens)


@pytest.mark.parametrize(
    "model",
    [InSetup(), InCompact(), InSetup(nn.remat(xn.Decoding))],
    ids=["setup", "compact", "remat"],
)
def test_an_embedding_is_shared_and_learns_from_both_uses(model: nn.Module) -> None:
    variables = model.init(KEY, TOKENS)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "embed": {"embedding": (7, 4)},
        "decode": {"embedding_decoder": {"bias": (7,)}},
    }

    def by_hand(table: Any, tied: Any) -> Any:
        return jnp.sum(jnp.sin(table[TOKENS] @ tied.T))

    def loss(params: Any) -> Any:
        return jnp.sum(jnp.sin(model.apply({"params": params}, TOKENS)))

    table = variables["params"]["embed"]["embedding"]
    gradients = jax.grad(loss)(variables["params"])["embed"]["embedding"]
    expected = sum(jax.grad(by_hand, (0, 1))(table, table))
    np.testing.assert_allclose(gradients, expected, rtol=1e-5, atol=1e-6)


def test_decoding_decodes_then_postprocesses() -> None:
    decoding = xn.Decoding(
        functools.partial(nn.Dense, 6), lambda: lambda decoded: decoded.reshape(-1, 5, 2, 3)
    )
    decoded, variables = decoding.init_with_output(KEY, OUTPUTS)
    dense = {"params": variables["params"]["embedding_decoder"]}
    expected = nn.Dense(6).apply(dense, OUTPUTS).reshape(2, 5, 2, 3)
    np.testing.assert_array_equal(decoded, expected)


def test_decoding_without_fields_changes_nothing() -> None:
    np.testing.assert_array_equal(xn.Decoding().apply({}, OUTPUTS), OUTPUTS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: xn.EmbedDecoding(nn.Embed(7, 4)),
            (
                "EmbedDecoding takes an embedding as an array [n_embeddings, features]; got "
                "Embed. If it is a layer nn.Embed, give its array: EmbedDecoding(embed.embedding)."
            ),
        ),
        (
            lambda: xn.EmbedDecoding(EMBEDDING).init(KEY, OUTPUTS[..., :3]),
            (
                "EmbedDecoding takes an embedding of shape [n_embeddings, features] for "
                "outputs of shape [..., features], here 3 features; got an embedding of "
                "shape [7, 4]."
            ),
        ),
        (
            lambda: xn.Decoding(postprocessing=nn.Dense(4)),
            (
                "Decoding takes a constructor for postprocessing, which it calls to make its own "
                "module; got Dense. Give functools.partial(Module, ...) or lambda: Module(...)."
            ),
        ),
    ],
)
def test_wording_of_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        wrong()
