"""attend, its masks and its dropout, and the layers around it."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as flax_errors
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from flax_extra import combinator as cb
from flax_extra import layer as xn

MASK_DTYPES = [np.bool_, np.int32, np.uint8, np.int8]


def formula(query: Any, key: Any, value: Any, mask: Any = None) -> np.ndarray:
    """What attend is to compute, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    if mask is not None:
        weights = weights * np.broadcast_to(with_heads(mask), weights.shape)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    vectors = np.einsum("bhqk,bkhd->bqhd", weights, value)
    return vectors.reshape(*vectors.shape[:2], -1)


def with_heads(mask: Any) -> np.ndarray:
    mask = np.asarray(mask) != 0
    return mask[:, None] if mask.ndim == 3 else mask


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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


@settings(max_examples=25, deadline=None)
@given(problems())
def test_attend_is_the_formula(problem: Any) -> None:
    np.testing.assert_allclose(xn.attend(*problem), formula(*problem), rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_extreme_logits_do_not_overflow(dtype: Any) -> None:
    # The products are beyond float16, and the greatest logit is masked.
    query = jnp.full((1, 1, 1, 4), 200, dtype)
    key = jnp.stack([jnp.full((1, 1, 4), -250, dtype), jnp.full((1, 1, 4), 250, dtype)], 1)
    value = jnp.array([1.0, 2.0], dtype).reshape(1, 2, 1, 1)
    (vectors, gradients) = _attend_and_gradients((query, key, value), jnp.array([[[True, False]]]))
    assert vectors.dtype == dtype
    assert vectors.item() == 1
    assert all(np.isfinite(np.asarray(gradient, np.float32)).all() for gradient in gradients)


def test_softmax_is_computed_in_float32() -> None:
    # 4,096 equal weights: each is exact in float16, their running sum in float16 would not be.
    query, key = jnp.zeros((1, 1, 1, 1), jnp.bfloat16), jnp.zeros((1, 4096, 1, 1), jnp.bfloat16)
    value = jnp.ones((1, 4096, 1, 1), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(xn.attend)(query, key, value))
    assert "exp" in jaxpr
    assert ":bf16[1,1,1,4096] = exp" not in jaxpr
    assert xn.attend(query, key, value).item() == 1


def test_derivatives_of_masked_attention() -> None:
    with jax.enable_x64(True):
        inputs = normal(1, 2, 1, 2), normal(1, 3, 1, 2, seed=1), normal(1, 3, 1, 2, seed=2)
        inputs = tuple(x.astype(np.float64) for x in inputs)
        mask = np.array([[[1, 0, 1], [0, 0, 0]]])
        check_grads(lambda *inputs: xn.attend(*inputs, mask), inputs, order=2)


def test_a_padding_mask_stays_small() -> None:
    inputs = normal(2, 8, 2, 4), normal(2, 16, 2, 4), normal(2, 16, 2, 4)
    mask = np.ones((2, 1, 16), bool)
    _, pullback = jax.vjp(lambda *inputs: xn.attend(*inputs, mask), *inputs)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == 2 * 2 * 8 * 16]
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}  # the weights alone


def test_shapes_with_symbolic_dimensions() -> None:
    b, t, s = jax.export.symbolic_shape("b, t, s")
    query, key, value = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((b, t, 2, 4), (b, s, 2, 4), (b, s, 2, 5))
    )
    dropping = functools.partial(xn.attend, dropout_rngkey=jax.random.key(0), dropout_rate=0.5)
    for shape in [(b, t, s), (b, 1, s), (1, t, s), (b, 2, t, s), (b, 1, 1, s)]:
        mask = jax.ShapeDtypeStruct(shape, jnp.int32)
        for f in (xn.attend, dropping):
            assert jax.eval_shape(f, query, key, value, mask).shape == (b, t, 10)


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


