"""A small language model of bytes, and its training on Python's own library.

The decoder is the one of today's large models: causal attention with rotary positions, a gated
feed-forward layer, RMSNorm before both, and an embedding that scores the next byte, too. It is
trained on whole sequences, and generates as a stream, with the same parameters:

    >>> model = LanguageRecipe(d_model=16, n_layers=1).model()
    >>> print(cb.shape_signature(model, "i32[b, t]"))
    i32[b, t] -> f32[b, t, 256]
    >>> cb.stream(model, "i32[b, t]", capacity=1000).takes_lengths
    True

Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023), section 2.2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from corpus import read_corpus
from flax_extra import combinator as cb
from flax_extra import layer as xn
from ngrams import N_BYTES, NgramModel
from tied_scores import TiedScores
from training import Recipe, TrainingError


def language_model(
    *, n_tokens: int, d_model: int, n_layers: int, n_heads: int, d_hidden: int, window: int
) -> cb.Combinator:
    """Scores each token that may come next.

    Args:
        n_tokens: how many tokens there are.
        d_model: features of a token.
        n_layers: how many blocks of attention and feed-forward.
        n_heads: of the attention.
        d_hidden: features within the feed-forward.
        window: how many tokens attention looks back: all that a stream remembers.

    Returns:
        A pipeline tokens ``[batch, time]`` -> logits ``[batch, time, n_tokens]``.
    """
    attention = xn.SelfAttention(
        n_heads,
        causal=True,
        window=window,
        rotary=xn.RotaryEncoding(),
        use_bias=False,
        name="attention",
    )
    feed_forward = xn.FeedForward(
        activation=nn.silu, d_hidden=d_hidden, gated=True, use_bias=False, name="feed_forward"
    )
    block = cb.serial(
        cb.residual(nn.RMSNorm(), cb.fn(attention, mask=None)),
        cb.residual(nn.RMSNorm(), feed_forward),
    )
    small = nn.initializers.normal(0.02)
    embed = nn.Embed(n_tokens, d_model, embedding_init=small, name="embed")
    return cb.serial(
        embed,
        nn.RMSNorm(),
        cb.repeat(block, n_layers, name="blocks"),
        nn.RMSNorm(),
        TiedScores(embed, name="scores"),
    )


@dataclasses.dataclass(frozen=True)
class LanguageRecipe(Recipe):
    """A language model of bytes, and how it is trained.

    Args:
        n_steps: see :class:`Recipe`.
        batch_size: see :class:`Recipe`.
        learning_rate: see :class:`Recipe`.
        seed: see :class:`Recipe`.
        n_positions: bytes of a text.
        d_model: features of a byte.
        n_layers: blocks of the model.
        n_heads: heads of its attention.

    Raises:
        TrainingError: If ``d_model`` is no multiple of twice the number of heads: rotary positions
            turn pairs of features.
    """

    n_steps: int = 4000
    batch_size: int = 8
    learning_rate: float = 5e-3
    seed: int = 0
    n_positions: int = 128
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.n_heads):
            raise TrainingError(
                f"A width of {self.d_model} is no multiple of {2 * self.n_heads}, twice the number "
                "of heads."
            )

    def model(self) -> cb.Combinator:
        """The model, without its weights."""
        return language_model(
            n_tokens=N_BYTES,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_hidden=2 * self.d_model,
            window=max(1, self.n_positions // 2),
        )

    def init_params(self, key: Array) -> Any:
        """Returns the weights before the first step."""
        return self.model().init(key, jnp.zeros((1, self.n_positions), jnp.int32))

    def draw_batch(self, corpus: np.ndarray, index: int) -> np.ndarray:
        """Draws texts, ``[batch, n_positions + 1]``: each byte but the last predicts the next."""
        draw = np.random.default_rng([self.seed, index])
        starts = draw.integers(0, len(corpus) - self.n_positions, self.batch_size)
        return _cut(corpus, starts, self.n_positions + 1)

    def compute_loss(self, params: Any, batch: Array) -> tuple[Array, Array]:
        """Computes how badly each byte is predicted: nats, on average."""
        loss = _count_nats(self, params, batch).mean()
        return loss, loss


def _cut(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Cuts pieces of one length out of a text."""
    return text[starts[:, None] + np.arange(length)].astype(np.int32)


def _count_nats(recipe: LanguageRecipe, params: Any, texts: Array) -> Array:
    """Counts the nats of each byte but the first, ``[batch, time - 1]``."""
    logits: Any = recipe.model().apply(params, texts[:, :-1])
    nats: Array = optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:])
    return nats


# How good it is


class Score(NamedTuple):
    """Bits per byte of files that were held out, and what there is to beat."""

    n_bytes: int
    model: float
    frequencies: float
    """A count of how often each byte comes."""
    five_grams: float
    """A count of which byte comes after which four, with Kneser-Ney smoothing."""


def evaluate(recipe: LanguageRecipe, params: Any, n_windows: int = 1024) -> Score:
    """Predicts bytes of files that were held out, and compares with counting.

    Windows are spread over the files. The bytes in the second half of each are counted, so that the
    model has half a window to go by; an n-gram model has all that it can use.
    """
    seen, unseen = read_corpus(held_out=False), read_corpus(held_out=True)
    length, half = recipe.n_positions + 1, recipe.n_positions // 2
    starts = np.linspace(0, len(unseen) - length, n_windows).astype(int)
    count = jax.jit(functools.partial(_count_nats, recipe))
    nats = [
        np.asarray(count(params, _cut(unseen, some, length)))[:, half:]
        for some in np.split(starts, range(recipe.batch_size, n_windows, recipe.batch_size))
    ]
    is_counted = starts[:, None] + np.arange(half + 1, length)
    frequencies, five_grams = (
        NgramModel.fit(seen, order).count_bits(unseen)[is_counted].mean() for order in (1, 5)
    )
    model = np.concatenate(nats).mean() / np.log(2)
    return Score(is_counted.size, float(model), float(frequencies), float(five_grams))
