"""Causal attention: which keys a query sees by its position, and which chunks hold any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from flax_extra.layer._tiles import AxisTiling, Grid, Index, State, TileIndex, loop

HIDDEN_POSITION = np.iinfo(np.int32).max
"""Position of a key that no query sees: it comes after every query."""


@dataclasses.dataclass(frozen=True)
class CausalRule:
    """A query sees the keys up to its own position, or the last few of them.

    Attributes:
        window: number of positions that a query sees, its own included; None for all.
        is_aligned: whether positions are indices, with the last query at the last key.
    """

    window: int | None
    is_aligned: bool

    def find_seen(self, query_positions: Array, key_positions: Array) -> Array:
        """Compares ``[batch, time_q]`` with ``[batch, time_kv]``, with an axis for the heads."""
        queries, keys = query_positions[:, None, :, None], key_positions[:, None, None, :]
        if self.window is None:
            return keys <= queries
        return (keys <= queries) & (keys > queries - self.window)


class Schedule(NamedTuple):
    """The chunks that each row of tiles visits, beginning with those that are full.

    A chunk is full if every query of the row sees every key of the chunk, by their positions.

    Attributes:
        n_full: number of full chunks, ``[batch tiles, query tiles]``.
        n_partial: number of the other chunks in which a query may see a key, in the same shape.
        find: returns the number of the chunk that a row visits at a step.
    """

    n_full: Any
    n_partial: Any
    find: Callable[[tuple[Index, Index], Any], Any]


def schedule_chunks(
    grid: Grid, rule: CausalRule, query_positions: Array, key_positions: Array
) -> Schedule:
    """Finds the chunks in which a query of a row of tiles may see a key."""
    if rule.is_aligned:
        return _schedule_by_index(grid.queries, grid.keys, rule.window)
    return _schedule_by_position(grid, rule.window, query_positions, key_positions)


def run_chunks(
    grid: Grid,
    schedule: Schedule | None,
    row: TileIndex,
    body: Callable[[Index, bool, State], State],
    state: State,
) -> State:
    """Runs ``body(chunk, is_full, state)`` over the scheduled chunks of a row, or over all."""
    if schedule is None:
        return loop(grid.keys.n_pieces, lambda chunk, state: body(chunk, True, state), state)
    n_full, n_partial, find = schedule
    where = 0 if n_full.shape[0] == 1 else row.batch, row.queries
    stop_full = _look_up(n_full, where)
    stop = stop_full + _look_up(n_partial, where)

    def run_full(step: Index, state: State) -> State:
        return body(find(where, step), True, state)

    def run_partial(step: Index, state: State) -> State:
        return body(find(where, step), False, state)

    if not _is_zero(n_full):  # each loop is a program of its own to compile
        state = lax.fori_loop(0, stop_full, run_full, state)
    if not _is_zero(n_partial):
        state = lax.fori_loop(stop_full, stop, run_partial, state)
    return state


def _schedule_by_index(queries: AxisTiling, keys: AxisTiling, window: int | None) -> Schedule:
    """Computes the schedule when the program is traced.

    A row visits chunks that lie side by side: partial ones, full ones, and partial ones again.
    """
    rows = np.arange(queries.n_pieces)
    first = np.minimum(rows * queries.size, queries.length - queries.size)
    first += keys.length - queries.length  # the last query is at the last key
    last = first + queries.size - 1
    stop = np.clip(last // keys.size + 1, 0, keys.n_pieces)
    stop_full = np.clip((first + 1) // keys.size, 0, stop)
    start, start_full = np.zeros_like(stop), np.zeros_like(stop)
    if window is not None:
        start = np.clip((first - window + 1) // keys.size, 0, stop)
        start_full = np.clip(-((window - 1 - last) // keys.size), start, stop)
    stop_full = np.maximum(stop_full, start_full)
    n_before, n_full = start_full - start, stop_full - start_full

    def find(where: tuple[Index, Index], step: Any) -> Any:
        before, full, begin = (_look_up(x[None], where) for x in (n_before, n_full, start))
        partial = step - full
        partial += jnp.where(partial < before, 0, full)
        return begin + jnp.where(step < full, before + step, partial)

    return Schedule(n_full[None], (stop - start - n_full)[None], find)


def _look_up(table: Any, where: tuple[Index, Index]) -> Any:
    if isinstance(table, np.ndarray) and all(isinstance(index, int) for index in where):
        return int(table[where])
    return jnp.asarray(table, jnp.int32)[where]


def _is_zero(counts: Any) -> bool:
    """Says whether counts are known to be zero when the program is traced."""
    return isinstance(counts, np.ndarray) and not counts.any()


def _schedule_by_position(
    grid: Grid, window: int | None, query_positions: Array, key_positions: Array
) -> Schedule:
    """Computes the schedule when the program runs, from the range of positions in each piece."""
    queries = _split(query_positions, grid.queries)[:, :, None]
    keys = _split(key_positions, grid.keys)[:, None, :]
    first_key, last_query = jnp.min(keys, axis=-1), jnp.max(queries, axis=-1)
    visible = first_key <= last_query
    full = jnp.max(keys, axis=-1) <= jnp.min(queries, axis=-1)
    if window is not None:
        # A query that sees no key, or a key that no query sees, makes no chunk visible.
        last_key = jnp.max(jnp.where(keys == HIDDEN_POSITION, -1, keys), axis=-1)
        first_query = jnp.min(jnp.where(queries < 0, HIDDEN_POSITION, queries), axis=-1)
        visible &= last_key > first_query - window
        full &= first_key > last_query - window
    visible, not_full = _combine_examples(jnp.stack([visible, ~full]), grid.batch)
    rank = jnp.where(visible, not_full.astype(jnp.int32), 2)
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    n_full = jnp.sum(visible & ~not_full, axis=-1, dtype=jnp.int32)
    n_partial = jnp.sum(visible & not_full, axis=-1, dtype=jnp.int32)
    return Schedule(n_full, n_partial, lambda where, step: order[where][step])


def _split(positions: Array, tiling: AxisTiling) -> Array:
    """Splits ``[batch, time]`` into ``[batch, pieces, size]``, each position into one piece."""
    missing = tiling.n_pieces * tiling.size - tiling.length
    padded = jnp.pad(positions, ((0, 0), (0, missing)), mode="edge")
    return padded.reshape(-1, tiling.n_pieces, tiling.size)


def _combine_examples(tests: Array, tiling: AxisTiling) -> Array:
    """Says whether a test holds for any example of a tile.

    A tile takes the whole batch, or one example of each group.

    Args:
        tests: ``[tests, batch or 1, ...]``.
        tiling: of the batch.

    Returns:
        ``[tests, batch tiles or 1, ...]``.
    """
    if tiling.n_pieces == 1 or tests.shape[1] == 1:
        combined = jnp.any(tests, axis=1, keepdims=True)
    else:
        groups = tests.reshape(tests.shape[0], tiling.groups, tiling.stride, *tests.shape[2:])
        combined = jnp.any(groups, axis=1)
    result: Array = _combine_mapped(combined)
    return result


# Under jax.vmap all examples share a schedule. With a schedule for each, JAX would run every loop
# as long as the longest, and select between the old and the new state of each example at each step.
@custom_vmap
def _combine_mapped(tests: Array) -> Array:
    return tests


@_combine_mapped.def_vmap
def _combine_mapped_vmap(_: int, in_batched: list[bool], tests: Array) -> tuple[Array, bool]:
    return _combine_mapped(jnp.any(tests, axis=0) if in_batched[0] else tests), False