# The layers.


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_is_that_of_linen(use_bias: bool) -> None:
    inputs_q, inputs_kv = normal(2, 3, 8), normal(2, 5, 6, seed=1)
    mask = normal(2, 4, 3, 5, seed=2) > -1
    ours = xn.Attention(
        n_heads=4, d_output=7, use_bias=use_bias, bias_init=nn.initializers.normal(1.0)
    )
    theirs = nn.MultiHeadDotProductAttention(
        num_heads=4, qkv_features=8, out_features=7, use_bias=use_bias
    )
    params = jax.jit(ours.init)(jax.random.key(0), inputs_q, inputs_kv, mask)["params"]
    split = {**params["out"], "kernel": params["out"]["kernel"].reshape(4, 2, 7)}

    def of_ours(params: Any) -> Any:
        return ours.apply({"params": params}, inputs_q, inputs_kv, mask)

    def of_theirs(params: Any) -> Any:
        return theirs.apply({"params": params}, inputs_q, inputs_kv, mask=mask)

    found, gradients = _with_gradients(of_ours, params)
    expected, expected_gradients = _with_gradients(of_theirs, {**params, "out": split})
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    gradients["out"]["kernel"] = gradients["out"]["kernel"].reshape(4, 2, 7)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradients,
        expected_gradients,
    )


def _with_gradients(f: Any, params: Any) -> Any:
    """The outputs of f, and the gradient of half their square."""

    @jax.jit
    def run(params: Any) -> Any:
        outputs, pullback = jax.vjp(f, params)
        return outputs, pullback(outputs)[0]

    return run(params)


def test_attention_with_other_dimensions_is_the_formula() -> None:
    inputs_q, inputs_kv, mask = normal(2, 3, 5), normal(2, 4, 7, seed=1), np.tri(3, 4)[None] > 0
    layer = xn.Attention(
        n_heads=2, d_qk=6, d_v=8, d_output=9, bias_init=nn.initializers.normal(1.0)
    )
    found, variables = layer.init_with_output(jax.random.key(0), inputs_q, inputs_kv, mask)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])

    def project(name: str, inputs: np.ndarray) -> np.ndarray:
        return np.einsum("btf,fhd->bthd", inputs, params[name]["kernel"]) + params[name]["bias"]

    vectors = formula(
        project("query", inputs_q), project("key", inputs_kv), project("value", inputs_kv), mask
    )
    expected = vectors @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)


def test_self_attention_is_attention_to_itself() -> None:
    x, mask = normal(2, 4, 6), np.tri(4)[None] > 0
    layer = xn.SelfAttention(n_heads=3)
    found, variables = layer.init_with_output(jax.random.key(0), x, mask)
    expected = xn.Attention(n_heads=3).apply(variables, x, x, mask)
    np.testing.assert_array_equal(found, expected)


def test_dimensions_are_rules() -> None:
    asked = []

    def rule(*references: Any) -> int:
        asked.append(tuple(x if x is None or isinstance(x, int) else x.shape for x in references))
        return 2 * len(asked)

    layer = xn.Attention(n_heads=2, d_qk=rule, d_v=rule, d_output=rule)
    y = jax.eval_shape(
        lambda: layer.init_with_output(jax.random.key(0), normal(1, 2, 3), normal(1, 4, 5), None)
    )[0]
    assert y.shape == (1, 2, 6)
    q, kv = (1, 2, 3), (1, 4, 5)
    assert asked == [(q, kv, None, None), (q, kv, 2, None), (q, kv, 2, 4)]


def test_a_query_without_keys_gives_the_bias_and_no_gradient() -> None:
    x, mask = normal(1, 3, 4), np.array([[[1, 1, 1], [0, 0, 0], [1, 0, 1]]])
    layer = xn.SelfAttention(n_heads=2, bias_init=nn.initializers.normal(1.0))
    variables = layer.init(jax.random.key(0), x, mask)
    y = jax.jit(layer.apply)(variables, x, mask)
    np.testing.assert_array_equal(y[0, 1], variables["params"]["out"]["bias"])

    def second(variables: Any) -> Any:
        return jnp.sum(layer.apply(variables, x, mask)[0, 1])

    gradients = jax.jit(jax.grad(second))(variables)["params"]
    bias = gradients["out"].pop("bias")
    assert np.all(bias == 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_precision_reaches_every_product() -> None:
    layer = xn.SelfAttention(n_heads=2, precision="highest")
    variables = layer.init(jax.random.key(0), normal(1, 3, 4), None)
    program = jax.jit(layer.apply).lower(variables, normal(1, 3, 4), None).as_text()
    assert program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]") == 6


