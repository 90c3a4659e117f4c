"""The formula of attention in parts, for all logits at once or for a tile of them.

Heads come before time here: a query is ``[batch, heads, time_q, d_qk]``, a key or value
``[batch, kv_heads, time_kv, d]``, and logits, masks and biases ``[batch, heads, time_q, time_kv]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import Array
from jax.custom_derivatives import SymbolicZero

from flax_extra import combinator as cb
from flax_extra.layer._causal import CausalRule, Schedule, schedule_chunks
from flax_extra.layer._numerics import einsum_accumulated, get_accumulation_dtype
from flax_extra.layer._tiles import Axes, Grid, TileIndex


class Inputs(NamedTuple):
    """What attention is computed from, with time before heads: ``[batch, time, heads, d]``.

    Mask and bias have the four axes of the logits, each of full size or 1. A stream gives its keys
    and values where they lie, so that parts of them can be read.
    """

    query: Array
    key: Any
    value: Any
    bias: Array | None = None
    mask: Array | None = None
    query_positions: Array | None = None
    key_positions: Array | None = None
    rngkey: Array | None = None

    def get_present(self) -> dict[str, Array]:
        """Returns the inputs that are given, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    def read_all(self) -> Inputs:
        """Reads keys and values that lie in a stream's state, as a whole."""
        key, value = (
            x.unbox() if isinstance(x, cb.CacheEntry) else x for x in (self.key, self.value)
        )
        return self._replace(key=key, value=value)


DIFFERENTIABLE = ("query", "key", "value", "bias")
"""Names of the inputs that can have a derivative."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is known of attention when the program is traced.

    Attributes:
        scale: factor of the products of queries and keys.
        logit_cap: bound of the scaled products; None for no bound.
        causal: which keys a query sees by its position; None for all.
        dropout_rate: probability that a weight is dropped.
        precision: numerical precision of the products.
        has_cudnn: whether cuDNN computes the same, if the program runs on CUDA.
    """

    scale: float
    logit_cap: float | None
    causal: CausalRule | None
    dropout_rate: float
    precision: PrecisionLike
    has_cudnn: bool = False


def put_heads_first(x: Array) -> Array:
    """Swaps time and heads, in either direction."""
    return jnp.swapaxes(x, 1, 2)


# Logits, weights and vectors. If fewer heads of keys than of queries are given, the queries of all
# heads that share a key lie on one axis in the products, so that no key is repeated.


def scale_query(query: Array, scale: float) -> tuple[Array, float | None]:
    """Scales a query, or returns the scale for its logits.

    A query has fewer elements than its logits, but in half precision scaling would round it.
    """
    if query.dtype == get_accumulation_dtype(query):
        return query * scale, None
    return query, scale


def multiply_keys(query: Array, key: Array, precision: PrecisionLike) -> Array:
    """Multiplies each query with each key of its head."""
    products = einsum_accumulated("bhqd,bhkd->bhqk", _group(query, key), key, precision)
    return products.reshape(*query.shape[:3], key.shape[2])


def weigh_values(weights: Array, value: Array, precision: PrecisionLike) -> Array:
    """Adds up the values of each head by the weights of each query."""
    grouped = _group(weights.astype(value.dtype), value)
    vectors = einsum_accumulated("bhqk,bhkd->bhqd", grouped, value, precision)
    return vectors.reshape(*weights.shape[:3], value.shape[3])


def _group(x: Array, key: Array) -> Array:
    """Puts the queries of all heads that share a key on one axis."""
    if x.shape[1] == key.shape[1]:
        return x
    return x.reshape(x.shape[0], key.shape[1], -1, x.shape[3])


