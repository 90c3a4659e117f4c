"""Llama, Mistral and GPT-2: one decoder, with blocks of two kinds.

A language model is an embedding, blocks in series, a norm, and a score for each token. Which block
it is makes the model: Llama's has RMSNorm, rotary positions, grouped-query attention and a gated
feed-forward; GPT-2's has LayerNorm, biases, and positions that are added to the embedding.

    >>> model = llama(Llama(n_tokens=99, d_model=16, n_layers=2, n_heads=4, d_hidden=32))
    >>> print(cb.shape_signature(model, "i32[b, t]"))
    i32[b, t] -> f32[b, t, 99]
    >>> stream = cb.stream(model, "i32[b, t]", capacity=1024)  # the same model, token by token

llama_checkpoints.py loads the directories that transformers saves, and the numbers are its numbers
(tests/parity/test_llama.py). On the command line such a model goes on with a text:

    python docs/examples/llama.py --weights DIR --prompt "It was a bright cold day in April"

Source: Llama Team, "The Llama 3 Herd of Models" (2024), section 3.2; Jiang et al., "Mistral 7B"
(2023), section 2; Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array

from flax_extra import combinator as cb
from flax_extra import layer as xn
from transformer import PADDING, Tower, pre_norm_block


def language_model(embed: nn.Embed, *body: Callable[..., Any], is_tied: bool) -> cb.Combinator:
    """Scores each token as the next one, at each position of a text.

    Args:
        embed: the embedding of the tokens.
        body: what comes between the embedding and the scores: x -> x.
        is_tied: whether a token is scored by its embedding, or has a vector of its own for that.

    Returns:
        A pipeline ``[batch, time]`` -> logits ``[batch, time, n_tokens]``.
    """
    head = nn.Dense(embed.num_embeddings, use_bias=False, dtype=embed.dtype, name="head")
    return cb.serial(embed, *body, embed.attend if is_tied else head)


@dataclasses.dataclass(frozen=True)
class Llama:
    """The sizes of a Llama or a Mistral.

    Args:
        n_tokens: the number of tokens.
        d_model: features of each position.
        n_layers: the number of blocks.
        n_heads: heads of the queries.
        d_hidden: features of the hidden layer of the feed-forward.
        n_kv_heads: heads of keys and values; ``n_heads`` by default.
        d_head: features of a head; ``d_model / n_heads`` by default.
        rotary: how positions turn queries and keys.
        window: how many positions a position sees, its own included; all by default.
        use_bias: whether attention has biases, and whether the feed-forward has.
        activation: of the feed-forward.
        epsilon: what the norms add to the mean square.
        is_tied: whether the scores use the embedding.
        dtype: of the computation; that of inputs and parameters by default.
    """

    n_tokens: int
    d_model: int
    n_layers: int
    n_heads: int
    d_hidden: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    rotary: xn.RotaryEncoding = xn.RotaryEncoding()  # noqa: RUF009  # it is frozen
    window: int | None = None
    use_bias: tuple[bool, bool] = (False, False)
    activation: Callable[[Array], Array] = nn.silu
    epsilon: float = 1e-5
    is_tied: bool = False
    dtype: Any = None


def llama(sizes: Llama) -> cb.Combinator:
    """Tokens ``[batch, time]`` -> logits ``[batch, time, n_tokens]``.

    The context keyword ``padding_mask``, ``bool[batch, 1, time]``, says where no padding is; only
    padding on the left needs it.
    """
    rms_norm = functools.partial(nn.RMSNorm, epsilon=sizes.epsilon, dtype=sizes.dtype)
    attention = xn.SelfAttention(
        sizes.n_heads,
        d_qk=sizes.n_heads * (sizes.d_head or sizes.d_model // sizes.n_heads),
        d_output=sizes.d_model,
        use_bias=sizes.use_bias[0],
        causal=True,
        window=sizes.window,
        n_kv_heads=sizes.n_kv_heads,
        rotary=sizes.rotary,
        dtype=sizes.dtype,
        name="attention",
    )
    feed_forward = xn.FeedForward(
        activation=sizes.activation,
        d_hidden=sizes.d_hidden,
        gated=True,
        use_bias=sizes.use_bias[1],
        dtype=sizes.dtype,
        name="feed_forward",
    )
    block = pre_norm_block(cb.fn(attention, mask=PADDING), feed_forward, rms_norm)
    return language_model(
        nn.Embed(sizes.n_tokens, sizes.d_model, dtype=sizes.dtype, name="embed"),
        cb.repeat(block, sizes.n_layers, name="layers"),
        rms_norm(name="norm"),
        is_tied=sizes.is_tied,
    )


def gpt2(tower: Tower, n_tokens: int, n_positions: int, *, is_tied: bool = True) -> cb.Combinator:
    """Tokens ``[batch, time]`` -> logits ``[batch, time, n_tokens]``; see :func:`llama`."""
    return language_model(
        tower.embed(n_tokens),
        tower.positions(n_positions),
        tower.blocks(causal=True, mask=PADDING),
        tower.norm("norm"),
        is_tied=is_tied,
    )


if __name__ == "__main__":
    from generate_text import main

    sys.exit(main())
