"""Layers in float16 and bfloat16, without implicit promotion, and parameters drawn in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import layer as xn
from tests.layer.entries import LAYER_ENTRIES, Entry
from tests.layer.multimodal_entries import MULTIMODAL_ENTRIES

ENTRIES = (*LAYER_ENTRIES, *MULTIMODAL_ENTRIES)

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
HALF = pytest.mark.parametrize(
    "half", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__
)
FIELDS = pytest.mark.parametrize("fields", [("dtype",), ("dtype", "param_dtype")], ids="+".join)


@every_entry
@HALF
@FIELDS
def test_nothing_is_promoted_implicitly(entry: Entry, half: Any, fields: tuple[str, ...]) -> None:
    """Init, apply and gradient under strict promotion, with inputs in half precision."""
    layer = entry.make(dict.fromkeys(fields, half))
    inputs = jax.tree.map(lambda x: jnp.asarray(x, half) if _is_float(x) else x, entry.inputs())

    def loss(params: Any, floats: list[Any]) -> Any:
        remaining = iter(floats)
        joined = jax.tree.map(lambda x: next(remaining) if _is_float(x) else x, inputs)
        outputs = layer.apply(params, *joined, rngs=rngs) if is_module else layer(*joined)
        found.extend(leaf.dtype for leaf in jax.tree.leaves(outputs) if _is_float(leaf))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outputs) if _is_float(leaf))

    found: list[Any] = []
    is_module = isinstance(layer, nn.Module)
    rngs = {name: jax.random.key(seed) for seed, name in enumerate(("params", *entry.rngs))}
    floats = [x for x in jax.tree.leaves(inputs) if _is_float(x)]
    with _strict():
        params = jax.eval_shape(lambda: layer.init(rngs, *inputs)) if is_module else {}
        jax.eval_shape(loss, params, floats)
        if floats or entry.param_shapes:
            jax.eval_shape(jax.grad(loss, (0, 1)), params, floats)
    expected = half if "param_dtype" in fields else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} <= {jnp.dtype(expected)}
    assert set(found) <= {jnp.dtype(half)}


LAYERS = [
    (xn.SelfAttention(n_heads=2), (jnp.ones((1, 3, 64)), None)),
    (xn.FeedForward(4), (jnp.ones((3, 64)),)),
    (xn.FeedForward(4, gated=True), (jnp.ones((3, 64)),)),
    (xn.TrainablePositionalEncoding(50, 40), (1,)),
    (xn.TrainablePositionalPadding(600), (jnp.ones((1, 2, 3)),)),
    (xn.TrainablePositionalMasking(0.5), (jnp.ones((1, 2, 600)),)),
    (xn.Learned(50, 40), (jnp.ones((1, 2)),)),
]


@pytest.mark.parametrize(
    ("layer", "inputs"), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS]
)
@HALF
def test_default_initializers_round_what_they_draw_in_float32(
    layer: nn.Module, inputs: tuple[Any, ...], half: Any
) -> None:
    drawn = layer.init(jax.random.key(0), *inputs)
    rounded = layer.clone(param_dtype=half).init(jax.random.key(0), *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(half), strict=True), rounded, drawn
    )


def test_rounded_parameters_have_many_distinct_values() -> None:
    # Drawn in bfloat16 there are at most 128 of them.
    layer = xn.FeedForward(4, param_dtype=jnp.bfloat16)
    kernel = layer.init(jax.random.key(0), jnp.ones((1, 64)))["params"]["Dense_0"]["kernel"]
    assert len(np.unique(kernel.astype(jnp.float32))) > 500


def test_default_initializers_draw_float64_in_float64() -> None:
    with jax.enable_x64(True):
        layer = xn.Learned(50, 40, param_dtype=jnp.float64)
        vectors = layer.init(jax.random.key(0), jnp.ones((1, 2)))["params"]["vectors"]
        assert vectors.dtype == jnp.float64
        assert np.any(vectors != vectors.astype(jnp.float32))


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)
