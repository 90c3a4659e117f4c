"""The layers around ``attend``."""

from __future__ import annotations

import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as flax_errors
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.layer.attend_reference import formula, normal


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
    assert not any("combinator" in file and "_cache" not in file for file in ours)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
        (lambda: xn.Attention(chunk_size=0), "Attention takes chunk_size of at least 1; got 0."),
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
