"""``Cache``: how a layer remembers from block to block of a stream.

A layer that streams takes the keywords ``decode`` and ``lengths``, and computes one block of time.
What it remembers is in the collection ``"cache"``, which linen's own layers use, too:

- All state is zeros at the start of a stream. Initializing with ``decode=True`` gives its shapes;
  nothing is written then.
- Every row of the batch has a place of its own in time, in the variable ``position``.
- Without ``decode``, the block is the whole sequence, and nothing is remembered.

A row that cannot go on, because it has run over the capacity or was given invalid lengths, is
refused where the numbers are known, and gives NaN from there on in a compiled program.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from flax_extra.combinator._cache.entry import CacheEntry
from flax_extra.combinator._core import errors, stream_errors
from flax_extra.combinator._core.describe import describe_item

COLLECTION = "cache"
"""The collection of variables in which layers remember."""

LOST = 2**30
"""The position of a row that was given invalid lengths: beyond every capacity, for good."""


has_capacity: contextvars.ContextVar[bool] = contextvars.ContextVar("has_capacity", default=True)
"""Whether the block with which a state is initialized is as long as a stream may be."""


class Cache:
    """What one layer remembers from block to block of a stream.

    A layer makes one at the start of its compact call, and says what to remember. In whole mode,
    without ``decode``, the same code computes the whole sequence. See the guide "Write a layer that
    streams".

    Args:
        layer: the layer whose variables hold the state.
        inputs: the block, ``[batch, time, ...]``.
        decode: whether the block goes on from the last one.
        lengths: how many steps of the block are valid in each row, ``[batch]``; all by default.
            The others are padding: they do not change what is remembered.

    Raises:
        TypeError: If ``decode`` is not a Python bool.
        ValueError: If ``inputs`` has no time axis, or ``lengths`` are not integers ``[batch]`` or
            known to lie outside of the block.

    With ``decode``, the methods raise a StreamError if the layer has no state, or one of another
    shape, or may not change it.

    Example:
        The mean of all steps so far, whole or block by block:

        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> class RunningMean(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, *, decode=False, lengths=None):
        ...         cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        ...         total = cache.recall("total", jnp.zeros_like(x[:, 0]))
        ...         totals = total[:, None] + jnp.cumsum(x, axis=1)
        ...         cache.keep("total", cache.take_last(totals))
        ...         return totals / (1 + cache.positions[..., None])
        >>> stream = cb.stream(RunningMean(), "f32[b, t, 1]")
        >>> state = stream.start(1)
        >>> state, y = stream.step({}, state, jnp.array([[[1.0], [3.0]]]))
        >>> state, z = stream.step({}, state, jnp.array([[[8.0]]]))
        >>> y.ravel().tolist(), z.ravel().tolist()
        ([1.0, 2.0], [4.0])
    """

    def __init__(
        self,
        layer: nn.Module,
        inputs: Any,
        *,
        decode: bool = False,
        lengths: Any = None,
    ) -> None:
        name = type(layer).__name__
        if not isinstance(decode, bool | np.bool_):
            raise stream_errors.decode_is_no_bool(name, describe_item(decode))
        batch, *others = jnp.shape(inputs) or (None,)
        if not others:
            raise stream_errors.no_block(name, describe_item(inputs))
        self._layer = layer
        self._name = name
        self._batch, self._time = batch, others[0]
        self._decode = bool(decode)
        self._lengths = check_lengths(name, lengths, self._batch, self._time)
        self._variables: dict[str, Any] = {}
        self._read: dict[str, tuple[CacheEntry, Array]] = {}
        self._recalled: set[str] = set()
        self._is_missing: Any = False

    @property
    def decode(self) -> bool:
        """Whether there is a state, or one is made while initializing."""
        return self._decode

    @property
    def is_streaming(self) -> bool:
        """Whether the block goes on from a state: with ``decode``, and not while initializing."""
        return self._decode and not self._layer.is_initializing()

    # Where the rows stand

    @functools.cached_property
    def positions(self) -> Array:
        """The place of each step in its row: ``[batch, time]``, or ``[1, time]`` if all are equal.

        Padding counts on from the last valid step.
        """
        start, steps = self._start[:, None], jnp.arange(self._time, dtype=jnp.int32)[None]
        return start + steps if self.is_streaming else steps

    @property
    def has_padding(self) -> bool:
        """Whether some steps may be padding: whether there are lengths."""
        return self._lengths is not None

    @functools.cached_property
    def is_valid(self) -> Array:
        """Whether each step is valid, or padding: ``[batch, time]``, or ``[1, time]``."""
        steps = jnp.arange(self._time, dtype=jnp.int32)[None]
        return steps >= 0 if self._lengths is None else steps < self._lengths[:, None]

    def take_last(self, sequence: Any) -> Any:
        """Takes the last valid step of each row, of arrays ``[batch, time, ...]``."""
        if self._lengths is None:
            return jax.tree.map(lambda x: x[:, -1], sequence)
        at = jnp.maximum(self._lengths - 1, 0)[:, None]
        return jax.tree.map(lambda x: _take_steps(x, at)[:, 0], sequence)

    # State that each block replaces

    def recall(self, name: str, initial: Any) -> Any:
        """Returns the state that :meth:`keep` kept; ``initial`` in rows that have no step yet.

        Args:
            name: the name of the state.
            initial: the state at the start: an array ``[batch, ...]``, or a pytree of arrays.

        Raises:
            ValueError: If ``initial`` does not have the batch of the inputs, or the kept state has
                another shape.
        """
        self._recalled.add(name)
        for leaf in jax.tree.leaves(initial):
            if jnp.shape(leaf)[:1] != (self._batch,):
                raise stream_errors.no_batch_in_state(
                    self._name, name, describe_item(leaf), self._batch
                )
        if not self._decode:
            return initial
        self._make_state(name, lambda: jax.tree.map(jnp.zeros_like, initial))
        has_begun, is_lost = self._start > 0, self._start >= LOST
        if not self.is_streaming:
            return initial
        kept = self._variables[name].value
        self._check_state(name, kept, initial)
        state = jax.tree.map(functools.partial(_choose_rows, has_begun), kept, initial)
        return jax.tree.map(functools.partial(_lose_rows, is_lost), state)

    def keep(self, name: str, state: Any) -> None:
        """Keeps a state for the next block, in the rows that have a valid step in this one.

        Args:
            name: the name under which :meth:`recall` was called.
            state: the state after the last valid step, with the shapes and dtypes of the initial.

        Raises:
            ValueError: If the state was not recalled before, or has other shapes or dtypes.
        """
        if self._decode and name not in self._recalled:
            raise stream_errors.not_recalled(self._name, name)
        if not self.is_streaming:
            return
        variable = self._variables[name]
        kept = variable.value
        self._check_state(name, kept, state)
        if self._lengths is not None:
            state = jax.tree.map(functools.partial(_choose_rows, self._lengths > 0), state, kept)
        variable.value = state

    # What is given once

    def remember(self, name: str, value: Array | None, *, dtype: Any = None) -> None:
        """Remembers a value that is given in one block, and not in later ones, for :meth:`read`.

        Such as the keys of what a decoder attends to.

        Args:
            name: the name of the value.
            value: an array ``[batch, ...]`` of the same shape in each block, or None to go on with
                what was given last.
            dtype: of what is remembered; that of the value by default.

        Raises:
            StreamError: If no value was given so far in a row, where that is known.
            ValueError: If the value does not have the batch of the inputs.
        """
        given_name = f"{name}_given"
        if value is None and not self.is_streaming:
            raise stream_errors.nothing_given(self._name, name)
        if value is not None and jnp.shape(value)[:1] != (self._batch,):
            raise stream_errors.no_batch_in_value(
                self._name, name, describe_item(value), self._batch
            )
        if value is not None and dtype is not None:
            value = value.astype(dtype)
        if self._decode:
            self._make_state(name, lambda: jax.tree.map(jnp.zeros_like, value))
            self._make_state(given_name, lambda: jnp.zeros((self._batch,), bool))
        if value is not None and not self.is_streaming:
            self._read[name] = CacheEntry(value), self.positions
            return
        entry = self._get_entry(name)
        if value is None:
            is_given = self._variables[given_name].value
            self._check_given(name, is_given)
            self._is_missing |= ~is_given
        else:
            if value.shape != entry.shape:
                raise stream_errors.other_value(self._name, name, entry.shape, value.shape)
            entry = entry.replace_boxed(value.astype(entry.dtype))
            self._put_entry(name, entry)
            self._variables[given_name].value = jnp.ones((self._batch,), bool)
        self._read[name] = entry, self.positions

    def lose_rows(self, x: Array) -> Array:
        """Puts NaN into rows that cannot go on: they are lost, or were never given a value."""
        if not self.is_streaming:
            return x
        return _lose_rows((self._start >= LOST) | self._is_missing, x)

    # Steps of the past

    def extend(self, name: str, steps: Array, n: int) -> Array:
        """Puts the ``n`` steps before this block in front of it: zeros at the start.

        Args:
            name: the name of what is remembered.
            steps: the block, ``[batch, time, ...]``.
            n: how many steps to remember.

        Returns:
            ``[batch, n + time, ...]``.

        Raises:
            ValueError: If the steps are not those of the block, or ``n`` is below 0.
        """
        self._check_steps(name, steps)
        if n < 0:
            raise errors.too_small(self._name, f"a number of steps for {name}", 0, n)
        past = self.recall(name, jnp.zeros((self._batch, n, *steps.shape[2:]), steps.dtype))
        both = jnp.concatenate([past, steps], axis=1)
        if self._lengths is None:
            self.keep(name, both[:, self._time :])
        else:
            at = self._lengths[:, None] + jnp.arange(n, dtype=jnp.int32)[None]
            self.keep(name, _take_steps(both, at))
        return both

    def append(
        self, name: str, steps: Array, *, window: int | None = None, dtype: Any = None
    ) -> None:
        """Appends the steps of this block to those before it, for :meth:`read`.

        Args:
            name: the name of what is remembered.
            steps: the block, floats ``[batch, time, ...]``.
            window: how many steps to remember, if there is room for as many. By default all, up to
                the capacity: the length of the block with which the state was initialized.
            dtype: of what is remembered; that of ``steps`` by default.

        Raises:
            StreamError: If the block is longer than the capacity, or a row is known to run over it.
            TypeError: If the steps are no floats.
            ValueError: If the steps are not those of the block, or ``window`` is below 1.
        """
        self._check_steps(name, steps)
        if not jnp.issubdtype(steps.dtype, jnp.floating):
            raise stream_errors.no_floats(self._name, name, describe_item(steps))
        if window is not None and window < 1:
            raise errors.too_small(self._name, f"a window for {name}", 1, window)
        steps = steps.astype(dtype or steps.dtype)
        if self.has_padding:  # it may be NaN, which no mask hides from a product
            steps = _choose_rows(self.is_valid, steps, jnp.zeros_like(steps))
        if self._decode:
            size = self._time
            if window is not None:
                size = min(window, size) if has_capacity.get() else window
            shape = (self._batch, size, *steps.shape[2:])
            self._make_state(name, lambda: jnp.zeros(shape, steps.dtype))
        if not self.is_streaming:
            self._read[name] = CacheEntry(steps), self.positions
            return
        past = self._get_entry(name)
        if (past.shape[:1], past.shape[2:]) != (steps.shape[:1], steps.shape[2:]):
            expected = jax.ShapeDtypeStruct(
                (self._batch, past.shape[1], *steps.shape[2:]), steps.dtype
            )  # type: ignore[no-untyped-call]
            raise stream_errors.other_state(
                self._name, name, describe_item(past), describe_item(expected)
            )
        steps = _lose_rows(self._start >= LOST, steps.astype(past.stacked.dtype))
        # A window that the capacity does not reach is no ring: the row ends before it is full.
        if past.shape[1] == window:
            entry, self._read[name] = self._write_in_ring(past, steps)
        else:
            entry, self._read[name] = self._write_to_end(past, steps)
        self._put_entry(name, entry)

    def read(self, name: str) -> Array:
        """Reads what was appended or remembered under a name, this block included.

        Returns:
            ``[batch, n, ...]``. Of what was appended, :meth:`locate` tells the positions, and the
            last place of a row that ran over the capacity holds NaN.
        """
        return self.get_entry(name).unbox()

    def locate(self, name: str) -> Array:
        """Returns the position of each step that :meth:`read` gives: ``[batch, n]``, or ``[1, n]``.

        A place that is not filled has a position below 0, or above the row's last valid step.
        """
        self._check_read(name)
        return self._read[name][1]

    def get_entry(self, name: str) -> CacheEntry:
        """Returns what :meth:`read` reads, so that parts of it can be read."""
        self._check_read(name)
        return self._read[name][0]

    # How it is done

    @functools.cached_property
    def _start(self) -> Array:
        """The position of the first step of the block in each row. Once read, the rows move on."""
        zeros = jnp.zeros((self._batch,), jnp.int32)
        if not self._decode:
            return zeros
        self._make_state("position", lambda: zeros)
        if not self.is_streaming:
            return zeros
        variable = self._variables["position"]
        start: Array = variable.value
        self._check_state("position", start, zeros)
        if self._lengths is None:
            end = start + self._time
        else:
            is_bad = (self._lengths < 0) | (self._lengths > self._time)
            start = jnp.where(is_bad, LOST, start)
            end = start + self._lengths
        variable.value = jnp.where(start >= LOST, LOST, end)
        return start

    def _make_state(self, name: str, make: Callable[[], Any]) -> None:
        """Makes a state while initializing. Otherwise raises an error if it cannot be used."""
        if not self._layer.is_initializing():
            if not self._layer.has_variable(COLLECTION, name):
                raise stream_errors.no_state(self._name, name)
            if not self._layer.is_mutable_collection(COLLECTION):
                raise stream_errors.fixed_state(self._name)
        elif not self._layer.is_mutable_collection(COLLECTION):
            return
        self._variables[name] = self._declare(name, make)

    def _declare(self, name: str, make: Callable[[], Any]) -> Any:
        """Declares a variable of the layer. Linen raises an error if its name is taken."""
        return self._layer.variable(COLLECTION, name, make)

    def _get_entry(self, name: str) -> CacheEntry:
        """Gets a state without reading it: one copy of it, if it is stacked for several."""
        stored: Any = self._layer.get_variable(COLLECTION, name)
        return stored if isinstance(stored, CacheEntry) else CacheEntry(stored)

    def _put_entry(self, name: str, entry: CacheEntry) -> None:
        self._layer.put_variable(COLLECTION, name, entry if entry.indices else entry.stacked)

    def _check_given(self, name: str, is_given: Array) -> None:
        """Raises an error if a row is known to have no value."""
        if is_known(is_given):
            rows = np.flatnonzero(~np.asarray(is_given)).tolist()
            if rows:
                raise stream_errors.value_not_given(self._name, name, rows)

    def _check_steps(self, name: str, steps: Array) -> None:
        """Raises an error if steps are not those of the block."""
        if steps.shape[:2] != (self._batch, self._time):
            raise stream_errors.other_steps(
                self._name, name, describe_item(steps), self._batch, self._time
            )

    def _check_read(self, name: str) -> None:
        if name not in self._read:
            raise stream_errors.nothing_to_read(self._name, name)

    def _check_state(self, name: str, kept: Any, state: Any) -> None:
        if _list_shapes(state) != _list_shapes(kept):
            raise stream_errors.other_state(
                self._name, name, describe_item(kept), describe_item(state)
            )

    def _check_capacity(self, capacity: int) -> None:
        """Raises an error if a row is known to run over the capacity."""
        if self._time > capacity and self._lengths is None:
            raise stream_errors.long_block(self._name, self._time, capacity)
        end = self._start + (self._time if self._lengths is None else self._lengths)
        if not is_known(end):
            return
        is_over = (end > capacity) & (self._start < LOST)  # a row that is lost stays NaN
        rows = np.flatnonzero(np.asarray(is_over)).tolist()
        if rows:
            starts = np.asarray(self._start)[rows].tolist()
            raise stream_errors.over_capacity(self._name, rows, starts, self._time, capacity)

    def _write_to_end(
        self, past: CacheEntry, steps: Array
    ) -> tuple[CacheEntry, tuple[CacheEntry, Array]]:
        """Writes each row at its positions. What runs over puts NaN at the row's last place."""
        capacity = past.shape[1]
        self._check_capacity(capacity)
        runs_over = self.is_valid & (self.positions >= capacity)
        at = jnp.where(self.is_valid, self.positions, capacity)  # what is not valid is not written
        is_last = at == capacity - 1
        at = jnp.where(is_last & jnp.any(runs_over, axis=1, keepdims=True), capacity, at)
        at = jnp.where(runs_over, capacity - 1, at)
        entry = past.write_rows(_lose_rows(runs_over, steps), at)
        return entry, (entry, jnp.arange(capacity, dtype=jnp.int32)[None])

    def _write_in_ring(
        self, past: CacheEntry, steps: Array
    ) -> tuple[CacheEntry, tuple[CacheEntry, Array]]:
        """Writes the last steps of the block in the places of the oldest."""
        size = past.shape[1]
        taken = self._time if self._lengths is None else self._lengths[:, None]
        is_kept = jnp.arange(self._time, dtype=jnp.int32)[None] >= taken - size
        at = jnp.where(self.is_valid & is_kept, self.positions % size, size)
        entry = past.write_rows(steps, at)
        last = self._start[:, None] - 1
        if self._time == 1:
            return entry, (entry, _locate_in_ring(last + taken, size))
        # A step may see one whose place a later step of the block takes.
        positions = jnp.concatenate([_locate_in_ring(last, size), self.positions], axis=1)
        both = jnp.concatenate([past.unbox(), steps], axis=1)
        return entry, (CacheEntry(both), positions)


