"""Attention in chunks is attention: values, gradients, masks, dropout, and what it holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from flax_extra import layer as xn
from flax_extra.layer import _attend, _chunked
from tests.layer.test_attention import formula, normal

BATCH, TIME_Q, TIME_KV, HEADS = 2, 5, 7, 2
MASKS = [
    None,
    (BATCH, TIME_Q, TIME_KV),
    (BATCH, 1, TIME_KV),
    (1, TIME_Q, TIME_KV),
    (BATCH, TIME_Q, 1),
    (BATCH, HEADS, TIME_Q, TIME_KV),
    (1, 1, 1, TIME_KV),
    (1, HEADS, TIME_Q, 1),
]


@pytest.fixture(autouse=True, scope="module")
def _few_queries_in_a_tile() -> Iterator[None]:
    """Five queries in pieces of three: the second is over the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunked, "QUERIES", 3)
        yield


def problem(dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    shapes = (TIME_Q, 4), (TIME_KV, 4), (TIME_KV, 6)
    return tuple(
        normal(BATCH, time, HEADS, features, seed=seed).astype(dtype)
        for seed, (time, features) in enumerate(shapes)
    )


def mask_of(shape: tuple[int, ...] | None, density: float = 0.4, seed: int = 0) -> Any:
    return None if shape is None else np.random.default_rng(seed).random(shape) < density


@functools.partial(jax.jit, static_argnames="chunk_size")
def with_gradients(*inputs: Any, **options: Any) -> Any:
    vectors, pullback = jax.vjp(lambda *inputs: xn.attend(*inputs, **options), *inputs)
    weight = jnp.cos(jnp.arange(vectors.size)).reshape(vectors.shape)
    return vectors, pullback(weight.astype(vectors.dtype))


@pytest.mark.parametrize(
    ("shape", "chunk_size"), [*((shape, 3) for shape in MASKS), (None, 1), (MASKS[1], 4)]
)
def test_chunks_change_no_number(shape: Any, chunk_size: int) -> None:
    inputs, mask = problem(), mask_of(shape)
    found, gradients = with_gradients(*inputs, mask=mask, chunk_size=chunk_size)
    np.testing.assert_allclose(found, formula(*inputs, mask), rtol=1e-5, atol=1e-6)
    _, expected = with_gradients(*inputs, mask=mask, chunk_size=TIME_KV)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), gradients, expected
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0))
def test_what_is_masked_is_exactly_zero(seed: int) -> None:
    mask = mask_of((BATCH, TIME_Q, TIME_KV), 0.3, seed)
    vectors, (query, key, value) = with_gradients(*problem(), mask=mask, chunk_size=3)
    assert not np.any(np.asarray(vectors)[~mask.any(2)])
    assert not np.any(np.asarray(query)[~mask.any(2)])
    assert not np.any(np.asarray(key)[~mask.any(1)])
    assert not np.any(np.asarray(value)[~mask.any(1)])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
def test_dtypes(dtype: Any) -> None:
    with jax.enable_x64(True):
        inputs, mask = problem(dtype), mask_of((BATCH, 1, TIME_KV))
        found, gradients = with_gradients(*inputs, mask=mask, chunk_size=3)
        assert {x.dtype for x in (found, *gradients)} == {jnp.dtype(dtype)}
        error = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            found.astype(np.float64), formula(*inputs, mask), rtol=error, atol=error
        )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_extreme_logits_do_not_overflow(dtype: Any) -> None:
    query, key = jnp.full((1, 1, 1, 4), 200, dtype), jnp.full((1, 3, 1, 4), -250, dtype)
    value = jnp.array([1.0, 2.0, 3.0], dtype).reshape(1, 3, 1, 1)
    mask = jnp.array([[[True, False, False]]])
    found, gradients = with_gradients(query, key.at[:, 1:].set(250), value, mask=mask, chunk_size=1)
    assert found.item() == 1
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradients)