def test_deterministic_is_the_field_or_the_keyword() -> None:
    x, rngs = normal(2, 3, 4), {"dropout": jax.random.key(1)}
    noisy = xn.SelfAttention(n_heads=2, dropout_rate=0.5, deterministic=False)
    quiet = xn.SelfAttention(n_heads=2, dropout_rate=0.5)
    variables = quiet.init(jax.random.key(0), x, None)
    expected = quiet.apply(variables, x, None)
    np.testing.assert_array_equal(noisy.apply(variables, x, None, deterministic=True), expected)
    dropped = quiet.apply(variables, x, None, deterministic=False, rngs=rngs)
    assert np.any(dropped != expected)
    np.testing.assert_array_equal(dropped, noisy.apply(variables, x, None, rngs=rngs))


def test_a_missing_rng_is_named() -> None:
    layer = xn.SelfAttention(n_heads=2, dropout_rate=0.5, deterministic=False)
    variables = layer.init(jax.random.key(0), normal(1, 2, 4), None)
    with pytest.raises(flax_errors.InvalidRngError, match="dropout"):
        layer.apply(variables, normal(1, 2, 4), None)


def _constant(value: float) -> Any:
    return nn.initializers.constant(value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1, 2)),
        ({"out_kernel_init": _constant(3)}, (3, 2)),
        ({"out_bias_init": _constant(4)}, (1, 4)),
    ],
)
def test_initializers_of_the_output_are_those_of_the_others_by_default(
    fields: dict[str, Any], expected: tuple[float, float]
) -> None:
    layer = xn.SelfAttention(n_heads=2, kernel_init=_constant(1), bias_init=_constant(2), **fields)
    params = layer.init(jax.random.key(0), normal(1, 3, 4), None)["params"]
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(params[name]["kernel"], np.full((4, 2, 2), 1))
        np.testing.assert_array_equal(params[name]["bias"], np.full((2, 2), 2))
    kernel, bias = expected
    np.testing.assert_array_equal(params["out"]["kernel"], np.full((4, 4), kernel))
    np.testing.assert_array_equal(params["out"]["bias"], np.full(4, bias))


def test_attention_is_plain_code() -> None:
    """A trace makes no pipeline: no call of the combinators."""
    layer, x = xn.SelfAttention(n_heads=2), normal(1, 3, 4)
    variables = layer.init(jax.random.key(0), x, None)
    files = set()

    def note_file(frame: Any, event: str, arg: object) -> None:
        files.add(frame.f_code.co_filename)

    sys.setprofile(note_file)
    try:
        jax.eval_shape(layer.apply, variables, x, None)
    finally:
        sys.setprofile(None)
    ours = {file for file in files if "flax_extra" in file}
    assert any("_attention" in file for file in ours)
    assert not any("combinator" in file for file in ours)


# In pipelines.


def test_signatures() -> None:
    for layer, text in [
        (xn.attend, "3 -> 1"),
        (xn.cross_attention_mask, "2 -> 1"),
        (xn.Attention(), "3 -> 1"),
        (xn.KVQAttention(), "3 -> 1"),
        (xn.SelfAttention(), "2 -> 1"),
        (cb.fn(xn.SelfAttention(), mask=None), "1 -> 1"),
        (cb.fn(xn.Attention(), mask=None), "2 -> 1"),
    ]:
        assert str(cb.infer_signature(layer)) == text


def test_each_block_gets_the_same_mask() -> None:
    x, mask = normal(2, 4, 6), np.tri(4)[None] > 0
    layer = xn.SelfAttention(n_heads=2)
    block = cb.keep(cb.residual(layer))
    (y, kept), variables = block.init_with_output(jax.random.key(0), x, mask)
    assert kept is mask
    inner = {"params": variables["params"]["SelfAttention_0"]}
    np.testing.assert_allclose(y, layer.apply(inner, x, mask) + x, rtol=1e-6)


def test_a_tower_of_masked_blocks() -> None:
    x, mask = normal(2, 4, 6), np.tri(4)[None] > 0
    block = cb.residual(nn.LayerNorm(), xn.SelfAttention(n_heads=2, dropout_rate=0.2))
    tower = cb.repeat(block, 3)
    variables = jax.jit(tower.init)(jax.random.key(0), x, mask)
    expected = x
    for index in range(3):
        copy = jax.tree.map(lambda leaf: leaf[index], variables)  # noqa: B023
        expected = block.apply(copy, expected, mask)
    np.testing.assert_allclose(tower.apply(variables, x, mask), expected, rtol=1e-5, atol=1e-5)
    rngs = {"dropout": jax.random.key(1)}
    noisy = tower.apply(variables, x, mask, deterministic=False, rngs=rngs)
    assert np.any(noisy != tower.apply(variables, x, mask))


