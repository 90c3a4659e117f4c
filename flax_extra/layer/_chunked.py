r"""Attention in chunks: what it holds grows with queries plus keys, not with their product.

Keys and values are walked in chunks. Of the softmax, only what was seen so far is kept: the
greatest logit, the sum of the exponentials relative to it, and the values that they weigh. The
backward pass keeps no weights either: it computes those of a tile again, from the logarithm of the
sum of all exponentials.

Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021), and, for the backward
pass, Dao et al., "FlashAttention" (2022), algorithm 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

Index: TypeAlias = int | Array
State = TypeVar("State")

QUERIES = 512
"""How many queries a tile holds at most; with as many keys, its products use every core."""

LOGITS = 2**20
"""How many logits of one example a tile holds; more would fall out of a processor's cache."""

LEAST_KEYS = 256
"""How many keys a chunk holds at least; with fewer the products would be too small."""

FOUND = "attention"
"""By this name a policy of ``jax.checkpoint`` can keep what was found, so that none looks again."""


class Inputs(NamedTuple):
    """What attention is computed of: shapes that agree, and a mask of booleans with four axes."""

    query: Array
    key: Array
    value: Array
    mask: Array | None
    rngkey: Array | None


class Settings(NamedTuple):
    """What is known of the computation when it is traced."""

    chunk_size: int
    dropout_rate: float
    precision: PrecisionLike


