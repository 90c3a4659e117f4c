"""What the fields of attention mean: causal, window, heads, positions, norms, and the stream."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra.layer import _chunked

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spread(variables: Any) -> Any:
    """Moves all parameters away from zeros and ones."""
    leaves, tree = jax.tree.flatten(variables)
    moved = [leaf + 0.3 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, moved)


def run(layer: nn.Module, *inputs: Any, **context: Any) -> Any:
    return layer.apply(spread(layer.init(KEY, *inputs)), *inputs, **context)


def check_equal(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


X = normal(2, 7, 8)
PLAIN = xn.SelfAttention(n_heads=4)


# Which keys a position sees.


def test_causal_is_a_mask_of_what_came_before() -> None:
    mask = np.tri(7, dtype=bool)[None]
    check_equal(run(PLAIN.copy(causal=True), X, None), run(PLAIN, X, mask))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9))
def test_a_window_is_a_mask_of_a_band(window: int) -> None:
    mask = (np.tri(7) - np.tri(7, k=-window)).astype(bool)[None]
    check_equal(run(PLAIN.copy(causal=True, window=window), X, None), run(PLAIN, X, mask))


def test_causal_joins_a_mask() -> None:
    is_key = np.array([[[1, 1, 0, 1, 1, 0, 1]]], bool)
    mask = is_key & np.tri(7, dtype=bool)[None]
    check_equal(run(PLAIN.copy(causal=True), X, is_key), run(PLAIN, X, mask))


def test_with_fewer_queries_the_last_is_at_the_last_key() -> None:
    layer = xn.Attention(n_heads=4, causal=True, rotary=xn.RotaryEncoding())
    variables = spread(layer.init(KEY, X, X, None))
    whole, part = (layer.apply(variables, q, X, None) for q in (X, X[:, 4:]))
    check_equal(part, whole[:, 4:])


# Heads.


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_a_head_of_keys_serves_a_group_of_query_heads(n_kv_heads: int) -> None:
    layer = PLAIN.copy(n_kv_heads=n_kv_heads)
    variables = spread(layer.init(KEY, X, None))
    repeated = jax.tree.map(lambda leaf: leaf, variables)
    for name in ("key", "value"):
        repeated["params"][name] = {
            "kernel": jnp.repeat(variables["params"][name]["kernel"], 4 // n_kv_heads, axis=1),
            "bias": jnp.repeat(variables["params"][name]["bias"], 4 // n_kv_heads, axis=0),
        }
    check_equal(layer.apply(variables, X, None), PLAIN.apply(repeated, X, None))


# Positions.


def test_rotary_depends_on_distances_alone() -> None:
    layer = PLAIN.copy(rotary=xn.RotaryEncoding(base=100.0))
    variables = spread(layer.init(KEY, X, None))
    is_key = np.arange(9)[None, None] >= 2
    shifted = np.concatenate([normal(2, 2, 8, seed=5), X], axis=1)
    check_equal(layer.apply(variables, shifted, is_key)[:, 2:], layer.apply(variables, X, None))


def compute_t5_bucket(distance: int, n_buckets: int, max_distance: int, both: bool) -> int:
    """The buckets as T5's paper and code describe them, for one distance from query to key."""
    offset = 0
    if both:
        n_buckets //= 2
        offset = n_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    n_exact = n_buckets // 2
    if distance < n_exact:
        return offset + distance
    share = math.log(distance / n_exact) / math.log(max_distance / n_exact)
    return offset + min(n_exact + int(share * (n_buckets - n_exact)), n_buckets - 1)


@pytest.mark.parametrize("both", [True, False])
def test_relative_position_bias_looks_up_a_bucket(both: bool) -> None:
    layer = xn.RelativePositionBias(3, n_buckets=10, max_distance=21, bidirectional=both)
    queries, keys = np.arange(30)[None], np.arange(5, 40)[None]
    variables = layer.init(KEY, queries, keys)
    table = np.asarray(variables["params"]["bias"])
    bias = np.asarray(layer.apply(variables, queries, keys))
    for i, j in np.ndindex(30, 35):
        bucket = compute_t5_bucket(int(keys[0, j] - queries[0, i]), 10, 21, both)
        np.testing.assert_array_equal(bias[0, :, i, j], table[bucket])


