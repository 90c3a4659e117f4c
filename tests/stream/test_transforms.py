"""Streams under jit, vmap, scan and export, in half precision, and with frozen variables."""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.stream.toys import Attention, Positions, draw, make_block, quick_jit

KEY = jax.random.key(0)
SPEC = "f32[b, t, 4]"
CAPACITY = 6
X = draw(2, CAPACITY, 4)


def make_layers(dtype: Any = None) -> cb.Combinator:
    attention = xn.SelfAttention(2, causal=True, rotary=xn.RotaryEncoding(), dtype=dtype)
    return cb.residual(
        nn.LayerNorm(dtype=dtype),
        cb.fn(attention, mask=None),
        xn.CausalConv(kernel_size=2, dtype=dtype),
        xn.GRU(4, return_sequences=True, dtype=dtype),
    )


BLOCKS = {"toys": make_block, "layers": make_layers}
MODELS = {name: cb.repeat(make(), 2, remat=name == "toys") for name, make in BLOCKS.items()}
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def make(name: str) -> tuple[cb.Stream, Any, Any]:
    """Returns the stream of a model, its variables, and what it gives for X."""
    model = MODELS[name]
    variables = quick_jit(model.init)(KEY, X)
    whole = np.asarray(quick_jit(model.apply)(variables, X))
    return cb.stream(model, SPEC, capacity=CAPACITY), variables, whole


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@every_model
def test_one_compiled_program_serves_all_steps_and_takes_the_state_over(name: str) -> None:
    stream, variables, whole = make(name)
    step, state = quick_jit(stream.step, donate_argnums=1), stream.start(2)
    for at in range(CAPACITY):
        before, (state, y) = state, step(variables, state, X[:, at : at + 1])
        assert_close(y, whole[:, at : at + 1])
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert step._cache_size() == 1
    lengths = jnp.array([1, 0])
    state = stream.start(2)
    for _ in range(3):
        state, _ = step(variables, state, X[:, :1], lengths=lengths)
    assert step._cache_size() == 2


def test_the_state_of_rows_taken_or_reset_needs_no_other_program() -> None:
    stream, variables, _ = make("toys")
    step = quick_jit(stream.step)
    state, _ = step(variables, stream.start(2), X[:, :1])
    for move in (stream.take, stream.reset, jax.jit(stream.take), jax.jit(stream.reset)):
        step(variables, move(state, jnp.array([1, 0])), X[:, :1])
    assert step._cache_size() == 1


@every_model
def test_all_steps_in_a_scan(name: str) -> None:
    stream, variables, whole = make(name)

    @quick_jit
    def run(state: Any, steps: Any) -> Any:
        return jax.lax.scan(
            lambda state, x: stream.step(variables, state, x[:, None]), state, steps
        )

    _, y = run(stream.start(2), jnp.moveaxis(X, 1, 0))
    assert_close(jnp.moveaxis(y[:, :, 0], 0, 1), whole)


@every_model
def test_streams_side_by_side(name: str) -> None:
    stream, variables, whole = make(name)
    start = jax.vmap(lambda _: stream.start(1))(jnp.arange(2))
    step = quick_jit(jax.vmap(stream.step, in_axes=(None, 0, 0)))
    state, first = step(variables, start, X[:, None, :4])
    # Each stream is at a place of its own.
    state = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), state, start)
    _, second = step(variables, state, jnp.stack([X[:1, 4:], X[1:, :2]]))
    assert_close(jnp.concatenate([first, second], axis=2)[0], whole[:1])
    assert_close(second[1], whole[1:, :2])


def test_one_stream_for_each_set_of_variables() -> None:
    stream, variables, whole = make("toys")
    others = jax.tree.map(lambda x: x + 0.1, variables)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), variables, others)
    start = jax.tree.map(lambda x: jnp.stack([x, x]), stream.start(2))
    _, y = quick_jit(jax.vmap(stream.step, in_axes=(0, 0, None)))(both, start, X)
    assert_close(y[0], whole)
    assert_close(y[1], quick_jit(MODELS["toys"].apply)(others, X))


