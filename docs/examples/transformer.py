"""The transformer block that published models share, and the parts around it.

A block is a value: another attention, feed-forward or norm is another argument.

    >>> look = cb.fn(xn.SelfAttention(n_heads=2), mask=None)
    >>> print(pre_norm_block(look, xn.FeedForward(4), nn.RMSNorm).signature)  # x -> x
    1 -> 1
    >>> ask = cb.fn(xn.Attention(n_heads=2), mask=None)
    >>> print(pre_norm_block(look, xn.FeedForward(4), nn.RMSNorm, ask).signature)  # x, memory -> x
    2 -> 1

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3; Xiong et al., "On Layer
Normalization in the Transformer Architecture" (2020), for the place of the norms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array

from flax_extra import combinator as cb
from flax_extra import layer as xn

PADDING = cb.context("padding_mask", default=None)
"""The mask of an attention as a context keyword: ``bool[batch, 1, time]``, where no padding is."""


def pre_norm_block(
    attention: Callable[..., Any],
    feed_forward: Callable[..., Any],
    norm: Callable[..., nn.Module],
    cross_attention: Callable[..., Any] | None = None,
) -> cb.Combinator:
    """Positions look at each other, perhaps at a memory, and make something of what they saw.

    Args:
        attention: x -> x.
        feed_forward: x -> x.
        norm: a constructor of norms; it is given the name of each.
        cross_attention: (x, memory) -> x, for a block of a decoder.

    Returns:
        A pipeline x -> x, or (x, memory) -> x.
    """
    look = cb.residual(norm(name="norm_attention"), attention)
    think = cb.residual(norm(name="norm_feed_forward"), feed_forward)
    if cross_attention is None:
        return look >> think
    ask = cb.residual(norm(name="norm_cross_attention"), cross_attention)
    return cb.serial(look, ask, think)


@dataclasses.dataclass(frozen=True)
class Tower:
    """Blocks in series, with LayerNorm and biases, as in GPT-2, CLIP and Whisper.

    Args:
        d_model: features of each position.
        n_layers: the number of blocks.
        n_heads: heads of their attention.
        d_hidden: features of the hidden layer of their feed-forward.
        activation: of the feed-forward.
        epsilon: what the norms add to the variance.
        dtype: of the computation; that of inputs and parameters by default.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_hidden: int
    activation: Callable[[Array], Array]
    epsilon: float = 1e-5
    dtype: Any = None

    def norm(self, name: str) -> nn.Module:
        """Makes a norm. Linen's own settings have a cheaper variance, which is less exact."""
        return nn.LayerNorm(
            epsilon=self.epsilon, use_fast_variance=False, dtype=self.dtype, name=name
        )

    def embed(self, n_tokens: int) -> nn.Embed:
        """Makes the embedding of tokens."""
        return nn.Embed(n_tokens, self.d_model, dtype=self.dtype, name="embed")

    def positions(self, n: int) -> nn.Module:
        """Makes a layer that adds a learned vector to each position of ``[batch, time, d_model]``.

        There are ``n`` positions.
        """
        vectors = functools.partial(
            xn.TrainablePositionalEncoding, n, self.d_model, dtype=self.dtype
        )
        return xn.Encoding(positional_encoding=vectors, aggregation=cb.add(), name="positions")

    def blocks(self, *, causal: bool, mask: Any = None, cross: bool = False) -> cb.Combinator:
        """Makes the blocks: x -> x, or (x, memory) -> x if they look ``cross`` at a memory."""
        look = xn.SelfAttention(self.n_heads, causal=causal, dtype=self.dtype, name="attention")
        ask = xn.Attention(self.n_heads, dtype=self.dtype, name="cross_attention")
        think = xn.FeedForward(
            d_hidden=self.d_hidden,
            activation=self.activation,
            dtype=self.dtype,
            name="feed_forward",
        )
        block = pre_norm_block(
            cb.fn(look, mask=mask),
            think,
            self.norm,
            cb.fn(ask, mask=None) if cross else None,
        )
        return cb.repeat(block, self.n_layers, name="layers")
