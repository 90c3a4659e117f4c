"""Models of this library written by hand in linen, scope for scope: what pipelines are held against.

A pipeline and its twin have one parameter tree and, as tests/benchmarks/test_benchmarks.py shows, one
jaxpr.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from perceiver_io import KEPT, LayerNorm
from perceiver_models import TiedScores

# Linen's scan traces its body once more by default, which leaves dead equations in the jaxpr.
SCAN = {
    "variable_axes": {"params": 0},
    "split_rngs": {"params": True, "dropout": True},
    "check_constancy_invariants": False,
}


# The demo


@functools.cache
def demo() -> Any:
    """The module of the demo."""
    path = Path(__file__).parents[2] / "docs/examples/digits_autoencoder.py"
    spec = importlib.util.spec_from_file_location("digits_autoencoder", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        return xn.FeedForward(widening_factor=2)(nn.LayerNorm()(x)) + x


class Ask(nn.Module):
    n_queries: int
    d_model: int

    @nn.compact
    def __call__(self, x):
        queries = xn.TrainablePositionalEncoding(self.n_queries, self.d_model)(x.shape[0])
        found = xn.Attention(n_heads=4)(nn.LayerNorm()(queries), nn.LayerNorm()(x), None)
        x = found + queries
        return xn.FeedForward(widening_factor=2)(nn.LayerNorm()(x)) + x


class Think(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = xn.SelfAttention(n_heads=4)(nn.LayerNorm()(x), None) + x
        return xn.FeedForward(widening_factor=2)(nn.LayerNorm()(x)) + x


class Demo(nn.Module):
    """The demo's autoencoder."""

    label_mask_rate: float = 1.0
    d_latent: int = 64

    @nn.compact
    def __call__(self, images, labels):
        digits, d = demo(), self.d_latent
        image = functools.partial(
            xn.Encoding,
            preprocessing=lambda: cb.serial(digits.to_patches, nn.Dense(d)),
            positional_encoding=functools.partial(
                xn.FourierPositionEncoding, digits.GRID, n_bands=4
            ),
        )
        label = functools.partial(
            xn.Encoding,
            preprocessing=lambda: cb.serial(digits.as_sequence_of_one, nn.Embed(10, d)),
        )
        rates = [None, self.label_mask_rate]
        x, lengths = xn.MultimodalEncoding([image, label], mask_rates=rates)([images, labels])
        x = Ask(8, d, name="latents")(x)
        loop = nn.scan(lambda block, x, _: (block(x), None), length=3, **SCAN)
        x, _ = loop(Think(name="Repeat_0"), x, None)
        x = Ask(17, d, name="queries")(x)
        pixels = functools.partial(
            xn.Decoding,
            postprocessing=lambda: cb.serial(nn.Dense(digits.D_PATCH), digits.to_pixels),
        )
        logits = functools.partial(
            xn.Decoding, postprocessing=lambda: cb.serial(nn.Dense(10), digits.without_time)
        )
        return tuple(xn.MultimodalDecoding([pixels, logits])(x, lengths))


# Perceiver IO's language model


class CrossAttention(nn.Module):
    """A cross-attention block."""

    n_heads: int
    d_qk: int
    d_v: int
    query_residual: bool

    @nn.compact
    def __call__(self, queries, inputs, mask):
        attention = xn.KVQAttention(self.n_heads, d_qk=self.d_qk, d_v=self.d_v, name="attention")
        x = attention(
            LayerNorm(name="norm_queries")(queries), LayerNorm(name="norm_inputs")(inputs), mask
        )
        x = x + queries if self.query_residual else x
        return xn.FeedForward(1, name="feed_forward")(LayerNorm(name="norm")(x)) + x


class SelfAttention(nn.Module):
    """A self-attention block."""

    n_heads: int
    d_qk: int
    d_v: int

    @nn.compact
    def __call__(self, x):
        attention = xn.SelfAttention(self.n_heads, d_qk=self.d_qk, d_v=self.d_v, name="attention")
        x = attention(LayerNorm(name="norm_inputs")(x), None) + x
        return xn.FeedForward(1, name="feed_forward")(LayerNorm(name="norm")(x)) + x


class Processor(nn.Module):
    """Self-attention blocks in a loop."""

    core: Any

    @nn.compact
    def __call__(self, x):
        core = self.core
        block = SelfAttention(core.n_heads, core.d_qk, core.d_v, name="layers")
        step = nn.remat(lambda block, x, _: (block(x), None), prevent_cse=False, policy=KEPT)
        return nn.scan(step, length=core.n_layers, **SCAN)(block, x, None)[0]


class Language(nn.Module):
    """Perceiver IO's masked language model."""

    core: Any
    n_positions: int
    d_model: int
    n_heads_decoder: int
    d_qk_decoder: int

    @nn.compact
    def __call__(self, tokens, mask):
        core, batch = self.core, tokens.shape[0]
        init = nn.initializers.truncated_normal(0.02)
        learned = xn.TrainablePositionalEncoding
        latents = learned(core.n_latents, core.d_latents, name="latents")(batch)
        embed = nn.Embed(262, self.d_model, embedding_init=init, name="embed")
        text = embed(tokens) + learned(self.n_positions, self.d_model, name="positions")(batch)
        mask = mask[:, None, :]
        queries = learned(self.n_positions, self.d_model, name="queries")(batch)
        encoder = CrossAttention(core.n_heads_encoder, core.d_qk, core.d_v, True, name="encoder")
        latents = encoder(latents, text, mask)
        latents = Processor(core, name="processor")(latents)
        decoder = CrossAttention(
            self.n_heads_decoder, self.d_qk_decoder, self.d_model, False, name="decoder"
        )
        return TiedScores(embed, name="scores")(decoder(queries, latents, None))


# A deep stack


def stack(n_layers: int, d: int) -> cb.Combinator:
    """Residual layers in series, none of them in a loop."""
    return cb.serial(cb.residual(nn.LayerNorm(), nn.Dense(d), nn.gelu) for _ in range(n_layers))


class Stack(nn.Module):
    """Residual layers in series, none of them in a loop."""

    n_layers: int
    d: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.n_layers):
            x = nn.gelu(nn.Dense(self.d)(nn.LayerNorm()(x))) + x
        return x