@every_model
def test_a_step_is_exported_for_every_batch_and_loaded(name: str) -> None:
    _, variables, whole = make(name)
    stream = cb.stream(MODELS[name], "f32[b, t, d]", capacity=CAPACITY)
    (b,) = export.symbolic_shape("b")
    program = export.export(jax.jit(stream.step))(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables),
        stream.state_shapes(b, d=4),
        jax.ShapeDtypeStruct((b, 2, 4), jnp.float32),
        lengths=jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    pytest.importorskip("flatbuffers", reason="jax.export serializes with it")
    loaded = export.deserialize(bytearray(program.serialize()))
    for rows in (1, 2):
        state, lengths = stream.start(rows, d=4), jnp.full(rows, 2)
        for at in (0, 2):
            state, y = loaded.call(variables, state, X[:rows, at : at + 2], lengths=lengths)
            assert_close(y, whole[:rows, at : at + 2])
    assert isinstance(state, cb.StreamState)
    assert state.sizes == (("d", 4),)
    assert stream.position(state).tolist() == [4, 4]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@every_model
def test_half_precision(name: str, dtype: Any) -> None:
    model = cb.repeat(BLOCKS[name](dtype), 2)
    spec = SPEC.replace("f32", "bf16" if dtype == jnp.bfloat16 else "f16")
    x, variables = X.astype(dtype), make(name)[1]
    whole = quick_jit(model.apply)(variables, x)
    stream = cb.stream(model, spec, capacity=CAPACITY)
    step, state, blocks = quick_jit(stream.step), stream.start(2), []
    for block in jnp.split(x, 3, axis=1):
        state, y = step(variables, state, block)
        blocks.append(y)
    assert np.dtype(dtype) in {leaf.dtype for leaf in jax.tree.leaves(state)}
    found = jnp.concatenate(blocks, axis=1)
    assert found.dtype == whole.dtype == dtype
    rtol = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        found.astype(np.float32), whole.astype(np.float32), rtol=rtol, atol=rtol
    )


def test_frozen_variables() -> None:
    stream, variables, whole = make("toys")
    frozen = flax.core.freeze(variables)
    state, y = quick_jit(stream.step)(frozen, stream.start(2), X)
    assert_close(y, whole)
    quick_jit(stream.step)(frozen, state, X[:, :1])
    assert not any(isinstance(x, flax.core.FrozenDict) for x in jax.tree.leaves(
        state.cache, is_leaf=lambda x: isinstance(x, flax.core.FrozenDict)
    ))  # fmt: skip


def test_partitioned_variables() -> None:
    dense = nn.Dense(4, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("a", "b")))
    model = cb.repeat(cb.residual(dense, Attention()), 2)
    variables = quick_jit(model.init)(KEY, X)
    stream = cb.stream(model, SPEC, capacity=CAPACITY)
    _, y = quick_jit(stream.step)(variables, stream.start(2), X)
    assert_close(y, quick_jit(model.apply)(variables, X))


# Generation


class Sample(nn.Module):
    """Chooses the next token: the one with the highest score."""

    def __call__(self, logits):
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32)


def test_to_generate_by_a_scan_of_the_model_is_to_recompute() -> None:
    n_tokens, vocabulary = 8, 11
    model = cb.serial(
        nn.Embed(vocabulary, 8),
        Positions(n_tokens),
        cb.repeat(make_block(), 2),
        nn.Dense(vocabulary),
    )
    prompt = jnp.array([[3, 1, 4], [1, 5, 9]])
    variables = quick_jit(model.init)(KEY, prompt)
    variables = jax.tree.map(lambda x: x + draw(*x.shape) / 4, variables)
    stream = cb.stream(model, "i32[b, t]", capacity=n_tokens)

    def next_token(state: Any, token: Any, _: Any) -> Any:
        state, logits = stream.step(variables, state, token)
        token = Sample()(logits)
        return state, token, token

    generate = cb.scan(cb.fn(next_token, n_out=3), n_carry=2, axis=0)

    @quick_jit
    def run(prompt: Any) -> Any:
        state, logits = stream.step(variables, stream.start(2), prompt)
        first = Sample()(logits)
        *_, tokens = generate(state, first, jnp.arange(n_tokens - 3))
        return jnp.concatenate([prompt, first, tokens[:, :, 0].T], axis=1)

    recompute = quick_jit(model.apply)
    expected = jnp.pad(prompt, ((0, 0), (0, n_tokens - 3)))  # no step sees the padding
    for at in range(3, n_tokens):
        logits = recompute(variables, expected)[:, :at]
        expected = expected.at[:, at].set(Sample()(logits)[:, 0])
    last = Sample()(recompute(variables, expected))
    expected = jnp.concatenate([expected, last], axis=1)
    assert run(prompt).tolist() == expected.tolist()
    assert len(set(expected.ravel().tolist())) > 3