def test_linear_position_bias_has_the_slopes_of_alibi() -> None:
    positions = np.arange(4)[None]
    for n_heads, slopes in [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ]:
        bias = xn.LinearPositionBias(n_heads).apply({}, positions, positions)
        check_equal(bias[0, :, 3, 1], -2 * np.array(slopes))


def test_a_position_bias_is_added_to_the_logits() -> None:
    layer = PLAIN.copy(position_bias=functools.partial(xn.LinearPositionBias, 4))
    variables = spread(layer.init(KEY, X, None))
    captured: dict[str, Any] = {}

    def spy(*args: Any, **options: Any) -> Any:
        captured.update(options)
        return xn.attend(*args, **options)

    check_equal(
        layer.copy(attention_fn=spy).apply(variables, X, None), layer.apply(variables, X, None)
    )
    positions = np.arange(7)[None]
    check_equal(captured["bias"], xn.LinearPositionBias(4).apply({}, positions, positions))


# Logits and weights.


def test_norms_of_queries_and_keys_are_sub_layers() -> None:
    layer = PLAIN.copy(qk_norm=nn.RMSNorm)
    variables = spread(layer.init(KEY, X, None))
    captured: list[Any] = []

    def spy(query: Any, key: Any, *args: Any, **options: Any) -> Any:
        captured.extend([query, key])
        return xn.attend(query, key, *args, **options)

    layer.copy(attention_fn=spy).apply(variables, X, None)
    for name, found in zip(("query", "key"), captured, strict=True):
        params = variables["params"]
        projected = nn.DenseGeneral((4, 2)).apply({"params": params[name]}, X)
        normed = nn.RMSNorm().apply({"params": params[f"{name}_norm"]}, projected)
        check_equal(found, normed)


