r"""Attention in chunks: memory grows with queries plus keys, not with their product.

Keys and values are taken in chunks. Of the softmax, only running statistics are kept: the greatest
logit, the sum of the exponentials relative to it, and the values that they weigh. Derivatives keep
no weights either: they compute those of a tile again, from the logsumexp of its queries.

Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021), and, for the backward
pass, Dao et al., "FlashAttention" (2022), algorithm 4.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from flax_extra import combinator as cb
from flax_extra.layer import _fused, _logits
from flax_extra.layer._causal import run_chunks
from flax_extra.layer._equations import Equations
from flax_extra.layer._logits import DIFFERENTIABLE, Inputs, Settings, put_heads_first
from flax_extra.layer._numerics import get_accumulation_dtype
from flax_extra.layer._tiled_sum import TiledSum, run_on_platform, sum_tangents
from flax_extra.layer._tiles import AxisTiling, Grid, Index, count_groups, loop

MAX_QUERIES_PER_TILE = 512
"""Number of queries of a tile at most; with as many keys, its products use every core."""

MAX_LOGITS_PER_TILE = 2**20
"""Number of logits of one example in a tile at most; more would leave a CPU's cache."""

MIN_KEYS_PER_CHUNK = 256
"""Number of keys of a chunk at least, if it is chosen; with fewer, products would be too small."""

KEYS_PER_CHUNK_OF_STATE = 256
"""Number of keys of a chunk that is read from the state of a stream.

Chunks that no row has reached are not read.
"""

MAX_KEYS_PER_CAUSAL_CHUNK = 512
"""Number of keys of a chunk at most, if it is chosen and its queries do not see all of it.

A longer chunk would have more keys that are hidden from its queries.
"""

CHECKPOINT_NAME = "attention"
"""The name of the results of attention, by which a policy of ``jax.checkpoint`` keeps them."""


def choose_chunk_size(heads: int, time_q: int, *, is_causal: bool) -> int:
    """Returns how many keys to take at a time, if the caller does not say."""
    size = MAX_LOGITS_PER_TILE // (heads * min(time_q, MAX_QUERIES_PER_TILE))
    if is_causal:
        size = min(size, MAX_KEYS_PER_CAUSAL_CHUNK)
    return max(size, MIN_KEYS_PER_CHUNK)


def name_result(x: Array) -> Array:
    """Gives a result of attention its name for policies of ``jax.checkpoint``."""
    named: Array = checkpoint_name(x, CHECKPOINT_NAME)  # type: ignore[no-untyped-call]
    return named


# custom_vjp would refuse forward mode. The tangent of this custom_jvp is a primitive of our own,
# with a backward pass by hand as its transpose, so that reverse mode is as fast.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def attend_in_chunks(inputs: Inputs, settings: Settings, chunk_size: int) -> tuple[Array, Array]:
    """Attends, a chunk of keys at a time.

    Returns:
        The attention vectors, ``[batch, time_q, heads, d_v]``, and the logsumexp of the logits of
        each query, ``[batch, time_q, heads]``; see :func:`find_logsumexp`.
    """
    grids = _tile_logits(inputs, settings, chunk_size)
    run = functools.partial(_attend_tile_by_tile, settings)

    def run_cudnn(inputs: Inputs) -> tuple[Array, Array]:
        # cuDNN rounds its logsumexp to half precision. Only forward mode needs this one; without
        # it, XLA leaves it out.
        vectors = _fused.attend_by_cudnn(*inputs[:3], settings=settings)
        return vectors, run(grids[1], inputs)[1]

    kernel = run_cudnn if settings.has_cudnn else None
    vectors, logsumexp = run_on_platform(run, grids, (inputs,), kernel)
    return vectors, logsumexp