def best_chunk_size(heads: int, time_q: int) -> int:
    """How many keys a chunk holds, where nobody says."""
    return max(LEAST_KEYS, LOGITS // (heads * min(time_q, QUERIES)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend_in_chunks(inputs: Inputs, settings: Settings) -> Array:
    """Attention vectors, ``[batch, time_q, heads, d_v]``."""
    vectors: Array = _on_each_platform(_forward, inputs, settings)[0]
    return vectors


def _attend_and_keep(inputs: Inputs, settings: Settings) -> tuple[Array, Any]:
    found = _on_each_platform(_forward, inputs, settings)
    vectors, log_total = map(named, found)
    return vectors, (inputs, vectors, log_total)


def _pull_back(settings: Settings, kept: Any, change: Array) -> tuple[Inputs]:
    inputs, *results = kept
    query, key, value = _on_each_platform(_backward, inputs, settings, *results, change)
    return (Inputs(query, key, value, None, None),)


attend_in_chunks.defvjp(_attend_and_keep, _pull_back)


def _on_each_platform(
    run: Callable[..., Any], inputs: Inputs, settings: Settings, *rest: Any
) -> Any:
    """A processor takes one example of the batch at a time, which its cache holds."""
    whole = functools.partial(run, settings=settings, examples=inputs.query.shape[0])
    if inputs.query.shape[0] == 1:
        return whole(inputs, *rest)
    single = functools.partial(run, settings=settings, examples=1)
    return lax.platform_dependent(inputs, *rest, cpu=single, default=whole)


class _Span(NamedTuple):
    """An axis in pieces of one size. The last begins early enough to fit, over the one before."""

    length: int
    size: int

    @classmethod
    def of(cls, length: int, at_most: int) -> _Span:
        n = -(-length // at_most)
        return cls(length, -(-length // n))

    @property
    def n(self) -> int:
        return -(-self.length // self.size)

    def start(self, index: Index) -> Index:
        return jnp.minimum(index * self.size, self.length - self.size)

    def of_array(self, x: Array, axis: int, index: Index) -> Array:
        """A piece of an array, or all of an axis that is broadcast."""
        if self.n == 1 or x.shape[axis] == 1:
            return x
        return lax.dynamic_slice_in_dim(x, self.start(index), self.size, axis)

    def fresh(self, index: Index) -> Array | None:
        """Which positions of a piece are in no piece before it, or None for all."""
        if self.n * self.size == self.length:
            return None
        return self.start(index) + jnp.arange(self.size) >= index * self.size


class _Tiles:
    """The logits, ``[batch, heads, time_q, time_kv]``, in tiles that are computed one by one."""

    def __init__(self, inputs: Inputs, settings: Settings, examples: int) -> None:
        batch, time_q, _, _ = inputs.query.shape
        self.inputs, self.settings = inputs, settings
        self.examples = _Span.of(batch, examples)
        self.queries = _Span.of(time_q, QUERIES)
        self.keys = _Span.of(inputs.key.shape[1], settings.chunk_size)

    def rows(self, body: Callable[[tuple[Index, Index], State], State], state: State) -> State:
        """Runs over all (examples, queries)."""
        n = self.queries.n
        return _loop(self.examples.n * n, lambda i, state: body((i // n, i % n), state), state)

    def columns(self, body: Callable[[Index, State], State], state: State) -> State:
        """Runs over the chunks of keys."""
        return _loop(self.keys.n, body, state)

    def of_queries(self, x: Array, row: tuple[Index, Index]) -> Array:
        """A piece, heads first, of an array with axes batch, time and heads."""
        piece = self.queries.of_array(self.examples.of_array(x, 0, row[0]), 1, row[1])
        return jnp.swapaxes(piece, 1, 2)

    def of_keys(self, x: Array, row: tuple[Index, Index], column: Index) -> Array:
        """A piece, heads first, of an array with axes batch, time and heads."""
        piece = self.keys.of_array(self.examples.of_array(x, 0, row[0]), 1, column)
        return jnp.swapaxes(piece, 1, 2)

    def add_queries(self, x: Array, piece: Array, row: tuple[Index, Index]) -> Array:
        return _add(x, piece, self.examples.start(row[0]), self.queries.start(row[1]))

    def add_keys(self, x: Array, piece: Array, row: tuple[Index, Index], column: Index) -> Array:
        return _add(x, piece, self.examples.start(row[0]), self.keys.start(column))

    def seen(self, row: tuple[Index, Index], column: Index) -> Array | None:
        """Which logits of a tile count: those not masked, each once; None for all."""
        parts = []
        if self.inputs.mask is not None:
            piece = self.examples.of_array(self.inputs.mask, 0, row[0])
            parts.append(self.keys.of_array(self.queries.of_array(piece, 2, row[1]), 3, column))
        queries, keys = self.queries.fresh(row[1]), self.keys.fresh(column)
        if queries is not None:
            parts.append(queries[None, None, :, None])
        if keys is not None:
            parts.append(keys[None, None, None, :])
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def kept(self, row: tuple[Index, Index], column: Index) -> Array | None:
        """By what dropout multiplies the weights of a tile: the same each time it is asked."""
        rngkey, rate = self.inputs.rngkey, self.settings.dropout_rate
        if rngkey is None:
            return None
        number = (row[0] * self.queries.n + row[1]) * self.keys.n + column
        heads = self.inputs.query.shape[2]
        shape = self.examples.size, heads, self.queries.size, self.keys.size
        kept = jax.random.bernoulli(jax.random.fold_in(rngkey, number), 1 - rate, shape)
        return kept / np.asarray(1 - rate, accumulated(self.inputs.query))

    def product(self, subscripts: str, x: Array, y: Array) -> Array:
        return product(subscripts, x, y, self.settings.precision)


def _forward(inputs: Inputs, *, settings: Settings, examples: int) -> tuple[Array, ...]:
    """The vectors, and for each row of logits the logarithm of the sum of the exponentials."""
    tiles = _Tiles(inputs, settings, examples)
    (batch, time_q, heads, _), d_v = inputs.query.shape, inputs.value.shape[-1]
    of_logits, of_vectors = accumulated(inputs.query), accumulated(inputs.value)

    def run_row(row: tuple[Index, Index], results: tuple[Array, ...]) -> tuple[Array, ...]:
        query, scale = scaled(tiles.of_queries(inputs.query, row))

        def run_chunk(column: Index, state: tuple[Array, ...]) -> tuple[Array, ...]:
            vectors, greatest, total = state
            key = tiles.of_keys(inputs.key, row, column)
            value = tiles.of_keys(inputs.value, row, column)
            logits = times(tiles.product("bhqd,bhkd->bhqk", query, key), scale)
            logits = where_seen(tiles.seen(row, column), logits)
            above = jnp.maximum(greatest, jnp.max(logits, axis=-1))
            weights, shrink = jnp.exp(logits - above[..., None]), jnp.exp(greatest - above)
            total = total * shrink + jnp.sum(weights, axis=-1)
            weights = times(weights, tiles.kept(row, column)).astype(value.dtype)
            added = tiles.product("bhqk,bhkd->bhqd", weights, value)
            return vectors * shrink[..., None].astype(of_vectors) + added, above, total

        rows = query.shape[:3]
        state: tuple[Array, ...] = (
            jnp.zeros((*rows, d_v), of_vectors),
            # Finite, so that what is masked, at -inf, is always below it, and its weight zero.
            jnp.full(rows, np.finfo(of_logits).min),
            jnp.zeros(rows, of_logits),
        )
        vectors, greatest, total = tiles.columns(run_chunk, state)
        vectors = vectors * inverse(total)[..., None].astype(of_vectors)
        # Where all is masked, any number: no weight comes of it.
        log_total = jnp.where(total > 0, greatest + jnp.log(jnp.where(total > 0, total, 1)), 0)
        return (
            tiles.add_queries(results[0], jnp.swapaxes(vectors, 1, 2), row),
            tiles.add_queries(results[1], jnp.swapaxes(log_total[..., None], 1, 2), row),
        )

    return tiles.rows(
        run_row,
        (
            jnp.zeros((batch, time_q, heads, d_v), inputs.value.dtype),
            jnp.zeros((batch, time_q, heads, 1), of_logits),
        ),
    )


def _backward(
    inputs: Inputs,
    vectors: Array,
    log_total: Array,
    change: Array,
    *,
    settings: Settings,
    examples: int,
) -> tuple[Array, ...]:
    """What a change of the vectors asks of query, key and value.

    Here tiles have the keys before the queries, so that all but one of the products read their
    operands in the order in which they lie.
    """
    tiles = _Tiles(inputs, settings, examples)

    def run_row(row: tuple[Index, Index], results: tuple[Array, ...]) -> tuple[Array, ...]:
        query, scale = scaled(tiles.of_queries(inputs.query, row))
        answer, asked = tiles.of_queries(vectors, row), tiles.of_queries(change, row)
        # Of each query, how far its weights together would move the result.
        along = jnp.sum(answer * asked, axis=-1, dtype=log_total.dtype)[:, :, None]
        top = jnp.swapaxes(tiles.of_queries(log_total, row), 2, 3)

        def run_chunk(column: Index, state: tuple[Array, ...]) -> tuple[Array, ...]:
            key = tiles.of_keys(inputs.key, row, column)
            value = tiles.of_keys(inputs.value, row, column)
            logits = tiles.product("bhkd,bhdq->bhkq", key, jnp.swapaxes(query, 2, 3))
            logits = where_seen(_turned(tiles.seen(row, column)), times(logits, scale))
            weights = jnp.exp(logits - top)
            kept = _turned(tiles.kept(row, column))
            of_weights = tiles.product("bhkd,bhdq->bhkq", value, jnp.swapaxes(asked, 2, 3))
            of_logits = weights * (times(of_weights.astype(weights.dtype), kept) - along)
            of_logits = times(of_logits, scale).astype(query.dtype)
            of_query = tiles.product("bhdk,bhkq->bhdq", jnp.swapaxes(key, 2, 3), of_logits)
            of_key = tiles.product("bhkq,bhqd->bhkd", of_logits, query)
            of_value = tiles.product(
                "bhkq,bhqd->bhkd", times(weights, kept).astype(value.dtype), asked
            )
            return (
                state[0] + of_query,
                tiles.add_keys(state[1], jnp.swapaxes(of_key, 1, 2), row, column),
                tiles.add_keys(state[2], jnp.swapaxes(of_value, 1, 2), row, column),
            )

        of_query = jnp.zeros_like(jnp.swapaxes(query, 2, 3), accumulated(query))
        of_query, of_key, of_value = tiles.columns(run_chunk, (of_query, *results[1:]))
        if scale is None:  # then this is of the scaled query
            of_query = of_query / math.sqrt(query.shape[-1])
        return tiles.add_queries(results[0], of_query.transpose(0, 3, 1, 2), row), of_key, of_value

    operands = inputs.query, inputs.key, inputs.value
    results = tiles.rows(run_row, tuple(jnp.zeros_like(x, accumulated(x)) for x in operands))
    return tuple(result.astype(x.dtype) for result, x in zip(results, operands, strict=True))


def _loop(n: int, body: Callable[[Index, State], State], state: State) -> State:
    return body(0, state) if n == 1 else lax.fori_loop(0, n, body, state)


def _add(x: Array, piece: Array, example: Index, time: Index) -> Array:
    """Adds to where a piece came from, for a piece holds zeros where it is over another."""
    start = example, time, 0, 0
    old = lax.dynamic_slice(x, start, piece.shape)
    return lax.dynamic_update_slice(x, old + piece.astype(x.dtype), start)


def named(found: Array) -> Array:
    """What was found, by the name that policies know."""
    same: Array = checkpoint_name(found, FOUND)  # type: ignore[no-untyped-call]
    return same


def product(subscripts: str, x: Array, y: Array, precision: PrecisionLike) -> Array:
    """An einsum that is summed in float32 or better."""
    return jnp.einsum(
        subscripts, x, y, precision=precision, preferred_element_type=accumulated(x, y)
    )


def scaled(query: Array) -> tuple[Array, float | None]:
    """Queries, and by what their logits are yet to be multiplied, if anything.

    There are fewer queries than logits; but those of half precision would be rounded.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    return (query * scale, None) if query.dtype == accumulated(query) else (query, scale)


def where_seen(seen: Array | None, logits: Array) -> Array:
    """Logits that weigh nothing wherever they do not count."""
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def times(x: Array, factor: Array | float | None) -> Array:
    """A product with a factor that may be absent."""
    return x if factor is None else x * factor


def _turned(tile: Array | None) -> Array | None:
    return None if tile is None else jnp.swapaxes(tile, 2, 3)


def inverse(total: Array) -> Array:
    """Zero for a row of which all is masked, whose weights so become zeros."""
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def accumulated(*operands: Array) -> Any:
    """The dtype of sums of products, and of the softmax."""
    return functools.reduce(jnp.promote_types, (x.dtype for x in operands), jnp.float32)