def test_a_causal_tower_does_not_look_ahead() -> None:
    x, mask = normal(1, 5, 4), np.tri(5, dtype=bool)[None]
    attention = cb.fn(xn.SelfAttention(n_heads=2), mask=mask)
    tower = cb.serial([cb.residual(attention), cb.residual(attention)])
    variables = tower.init(jax.random.key(0), x)
    changed = tower.apply(variables, np.concatenate([x[:, :3], normal(1, 2, 4, seed=9)], 1))
    np.testing.assert_array_equal(changed[:, :3], tower.apply(variables, x)[:, :3])


def test_cross_attention_mask() -> None:
    mask_q, mask_kv = np.array([[1, 1, 0], [1, 0, 0]]), np.array([[True, False], [True, True]])
    mask = xn.cross_attention_mask(mask_q, mask_kv)
    assert mask.dtype == bool
    expected = (mask_q[:, :, None] * mask_kv[:, None, :]).astype(bool)
    np.testing.assert_array_equal(mask, expected)
    attention = cb.dip(xn.cross_attention_mask, 2) >> xn.KVQAttention(n_heads=2)
    y, _ = attention.init_with_output(
        jax.random.key(0), normal(2, 3, 4), normal(2, 2, 6), mask_q, mask_kv
    )
    assert y.shape == (2, 3, 4)


# What goes wrong.

QUERY, KEY, VALUE = (
    np.zeros(shape, np.float32) for shape in ((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 6))
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: xn.attend(QUERY, KEY[:, :, :1], VALUE),
            (
                "attend takes a query [batch, time_q, heads, d_qk], a key [batch, time_kv, heads, "
                "d_qk] and a value [batch, time_kv, heads, d_v]; got shapes [2, 3, 2, 4], "
                "[2, 5, 1, 4] and [2, 5, 2, 6], which do not agree."
            ),
        ),
        (
            lambda: xn.attend(QUERY, KEY, VALUE[:, :4]),
            "[2, 3, 2, 4], [2, 5, 2, 4] and [2, 4, 2, 6]",
        ),
        (lambda: xn.attend(QUERY[0], KEY[0], VALUE[0]), "[3, 2, 4], [5, 2, 4] and [5, 2, 6]"),
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
            lambda: xn.Attention(dropout_rate=-0.5),
            "Attention takes a dropout_rate of at least 0 and below 1; got -0.5.",
        ),
        (
            lambda: xn.SelfAttention(n_heads=4, d_qk=6),
            (
                "SelfAttention splits d_qk evenly among its heads; d_qk is 6 and n_heads is 4. "
                "Choose a d_qk that is a multiple of 4."
            ),
        ),
        (lambda: xn.Attention(n_heads=4, d_v=10), "d_v is 10 and n_heads is 4"),
        (lambda: xn.Attention(d_qk=0), "Attention takes d_qk of at least 1; got 0."),
        (lambda: xn.Attention(n_heads=0), "Attention takes n_heads of at least 1; got 0."),
        (
            lambda: xn.SelfAttention(n_heads=4).init(jax.random.key(0), normal(1, 2, 6), None),
            "SelfAttention splits d_qk evenly among its heads; d_qk is 6 and n_heads is 4",
        ),
        (
            lambda: xn.Attention().init(jax.random.key(0), normal(1, 2, 8), normal(2, 8), None),
            (
                "Attention takes inputs_kv with axes [batch, time, features]; got shape [2, 8], "
                "which has 2 axes."
            ),
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


def test_an_error_in_a_pipeline_says_where() -> None:
    pipeline = cb.serial(nn.LayerNorm(), xn.SelfAttention(n_heads=2))
    with pytest.raises(ValueError, match="broadcasts") as caught:
        pipeline.init(jax.random.key(0), normal(2, 3, 4), np.ones((2, 3), bool))
    (note,) = [note for note in caught.value.__notes__ if note.startswith("flax_extra")]
    assert note == (
        "flax_extra: in serial[1] -> SelfAttention\n"
        "  signature: 2 -> 1\n"
        "  stack: f32[2, 3, 4], bool[2, 3]"
    )