def test_derivatives_of_any_order_in_reverse() -> None:
    mask = mask_of((1, TIME_Q, TIME_KV))

    @functools.partial(jax.jit, static_argnums=0)
    def second(chunk_size: int, *inputs: Any) -> Any:
        f = lambda *inputs: jnp.sum(jnp.sin(xn.attend(*inputs, mask, chunk_size=chunk_size)))
        first = jax.grad(f, (0, 1, 2))
        return jax.grad(lambda *inputs: sum(jnp.sum(x**2) for x in first(*inputs)), (0, 1, 2))(
            *inputs
        )

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        second(3, *problem()),
        second(TIME_KV, *problem()),
    )


def test_forward_derivatives_are_refused() -> None:
    f = functools.partial(xn.attend, chunk_size=3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, problem(), problem())
    jax.jvp(functools.partial(xn.attend, chunk_size=TIME_KV), problem(), problem())


def test_transformations() -> None:
    inputs, expected = problem(), formula(*problem())
    f = functools.partial(xn.attend, chunk_size=3)
    single = jax.vmap(lambda *inputs: f(*(x[None] for x in inputs))[0])
    np.testing.assert_allclose(single(*inputs), expected, rtol=1e-5, atol=1e-6)
    loss = lambda f: jax.grad(lambda *inputs: jnp.sum(jnp.sin(f(*inputs))), (0, 1, 2))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.jit(loss(jax.checkpoint(f)))(*inputs),
        jax.jit(loss(single))(*inputs),
    )
    scanned = jax.lax.map(lambda query: f(query, *inputs[1:]), inputs[0][None])
    np.testing.assert_allclose(scanned[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [3, TIME_KV])
def test_a_policy_can_keep_what_was_found(chunk_size: int) -> None:
    keep = jax.checkpoint_policies.save_only_these_names("attention")
    inputs, mask = problem(), mask_of(MASKS[1])

    def attended(*inputs: Any) -> Any:
        vectors = xn.attend(*inputs, mask, jax.random.key(0), 0.5, chunk_size=chunk_size)
        return jnp.sum(jnp.sin(vectors))

    def gradient(f: Any) -> tuple[int, Any]:
        f = jax.grad(f, (0, 1, 2))
        return str(jax.make_jaxpr(f)(*inputs)).count("dot_general"), jax.jit(f)(*inputs)

    of_plain, plain = gradient(attended)
    of_checkpoint, again = gradient(jax.checkpoint(attended))
    of_policy, kept = gradient(jax.checkpoint(attended, policy=keep))
    for found in (again, kept):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, plain)
    if chunk_size == TIME_KV:
        # The logits, but not the vectors: those are one product.
        assert of_plain + 2 == of_checkpoint == of_policy + 1
    else:
        assert of_plain == of_policy < of_checkpoint


# Dropout.


def dropped_weights(inputs: Any, rate: float, chunk_size: int = 3) -> np.ndarray:
    """The weights after dropout, [batch, time_q, heads, time_kv]."""
    eye = jnp.broadcast_to(jnp.eye(TIME_KV)[None, :, None], (BATCH, TIME_KV, HEADS, TIME_KV))
    vectors = xn.attend(*inputs[:2], eye, None, jax.random.key(0), rate, chunk_size=chunk_size)
    return np.asarray(vectors).reshape(BATCH, TIME_Q, HEADS, TIME_KV)


def test_dropout_drops_each_weight_by_itself() -> None:
    query = jnp.zeros((64, 32, 4, 1)), jnp.zeros((64, 32, 4, 1))
    value = jnp.ones((64, 32, 4, 1))
    means = [
        np.asarray(xn.attend(*query, value, None, jax.random.key(seed), 0.5, chunk_size=10))
        for seed in range(2)
    ]
    for mean in means:  # of each query's 32 weights of 1/32, doubled or zero
        assert abs(mean.mean() - 1) < 5 / np.sqrt(mean.size * 32)
        assert abs(mean.std() - 1 / np.sqrt(32)) < 0.01
    assert np.any(means[0] != means[1])


def test_dropout_scales_what_it_keeps() -> None:
    inputs = problem()
    kept, whole = dropped_weights(inputs, 0.5), dropped_weights(inputs, 0.0)
    assert 0.3 < np.mean(kept == 0) < 0.7
    np.testing.assert_allclose(kept[kept != 0], 2 * whole[kept != 0], rtol=1e-5)


