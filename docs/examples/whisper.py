"""Whisper: speech to text, as an encoder of sounds and a decoder that looks at them.

The encoder makes a sequence of a sound: two convolutions over log-mel features, and blocks. The
decoder is a language model whose blocks also look at that sequence, the memory.

    >>> tower = Tower(d_model=16, n_layers=2, n_heads=2, d_hidden=32, activation=nn.gelu)
    >>> model = whisper(encoder(tower, n_positions=50), decoder(tower, n_tokens=99, n_positions=20))
    >>> print(cb.shape_signature(model, "i32[b, t] where t <= 20", "f32[b, 100, 80]"))
    i32[b, t], f32[b, 100, 80] where t <= 20 -> f32[b, t, 99]

whisper_checkpoints.py loads the directories that transformers saves, and the numbers are its
numbers (tests/parity/test_whisper.py). On the command line it writes down what is said in a sound:

    python docs/examples/whisper.py --weights DIR --sound FILE

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), section
2.2 and figure 1.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from flax_extra import combinator as cb
from generation import Generated, generate
from sound import log_mel
from transformer import Tower


def encoder(tower: Tower, n_positions: int) -> cb.Combinator:
    """Makes the encoder: features ``[batch, 2 * n_positions, n_mels]`` -> memory.

    The memory is ``[batch, n_positions, d_model]``: every 20 ms of the sound.
    """
    d, dtype = tower.d_model, tower.dtype
    return cb.serial(
        nn.Conv(d, (3,), padding=1, dtype=dtype, name="conv_0"),
        tower.activation,
        nn.Conv(d, (3,), strides=2, padding=1, dtype=dtype, name="conv_1"),
        tower.activation,
        tower.positions(n_positions),
        tower.blocks(causal=False),
        tower.norm("norm"),
        name="encoder",
    )


def decoder(tower: Tower, n_tokens: int, n_positions: int) -> cb.Combinator:
    """Makes the decoder: (tokens ``[batch, time]``, memory) -> logits ``[batch, time, n_tokens]``.

    In a stream the memory is given with the first block, and None from then on.
    """
    embed = tower.embed(n_tokens)
    return cb.serial(
        embed,
        tower.positions(n_positions),
        tower.blocks(causal=True, cross=True),
        tower.norm("norm"),
        embed.attend,
        name="decoder",
    )


def whisper(encoder: cb.Combinator, decoder: cb.Combinator) -> cb.Combinator:
    """(Tokens ``[batch, time]``, features) -> logits ``[batch, time, n_tokens]``."""
    return cb.dip(encoder) >> decoder


@dataclasses.dataclass(frozen=True)
class Task:
    """What to write down, in tokens.

    Args:
        prompt: what the decoder starts with: language, task, and whether there are times.
        end: the token after the last.
        never: tokens that must not come.
        not_first: tokens that must not come first.
    """

    prompt: tuple[int, ...]
    end: int
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()


class Suppress(nn.Module):
    """Makes the tokens impossible that must not come: logits ``[batch, time, n_tokens]``.

    The first token is scored at the end of the prompt. In a stream, too, the layer knows how far
    each row is.
    """

    task: Task

    @nn.compact
    def __call__(
        self, logits: Array, *, decode: bool = False, lengths: Array | None = None
    ) -> Array:
        """Leaves all other logits as they are."""
        positions = cb.Cache(self, logits, decode=decode, lengths=lengths).positions
        is_first = positions[..., None] == len(self.task.prompt) - 1
        tokens = np.arange(logits.shape[-1])[None, None]
        never, not_first = (np.isin(tokens, t) for t in (self.task.never, self.task.not_first))
        return jnp.where(never | (not_first & is_first), -jnp.inf, logits)


def transcribe(
    model: cb.Combinator, variables: Any, sound: Array, task: Task, n_new: int
) -> Generated:
    """Writes down what is said, greedily: one XLA program under ``jax.jit``.

    Args:
        model: a :func:`whisper`.
        variables: its variables.
        sound: samples at 16 kHz, ``[batch, samples]``, as long as the model takes.
        task: what to write down.
        n_new: the number of tokens at most.

    Returns:
        The tokens, ``[batch, n_new]``, and how many there are in each row.
    """
    dip: Any = model[0]
    encoder, decoder = dip[0], model[1]
    params = variables["params"]["encoder"]
    n_mels = params["conv_0"]["kernel"].shape[1]
    memory = encoder.apply({"params": params}, log_mel(sound, n_mels))
    prompts = jnp.tile(jnp.asarray([task.prompt], jnp.int32), (sound.shape[0], 1))
    stream = cb.stream(
        cb.serial(decoder, Suppress(task)),
        "i32[b, t]",
        f"f32[b, {memory.shape[1]}, {memory.shape[2]}]",
        capacity=len(task.prompt) + n_new,
    )
    return generate(
        stream, variables, prompts, None, n_new, stop=(task.end,), inputs=(memory.astype("f4"),)
    )


if __name__ == "__main__":
    from transcribe import main

    sys.exit(main())
