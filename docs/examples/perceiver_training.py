"""Training of a small Perceiver on Python's own library: it learns to fill in masked bytes.

    state = train(MaskedRecipe(), read_corpus(held_out=False), directory)

Source of the task: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding" (2018), section 3.1; here every chosen byte is masked, and none is changed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from corpus import read_corpus
from flax_extra import combinator as cb
from perceiver_io import Core
from perceiver_models import masked_language_model
from perceiver_text import MASK, N_SPECIAL, as_bytes, as_tokens, padded
from training import Recipe, TrainingError

N_HEADS = 4


class Batch(NamedTuple):
    """Texts, the same with some bytes masked, and where there is no padding, ``[batch, time]``."""

    tokens: np.ndarray
    masked: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class MaskedRecipe(Recipe):
    """A masked language model, and how it is trained.

    Args:
        n_steps: see :class:`Recipe`.
        batch_size: see :class:`Recipe`.
        learning_rate: see :class:`Recipe`.
        seed: see :class:`Recipe`.
        n_positions: bytes of a text.
        n_latents: of the model.
        d_model: features of tokens and of latents.
        n_layers: self-attention blocks of the model.
        mask_rate: how probably a byte is masked.
        copy_weight: how much it counts that the other bytes come back as they are. There are more
            of them, and from them the model learns sooner where to look.

    Raises:
        TrainingError: If ``d_model`` is no multiple of the number of heads.
    """

    n_steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    n_positions: int = 64
    n_latents: int = 32
    d_model: int = 96
    n_layers: int = 2
    mask_rate: float = 0.15
    copy_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.d_model % N_HEADS:
            raise TrainingError(
                f"A width of {self.d_model} is no multiple of {N_HEADS}, the number of heads."
            )

    def model(self) -> cb.Combinator:
        """The model, without its weights."""
        core = Core(
            n_latents=self.n_latents,
            d_latents=self.d_model,
            n_layers=self.n_layers,
            n_heads=N_HEADS,
            n_heads_encoder=N_HEADS,
            widening_factor=2,
        )
        return masked_language_model(
            core,
            n_positions=self.n_positions,
            d_model=self.d_model,
            n_heads_decoder=N_HEADS,
            d_qk_decoder=self.d_model,
        )

    def init_params(self, key: Array) -> Any:
        """Returns the weights before the first step."""
        return self.model().init(key, jnp.zeros((1, self.n_positions), jnp.int32), None)

    def draw_batch(self, corpus: np.ndarray, index: int) -> Batch:
        """Draws texts of any length, but every second one as long as can be, and masks."""
        draw = np.random.default_rng([self.seed, index])
        n_rows, longest = self.batch_size, self.n_positions - 2
        lengths = np.full(n_rows, longest)
        lengths[1::2] = draw.integers(1, longest, n_rows // 2, endpoint=True)
        starts = draw.integers(0, len(corpus) - longest, n_rows)
        rows = [
            padded(as_tokens(corpus[start : start + length].tobytes()), self.n_positions)
            for start, length in zip(starts, lengths, strict=True)
        ]
        tokens, mask = map(np.concatenate, zip(*rows, strict=True))
        is_masked = (tokens >= N_SPECIAL) & (draw.random(tokens.shape) < self.mask_rate)
        return Batch(tokens, np.where(is_masked, MASK, tokens).astype(np.int32), mask)

    def compute_loss(self, params: Any, batch: Batch) -> tuple[Array, Array]:
        """Computes how badly masked bytes are filled in, which is shown, and others come back."""
        logits: Any = self.model().apply(params, batch.masked, batch.mask)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens)
        is_masked = batch.masked == MASK
        filled, copied = _mean(each, is_masked), _mean(each, ~is_masked & batch.mask)
        return filled + self.copy_weight * copied, filled


def _mean(x: Array, where: Array) -> Array:
    """Computes the mean of some values; zero if there are none."""
    return jnp.sum(x, where=where) / jnp.maximum(jnp.sum(where), 1)


class Score(NamedTuple):
    """How many of the masked bytes are filled in right, and what there is to beat."""

    n_bytes: int
    accuracy: float
    baseline: float
    most_frequent: bytes


def evaluate(recipe: MaskedRecipe, params: Any, n_batches: int = 20) -> Score:
    """Fills masks in files that were held out, and compares with the most frequent byte."""
    unseen = read_corpus(held_out=True)
    guess = np.bincount(read_corpus(held_out=False)).argmax()
    most_frequent = int(guess) + N_SPECIAL
    score = jax.jit(recipe.model().apply)
    right, baseline, n_bytes = 0, 0, 0
    for index in range(n_batches):
        texts = recipe.draw_batch(unseen, index)
        is_masked = texts.masked == MASK
        n_bytes += int(is_masked.sum())
        guesses = np.asarray(score(params, texts.masked, texts.mask)).argmax(-1)
        right += int((guesses == texts.tokens)[is_masked].sum())
        baseline += int((texts.tokens[is_masked] == most_frequent).sum())
    return Score(n_bytes, right / n_bytes, baseline / n_bytes, as_bytes(np.array([most_frequent])))
