r"""Generates tokens with any pipeline from tokens to logits that runs as a stream.

The prompts are read as one block. A loop then runs the model on one token at a time, draws the next
token from its logits, and ends when every row has ended. All of it is one XLA program, in which the
state of the stream is updated in place:

    >>> from flax import linen as nn
    >>> from flax_extra import layer as xn
    >>> model = cb.serial(nn.Embed(256, 8), xn.LSTM(8, return_sequences=True), nn.Dense(256))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 1), int))
    >>> stream = cb.stream(model, "i32[b, t]")
    >>> prompts, lengths = pad_prompts([b"def", b"class"])
    >>> sampler = Sampler(temperature=0.8, top_k=40, top_p=0.95)
    >>> key = jax.random.key(1)
    >>> generated = generate(
    ...     stream, variables, prompts, lengths, 20, sampler=sampler, stop=b"\n", key=key
    ... )
    >>> generated.tokens.shape, generated.lengths.shape
    ((2, 20), (2,))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flax_extra import combinator as cb

# How a token is chosen

ChooseToken: TypeAlias = Callable[[Array, Array], Array]
"""A function from the logits of a row, ``[n_tokens]``, and a key to a token.

Functions that are equal share a compiled program.
"""


def greedy(logits: Array, key: Array | None = None) -> Array:
    """Chooses the most probable token: the first, if there are several.

    >>> greedy(jnp.array([0.0, 3.0, 1.0])).item()
    1
    """
    del key
    return jnp.argmax(logits)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws a token from the most probable ones, in proportion to their probabilities.

    Args:
        temperature: divides the logits. Below 1, probable tokens become more probable.
        top_k: how many tokens are candidates; all by default.
        top_p: of these, the fewest that have this probability together are candidates; the most
            probable one always is.

    Raises:
        ValueError: If the temperature is not above 0, ``top_k`` is below 1, or ``top_p`` is not in
            (0, 1].

    Source: Fan et al., "Hierarchical Neural Story Generation" (2018), section 5.1, for ``top_k``;
    Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), section 3.1, for
    ``top_p``.

    Example:
        >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
        >>> tokens, scores = Sampler(top_p=0.8).find_candidates(logits)
        >>> tokens.tolist(), [round(float(p), 2) for p in jax.nn.softmax(scores)]
        ([1, 2, 0], [0.67, 0.33, 0.0])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"A temperature of {self.temperature} is not above 0. "
                "To choose the most probable token, use greedy."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}.")

    def __call__(self, logits: Array, key: Array) -> Array:
        """Draws a token.

        Args:
            logits: of the next token, ``[n_tokens]``.
            key: what is drawn with.
        """
        tokens, scores = self.find_candidates(logits)
        return tokens[jax.random.categorical(key, scores)]

    def find_candidates(self, logits: Array) -> tuple[Array, Array]:
        """Finds the tokens that may be drawn, the most probable one first.

        Args:
            logits: of the next token, ``[n_tokens]``.

        Returns:
            Tokens and their logits, ``[n_candidates]`` each; minus infinity for a token that is not
            drawn.
        """
        logits = logits.astype(jnp.float32) / self.temperature
        n_tokens = logits.shape[-1]
        if self.top_k is None and self.top_p is None:
            return jnp.arange(n_tokens), logits  # nothing to sort for
        scores, tokens = jax.lax.top_k(logits, min(self.top_k or n_tokens, n_tokens))
        if self.top_p is not None:
            probabilities = jax.nn.softmax(scores)
            more_probable = jnp.cumsum(probabilities) - probabilities
            is_candidate = (more_probable < self.top_p).at[0].set(True)
            scores = jnp.where(is_candidate, scores, -jnp.inf)
        return tokens, scores


# Generation


class Generated(NamedTuple):
    """The tokens that follow each prompt."""

    tokens: Array
    """``[batch, n_new]``: zeros after the end of a row."""
    lengths: Array
    """How many tokens each row has, its stop token included: ``[batch]``."""


def generate(
    stream: cb.Stream,
    variables: Mapping[str, Any],
    prompts: Any,
    lengths: Any,
    n_new: int,
    *,
    sampler: ChooseToken = greedy,
    stop: Iterable[int] = (),
    key: Array | None = None,
    inputs: Sequence[Any] = (),
    state: cb.StreamState | None = None,
    show: Callable[[Array], None] | None = None,
) -> Generated:
    """Generates what follows each prompt, in one compiled program.

    The program is kept: it serves all calls with the same stream, sampler, stop tokens, number of
    new tokens and shapes. What a row gets does not depend on its neighbours or on the padding.

    Args:
        stream: a stream of a pipeline from tokens ``[batch, time]`` to logits
            ``[batch, time, n_tokens]``.
        variables: the variables of the pipeline.
        prompts: tokens, ``[batch, time]``, padded at the end; :func:`pad_prompts` makes them.
        lengths: how many tokens of each prompt are not padding, ``[batch]``; None if all are as
            long.
        n_new: how many tokens to generate at most.
        sampler: chooses a token from the logits of a row: :func:`greedy`, a :class:`Sampler`, or a
            function of your own.
        stop: a row ends with the first of these tokens that it generates.
        key: for a sampler that draws: one for all rows, ``[]``, or one for each, ``[batch]``.
        inputs: further inputs of the pipeline, such as what a decoder attends to. They are given
            with the prompt; after it, the stream goes on with None.
        state: where to go on from; the start of the stream by default.
        show: called with the number of new tokens, after each of them: for a progress bar.

    Returns:
        The new tokens and how many there are. Within a program of your own, a token is -1 where
        the logits are NaN, as they are over the capacity of the stream.

    Raises:
        ValueError: If the prompts are not integers ``[batch, time]``, a length is not from 1 to the
            length of the array, there is no room for the new tokens in the stream, ``n_new`` is
            below 1, a sampler other than ``greedy`` has no key, or logits are NaN.

    Example:
        >>> count = lambda tokens: jax.nn.one_hot(tokens + 1, 10)  # after 3 comes 4
        >>> generated = generate(cb.stream(count, "i32[b, t]"), {}, [[3], [7]], None, 4, stop=[9])
        >>> generated.tokens.tolist(), generated.lengths.tolist()
        ([[4, 5, 6, 7], [8, 9, 0, 0]], [4, 2])
    """
    prompts = jnp.asarray(prompts)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(
            f"Prompts must be integers [batch, time]; got {prompts.dtype}{list(prompts.shape)}. "
            "pad_prompts makes one array of several prompts."
        )
    if n_new < 1:
        raise ValueError(f"n_new must be at least 1; got {n_new}.")
    n_rows, time = prompts.shape
    if key is None and sampler is not greedy:
        raise ValueError(f"{sampler} draws tokens: give it a key, such as key=jax.random.key(0).")
    key = jax.random.key(0) if key is None else key
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        _check_lengths(lengths, n_rows, time)
    _check_room(stream, state, np.full(n_rows, time) if lengths is None else lengths, n_new)
    generated: Generated = _generate(
        stream,
        variables,
        state,
        prompts,
        lengths,
        _split_by_row(key, n_rows),
        tuple(inputs),
        n_new=n_new,
        sampler=sampler,
        stop=tuple(stop),
        show=show,
    )
    if show is not None:
        jax.effects_barrier()  # type: ignore[no-untyped-call]
    _check_tokens(generated.tokens)
    return generated


class _Progress(NamedTuple):
    """What the loop carries: the state of the stream, and what was generated so far."""

    n_done: Array
    state: cb.StreamState
    last: Array
    """The last token of each row, which the model has not read: ``[batch]``."""
    has_ended: Array
    generated: Generated


@functools.partial(jax.jit, static_argnames=("stream", "n_new", "sampler", "stop", "show"))
def _generate(
    stream: cb.Stream,
    variables: Mapping[str, Any],
    state: cb.StreamState | None,
    prompts: Array,
    lengths: Array | None,
    keys: Array,
    inputs: tuple[Any, ...],
    *,
    n_new: int,
    sampler: ChooseToken,
    stop: tuple[int, ...],
    show: Callable[[Array], None] | None,
) -> Generated:
    n_rows, time = prompts.shape
    state = stream.start(n_rows) if state is None else state
    # The loop reads the last token of each prompt, so that it starts as it goes on. Nobody needs
    # the logits of the others: XLA does not compute them.
    if time > 1:
        n_read = None if lengths is None else lengths - 1
        state, _ = stream.step(variables, state, prompts[:, :-1], *inputs, lengths=n_read)
    at = jnp.full(n_rows, time - 1) if lengths is None else lengths - 1
    last = jnp.take_along_axis(prompts, at[:, None], axis=1)[:, 0]

    def has_more(progress: _Progress) -> Array:
        return (progress.n_done < n_new) & ~jnp.all(progress.has_ended)

    def add_token(progress: _Progress, inputs: Sequence[Any] = (None,) * len(inputs)) -> _Progress:
        index, ended = progress.n_done, progress.has_ended
        state, logits = stream.step(variables, progress.state, progress.last[:, None], *inputs)
        logits = logits[:, 0]
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        chosen = jax.vmap(sampler)(logits, row_keys).astype(prompts.dtype)
        chosen = jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, chosen)
        token = jnp.where(ended, 0, chosen)
        generated = Generated(
            progress.generated.tokens.at[:, index].set(token),
            progress.generated.lengths + ~ended,
        )
        for stop_token in stop:
            ended |= token == stop_token
        if show is not None:
            jax.debug.callback(show, index + 1)
        return _Progress(index + 1, state, token, ended, generated)

    none_yet = Generated(jnp.zeros((n_rows, n_new), prompts.dtype), jnp.zeros(n_rows, jnp.int32))
    start = _Progress(jnp.int32(0), state, last, jnp.zeros(n_rows, bool), none_yet)
    if inputs and time == 1:  # the first token is the first block, which they are given with
        start = add_token(start, inputs)
    return jax.lax.while_loop(has_more, add_token, start).generated


def _split_by_row(key: Array, n_rows: int) -> Array:
    """Makes a key for each row, which does not depend on how many rows there are."""
    if key.ndim:
        return key
    keys: Array = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(n_rows))
    return keys


def _check_lengths(lengths: Array, n_rows: int, time: int) -> None:
    """Raises an error if lengths do not fit the prompts."""
    if lengths.shape != (n_rows,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"The lengths of {n_rows} prompts must be integers [{n_rows}]; got {lengths.dtype}"
            f"{list(lengths.shape)}."
        )
    if isinstance(lengths, jax.core.Tracer):
        return
    rows = np.flatnonzero((lengths < 1) | (lengths > time)).tolist()
    if rows:
        raise ValueError(
            f"The prompts of rows {rows} have lengths {lengths[np.array(rows)].tolist()}: each "
            f"needs at least 1 token, and the array has room for {time}."
        )


def _check_tokens(tokens: Array) -> None:
    """Raises an error if there were logits that are NaN."""
    if isinstance(tokens, jax.core.Tracer):
        return
    rows = np.flatnonzero((tokens < 0).any(axis=1)).tolist()
    if rows:
        index = int((tokens[rows[0]] < 0).argmax())
        raise ValueError(
            f"The logits of rows {rows} are NaN, in row {rows[0]} from new token {index} on. Are "
            "all tokens of the prompts below the number of tokens, and all parameters finite?"
        )


def _check_room(stream: cb.Stream, state: cb.StreamState | None, lengths: Any, n_new: int) -> None:
    """Raises an error if there is no room for all new tokens of a row."""
    before = np.int32(0) if state is None else stream.position(state)
    if isinstance(lengths, jax.core.Tracer) or isinstance(before, jax.core.Tracer):
        return
    n_tokens = np.asarray(before) + np.asarray(lengths)
    n_steps = n_tokens + n_new - 1  # the last token is never read
    if stream.room is not None and n_steps.max() > stream.room:
        row = int(n_steps.argmax())
        raise ValueError(
            f"Row {row} has {n_tokens[row]} tokens, and {n_new} are to come: the "
            f"capacity of the stream is {stream.room}. Make the stream with "
            f"capacity={n_steps.max()}, or generate fewer tokens."
        )


def pad_prompts(
    prompts: Sequence[Sequence[int]], multiple_of: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Makes one array of prompts of different lengths, padded at the end.

    Args:
        prompts: the tokens of each. ``bytes`` are a sequence of tokens, too.
        multiple_of: the array is that long, or a multiple of it, so that prompts of about the same
            length share a compiled program.

    Returns:
        Tokens ``[batch, time]`` and lengths ``[batch]``.

    Example:
        >>> tokens, lengths = pad_prompts([[1, 2, 3], [4]])
        >>> tokens.tolist(), lengths.tolist()
        ([[1, 2, 3], [4, 0, 0]], [3, 1])
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    time = -(-lengths.max() // multiple_of) * multiple_of
    tokens = np.zeros((len(prompts), time), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = list(prompt)
    return tokens, lengths
