"""``attend`` in all its forms, against the formula: values and derivatives of every kind."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import layer as xn
from flax_extra.layer import _chunked
from tests.layer.attend_reference import (
    KINDS,
    formula,
    hide_with,
    normal,
    quick_jit,
    with_heads,
)

every_form = pytest.mark.parametrize("chunk_size", [None, 3], ids=["direct", "chunked"])
seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True, scope="module")
def _few_queries_to_a_tile() -> Iterator[None]:
    """Five queries in tiles of three: the second tile begins in the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 3)
        yield


# Values, and derivatives of every kind and order.


def derive(f: Callable[..., Any], floats: Any, tangents: Any, *others: Any) -> dict[str, Any]:
    """Computes values, and derivatives in both modes."""
    run = lambda floats: f(floats, *others)
    gradient = jax.grad(lambda floats: jnp.sum(jnp.sin(run(floats))))
    value, pushed = jax.jvp(run, (floats,), (tangents,))
    _, hessian_product = jax.jvp(gradient, (floats,), (tangents,))
    return {"value": value, "jvp": pushed, "grad": gradient(floats), "hvp": hessian_product}


def derive_twice(f: Callable[..., Any], floats: Any, tangents: Any, *others: Any) -> Any:
    """Computes reverse over reverse, and forward over forward."""
    run = lambda floats: f(floats, *others)
    gradient = jax.grad(lambda floats: jnp.sum(jnp.sin(run(floats))))
    push = lambda floats: jax.jvp(run, (floats,), (tangents,))[1]
    square = lambda floats: sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient(floats)))
    return {"reverse": jax.grad(square)(floats), "forward": jax.jvp(push, (floats,), (tangents,))}


@functools.cache
def compiled(derivatives: Any, name: str, chunk_size: int | str | None) -> Any:
    kind = KINDS[name]

    def run(floats: Any, others: Any) -> Any:
        if chunk_size == "reference":
            return kind.formula(floats, **others)
        return xn.attend(**floats, **others, **kind.options, chunk_size=chunk_size)

    return quick_jit(functools.partial(derivatives, run))


def check_derivatives(
    derivatives: Any, name: str, chunk_size: int | None, seed: int, fill: float = np.nan
) -> None:
    """Compares with the formula; what is hidden from all is not finite, and leaves no trace."""
    kind = KINDS[name]
    with jax.enable_x64(True):
        floats, others = kind.draw(seed, np.float64)
        tangents, _ = kind.draw(seed + 1, np.float64)
        seen = kind.find_seen(others)
        expected = compiled(derivatives, name, "reference")(
            hide_with(0.0, floats, seen), tangents, {"seen": seen}
        )
        run = compiled(derivatives, name, chunk_size)
        found = run(hide_with(fill, floats, seen), tangents, others)
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
        jax.tree.map(compare, found, expected)


@pytest.mark.parametrize("name", KINDS)
@every_form
@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([np.nan, np.inf]))
def test_values_and_derivatives(name: str, chunk_size: int | None, seed: int, fill: float) -> None:
    check_derivatives(derive, name, chunk_size, seed, fill)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_derivatives_of_derivatives_in_chunks(seed: int) -> None:
    check_derivatives(derive_twice, "ring", 3, seed)


@every_form
def test_derivatives_with_dropout(chunk_size: int | None) -> None:
    """In every mode the weights are dropped that the values show to be dropped."""
    kind = KINDS["plain"]
    dropout = {"dropout_rngkey": jax.random.key(3), "dropout_rate": 0.4}

    def derive(f: Any, floats: Any, tangents: Any) -> Any:
        loss = lambda floats: jnp.sum(jnp.sin(f(floats)))
        return jax.jvp(f, (floats,), (tangents,)), jax.grad(loss)(floats)

    with jax.enable_x64(True):
        floats, others = kind.draw(0, np.float64)
        tangents, _ = kind.draw(1, np.float64)
        run = lambda floats, **options: xn.attend(
            **floats, **others, **kind.options, **options, chunk_size=chunk_size
        )
        eye = np.broadcast_to(np.eye(7)[None, :, None], (2, 7, 2, 7))
        weights, dropped = (run({**floats, "value": eye}, **options) for options in ({}, dropout))
        kept = np.where(weights > 0, dropped / np.where(weights > 0, weights, 1), 0)
        kept = kept.reshape(2, 5, 4, 7).swapaxes(1, 2)
        assert 0.4 < np.mean(kept > 0) < 0.8
        found = quick_jit(functools.partial(derive, functools.partial(run, **dropout)))(
            floats, tangents
        )
        formula = functools.partial(kind.formula, seen=kind.find_seen({}), kept=kept)
        expected = quick_jit(functools.partial(derive, formula))(floats, tangents)
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
        jax.tree.map(compare, found, expected)


