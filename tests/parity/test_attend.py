"""``attend`` against torch's scaled_dot_product_attention: values and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_extra import layer as xn
from flax_extra.layer import _chunked

BATCH, TIME, HEADS = 2, 12, 4


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mask_of(*shape: int) -> np.ndarray:
    mask = np.random.default_rng(5).random(shape) < 0.6
    mask[..., 0] = True  # torch gives NaN for a query that sees no key
    return mask


MASK, BIAS = mask_of(BATCH, 1, TIME, TIME), normal(1, HEADS, TIME, TIME, seed=6)
DISTANCE = np.arange(TIME)[:, None] - np.arange(TIME)
WINDOW = ((DISTANCE >= 0) & (DISTANCE < 5))[None, None]

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "plain": (HEADS, {}, {}),
    "causal": (HEADS, {"causal": True}, {"is_causal": True}),
    "grouped": (2, {"causal": True}, {"is_causal": True, "enable_gqa": True}),
    "one key head": (1, {"mask": MASK}, {"attn_mask": MASK, "enable_gqa": True}),
    "bias": (HEADS, {"bias": BIAS, "scale": 0.3}, {"attn_mask": BIAS, "scale": 0.3}),
    "window": (HEADS, {"causal": True, "window": 5}, {"attn_mask": WINDOW}),
}


@pytest.mark.parametrize("chunk_size", [None, 5], ids=["direct", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(
    case: str, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 5)
    kv_heads, ours, theirs = CASES[case]
    shapes = (BATCH, TIME, HEADS, 8), (BATCH, TIME, kv_heads, 8), (BATCH, TIME, kv_heads, 6)
    inputs = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    weight = normal(BATCH, TIME, HEADS * 6, seed=3)

    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    options = {
        name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in theirs.items()
    }
    heads_first = [x.transpose(1, 2) for x in leaves]
    vectors = torch.nn.functional.scaled_dot_product_attention(*heads_first, **options)
    expected = vectors.transpose(1, 2).reshape(BATCH, TIME, -1)
    expected.backward(torch.tensor(weight))

    @jax.jit
    def run(*inputs: Any) -> Any:
        f = functools.partial(xn.attend, **ours, chunk_size=chunk_size)
        found, pullback = jax.vjp(f, *inputs)
        return found, pullback(jnp.asarray(weight))

    found, gradients = run(*inputs)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=2e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-5, atol=5e-6)
