r"""Derivatives of attention in chunks, by the equations that its results solve.

For each query, the vector :math:`y` and the logsumexp :math:`l` of the logits :math:`s` solve

.. math::
    \sum_k e^{s_k - l} (v_k - y) = 0, \quad \sum_k e^{s_k - l} = 1

By the implicit function theorem :math:`y` and :math:`l` change just as much as the two sums do if
the inputs change and :math:`y` and :math:`l` are held fixed. The sums go over tiles, so derivatives
of every order do, too (:mod:`._tiled_sum`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from flax_extra.layer import _fused, _logits
from flax_extra.layer._causal import Schedule
from flax_extra.layer._logits import Settings, put_heads_first
from flax_extra.layer._numerics import einsum_accumulated, get_accumulation_dtype
from flax_extra.layer._tiled_sum import Layout, Row, Tangent, TileFunction, Tiles, merge_tiles
from flax_extra.layer._tiles import Grid, TileIndex


@dataclasses.dataclass(frozen=True)
class Equations(TileFunction):
    """What a tile adds to the two sums.

    Attributes:
        settings: of attention.
        names: names of the operands: inputs, ``vectors`` and ``logsumexp``.
        kv_heads: number of heads of the keys.
    """

    settings: Settings
    names: tuple[str, ...]
    kv_heads: int

    @property
    def hides(self) -> bool:
        """Whether a query may not see all keys."""
        return _logits.hides_keys(self.settings, self.names)

    def schedule(self, grid: Grid, operands: Sequence[Any]) -> Schedule | None:
        return _logits.schedule(self.settings, grid, self._label(operands))

    def compute(self, grid: Grid, index: TileIndex, tiles: Tiles, is_full: bool) -> Sequence[Array]:
        settings, named = self.settings, self._label(tiles)
        query, key, value, vectors = (
            put_heads_first(named[name]) for name in ("query", "key", "value", "vectors")
        )
        if self.hides:
            query, key, value = map(_logits.keep_finite, (query, key, value))
        query, scale = _logits.scale_query(query, settings.scale)
        products = _logits.multiply_keys(query, key, settings.precision)
        logits = _logits.shape_logits(
            products, named.get("bias"), scale=scale, logit_cap=settings.logit_cap
        )
        seen = _logits.find_seen(settings, named, is_full=is_full)
        counts = _logits.count_once(seen, grid, index)
        logsumexp = put_heads_first(named["logsumexp"][..., None])
        # The logsumexp is NaN for a query that sees a NaN, so hide what does not count after it.
        weights = jnp.exp(_logits.hide(counts, logits - logsumexp))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        kept = _logits.draw_kept(settings, grid, index, named.get("rngkey"), query.shape[1])
        weights = _logits.drop(settings, weights, kept)
        term = _logits.weigh_values(weights, value, settings.precision)
        term = term - total.astype(term.dtype) * vectors.astype(term.dtype)
        return put_heads_first(term), put_heads_first(total)[..., 0]

    def transpose_tangent(
        self, tangent: Tangent, linear: tuple[int, ...], outputs: tuple[int, ...]
    ) -> TileFunction | None:
        n = len(self.names)
        if linear != tuple(range(n, n + len(tangent.active))):
            return None
        active = tuple(self.names[i] for i in tangent.active)
        cotangents = tuple(("grad_vectors", "grad_logsumexp")[i] for i in outputs)
        return PullBack(self, active, cotangents)

    def _label(self, operands: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, operands, strict=True))


class _Queries(NamedTuple):
    """What the backward pass knows of a row of queries: ``[batch, kv_heads, group, time_q, d]``.

    Attributes:
        query: scaled, if ``scale`` is None.
        scale: of the logits, if the query is not scaled.
        grad_vectors: cotangent of the vectors.
        logsumexp: of the logits, ``[batch, kv_heads, 1, group, time_q]``.
        delta: product of each vector with its cotangent, in the same shape, less the cotangent of
            the logsumexp.
    """

    query: Array
    scale: float | None
    grad_vectors: Array
    logsumexp: Array
    delta: Array


@dataclasses.dataclass(frozen=True)
class PullBack(TileFunction):
    """The backward pass by hand: from cotangents of the results to those of the inputs.

    It is the transpose of the tangent of :class:`Equations`. Its tiles have keys before queries,
    ``[batch, kv_heads, time_kv, group, time_q]``, so that all products but one read their operands
    in the order in which they lie in memory. A group is the heads of queries that share a key.

    Attributes:
        equations: the function that this is the transpose of the tangent of.
        active: names of the inputs whose cotangents it returns.
        cotangents: names of the cotangents that it takes after the operands.
    """

    equations: Equations
    active: tuple[str, ...]
    cotangents: tuple[str, ...]

    def schedule(self, grid: Grid, operands: Sequence[Any]) -> Schedule | None:
        return _logits.schedule(self.equations.settings, grid, self._label(operands))

    def start_row(self, grid: Grid, row: TileIndex, rows: Tiles) -> Row:
        del row
        queries = self._prepare_queries(self._label(rows))

        def compute(index: TileIndex, columns: Tiles, is_full: bool) -> Sequence[Array]:
            named = self._label(merge_tiles(rows, columns))
            return self._compute_chunk(grid, index, named, queries, is_full=is_full)

        if "query" not in self.active:
            return Row(compute, {})
        query = queries.query
        zeros = jnp.zeros_like(_turn_queries(query), get_accumulation_dtype(query))
        finish = functools.partial(self._finish_query, queries.scale)
        return Row(compute, {self.active.index("query"): Layout(zeros, finish)})

    def get_cuda_kernel(self) -> Callable[..., Sequence[Array]] | None:
        settings = self.equations.settings
        if not settings.has_cudnn or self.cotangents != ("grad_vectors",):
            return None

        def run(*operands: Array) -> list[Array]:
            named = self._label(operands)
            inputs = (named[name] for name in ("query", "key", "value", "grad_vectors"))
            grads = _fused.pull_back_by_cudnn(*inputs, settings=settings)
            return [grads[name] for name in self.active]

        return run

    def _prepare_queries(self, named: dict[str, Any]) -> _Queries:
        query, vectors = self._group(named["query"]), self._group(named["vectors"])
        logsumexp = self._group(named["logsumexp"][..., None])[:, :, None, ..., 0]
        if self.equations.hides:
            query = _logits.keep_finite(query)
        query, scale = _logits.scale_query(query, self.equations.settings.scale)
        if "grad_vectors" in named:
            grad_vectors = self._group(named["grad_vectors"])
        else:
            grad_vectors = jnp.zeros_like(vectors)
        delta = jnp.sum(vectors * grad_vectors, axis=-1, dtype=logsumexp.dtype)[:, :, None]
        if "grad_logsumexp" in named:
            delta -= self._group(named["grad_logsumexp"][..., None])[:, :, None, ..., 0]
        return _Queries(query, scale, grad_vectors, logsumexp, delta)

    def _compute_chunk(
        self,
        grid: Grid,
        index: TileIndex,
        named: dict[str, Any],
        queries: _Queries,
        *,
        is_full: bool,
    ) -> Sequence[Array]:
        settings, hides = self.equations.settings, self.equations.hides
        einsum = functools.partial(einsum_accumulated, precision=settings.precision)
        query, scale, grad_vectors, logsumexp, delta = queries
        key, value = put_heads_first(named["key"]), put_heads_first(named["value"])
        if hides:
            key, value = _logits.keep_finite(key), _logits.keep_finite(value)
        products = einsum("bhkd,bhdgq->bhkgq", key, _turn_queries(query))
        shape_logits = functools.partial(
            _logits.shape_logits, scale=scale, logit_cap=settings.logit_cap
        )
        bias = self._turn(named.get("bias"))
        logits, pull_back_logits = jax.vjp(shape_logits, products, bias)
        seen = _logits.find_seen(settings, named, is_full=is_full)
        counts = self._turn(_logits.count_once(seen, grid, index))
        weights = jnp.exp(_logits.hide(counts, logits - logsumexp))
        heads = named["query"].shape[2]
        kept = self._turn(_logits.draw_kept(settings, grid, index, named.get("rngkey"), heads))
        grad_weights = einsum("bhkd,bhdgq->bhkgq", value, _turn_queries(grad_vectors))
        grad_weights = _logits.drop(settings, grad_weights.astype(weights.dtype), kept)
        grad_logits = weights * (grad_weights - delta)
        if hides and counts is not None:
            # A weight of zero times NaN is NaN, for a query that sees a NaN elsewhere.
            grad_logits = jnp.where(counts, grad_logits, 0)
        grad_products, grad_bias = pull_back_logits(grad_logits)
        grad_products = grad_products.astype(query.dtype)
        grads = {"bias": _turn_back(grad_bias)}
        if "query" in self.active:
            grads["query"] = einsum("bhdk,bhkgq->bhdgq", jnp.swapaxes(key, 2, 3), grad_products)
        if "key" in self.active:
            grads["key"] = put_heads_first(einsum("bhkgq,bhgqd->bhkd", grad_products, query))
        if "value" in self.active:
            dropped = _logits.drop(settings, weights, kept).astype(value.dtype)
            grads["value"] = put_heads_first(einsum("bhkgq,bhgqd->bhkd", dropped, grad_vectors))
        return [grads[name] for name in self.active]

    def _finish_query(self, scale: float | None, grad_query: Array) -> Array:
        """Brings the cotangent of a query into its layout, and scales it as the query was."""
        if scale is None:
            grad_query = grad_query * self.equations.settings.scale
        # In two steps, so that XLA can add up a group of one head in the buffer of the result.
        x = jnp.swapaxes(grad_query, 2, 3)
        return x.reshape(x.shape[0], -1, *x.shape[3:]).transpose(0, 3, 1, 2)

    def _label(self, operands: Sequence[Any]) -> dict[str, Any]:
        names = (*self.equations.names, *self.cotangents)
        return dict(zip(names, operands, strict=True))

    def _group(self, x: Array) -> Array:
        """``[batch, time, heads, d]`` -> ``[batch, kv_heads, group, time, d]``."""
        grouped = x.reshape(*x.shape[:2], self.equations.kv_heads, -1, x.shape[3])
        return grouped.transpose(0, 2, 3, 1, 4)

    def _turn(self, x: Array | None) -> Any:
        """``[batch, heads, time_q, time_kv]`` -> ``[batch, kv_heads, time_kv, group, time_q]``."""
        if x is None:
            return None
        kv_heads = 1 if x.shape[1] == 1 else self.equations.kv_heads
        return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).transpose(0, 1, 4, 2, 3)


def _turn_back(x: Array | None) -> Any:
    """``[batch, kv_heads, time_kv, group, time_q]`` -> ``[batch, heads, time_q, time_kv]``."""
    if x is None:
        return None
    x = x.transpose(0, 1, 3, 4, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _turn_queries(x: Array) -> Array:
    """``[batch, kv_heads, group, time, d]`` -> ``[batch, kv_heads, d, group, time]``."""
    return x.transpose(0, 1, 4, 2, 3)