# Masks.

MASK_DTYPES = [np.bool_, np.int32, np.uint8, np.int8]

sizes = st.sampled_from([1, 3])


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    batch, time_q, time_kv, heads, d_qk, d_v, seed = draw(st.tuples(*[sizes] * 6, st.integers(0)))
    rng = np.random.default_rng(seed)
    query, key, value = (
        rng.normal(size=shape).astype(np.float32)
        for shape in (
            (batch, time_q, heads, d_qk),
            (batch, time_kv, heads, d_qk),
            (batch, time_kv, heads, d_v),
        )
    )
    full = draw(st.sampled_from([None, (batch, time_q, time_kv), (batch, heads, time_q, time_kv)]))
    if full is None:
        return query, key, value, None
    shape = [draw(st.sampled_from([1, size])) for size in full]
    mask = rng.random(shape) < draw(st.sampled_from([0.2, 0.7]))
    return query, key, value, mask.astype(draw(st.sampled_from(MASK_DTYPES)))


@settings(max_examples=20, deadline=None)
@given(problems())
def test_attend_is_the_formula(problem: Any) -> None:
    found = quick_jit(xn.attend)(*problem)
    np.testing.assert_allclose(found, formula(*problem), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize(
    "mask_shape",
    [
        (3, 5, 7),
        (3, 1, 7),
        (1, 5, 7),
        (1, 1, 7),
        (3, 5, 1),
        (3, 2, 5, 7),
        (3, 1, 5, 7),
        (1, 2, 1, 7),
    ],
)
def test_masks_of_every_shape_and_dtype(mask_shape: tuple[int, ...], mask_dtype: Any) -> None:
    query, key, value = normal(3, 5, 2, 4), normal(3, 7, 2, 4, seed=1), normal(3, 7, 2, 6, seed=2)
    mask = 2 * (normal(*mask_shape, seed=3) > 0).astype(np.int32).astype(mask_dtype)
    found = xn.attend(query, key, value, mask.astype(mask_dtype))
    np.testing.assert_allclose(found, formula(query, key, value, mask), rtol=1e-6, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0), st.sampled_from([(2, 3, 4), (2, 1, 4), (1, 3, 4), (2, 2, 3, 4)]))
def test_masks_agree(seed: int, shape: tuple[int, ...]) -> None:
    query, key, value = normal(2, 3, 2, 4), normal(2, 4, 2, 4, seed=1), normal(2, 4, 2, 5, seed=2)
    mask = np.random.default_rng(seed).random(shape) < 0.5
    expected = xn.attend(query, key, value, mask)
    full = np.broadcast_to(with_heads(mask), (2, 2, 3, 4))
    for same in (mask.astype(np.int32), -3 * mask.astype(np.int8), full, full.astype(np.uint8)):
        np.testing.assert_array_equal(xn.attend(query, key, value, same), expected)
    np.testing.assert_array_equal(
        xn.attend(query, key, value, np.ones(shape, bool)), xn.attend(query, key, value)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0))
def test_what_is_masked_is_exactly_zero(seed: int) -> None:
    inputs = normal(2, 3, 2, 4), normal(2, 4, 2, 4, seed=1), normal(2, 4, 2, 5, seed=2)
    mask = np.random.default_rng(seed).random((2, 3, 4)) < 0.3
    vectors, gradients = jax.jit(_attend_and_gradients)(inputs, mask)
    blind, unseen = ~mask.any(2), ~mask.any(1)
    assert not np.any(np.asarray(vectors)[blind])
    query, key, value = map(np.asarray, gradients)
    assert not np.any(query[blind])
    assert not np.any(key[unseen])
    assert not np.any(value[unseen])
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def _attend_and_gradients(inputs: Any, mask: Any) -> Any:
    vectors, pullback = jax.vjp(lambda *inputs: xn.attend(*inputs, mask), *inputs)
    return vectors, pullback(jnp.ones_like(vectors))


