"""What ``attend`` has to compute, written as plainly as possible, and problems to try it on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""To compile takes most of the time in tests: a third of it without optimisation."""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_heads(mask: Any) -> np.ndarray:
    mask = np.asarray(mask) != 0
    return mask[:, None] if mask.ndim == 3 else mask


def find_seen(
    shape: tuple[int, ...],
    mask: Any = None,
    causal: bool = False,
    window: int | None = None,
    query_positions: Any = None,
    key_positions: Any = None,
    **_: Any,
) -> np.ndarray:
    """Says which query sees which key, pair by pair: ``[batch, heads, time_q, time_kv]``."""
    batch, _heads, time_q, time_kv = shape
    seen = np.ones(shape, bool)
    if mask is not None:
        seen &= with_heads(mask)
    if not causal:
        return seen
    if query_positions is None:
        query_positions = np.arange(time_q)[None] + time_kv - time_q
    if key_positions is None:
        key_positions = np.arange(time_kv)[None]
    for b in range(batch):
        for i, q in enumerate(query_positions[b % len(query_positions)]):
            for j, k in enumerate(key_positions[b % len(key_positions)]):
                seen[b, :, i, j] &= 0 <= k <= q and (window is None or q - k < window)
    return seen


def formula(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    *,
    seen: Any = None,
    bias: Any = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    kept: Any = 1.0,
) -> Any:
    """Attends in float64, by numpy, or by JAX if it is given arrays of JAX.

    Args:
        seen: which query sees which key, ``[batch, heads, time_q, time_kv]``, instead of a mask.
        kept: what the weights are multiplied by.
    """
    is_jax = isinstance(query, jax.Array)
    numpy: Any = jnp if is_jax else np
    if not is_jax:
        query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = numpy.repeat(key, group, axis=2), numpy.repeat(value, group, axis=2)
    logits = numpy.einsum("bqhd,bkhd->bhqk", query, key)
    logits = logits / np.sqrt(query.shape[3]) if scale is None else logits * scale
    if logit_cap is not None:
        logits = logit_cap * numpy.tanh(logits / logit_cap)
    if bias is not None:
        logits = logits + (bias[:, None] if bias.ndim == 3 else bias)
    if seen is None:
        seen = find_seen(logits.shape, mask)
    logits = numpy.where(seen, logits, -1e30)
    weights = numpy.exp(logits - logits.max(-1, keepdims=True)) * seen
    total = weights.sum(-1, keepdims=True)
    weights = weights / numpy.where(total > 0, total, 1) * kept
    vectors = numpy.einsum("bhqk,bkhd->bqhd", weights, value)
    return vectors.reshape(*vectors.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of attention: its static options, and the shapes of its arrays.

    Attributes:
        options: keyword arguments of ``attend`` that are numbers.
        arrays: shapes of keyword arguments that are arrays.
        heads: heads of the query.
        kv_heads: heads of key and value.
        time_q: number of queries.
        time_kv: number of keys.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    heads: int = 2
    kv_heads: int = 2
    time_q: int = 5
    time_kv: int = 7

    def draw(self, seed: int = 0, dtype: Any = np.float32) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws the arrays that can have a derivative, and the others."""
        rng = np.random.default_rng(seed)
        shapes = {
            "query": (2, self.time_q, self.heads, 4),
            "key": (2, self.time_kv, self.kv_heads, 4),
            "value": (2, self.time_kv, self.kv_heads, 6),
        }
        shapes |= {name: shape for name, shape in self.arrays.items() if name == "bias"}
        floats = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        others: dict[str, np.ndarray] = {}
        for name, shape in self.arrays.items():
            if name == "mask":
                others[name] = rng.random(shape) < 0.6
            elif name == "query_positions":
                others[name] = rng.integers(-2, 2 * self.time_kv, shape)
            elif name == "key_positions":  # each position in one slot at most; -1 is an empty slot
                slots = [rng.permutation(2 * shape[1])[: shape[1]] for _ in range(shape[0])]
                others[name] = np.stack(slots) - 1
        return floats, others

    def find_seen(self, others: Mapping[str, Any]) -> np.ndarray:
        """Says which query sees which key."""
        shape = 2, self.heads, self.time_q, self.time_kv
        return find_seen(shape, **{**self.options, **others})

    def formula(self, floats: Mapping[str, Any], seen: Any, kept: Any = 1.0) -> Any:
        options = {name: self.options.get(name) for name in ("scale", "logit_cap")}
        return formula(**floats, seen=seen, kept=kept, **options)


KINDS = {
    "plain": Kind({"scale": 0.9}, heads=4),
    "padding": Kind({"logit_cap": 1.5}, {"mask": (2, 1, 7)}),
    "mask": Kind(arrays={"mask": (2, 4, 5, 7), "bias": (1, 4, 5, 1)}, heads=4),
    "causal": Kind({"causal": True, "logit_cap": 0.7}, {"bias": (1, 2, 5, 7)}),
    "more queries": Kind({"causal": True}, {"mask": (1, 7, 5)}, time_q=7, time_kv=5),
    "window": Kind(
        {"causal": True, "window": 3}, {"bias": (2, 1, 1, 11)}, heads=6, time_q=8, time_kv=11
    ),
    "ring": Kind(
        {"causal": True, "window": 4},
        {"query_positions": (1, 5), "key_positions": (2, 7), "bias": (2, 5, 7)},
        heads=3,
        kv_heads=1,
    ),
}
"""Every argument of ``attend``, and those together that meet in one place."""


def hide_with(fill: float, floats: Mapping[str, Any], seen: Any) -> dict[str, Any]:
    """Fills keys and values that no query sees, and queries that see no key."""
    blind, unseen = ~seen.any((1, 3)), ~seen.any((1, 2))
    places = {"query": blind, "key": unseen, "value": unseen}
    return {
        name: np.where(places[name][:, :, None, None], fill, x).astype(x.dtype)
        if name in places
        else x
        for name, x in floats.items()
    }