def test_attention_fn_gets_what_is_not_the_default() -> None:
    captured: dict[str, Any] = {}

    def spy(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        captured.update(options)
        return xn.attend(query, key, value, mask, **options)

    run(PLAIN.copy(attention_fn=spy), X, None)
    assert captured == {}
    layer = PLAIN.copy(
        attention_fn=spy, causal=True, window=2, logit_cap=3.0, scale=0.5, chunk_size=4
    )
    run(layer, X, None)
    assert captured == {
        "causal": True,
        "window": 2,
        "logit_cap": 3.0,
        "scale": 0.5,
        "chunk_size": 4,
    }


def test_weights_are_sown_when_asked() -> None:
    layer = PLAIN.copy(sow_weights=True, causal=True, n_kv_heads=2)
    variables = spread({"params": layer.init(KEY, X, None)["params"]})
    y, sown = layer.apply(variables, X, None, mutable=["intermediates"])
    (weights,) = sown["intermediates"]["weights"]
    assert weights.shape == (2, 4, 7, 7)
    check_equal(weights.sum(-1), np.ones((2, 4, 7)))
    assert not np.triu(np.asarray(weights), k=1).any()
    check_equal(y, layer.apply(variables, X, None))
    params = variables["params"]
    value = nn.DenseGeneral((2, 2)).apply({"params": params["value"]}, X)
    vectors = np.einsum("bhqk,bkhd->bqhd", weights, np.repeat(value, 2, axis=2)).reshape(2, 7, 8)
    check_equal(nn.Dense(8).apply({"params": params["out"]}, vectors), y)


def test_out_may_have_no_bias_of_its_own() -> None:
    params = PLAIN.copy(out_use_bias=False).init(KEY, X, None)["params"]
    assert set(params["out"]) == {"kernel"}
    assert set(params["query"]) == {"kernel", "bias"}


# Dropout.


def test_dropout_that_is_off_is_told_once() -> None:
    layer = PLAIN.copy(dropout_rate=0.375)  # no other test has this rate
    variables = layer.init(KEY, X, None)
    with pytest.warns(UserWarning, match="dropout of rate") as caught:
        layer.apply(variables, X, None, rngs={"dropout": KEY})
    assert str(caught[0].message) == (
        "SelfAttention leaves out its dropout of rate 0.375, although there is an rng for it: "
        "deterministic is True unless a call says otherwise. Call the model with "
        "deterministic=False in training, and with deterministic=True in evaluation."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.apply(variables, X, None, rngs={"dropout": KEY})
        layer.apply(variables, X, None)
        layer.apply(variables, X, None, rngs={"dropout": KEY}, deterministic=False)


# Lengths.


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_hide_padding_that_may_be_nan(causal: bool) -> None:
    layer = PLAIN.copy(causal=causal)
    variables = spread(layer.init(KEY, X, None))
    lengths = np.array([3, 7])
    padded = np.where(np.arange(7)[None, :, None] < lengths[:, None, None], X, np.nan)

    def compute_loss(variables: Any) -> Any:
        y = layer.apply(variables, padded, None, lengths=lengths)
        return jnp.sum(jnp.sin(y), where=np.arange(7)[None, :, None] < lengths[:, None, None])

    def compute_alone(variables: Any) -> Any:
        rows = [layer.apply(variables, X[i : i + 1, :n], None) for i, n in enumerate(lengths)]
        return sum(jnp.sum(jnp.sin(row)) for row in rows)

    (loss, grads), (alone, expected) = (
        jax.value_and_grad(f)(variables) for f in (compute_loss, compute_alone)
    )
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_lengths_join_a_mask() -> None:
    mask = np.random.default_rng(1).random((2, 4, 7, 7)) < 0.6
    lengths = np.array([3, 7])
    both = mask & (np.arange(7) < lengths[:, None])[:, None, None]
    variables = spread(PLAIN.init(KEY, X, None))
    found = PLAIN.apply(variables, X, mask, lengths=lengths)
    expected = PLAIN.apply(variables, X, both)
    check_equal(found[1], expected[1])
    check_equal(found[0, :3], expected[0, :3])


# Streams.

CROSS = cb.fn(xn.KVQAttention(n_heads=2), mask=None)
MEMORY = normal(2, 5, 6, seed=3)


def start_cross(capacity: int | None = None) -> tuple[cb.Stream, Any]:
    stream = cb.stream(CROSS, "f32[b, t, 8]", "f32[b, s, 6]", capacity=capacity)
    return stream, spread(CROSS.init(KEY, X, MEMORY))


def test_a_memory_is_given_once() -> None:
    stream, variables = start_cross()
    step = jax.jit(stream.step)
    whole = CROSS.apply(variables, X, MEMORY)
    state, first = step(variables, stream.start(2, s=5), X[:, :3], MEMORY)
    state, second = step(variables, state, X[:, 3:], None)
    check_equal(jnp.concatenate([first, second], axis=1), whole)


def test_a_memory_may_be_replaced() -> None:
    stream, variables = start_cross()
    state, _ = stream.step(variables, stream.start(2, s=5), X[:, :3], MEMORY)
    state, _ = stream.step(variables, state, X[:, 3:4], MEMORY[::-1])
    _, y = stream.step(variables, state, X[:, 4:], None)
    check_equal(y, CROSS.apply(variables, X, MEMORY[::-1])[:, 4:])


def test_a_memory_that_was_not_given() -> None:
    stream, variables = start_cross()
    with pytest.raises(cb.StreamError) as error:
        stream.step(variables, stream.start(2, s=5), X, None)
    assert str(error.value).startswith(
        "KVQAttention got None for 'keys', and rows 0, 1 were not given it before. Give it in the "
        "first block of a row, also after a reset."
    )
    state, _ = stream.step(variables, stream.start(2, s=5), X, MEMORY)
    state = stream.reset(state, jnp.array([1]))
    with pytest.raises(cb.StreamError, match="rows 1 were not given it before"):
        stream.step(variables, state, X, None)
    _, y = jax.jit(stream.step)(variables, state, X, None)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[0]).all()


def test_a_memory_of_another_length() -> None:
    stream, variables = start_cross()
    state, _ = stream.step(variables, stream.start(2, s=5), X, MEMORY)
    with pytest.raises(ValueError, match="s"):
        stream.step(variables, state, X, MEMORY[:, :4])
    layer = xn.KVQAttention(n_heads=2)
    variables = layer.init(KEY, X, MEMORY, None, decode=True)
    with pytest.raises(cb.StreamError) as error:
        layer.apply(variables, X, MEMORY[:, :4], None, decode=True, mutable=["cache"])
    assert str(error.value) == (
        "KVQAttention remembers 'keys' of shape (2, 5, 2, 3), as when the stream was made; got "
        "shape (2, 4, 2, 3). What is remembered as a whole does not grow from block to block."
    )


def test_no_memory_at_all() -> None:
    with pytest.raises(cb.StreamError) as error:
        xn.KVQAttention(n_heads=2).init(KEY, X, None, None)
    assert str(error.value) == (
        "KVQAttention got None for 'keys', and has no earlier block to remember it from. Give it "
        "when initializing, in calls without decode, and in the first block of a stream."
    )


def test_what_is_remembered_may_be_rounded() -> None:
    layer = PLAIN.copy(causal=True, cache_dtype=jnp.bfloat16)
    model = cb.fn(layer, mask=None)
    stream = cb.stream(model, "f32[b, t, 8]", capacity=8)
    state = stream.start(2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.cache)} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("int32"),
    }
    variables = spread(model.init(KEY, X))
    blocks = []
    for at in range(7):
        state, y = stream.step(variables, state, X[:, at : at + 1])
        blocks.append(y)
    whole = model.apply(variables, X)
    np.testing.assert_allclose(jnp.concatenate(blocks, 1), whole, rtol=0.05, atol=0.05)