@every_form
def test_an_additive_mask_hides(chunk_size: int | None) -> None:
    """Minus infinity as a bias hides as a mask does, a query that sees no key too."""
    inputs = normal(2, 5, 2, 4), normal(2, 7, 2, 4, seed=1), normal(2, 7, 2, 6, seed=2)
    mask = np.random.default_rng(0).random((2, 1, 5, 7)) < 0.5
    mask[:, :, 2] = False
    bias = np.where(mask, 0, -np.inf).astype(np.float32)

    @quick_jit
    def run(**options: Any) -> Any:
        f = lambda *inputs: xn.attend(*inputs, **options, chunk_size=chunk_size, logit_cap=2.0)
        vectors, pullback = jax.vjp(f, *inputs)
        return vectors, pullback(jnp.cos(vectors))

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        run(bias=bias),
        run(mask=mask),
    )


def test_a_padding_mask_stays_small() -> None:
    inputs = normal(2, 8, 2, 4), normal(2, 16, 2, 4), normal(2, 16, 2, 4)
    mask = np.ones((2, 1, 16), bool)
    _, pullback = jax.vjp(lambda *inputs: xn.attend(*inputs, mask), *inputs)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == 2 * 2 * 8 * 16]
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}  # the weights alone


@every_form
def test_a_nan_reaches_those_that_see_it_and_nobody_else(chunk_size: int | None) -> None:
    seen = np.random.default_rng(1).random((1, 5, 7)) < 0.5
    seen[0, :2, 4] = False, True
    inputs = {"query": normal(1, 5, 2, 4), "key": normal(1, 7, 2, 4), "value": normal(1, 7, 2, 4)}

    @quick_jit
    def run(inputs: Any, sees_it: Any) -> Any:
        """The loss is of the queries that do not see it."""
        f = lambda inputs: xn.attend(**inputs, mask=seen, chunk_size=chunk_size)
        vectors, pullback = jax.vjp(f, inputs)
        return vectors, pullback(jnp.where(sees_it[None, :, None], 0, jnp.cos(vectors)))[0]

    for name, time, fill in [("query", 1, np.nan), ("key", 4, -np.inf), ("value", 4, np.inf)]:
        broken = {name: x.copy() for name, x in inputs.items()}
        broken[name][0, time, :, 2] = fill
        sees_it = np.arange(5) == 1 if name == "query" else seen[0, :, 4]
        (vectors, grads), (expected, expected_grads) = run(broken, sees_it), run(inputs, sees_it)
        assert not np.isfinite(vectors[0, sees_it]).any()
        np.testing.assert_array_equal(vectors[0, ~sees_it], expected[0, ~sees_it])
        np.testing.assert_array_equal(
            grads["query"][0, ~sees_it], expected_grads["query"][0, ~sees_it]
        )
        far = ~seen[0, sees_it].any(0)  # keys that no query sees which sees the NaN
        assert far.any()
        for other in ("key", "value"):
            np.testing.assert_allclose(
                grads[other][0, far], expected_grads[other][0, far], rtol=1e-5, atol=1e-6
            )


# Dtypes.


@pytest.mark.parametrize(("dtype", "chunk_size"), [(jnp.float16, None), (jnp.bfloat16, 3)])
def test_half_precision(dtype: Any, chunk_size: int | None) -> None:
    """Under strict promotion, with dropout, and with padding that is not finite."""
    kind = KINDS["padding"]
    floats, others = kind.draw()
    seen = kind.find_seen(others)
    options = {**kind.options, "causal": True, "dropout_rngkey": jax.random.key(0)}

    @functools.partial(quick_jit, static_argnames="rate")
    def run(floats: Any, rate: float) -> Any:
        f = lambda floats: xn.attend(
            **floats, **others, **options, dropout_rate=rate, chunk_size=chunk_size
        )
        vectors, pullback = jax.vjp(f, floats)
        return vectors, pullback(vectors)

    def fill(number: float) -> Any:
        return {k: jnp.asarray(x, dtype) for k, x in hide_with(number, floats, seen).items()}

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        whole, dropped, clean = run(fill(np.nan), 0.0), run(fill(np.nan), 0.5), run(fill(0), 0.5)
    assert {x.dtype for x in jax.tree.leaves(whole)} == {jnp.dtype(dtype)}
    seen = seen & np.tri(5, 7, 2, dtype=bool)
    rounded = {k: np.asarray(x, np.float64) for k, x in fill(0).items()}
    error = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(whole[0], np.float64), kind.formula(rounded, seen), rtol=error, atol=error
    )
    jax.tree.map(np.testing.assert_array_equal, dropped, clean)


