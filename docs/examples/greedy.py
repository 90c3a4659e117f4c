"""Greedy generation: the most probable token, again and again, as one loop of one XLA program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flax_extra import combinator as cb


def generate(
    stream: cb.Stream,
    variables: Any,
    prompts: Array,
    n_steps: int,
    *,
    lengths: Array | None = None,
    memory: tuple[Any, ...] = (),
    end: tuple[int, ...] = (),
    adjust: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """Goes on with each prompt.

    Args:
        stream: of a pipeline (tokens, memory..) -> logits ``[batch, time, n_tokens]``.
        variables: of the pipeline.
        prompts: tokens ``[batch, time]``, with padding on the right.
        n_steps: the number of tokens to add.
        lengths: of the prompts, ``[batch]``; all of the time by default.
        memory: what else the pipeline takes in its first block; it is None in later blocks.
        end: tokens that end a text. The first of them fills what follows.
        adjust: changes the logits ``[batch, n_tokens]`` of a step, whose index is the other
            argument; for tokens that must not come.

    Returns:
        The tokens that were added, ``[batch, n_steps]``.
    """
    batch, time = prompts.shape
    lengths = jnp.full((batch,), time) if lengths is None else lengths
    fill = end[0] if end else 0

    def choose(logits: Array, index: Any) -> Array:
        adjusted = logits if adjust is None else adjust(logits, index)
        return jnp.argmax(adjusted, axis=-1).astype(prompts.dtype)

    def is_unfinished(carry: tuple[Any, ...]) -> Array:
        index, _, _, _, is_over = carry
        is_going_on: Array = (index < n_steps) & ~jnp.all(is_over)
        return is_going_on

    def add_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, state, token, added, is_over = carry
        added = added.at[:, index].set(token)
        is_over |= jnp.isin(token, jnp.asarray(end, token.dtype))
        state, logits = stream.step(variables, state, token[:, None], *(None for _ in memory))
        token = jnp.where(is_over, fill, choose(logits[:, 0], index + 1))
        return index + 1, state, token, added, is_over

    state, logits = stream.step(variables, stream.start(batch), prompts, *memory, lengths=lengths)
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    added = jnp.full((batch, n_steps), fill, prompts.dtype)
    carry = (0, state, choose(last, 0), added, jnp.zeros((batch,), bool))
    tokens: Array = jax.lax.while_loop(is_unfinished, add_token, carry)[3]
    return tokens