@functools.partial(attend_in_chunks.defjvp, symbolic_zeros=True)
def _attend_in_chunks_jvp(
    settings: Settings, chunk_size: int, primals: tuple[Inputs], tangents: tuple[Inputs]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    inputs = primals[0].read_all()
    vectors, logsumexp = map(name_result, attend_in_chunks(inputs, settings, chunk_size))
    changes = {
        name: tangent
        for name, tangent in _read_tangents(primals[0], tangents[0]).get_present().items()
        if name in DIFFERENTIABLE and not isinstance(tangent, SymbolicZero)
    }
    results = vectors, logsumexp
    return results, sum_changes(inputs, results, changes, settings, chunk_size)


def sum_changes(
    inputs: Inputs,
    results: tuple[Array, Array],
    changes: Mapping[str, Array],
    settings: Settings,
    chunk_size: int,
) -> tuple[Array, Array]:
    """Returns the tangents of attention vectors and logsumexp, from those of some inputs.

    They are sums over keys. If the results are those of attention to more keys than are given, the
    tangents are the part that the given keys contribute.
    """
    vectors, logsumexp = results
    operands = {**inputs.get_present(), "vectors": vectors, "logsumexp": logsumexp}
    names = tuple(operands)
    spec = TiledSum(
        function=Equations(settings, names, kv_heads=inputs.key.shape[2]),
        grids=_tile_logits(inputs, settings, chunk_size),
        axes=tuple(_logits.find_axes(name, x) for name, x in operands.items()),
        primal_of=tuple(range(len(names))),
        outputs=(names.index("vectors"), names.index("logsumexp")),
    )
    active = {names.index(name): change for name, change in changes.items()}
    vectors_dot, logsumexp_dot = sum_tangents(spec, tuple(operands.values()), active)
    return vectors_dot, logsumexp_dot


def _read_tangents(inputs: Inputs, tangents: Inputs) -> Inputs:
    """Reads the tangents of keys and values that lie in a stream's state."""

    def read(x: Any, tangent: Any) -> Any:
        if not isinstance(x, cb.CacheEntry):
            return tangent
        if isinstance(tangent.stacked, SymbolicZero):
            return SymbolicZero(jax.typeof(x.unbox()).to_tangent_aval())
        return cb.CacheEntry(tangent.stacked, x.indices).unbox()

    return tangents._replace(
        key=read(inputs.key, tangents.key), value=read(inputs.value, tangents.value)
    )


def _tile_logits(inputs: Inputs, settings: Settings, chunk_size: int) -> tuple[Grid, Grid]:
    """Cuts the logits into tiles for a CPU, and into tiles for other platforms.

    A CPU takes one example at a time, or one for each device that may share the batch, so that its
    cache holds a tile.
    """
    batch, time_q = inputs.query.shape[:2]
    keys = AxisTiling.at_most(inputs.key.shape[1], chunk_size)
    # Queries of several groups are far apart, and would have to visit many chunks together.
    groups = count_groups(inputs.query, axis=1) if settings.causal is None else 1
    queries = AxisTiling.at_most(time_q, MAX_QUERIES_PER_TILE, groups)
    one_by_one = AxisTiling(batch, size=1, groups=count_groups(inputs.query, axis=0))
    whole = AxisTiling(batch, size=batch)
    n_logits = batch * inputs.query.shape[2] * queries.size * keys.size
    if isinstance(inputs.key, cb.CacheEntry) and n_logits <= MAX_LOGITS_PER_TILE:
        one_by_one = whole  # a step of a few queries: one tile for all rows
    return Grid(one_by_one, queries, keys), Grid(whole, queries, keys)


class _Sums(NamedTuple):
    """What is known of a row of queries after some chunks.

    Attributes:
        vectors: values, added up by their weights, ``[batch, heads, time_q, d_v]``.
        total: sum of the weights, ``[batch, heads, time_q, 1]``.
        greatest: greatest logit, to which the weights are relative, in the same shape.
    """

    vectors: Array
    total: Array
    greatest: Array


def find_logsumexp(total: Array, greatest: Array) -> Array:
    """Returns the logsumexp of logits, from the sum of weights that are relative to the greatest.

    For a query that sees no key it is zero. Any number would do: its weights are zero.
    """
    is_empty = total == 0
    return jnp.where(is_empty, 0, greatest + jnp.log(jnp.where(is_empty, 1, total)))


def _attend_tile_by_tile(settings: Settings, grid: Grid, inputs: Inputs) -> tuple[Array, Array]:
    named = inputs.get_present()
    axes = {name: _logits.find_axes(name, x) for name, x in named.items()}
    schedule = _logits.schedule(settings, grid, named)
    hides = _logits.hides_keys(settings, named)
    dtype, value_dtype = map(get_accumulation_dtype, (inputs.query, inputs.value))
    (batch, time_q, heads, _), d_v = inputs.query.shape, inputs.value.shape[3]

    def run_row(number: Index, results: tuple[Array, Array]) -> tuple[Array, Array]:
        row = grid.find_row(number)
        query = put_heads_first(grid.read(inputs.query, axes["query"], row))
        if hides:
            query = _logits.mark_queries(query)
        query, scale = _logits.scale_query(query, settings.scale)

        def run_chunk(chunk: Index, is_full: bool, sums: _Sums) -> _Sums:
            index = row._replace(keys=chunk)
            tiles = {name: grid.read(x, axes[name], index) for name, x in named.items()}
            key, value = put_heads_first(tiles["key"]), put_heads_first(tiles["value"])
            if hides:
                key, value = _logits.mark_keys(key, value), _logits.keep_finite(value)
            products = _logits.multiply_keys(query, key, settings.precision)
            logits = _logits.shape_logits(
                products, tiles.get("bias"), scale=scale, logit_cap=settings.logit_cap
            )
            seen = _logits.find_seen(settings, tiles, is_full=is_full)
            logits = _logits.hide(_logits.count_once(seen, grid, index), logits)
            greatest = jnp.maximum(sums.greatest, jnp.max(logits, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(logits - greatest), jnp.exp(sums.greatest - greatest)
            total = sums.total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            kept = _logits.draw_kept(settings, grid, index, inputs.rngkey, heads)
            weights = _logits.drop(settings, weights, kept)
            vectors = sums.vectors * shrink.astype(value_dtype)
            vectors += _logits.weigh_values(weights, value, settings.precision)
            return _Sums(vectors, total, greatest)

        shape = query.shape[:3]
        sums = _Sums(
            vectors=jnp.zeros_like(query, value_dtype, shape=(*shape, d_v)),
            total=jnp.zeros_like(query, dtype, shape=(*shape, 1)),
            # Finite, so that what is hidden, at -inf, is always below it, and its weight zero.
            greatest=jnp.full_like(query, np.finfo(dtype).min, dtype, shape=(*shape, 1)),
        )
        sums = run_chunks(grid, schedule, row, run_chunk, sums)
        vectors = sums.vectors * _logits.invert_total(sums.total).astype(value_dtype)
        logsumexp = find_logsumexp(sums.total, sums.greatest)
        return (
            grid.add(results[0], put_heads_first(vectors), axes["query"], row),
            grid.add(results[1], put_heads_first(logsumexp)[..., 0], axes["query"], row),
        )

    results = (
        jnp.zeros_like(inputs.query, inputs.value.dtype, shape=(batch, time_q, heads, d_v)),
        jnp.zeros_like(inputs.query, dtype, shape=(batch, time_q, heads)),
    )
    return loop(grid.n_rows, run_row, results)