@pytest.mark.parametrize("name", ["mask", "ring"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_strict_promotion(name: str, dtype: Any) -> None:
    """Promotion is decided when the program is traced. With x64, all is in float64."""
    kind = KINDS[name]
    dropout = {"dropout_rngkey": jax.random.key(0), "dropout_rate": 0.5}
    with (
        jax.enable_x64(dtype == jnp.float64),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        floats, others = kind.draw()
        floats = {name: jnp.asarray(x, dtype) for name, x in floats.items()}
        f = lambda floats: jnp.sum(
            xn.attend(**floats, **others, **kind.options, **dropout, chunk_size=3)
        )
        program = jax.make_jaxpr(jax.value_and_grad(f))(floats)
        assert {x.dtype for x in program.out_avals} == {jnp.dtype(dtype)}
        assert dtype != jnp.float64 or "f32" not in str(program)


@every_form
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_extreme_logits_do_not_overflow(dtype: Any, chunk_size: int | None) -> None:
    # The products are beyond float16, and the greatest logit is masked.
    query, key = jnp.full((1, 1, 1, 4), 200, dtype), jnp.full((1, 5, 1, 4), 250, dtype)
    value = jnp.arange(1.0, 6).astype(dtype).reshape(1, 5, 1, 1)
    mask = jnp.array([[[True, False, False, False, False]]])

    @quick_jit
    def run(*inputs: Any) -> Any:
        f = lambda *inputs: xn.attend(*inputs, mask, chunk_size=chunk_size)
        vectors, pullback = jax.vjp(f, *inputs)
        return vectors, pullback(vectors)

    vectors, gradients = run(query, key.at[:, 0].set(-250), value)
    assert vectors.dtype == dtype
    assert vectors.item() == 1
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradients)


def test_softmax_is_computed_in_float32() -> None:
    # 4,096 equal weights: each is exact in float16, their running sum in float16 would not be.
    query, key = jnp.zeros((1, 1, 1, 1), jnp.bfloat16), jnp.zeros((1, 4096, 1, 1), jnp.bfloat16)
    value = jnp.ones((1, 4096, 1, 1), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(xn.attend)(query, key, value))
    assert "exp" in jaxpr
    assert ":bf16[1,1,1,4096] = exp" not in jaxpr
    assert xn.attend(query, key, value).item() == 1


def test_shapes_with_symbolic_dimensions() -> None:
    b, t, s = jax.export.symbolic_shape("b, t, s")
    query, key, value = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((b, t, 2, 4), (b, s, 2, 4), (b, s, 2, 5))
    )
    dropping = functools.partial(xn.attend, dropout_rngkey=jax.random.key(0), dropout_rate=0.5)
    causal = functools.partial(xn.attend, causal=True, window=2)
    for shape in [(b, t, s), (b, 1, s), (1, t, s), (b, 2, t, s), (b, 1, 1, s)]:
        mask = jax.ShapeDtypeStruct(shape, jnp.int32)
        for f in (xn.attend, dropping, causal):
            assert jax.eval_shape(f, query, key, value, mask).shape == (b, t, 10)


def test_a_causal_program_for_all_lengths() -> None:
    t, s = jax.export.symbolic_shape("t, s")
    shapes = (1, t, 2, 4), (1, s, 2, 4), (1, s, 2, 6)
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    exported = jax.export.export(jax.jit(functools.partial(xn.attend, causal=True)))(*specs)
    inputs = normal(1, 3, 2, 4), normal(1, 5, 2, 4, seed=1), normal(1, 5, 2, 6, seed=2)
    expected = formula(*inputs, np.tri(3, 5, 2)[None])
    np.testing.assert_allclose(exported.call(*inputs), expected, rtol=1e-5, atol=1e-6)


# Keys that nobody sees, and heads that share keys.


def test_keys_before_every_window_are_not_touched() -> None:
    specs = [jax.ShapeDtypeStruct((1, time, 1, 4), jnp.float32) for time in (2, 100, 100)]
    program = str(jax.make_jaxpr(functools.partial(xn.attend, causal=True, window=5))(*specs))
    assert "1,1,2,6]" in program  # the keys that one of two queries sees
    assert "1,1,2,100]" not in program


@pytest.mark.parametrize(("chunk_size", "time"), [(None, 7), (2, 2)], ids=["direct", "chunked"])
def test_heads_that_share_a_key_repeat_none(chunk_size: int | None, time: int) -> None:
    shapes = (1, 5, 6, 8), (1, 7, 3, 8), (1, 7, 3, 9)
    f = lambda *inputs: jnp.sum(xn.attend(*inputs, chunk_size=chunk_size))
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(*specs))
    for features in (8, 9):
        assert f"1,3,{time},{features}]" in program
        assert f"1,6,{time},{features}]" not in program
        assert f"1,{time},6,{features}]" not in program


