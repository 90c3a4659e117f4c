r"""Perceiver IO as pipelines: one architecture for any inputs and any outputs.

A Perceiver reads inputs of any kind and length into a few latent vectors by cross-attention, thinks
in the latents alone, and answers any number of queries by cross-attention again. Its cost is linear
in the inputs and in the outputs. All of that is one line, :func:`perceiver_io`; the rest of this
file says what the parts are. perceiver_models.py puts them to use on text, images and video.

Every part is an argument: to try another attention, another feed-forward or another norm, build a
block with it; nothing else changes.

    >>> look = cb.fn(xn.KVQAttention(n_heads=2), mask=None)
    >>> cross = cross_attention_block(look, xn.FeedForward())
    >>> think = self_attention_block(cb.fn(xn.SelfAttention(n_heads=2), mask=None), nn.Dense(8))
    >>> model = perceiver_io(cross, processor(think, n_layers=3), decoder(cross))
    >>> print(model.signature)  # latents, inputs, queries -> outputs
    3 -> 1

Source: Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs", 2021,
section 3 and appendix E.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from jax import Array

from flax_extra import combinator as cb
from flax_extra import layer as xn

Function: TypeAlias = Callable[..., Any]
"""A step of a pipeline: a function or a linen module."""

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
"""The norm of the published weights. Linen's own has another epsilon, and a variance that is
cheaper and less exact."""

KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
)
"""What a layer of the processor keeps for its backward pass: the products with its weights, and
what attention found.