def test_the_backward_pass_drops_the_same_weights() -> None:
    with jax.enable_x64(True):
        options = {"dropout_rngkey": jax.random.key(1), "dropout_rate": 0.3, "chunk_size": 3}
        f = functools.partial(xn.attend, **options)
        check_grads(jax.jit(f), problem(np.float64), order=1, modes=["rev"])


# The choice.


def test_chunks_are_chosen_from_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "QUERIES", 512)
    chosen = _attend._chunk_size
    assert chosen((1, 8, 256, 512), None) is None
    assert chosen((1, 8, 1, 65_536), None) is None
    assert chosen((1, 8, 512, 65_536), None) == 256
    assert chosen((1, 1, 512, 65_536), None) == 2_048
    assert chosen((1, 8, 512, 65_536), 1_000) == 1_000
    assert chosen((1, 8, 512, 65_536), 65_536) is None
    b, t = jax.export.symbolic_shape("b, t")
    assert chosen((b, 8, 512, 65_536), None) is None
    assert chosen((1, 8, 512, t), 64) is None
    assert chosen((0, 8, 512, 64), 8) is None


def test_shapes_with_symbolic_dimensions() -> None:
    b, t = jax.export.symbolic_shape("b, t")
    layer = xn.SelfAttention(n_heads=2, chunk_size=2)
    x = jax.ShapeDtypeStruct((b, t, 4), jnp.float32)
    init = lambda x: layer.init_with_output(jax.random.key(0), x, None)[0]
    assert jax.eval_shape(init, x).shape == (b, t, 4)


def test_the_field_of_the_layers_reaches_it() -> None:
    x = normal(1, 6, 4)
    whole, chunked = xn.SelfAttention(n_heads=2), xn.SelfAttention(n_heads=2, chunk_size=2)
    variables = whole.init(jax.random.key(0), x, None)
    assert "while" not in str(jax.make_jaxpr(whole.apply)(variables, x, None))
    assert "custom_vjp" in str(jax.make_jaxpr(chunked.apply)(variables, x, None))
    found, expected = (layer.apply(variables, x, None) for layer in (chunked, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", [xn.attend, xn.Attention])
def test_a_chunk_of_no_keys(call: Any) -> None:
    arguments = problem() if call is xn.attend else ()
    with pytest.raises(ValueError, match=f"{call.__name__} takes chunk_size of at least 1; got 0."):
        call(*arguments, chunk_size=0)


# Memory, and other platforms.


def temporaries(time_kv: int, **options: Any) -> int:
    shapes = [(2, 512, 4, 8)] + 2 * [(2, time_kv, 4, 8)] + [(2, 1, time_kv)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[:3]]
    mask = jax.ShapeDtypeStruct(shapes[3], jnp.bool_)
    analysis = with_gradients.lower(*inputs, mask=mask, **options).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def test_no_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "QUERIES", 512)
    sizes = {time: temporaries(time) for time in (4_096, 32_768)}
    of_inputs = 2 * 2 * 28_672 * 4 * 8 * 4
    assert sizes[32_768] - sizes[4_096] <= of_inputs
    assert 20 * sizes[32_768] < 4 * 2 * 4 * 512 * 32_768


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_is_lowered_for_every_platform(platform: str) -> None:
    f = functools.partial(with_gradients, chunk_size=3)
    exported = jax.export.export(jax.jit(f), platforms=[platform])(*problem())
    assert exported.platforms == (platform,)


def test_half_precision_is_for_cudnn_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    query = jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)

    def program(platform: str, **options: Any) -> str:
        f = jax.jit(functools.partial(with_gradients, chunk_size=64, **options))
        return str(f.trace(query, key, key).lower(lowering_platforms=(platform,)).as_text())

    assert "cudnn" in program("cuda")
    assert "cudnn" not in program("cpu")
    assert "cudnn" not in program("cuda", mask=np.ones((2, 1, 128), bool))