def test_causal_attention_goes_on_where_a_cache_ends() -> None:
    """Blocks of queries against a ring of keys, rows at places of their own, are the whole."""
    window, slots, blocks = 4, 8, [5, 5]
    query, key, value = (
        normal(2, 10, 2, 4),
        normal(2, 10, 1, 4, seed=1),
        normal(2, 10, 1, 6, seed=2),
    )
    attend = quick_jit(functools.partial(xn.attend, causal=True, window=window, chunk_size=3))
    expected = attend(query, key, value)
    offset = np.array([0, 5])  # the second row began five positions later
    cached_key, cached_value = (jnp.full((2, slots, 1, d), jnp.nan) for d in (4, 6))
    positions, start, found = jnp.full((2, slots), -1), 0, []
    for size in blocks:
        block = slice(start, start + size)
        now = np.arange(10)[None, block] + offset[:, None]
        at = np.arange(2)[:, None], now % slots
        cached_key = cached_key.at[at].set(key[:, block])
        cached_value = cached_value.at[at].set(value[:, block])
        positions = positions.at[at].set(now)
        places = {"query_positions": now, "key_positions": positions}
        found.append(attend(query[:, block], cached_key, cached_value, **places))
        start += size
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=1e-5, atol=1e-6)


# Dropout.


def _weights(rate: float, seed: int = 0, shape: tuple[int, ...] = (8, 16, 4, 64)) -> np.ndarray:
    """The attention weights after dropout, [batch, time_q, heads, time_kv]."""
    batch, time_q, heads, time_kv = shape
    query, key = jnp.zeros((batch, time_q, heads, 1)), jnp.zeros((batch, time_kv, heads, 1))
    value = jnp.broadcast_to(jnp.eye(time_kv)[None, :, None], (batch, time_kv, heads, time_kv))
    vectors = xn.attend(query, key, value, None, jax.random.key(seed), rate)
    return np.asarray(vectors).reshape(shape)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_meets_its_rate(rate: float) -> None:
    weights = _weights(rate)
    deviation = np.sqrt(rate * (1 - rate) / weights.size)
    assert abs(np.mean(weights == 0) - rate) < 5 * deviation
    kept = weights[weights != 0]
    np.testing.assert_allclose(kept, 1 / 64 / (1 - rate), rtol=1e-6)


def test_each_weight_is_dropped_by_itself() -> None:
    dropped = _weights(0.5) == 0
    for axis in range(4):
        assert np.any(dropped.any(axis) != dropped.all(axis))
    heads = dropped.transpose(2, 0, 1, 3).reshape(4, -1)
    assert np.all(np.abs(np.corrcoef(heads) - np.eye(4)) < 0.08)


def test_dropout_follows_its_key() -> None:
    np.testing.assert_array_equal(_weights(0.5, seed=1), _weights(0.5, seed=1))
    assert np.any(_weights(0.5, seed=1) != _weights(0.5, seed=2))


def test_dropout_is_left_out() -> None:
    inputs = normal(2, 3, 2, 4), normal(2, 4, 2, 4), normal(2, 4, 2, 4)
    expected = xn.attend(*inputs)
    for options in ({"deterministic": True, "dropout_rate": 0.5}, {"dropout_rate": 0.0}):
        np.testing.assert_array_equal(xn.attend(*inputs, **options), expected)


# What goes wrong.