The rest is cheaper to compute again than to write and to read.
"""


# The architecture


def perceiver_io(encoder: Function, processor: Function, decoder: Function) -> cb.Combinator:
    """Inputs to latents, latents to latents, latents to outputs.

    Args:
        encoder: (latents, inputs) -> latents, or (latents, inputs, mask) -> latents.
        processor: latents -> latents.
        decoder: (latents, queries) -> outputs.

    Returns:
        A pipeline (latents, inputs, queries) -> outputs; a mask, if any, is the third of four.

    Source: Jaegle et al. (2021), section 3.1.
    """
    return cb.serial(encoder, processor, decoder)


def cross_attention_block(
    attention: Function,
    feed_forward: Function,
    *,
    norm: Function = LayerNorm,
    query_residual: bool = True,
    name: str | None = None,
) -> cb.Combinator:
    """Queries look at inputs; then each of them makes something of what it saw.

    Args:
        attention: (queries, inputs, mask) -> vectors like the queries. One that takes no mask, as
            ``cb.fn(attention, mask=None)``, makes a block that takes none.
        feed_forward: vectors -> vectors.
        norm: a constructor of norms; it is given the name of each.
        query_residual: whether the queries are added to what they saw. They are not where queries
            and outputs are different things, such as positions and pixels.
        name: of its scope in the parameter tree.

    Returns:
        A pipeline (queries, inputs, mask) -> vectors like the queries.

    Source: Jaegle et al. (2021), appendix E.
    """
    look = cb.parallel(norm(name="norm_queries"), norm(name="norm_inputs")) >> attention
    return cb.serial(
        cb.residual(look) if query_residual else look,
        cb.residual(norm(name="norm"), feed_forward),
        name=name,
    )


def self_attention_block(
    attention: Function,
    feed_forward: Function,
    *,
    norm: Function = LayerNorm,
    name: str | None = None,
) -> cb.Combinator:
    """Vectors look at each other; then each of them makes something of what it saw.

    Args:
        attention: vectors -> vectors, or (vectors, mask) -> vectors.
        feed_forward: vectors -> vectors.
        norm: a constructor of norms; it is given the name of each.
        name: of its scope in the parameter tree.

    Returns:
        A pipeline of the signature of the attention.

    Source: Jaegle et al. (2021), appendix E.
    """
    return cb.serial(
        cb.residual(norm(name="norm_inputs"), attention),
        cb.residual(norm(name="norm"), feed_forward),
        name=name,
    )


def processor(
    block: Function, n_layers: int, n_shards: int = 1, *, name: str | None = "processor"
) -> cb.Combinator:
    """Layers in series, and all of them over again with the same weights.

    Args:
        block: latents -> latents.
        n_layers: how many copies of it there are, with weights of their own.
        n_shards: how many times all of the layers are applied.
        name: of its scope in the parameter tree.

    Returns:
        A pipeline latents -> latents, which takes as long to compile whatever the numbers are.

    Source: Jaegle et al. (2021), section 3.1; for shared weights Jaegle et al., "Perceiver: General
    Perception with Iterative Attention" (2021), section 3.
    """
    layers = cb.repeat(block, n_layers, remat=KEPT, name="layers")
    if n_shards == 1:
        return cb.serial(layers, name=name)
    return cb.repeat(layers, n_shards, shared=True, name=name)


def decoder(cross_attention: Function) -> cb.Combinator:
    """Queries look at latents.

    Args:
        cross_attention: (queries, latents) -> outputs: a :func:`cross_attention_block`.

    Returns:
        A pipeline (latents, queries) -> outputs.

    Source: Jaegle et al. (2021), section 3.2.
    """
    return cb.swap() >> cross_attention


def learned(n: int, d: int, name: str) -> cb.Combinator:
    """Learned vectors, the same for each of a batch: any array -> ``[batch, n, d]``."""
    return cb.serial(batch_size, xn.TrainablePositionalEncoding(n, d, name=name))


def batch_size(x: Array) -> int:
    """How many examples an array holds."""
    return x.shape[0]


def without_mask(attention: Function) -> cb.Combinator:
    """Attention to everything there is."""
    return cb.fn(attention, mask=None)


# What models have in common, whatever they read


@dataclasses.dataclass(frozen=True)
class Core:
    """What reads inputs and thinks, whatever the inputs are.

    Args:
        n_latents: how many latents there are.
        d_latents: features of a latent.
        n_layers: how many self-attention blocks have weights of their own.
        n_shards: how many times all of those are applied.
        n_heads: of self-attention.
        n_heads_encoder: heads of the cross-attention that reads the inputs.
        d_qk: features of queries and keys; those of what keys come from where None.
        d_v: features of values; ``d_qk`` where None.
        widening_factor: of the feed-forwards in the processor.
        widening_factor_encoder: of the feed-forward in the encoder.
        query_residual: whether the latents are added to what they read.
        attention: a constructor of cross-attentions.
        self_attention: a constructor of self-attentions.
        feed_forward: a constructor of feed-forwards.
        norm: a constructor of norms.
    """

    n_latents: int
    d_latents: int
    n_layers: int
    n_shards: int = 1
    n_heads: int = 8
    n_heads_encoder: int = 1
    d_qk: int | None = None
    d_v: int | None = None
    widening_factor: int = 1
    widening_factor_encoder: int = 1
    query_residual: bool = True
    attention: Function = xn.KVQAttention
    self_attention: Function = xn.SelfAttention
    feed_forward: Function = xn.FeedForward
    norm: Function = LayerNorm

    def latents(self) -> cb.Combinator:
        """Any array -> the latents before they have read anything."""
        return learned(self.n_latents, self.d_latents, name="latents")

    def encoder(self, *, masked: bool = False) -> cb.Combinator:
        """(latents, inputs) -> latents; with a mask as third input where it is masked."""
        attention = self.attention(self.n_heads_encoder, **self._features(), name="attention")
        return cross_attention_block(
            attention if masked else without_mask(attention),
            self.feed_forward(self.widening_factor_encoder, name="feed_forward"),
            norm=self.norm,
            query_residual=self.query_residual,
            name="encoder",
        )

    def processor(self) -> cb.Combinator:
        """Latents -> latents."""
        attention = self.self_attention(self.n_heads, **self._features(), name="attention")
        block = self_attention_block(
            without_mask(attention),
            self.feed_forward(self.widening_factor, name="feed_forward"),
            norm=self.norm,
        )
        return processor(block, self.n_layers, self.n_shards)

    def decoder(
        self, *, n_heads: int = 1, query_residual: bool = False, **features: int
    ) -> cb.Combinator:
        """(latents, queries) -> outputs. ``features`` are those of the attention."""
        return decoder(
            cross_attention_block(
                without_mask(self.attention(n_heads, **features, name="attention")),
                self.feed_forward(name="feed_forward"),
                norm=self.norm,
                query_residual=query_residual,
                name="decoder",
            )
        )

    def _features(self) -> dict[str, int]:
        asked = {"d_qk": self.d_qk, "d_v": self.d_v}
        return {name: d for name, d in asked.items() if d is not None}
