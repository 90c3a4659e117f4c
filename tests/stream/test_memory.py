"""A step of one token copies no cache: XLA's own account of the memory of the compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from tests.stream.toys import draw, quick_jit

BATCH, FEATURES, HEADS, CAPACITY, CHUNK = 4, 64, 4, 2048, 256


class ChunkedAttention(nn.Module):
    """Causal attention that reads the cache chunk by chunk, up to the last position."""

    chunk: int = CHUNK
    n_heads: int = HEADS

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        heads = self.n_heads, x.shape[-1] // self.n_heads
        query, key, value = (
            nn.DenseGeneral(heads, name=name)(x) for name in ("query", "key", "value")
        )
        cache.append("keys", key)
        cache.append("values", value)
        y = self.attend(cache, query) if cache.is_streaming else attend(query, key, value)
        return x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(y)

    def attend(self, cache: cb.Cache, query: Any) -> Any:
        keys, values = cache.get_entry("keys"), cache.get_entry("values")
        batch, time, *heads = query.shape
        sizes = (batch, self.chunk, *heads)
        at = cache.positions[:, :, None]

        def add_chunk(index: Any, carry: Any) -> Any:
            top, total, sums = carry
            key, value = (e.read((0, index * self.chunk, 0, 0), sizes) for e in (keys, values))
            logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / heads[1] ** 0.5
            places = index * self.chunk + jnp.arange(self.chunk)
            logits = jnp.where((places[None, None] <= at)[:, None], logits, -1e30)
            new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
            weights, shrink = jnp.exp(logits - new_top), jnp.exp(top - new_top)
            sums = sums * shrink + jnp.einsum("bhqk,bkhd->bhqd", weights, value)
            return new_top, total * shrink + weights.sum(-1, keepdims=True), sums

        shape = batch, heads[0], time
        start = jnp.full((*shape, 1), -1e30), jnp.zeros((*shape, 1)), jnp.zeros((*shape, heads[1]))
        n_chunks = jnp.max(at) // self.chunk + 1
        _, total, sums = jax.lax.fori_loop(0, n_chunks, add_chunk, start)
        return jnp.moveaxis(sums / total, 1, 2)


def attend(query: Any, key: Any, value: Any) -> Any:
    mask = nn.make_causal_mask(query[..., 0, 0])
    return nn.dot_product_attention(query, key, value, mask=mask)


def make_layer() -> Any:
    return cb.residual(
        cb.fn(xn.SelfAttention(HEADS, causal=True, chunk_size=CHUNK), mask=None),
        xn.FeedForward(1),
    )


def make_grouped() -> Any:
    attention = xn.SelfAttention(
        HEADS, causal=True, chunk_size=CHUNK, n_kv_heads=2, rotary=xn.RotaryEncoding()
    )
    return cb.residual(cb.fn(attention, mask=None))


LAYERS: dict[str, Callable[[], Any]] = {
    "Cache": ChunkedAttention,
    "SelfAttention": make_layer,
    "SelfAttention, grouped": make_grouped,
}
PIPELINES: dict[str, Callable[[Any], Any]] = {
    "series": lambda make: cb.serial([make() for _ in range(3)]),
    "repeat": lambda make: cb.repeat(make(), 8),
    "repeat, shared": lambda make: cb.repeat(make(), 8, shared=True),
    "repeat, remat": lambda make: cb.repeat(make(), 8, remat=True),
    "nested repeats": lambda make: cb.repeat(cb.serial(cb.repeat(make(), 4), jnp.tanh), 2),
}


def test_the_toy_streams() -> None:
    layer = ChunkedAttention(chunk=2, n_heads=2)
    testing.check_streaming(layer, "f32[b, t, 4]", gradients=False, max_examples=3)


def compile_step(pipeline: Any, batch: int = BATCH, **lengths: Any) -> tuple[Any, int]:
    """Compiles a step of one token on shapes: no array is made. Returns the bytes of its state."""
    stream = cb.stream(pipeline, f"f32[b, t, {FEATURES}]", capacity=CAPACITY)
    x = jax.ShapeDtypeStruct((batch, 1, FEATURES), jnp.float32)
    variables = jax.eval_shape(pipeline.init, jax.random.key(0), x)
    state = stream.state_shapes(batch)
    step = jax.jit(stream.step, donate_argnums=1)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return step.lower(variables, state, x, **lengths).compile(), size


def check_memory(program: Any, size: int) -> None:
    found = program.memory_analysis()
    assert found.temp_size_in_bytes <= size / 8
    assert found.alias_size_in_bytes >= size


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        *((layer, name) for layer in ("Cache", "SelfAttention") for name in PIPELINES),
        ("SelfAttention, grouped", "repeat"),
    ],
)
def test_a_step_of_one_token(layer: str, name: str) -> None:
    check_memory(*compile_step(PIPELINES[name](LAYERS[layer])))


def test_a_step_with_lengths() -> None:
    lengths = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    check_memory(*compile_step(PIPELINES["repeat"](make_layer), lengths=lengths))


def test_what_is_left_over_is_found() -> None:
    """A layer that replaces its state as a whole copies it, and the account shows that."""

    class Replaces(nn.Module):
        @nn.compact
        def __call__(self, x, *, decode=False):
            cache = cb.Cache(self, x, decode=decode)
            shape = (x.shape[0], CAPACITY, FEATURES)
            past = cache.recall("past", jnp.zeros(shape))
            past = jnp.concatenate([past[:, x.shape[1] :], x], axis=1)
            cache.keep("past", past)
            return x + jnp.cumsum(past, axis=1)[:, -1:]

    program, size = compile_step(cb.repeat(Replaces(), 2))
    with pytest.raises(AssertionError):
        check_memory(program, size)


def test_generation_in_a_scan_copies_no_cache() -> None:
    pipeline = PIPELINES["repeat"](make_layer)
    stream = cb.stream(pipeline, f"f32[b, t, {FEATURES}]", capacity=CAPACITY)
    x = jax.ShapeDtypeStruct((BATCH, 1, FEATURES), jnp.float32)
    variables = jax.eval_shape(pipeline.init, jax.random.key(0), x)
    state = stream.state_shapes(BATCH)

    def generate(variables: Any, state: Any, x: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            carry = stream.step(variables, *carry)
            return carry, carry[1]

        return jax.lax.scan(step, (state, x), length=16)

    program = jax.jit(generate, donate_argnums=1).lower(variables, state, x).compile()
    check_memory(program, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))


def test_only_what_is_filled_is_read() -> None:
    """Chunks that are not filled may hold NaN: nobody reads them."""
    pipeline = cb.repeat(ChunkedAttention(chunk=4, n_heads=2), 2)
    x = draw(2, 3, 4)
    variables = quick_jit(pipeline.init)(jax.random.key(0), x)
    stream = cb.stream(pipeline, "f32[b, t, 4]", capacity=12)
    start = stream.start(2)
    spoiled = jax.tree.map(lambda x: x.at[:, :, 4:].set(jnp.nan) if x.ndim == 5 else x, start)
    expected, found = (quick_jit(stream.step)(variables, s, x)[1] for s in (start, spoiled))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, expected)