QUERY, KEY, VALUE = (
    np.zeros(shape, np.float32) for shape in ((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 6))
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: xn.attend(QUERY, KEY[..., :3], VALUE),
            (
                "attend takes a query [batch, time_q, heads, d_qk], a key [batch, time_kv, "
                "kv_heads, d_qk] and a value [batch, time_kv, kv_heads, d_v]; got shapes "
                "[2, 3, 2, 4], [2, 5, 2, 3] and [2, 5, 2, 6], which do not agree."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE[:, :4]),
            "[2, 3, 2, 4], [2, 5, 2, 4] and [2, 4, 2, 6]",
        ),
        (
            lambda: xn.attend(QUERY, KEY[:, :, :1], VALUE),
            "[2, 3, 2, 4], [2, 5, 1, 4] and [2, 5, 2, 6]",
        ),
        (lambda: xn.attend(QUERY[0], KEY[0], VALUE[0]), "[3, 2, 4], [5, 2, 4] and [5, 2, 6]"),
        (
            lambda: xn.attend(QUERY[:, :, :1], KEY, VALUE),
            (
                "attend shares each head of keys and values among as many heads of the query; the "
                "query has 1 heads, which is no multiple of the 2 of the key."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, np.ones((2, 5), bool)),
            (
                "attend takes a mask that broadcasts to [batch, time_q, time_kv], here [2, 3, 5], "
                "or to [batch, heads, time_q, time_kv], here [2, 2, 3, 5]; got shape [2, 5]. Give "
                "a mask of three or four axes, each of that size or 1."
            ),
        ),
        (lambda: xn.attend(QUERY, KEY, VALUE, np.ones((2, 5, 3), bool)), "got shape [2, 5, 3]."),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, np.ones((2, 3, 3, 5), bool)),
            "got shape [2, 3, 3, 5].",
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, np.ones((2, 3, 5), np.float32)),
            (
                "attend takes a mask of booleans or integers, non-zero where a query attends to a "
                "key; got float32. Compare it first, as in mask > 0."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, bias=np.ones((2, 3, 3, 5), np.float32)),
            (
                "attend takes a bias that broadcasts to [batch, time_q, time_kv], here [2, 3, 5], "
                "or to [batch, heads, time_q, time_kv], here [2, 2, 3, 5]; got shape [2, 3, 3, 5]. "
                "Give a bias of three or four axes, each of that size or 1."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, bias=np.ones((2, 3, 5), bool)),
            (
                "attend takes a bias of floating point numbers, which is added to the logits; got "
                "bool. If it says which keys a query sees, give it as mask."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, dropout_rate=0.5),
            (
                "attend needs a dropout_rngkey for dropout at rate 0.5; got None. Give a key, or "
                "say deterministic=True."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, dropout_rate=1.0),
            "attend takes a dropout_rate of at least 0 and below 1; got 1.0.",
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, chunk_size=0),
            "attend takes chunk_size of at least 1; got 0.",
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, causal=True, window=0),
            "attend takes window of at least 1; got 0.",
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, window=3),
            (
                "attend takes a window as the last positions that a query sees, its own included; "
                "got window=3 and causal=False. Give causal=True, too."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, logit_cap=0),
            "attend takes logit_cap above 0; got 0.",
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, logit_cap=jnp.ones(())),
            (
                "attend takes logit_cap as a Python number, which is part of the program; got an "
                "array."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, scale="1"),
            "attend takes scale as a Python number, which is part of the program; got str.",
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, query_positions=np.ones((2, 3), int)),
            (
                "attend takes query_positions and key_positions to decide which keys come after a "
                "query; got positions and causal=False. Give causal=True, or leave the positions "
                "out."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE, causal=True, key_positions=np.ones((2, 5), int)),
            (
                "attend compares key_positions with query_positions; got key_positions alone. Give "
                "the position of each query, too."
            ),
        ),
        (
            lambda: xn.attend(
                QUERY, KEY, VALUE, causal=True, query_positions=np.ones((2, 5), "i4")
            ),
            "attend takes query_positions as integers of shape [2, 3] or [1, 3]; got int32[2, 5].",
        ),
        (
            lambda: xn.attend(
                QUERY,
                KEY,
                VALUE,
                causal=True,
                query_positions=np.ones((1, 3), int),
                key_positions=np.ones((2, 5), np.float32),
            ),
            "attend takes key_positions as integers of shape [2, 5] or [1, 5]; got float32[2, 5].",
        ),
        (
            lambda: xn.cross_attention_mask(np.ones((2, 3)), np.ones((1, 4))),
            (
                "cross_attention_mask takes padding masks [batch, time_q] and [batch, time_kv]; "
                "got shapes [2, 3] and [1, 4]."
            ),
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