def shape_logits(
    products: Array, bias: Array | None, *, scale: float | None, logit_cap: float | None
) -> Array:
    """Computes logits from products of queries and keys: scaled, then capped, then with bias."""
    logits = products if scale is None else products * scale
    if logit_cap is not None:
        logits = _cap_logits(logits, logit_cap)
    return logits if bias is None else logits + bias.astype(logits.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _cap_logits(logits: Array, logit_cap: float) -> Array:
    return logit_cap * jnp.tanh(logits / logit_cap)


@_cap_logits.defjvp
def _cap_logits_jvp(
    logit_cap: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    # Finite for a logit that is NaN, which may be hidden.
    capped = _cap_logits(primals[0], logit_cap)
    return capped, tangents[0] * (1 - (keep_finite(capped) / logit_cap) ** 2)


def hide(counts: Array | None, logits: Array) -> Array:
    """Sets logits that do not count to minus infinity, so that their weights are zero."""
    return logits if counts is None else jnp.where(counts, logits, -jnp.inf)


def drop(settings: Settings, weights: Array, kept: Array | None) -> Array:
    """Sets weights to zero that are not kept, and scales the others; None keeps all as they are."""
    return weights if kept is None else jnp.where(kept, weights / (1 - settings.dropout_rate), 0)


def invert_total(total: Array) -> Array:
    """Inverts the sum of the weights of each query.

    The inverse is 0 for a query that sees no key: its vector is zero. It is also 0 for a query that
    sees a NaN: its vector is NaN by the weights, and cotangents of other keys stay finite.
    """
    is_positive = total > 0
    return jnp.where(is_positive, 1 / jnp.where(is_positive, total, 1), 0)


# A hidden key may hold NaN. Its weight is zero, but zero times NaN is NaN. So values that are not
# finite are set to zero, and their keys hand a NaN to the logits of the queries that see them.


def keep_finite(x: Array) -> Array:
    """Sets what is not finite to zero."""
    return jnp.where(jnp.isfinite(x), x, 0)


def mark_queries(query: Array) -> Array:
    """Sets what is not finite to NaN, so that all logits of the query are NaN."""
    return jnp.where(jnp.isfinite(query), query, jnp.nan)


def mark_keys(key: Array, value: Array) -> Array:
    """Sets what is not finite to NaN, in a key or in its value, so that its logits are NaN."""
    is_finite = jnp.isfinite(value)
    if key.shape != value.shape:
        is_finite = jnp.all(is_finite, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(key) & is_finite, key, jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def multiply_marked_keys(query: Array, key: Array, precision: PrecisionLike) -> Array:
    """Multiplies as :func:`multiply_keys` does, with derivatives that are finite.

    Of a query that sees a NaN the weights are NaN, and so are its derivatives.
    """
    return multiply_keys(query, key, precision)


@functools.partial(multiply_marked_keys.defjvp, symbolic_zeros=True)
def _multiply_marked_keys_jvp(
    precision: PrecisionLike, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    (query, key), (query_dot, key_dot) = primals, tangents
    terms = []
    if not isinstance(query_dot, SymbolicZero):
        terms.append(multiply_keys(query_dot, keep_finite(key), precision))
    if not isinstance(key_dot, SymbolicZero):
        terms.append(multiply_keys(keep_finite(query), key_dot, precision))
    products_dot = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return multiply_marked_keys(query, key, precision), products_dot


# What counts.


def hides_keys(settings: Settings, names: Container[str]) -> bool:
    """Says whether a query may not see all keys, from the names of the inputs."""
    return settings.causal is not None or "mask" in names


def find_seen(
    settings: Settings, named: Mapping[str, Any], *, is_full: bool = False
) -> Array | None:
    """Says which keys a query sees; None for all.

    Args:
        settings: of attention.
        named: the inputs, or what a tile has of them.
        is_full: whether no position hides any key.
    """
    seen = named.get("mask")
    if settings.causal is None or is_full:
        return seen
    by_position = settings.causal.find_seen(named["query_positions"], named["key_positions"])
    return by_position if seen is None else seen & by_position


def count_once(seen: Array | None, grid: Grid, index: TileIndex) -> Array | None:
    """Says which logits of a tile count: what is seen, in one of two tiles that share it."""
    is_new = grid.is_new(index)
    if seen is None:
        return is_new
    return seen if is_new is None else seen & is_new


def schedule(settings: Settings, grid: Grid, named: Mapping[str, Any]) -> Schedule | None:
    """Finds the chunks of keys that each row of tiles visits; None for all of them."""
    if settings.causal is None:
        return None
    positions = named["query_positions"], named["key_positions"]
    return schedule_chunks(grid, settings.causal, *positions)


def draw_kept(
    settings: Settings, grid: Grid, index: TileIndex, rngkey: Array | None, heads: int
) -> Array | None:
    """Draws which weights of a tile dropout keeps; None for all.

    Each query draws from a key of its own for each chunk. So the same is drawn in every derivative,
    and however examples and queries are cut into tiles.
    """
    if rngkey is None:
        return None
    examples = grid.batch.get_indices(index.batch)
    queries = grid.queries.get_indices(index.queries)
    numbers = examples[:, None] * grid.queries.length + queries[None]
    shape = heads, grid.keys.size

    def draw(number: Array) -> Array:
        query_key = jax.random.fold_in(jax.random.fold_in(rngkey, number), index.keys)
        return jax.random.bernoulli(query_key, 1 - settings.dropout_rate, shape)

    return jnp.swapaxes(jax.vmap(jax.vmap(draw))(numbers), 1, 2)


def find_axes(name: str, x: Array) -> Axes:
    """Finds the axes of an input, or of something like a query, that are tiled."""
    axes = _TILED_AXES.get(name, Axes(batch=0, queries=1))
    return Axes(*(None if axis is None or x.shape[axis] == 1 else axis for axis in axes))


_TILED_AXES = {
    "key": Axes(batch=0, keys=1),
    "value": Axes(batch=0, keys=1),
    "bias": Axes(batch=0, queries=2, keys=3),
    "mask": Axes(batch=0, queries=2, keys=3),
    "key_positions": Axes(batch=0, keys=1),
    "rngkey": Axes(),
}