def test_another_attention_fn_streams_too() -> None:
    def plain(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        return xn.attend(query, key, value, mask, **options)

    model = cb.fn(PLAIN.copy(causal=True, attention_fn=plain), mask=None)
    stream = cb.stream(model, "f32[b, t, 8]", capacity=8)
    variables = spread(model.init(KEY, X))
    state, first = stream.step(variables, stream.start(2), X[:, :3])
    _, second = stream.step(variables, state, X[:, 3:])
    check_equal(jnp.concatenate([first, second], axis=1), model.apply(variables, X))


def test_a_window_needs_no_capacity_and_never_ends() -> None:
    model = cb.fn(PLAIN.copy(causal=True, window=3), mask=None)
    stream = cb.stream(model, "f32[b, t, 8]")
    assert stream.room is None
    assert stream.state_shapes(2).cache["SelfAttention_0"]["keys"].shape == (2, 3, 4, 2)
    assert cb.stream(model, "f32[b, t, 8]", capacity=2).room == 2
    assert cb.stream(model, "f32[b, t, 8]", capacity=5).room is None
    variables = spread(model.init(KEY, X))
    step, state, blocks = jax.jit(stream.step), stream.start(2), []
    for at in range(7):
        state, y = step(variables, state, X[:, at : at + 1])
        blocks.append(y)
    check_equal(jnp.concatenate(blocks, axis=1), model.apply(variables, X))


@pytest.mark.parametrize("window", [None, 6])
def test_state_is_read_in_chunks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 4 steps here. Those that no row has reached are not read."""
    monkeypatch.setattr(_chunked, "KEYS_PER_CHUNK_OF_STATE", 4)
    layer = cb.residual(cb.fn(PLAIN.copy(causal=True, window=window, n_kv_heads=2), mask=None))
    x = normal(2, 12, 8)

    def run_blocks(model: cb.Combinator, variables: Any, starts: list[int]) -> Any:
        stream = cb.stream(model, "f32[b, t, 8]", capacity=13)
        state, blocks = stream.start(2), []
        for start, stop in itertools.pairwise(starts):
            state, y = stream.step(variables, state, x[:, start:stop])
            blocks.append(y)
        return jnp.concatenate(blocks, axis=1)

    tower = cb.repeat(layer, 2)
    variables = spread(tower.init(KEY, x))
    blocks = jax.jit(lambda variables: run_blocks(tower, variables, [0, 5, 6, 11, 12]))(variables)
    check_equal(blocks, tower.apply(variables, x))

    variables = spread(layer.init(KEY, x))
    found, expected = (
        jax.jit(jax.grad(lambda variables, run=run: jnp.sum(jnp.sin(run(variables)))))(variables)
        for run in (
            lambda variables: run_blocks(layer, variables, [0, 6, 12]),
            lambda variables: layer.apply(variables, x),
        )
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# Errors.

MASKED = PLAIN.copy(causal=True)


def apply_in_stream(layer: nn.Module, *inputs: Any, mask: Any = None) -> Any:
    variables = layer.init(KEY, *inputs, mask, decode=True)
    return layer.apply(variables, *inputs, mask, decode=True, mutable=["cache"])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: apply_in_stream(PLAIN, X),
            cb.StreamError,
            (
                "SelfAttention with causal=False cannot run piece by piece: its positions attend "
                "to later ones. Say causal=True, or call it without decode."
            ),
        ),
        (
            lambda: apply_in_stream(MASKED, X, mask=np.ones((1, 7, 7), bool)),
            cb.StreamError,
            (
                "In a stream, SelfAttention takes a mask that says which steps of the block are "
                "keys, of shape [2, 1, 7]; got shape [1, 7, 7]. The fields causal and window hide"
                " steps by their positions."
            ),
        ),
        (
            lambda: MASKED.apply(
                MASKED.init(KEY, X, None, decode=True),
                X,
                np.ones((2, 1, 7), bool),
                decode=True,
                mutable=["cache"],
            ),
            cb.StreamError,
            (
                "SelfAttention got a mask, and the stream was made with the mask None, so that it"
                " does not remember which steps are keys. Give the stream a spec of the mask, "
                "such as 'bool[b, 1, t]'."
            ),
        ),
        (
            lambda: apply_in_stream(MASKED, X, mask=np.ones((2, 1, 7), np.float32)),
            ValueError,
            (
                "attend takes a mask of booleans or integers, non-zero where a query attends to a"
                " key; got float32. Compare it first, as in mask > 0."
            ),
        ),
        (
            lambda: xn.Attention(n_heads=2, causal=True).init(KEY, X, None, None),
            ValueError,
            (
                "Attention with causal=True takes inputs_kv in every block; got None. Without "
                "causal it remembers them from the first block."
            ),
        ),
        (
            lambda: xn.Attention(n_heads=2, causal=True).init(
                KEY, X, X[:, :3], None, lengths=np.array([1, 2])
            ),
            ValueError,
            (
                "Attention with causal=True takes as many steps of inputs_q as of inputs_kv in a "
                "stream, or with lengths; got 7 and 3. Attend to a sequence that stays with "
                "causal=False."
            ),
        ),
        (
            lambda: xn.SelfAttention(window=3),
            ValueError,
            (
                "SelfAttention takes a window as the last positions that a query sees, its own "
                "included; got window=3 and causal=False. Give causal=True, too."
            ),
        ),
        (
            lambda: xn.SelfAttention(n_heads=4, n_kv_heads=3),
            ValueError,
            "SelfAttention takes n_kv_heads that divide n_heads; got 3 and n_heads 4.",
        ),
        (
            lambda: xn.SelfAttention(n_kv_heads=0),
            ValueError,
            "SelfAttention takes n_kv_heads of at least 1; got 0.",
        ),
        (
            lambda: xn.SelfAttention(rotary=10000.0),  # type: ignore[arg-type]
            TypeError,
            (
                "SelfAttention takes a RotaryEncoding as rotary, such as "
                "xn.RotaryEncoding(base=10000.0); got float."
            ),
        ),
        (
            lambda: xn.SelfAttention(qk_norm=nn.RMSNorm()),
            ValueError,
            (
                "SelfAttention takes a constructor for qk_norm, which it calls to make its own "
                "module; got RMSNorm. Give functools.partial(Module, ...) or lambda: Module(...)."
            ),
        ),
        (
            lambda: xn.RelativePositionBias(2, n_buckets=3),
            ValueError,
            "RelativePositionBias takes n_buckets of at least 4; got 3.",
        ),
        (
            lambda: xn.RelativePositionBias(2, max_distance=8),
            ValueError,
            "RelativePositionBias takes max_distance of at least 9; got 8.",
        ),
        (
            lambda: xn.LinearPositionBias(0),
            ValueError,
            "LinearPositionBias takes n_heads of at least 1; got 0.",
        ),
    ],
)
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(text), str(error.value)