def check_lengths(asked: str, lengths: Any, batch: Any, time: Any) -> Array | None:
    """Returns how many steps of a block are valid in each row, as an array.

    Raises:
        ValueError: If they are not integers ``[batch]``, or known to lie outside of the block.
    """
    if lengths is None:
        return None
    known = np.asarray(lengths) if is_known(lengths) else None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (batch,):
        raise stream_errors.wrong_lengths(asked, describe_item(lengths), batch)
    if known is not None and isinstance(time, int):
        beyond = known[(known < 0) | (known > time)].tolist()
        if beyond:
            raise stream_errors.lengths_beyond_block(asked, beyond, time)
    valid: Array = lengths.astype(jnp.int32)
    return valid


def is_known(values: Any) -> bool:
    """Whether values can be read: they are not traced, and all lie on this host."""
    return not any(
        isinstance(leaf, jax.core.Tracer)
        or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
        for leaf in jax.tree.leaves(values)
    )


def _list_shapes(state: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _locate_in_ring(last: Array, size: int) -> Array:
    """Returns the positions in a ring whose newest step is at ``last``, ``[batch, 1]``."""
    places = jnp.arange(size, dtype=jnp.int32)[None]
    return last - (last - places) % size


def _take_steps(sequence: Array, at: Array) -> Array:
    """Takes steps ``[batch, n]`` of ``[batch, time, ...]``."""
    steps: Array = jnp.take_along_axis(sequence, _add_axes(at, sequence.ndim), axis=1, mode="fill")
    return steps


def _choose_rows(rows: Array, yes: Array, no: Array) -> Array:
    return jnp.where(_add_axes(rows, yes.ndim), yes, no)


def _lose_rows(rows: Array, values: Array) -> Array:
    """Puts NaN into rows, or steps, of floats."""
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return values
    return jnp.where(_add_axes(rows, values.ndim), jnp.nan, values)


def _add_axes(x: Array, ndim: int) -> Array:
    return jnp.expand_dims(x, tuple(range(x.ndim, ndim)))
