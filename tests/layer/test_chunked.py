"""Attention in chunks: how it is transformed, which tiles it visits, and what it holds."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import layer as xn
from flax_extra.layer import _attend, _causal, _chunked, _equations, _logits, _numerics
from flax_extra.layer._causal import HIDDEN_POSITION, CausalRule
from flax_extra.layer._tiles import AxisTiling, Grid, TileIndex
from tests.layer.attend_reference import find_seen, formula, normal, quick_jit

BATCH, TIME_Q, TIME_KV, HEADS = 2, 5, 7, 2
MASKS = [
    None,
    (BATCH, TIME_Q, TIME_KV),
    (BATCH, TIME_Q, 1),
    (1, 1, 1, TIME_KV),
    (1, HEADS, TIME_Q, 1),
]


@pytest.fixture(autouse=True, scope="module")
def _few_queries_in_a_tile() -> Iterator[None]:
    """Five queries in pieces of three: the second is over the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 3)
        yield


def problem(dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    shapes = (TIME_Q, 4), (TIME_KV, 4), (TIME_KV, 6)
    return tuple(
        normal(BATCH, time, HEADS, features, seed=seed).astype(dtype)
        for seed, (time, features) in enumerate(shapes)
    )


def mask_of(shape: tuple[int, ...] | None, density: float = 0.4, seed: int = 0) -> Any:
    return None if shape is None else np.random.default_rng(seed).random(shape) < density


@functools.partial(quick_jit, static_argnames="chunk_size")
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


def test_transformations_of_tangents() -> None:
    inputs, tangents = problem(), tuple(jax.tree.map(np.cos, problem()))
    f, whole = (functools.partial(xn.attend, chunk_size=size) for size in (3, TIME_KV))
    push = lambda f: lambda *inputs: jax.jvp(f, inputs, tangents)[1]

    def scan(*inputs: Any) -> Any:
        step = lambda query, _: (query, push(f)(query, *inputs[1:]))
        return jax.lax.scan(step, inputs[0], None, length=1)[1][0]

    def linearize(*inputs: Any) -> Any:
        return jax.linearize(f, *inputs)[1](*tangents)

    def mapped(*inputs: Any) -> Any:
        """A tangent for each example, and one key and value for all of them."""
        example = lambda query: f(query[None], inputs[1][:1], inputs[2][:1])[0]
        return jax.vmap(lambda *query: jax.jvp(example, *((x,) for x in query))[1])(
            inputs[0], tangents[0]
        )

    expected = push(whole)(*inputs)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for run in (push(f), push(jax.checkpoint(f)), scan, linearize):
        close(quick_jit(run)(*inputs), expected)
    first = lambda query: whole(query, *(x[:1].repeat(BATCH, 0) for x in inputs[1:]))
    close(quick_jit(mapped)(*inputs), jax.jvp(first, inputs[:1], tangents[:1])[1])


def test_jacobian_and_hessian() -> None:
    inputs = normal(1, 2, 1, 2), normal(1, 5, 1, 2, seed=1), normal(1, 5, 1, 1, seed=2)
    total = lambda size: lambda *inputs: jnp.sum(jnp.sin(xn.attend(*inputs, chunk_size=size)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for derivative in (jax.hessian, lambda f, argnums: jax.jacfwd(f, argnums)):
        found, expected = (
            quick_jit(derivative(total(size), (0, 1, 2)))(*inputs) for size in (2, 5)
        )
        jax.tree.map(close, found, expected)


def test_gradients_of_some_inputs_only() -> None:
    """What is not asked for is not computed: neither tangent nor cotangent."""
    inputs = problem()
    f = lambda *inputs: jnp.sum(jnp.sin(xn.attend(*inputs, chunk_size=3)))
    expected = quick_jit(jax.grad(f, (0, 1, 2)))(*inputs)
    for i in range(3):
        found = quick_jit(jax.grad(f, i))(*inputs)
        np.testing.assert_allclose(found, expected[i], rtol=1e-5, atol=1e-6)
    of_query = jax.make_jaxpr(jax.grad(f, 0))(*inputs)
    outputs = [len(eqn.outvars) for eqn in of_query.eqns if eqn.primitive.name == "tiled_sum"]
    assert outputs == [1]


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


def test_dropout_does_not_depend_on_the_tiles_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem()
    expected = dropped_weights(inputs, 0.5)
    monkeypatch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 2)
    np.testing.assert_allclose(dropped_weights(inputs, 0.5), expected, rtol=1e-6)


# Tiles.


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.sampled_from([1, 2, 3]))
def test_a_cut_has_each_position_once(length: int, max_size: int, groups: int) -> None:
    cut = AxisTiling.at_most(length * groups, max_size, groups)
    assert cut.size * groups <= max(max_size, groups)
    new = []
    for i in range(cut.n_pieces):
        is_new = cut.is_new(i)
        indices = np.asarray(cut.get_indices(i))
        new.extend(indices if is_new is None else indices[np.asarray(is_new)])
    assert sorted(new) == list(range(length * groups))


@st.composite
def plans(draw: st.DrawFn, times: Any, sizes: Any, windows: Any) -> tuple[Any, ...]:
    queries, keys = (AxisTiling.at_most(draw(times), draw(sizes)) for _ in range(2))
    return queries, keys, draw(windows)


def check_schedule(grid: Grid, schedule: Any, seen: np.ndarray, *, is_exact: bool) -> None:
    """Compares the chunks that are visited with those that are seen, ``[batch, time_q, time_kv]``.

    Each chunk that is seen is visited once, and a full one is seen by every query of the row.
    """
    n_full, n_partial = np.asarray(schedule.n_full), np.asarray(schedule.n_partial)
    for block, row in np.ndindex(n_full.shape):
        full, partial = n_full[block, row], n_partial[block, row]
        chunks = [int(schedule.find((block, row), i)) for i in range(full + partial)]
        assert len(set(chunks)) == len(chunks)
        examples = seen if len(n_full) == 1 else seen[block : block + 1]
        of_row = examples[:, np.asarray(grid.queries.get_indices(row))]
        for chunk in range(grid.keys.n_pieces):
            tile = whole = of_row[:, :, np.asarray(grid.keys.get_indices(chunk))]
            is_new = grid.is_new(TileIndex(block, row, chunk))
            if is_new is not None:
                tile = tile[:, np.broadcast_to(is_new[0, 0], tile.shape[1:])]
            assert chunk in chunks or not tile.any()
            # A row that begins earlier to fit in may see more, which counts in the row before it.
            assert not is_exact or chunk not in chunks or whole.any()
            assert chunk not in chunks[:full] or tile.all()


@settings(max_examples=60, deadline=None)
@given(plans(st.integers(1, 12), st.integers(1, 6), st.none() | st.integers(1, 14)))
def test_exactly_the_chunks_that_are_seen_are_visited(plan: Any) -> None:
    queries, keys, window = plan
    grid, rule = Grid(AxisTiling(1, 1), queries, keys), CausalRule(window, is_aligned=True)
    unused = jnp.zeros((1, 1), jnp.int32)
    schedule = _causal.schedule_chunks(grid, rule, unused, unused)
    seen = find_seen((1, 1, queries.length, keys.length), causal=True, window=window)
    check_schedule(grid, schedule, seen[:, 0], is_exact=True)


@settings(max_examples=20, deadline=None)
@given(
    plans(st.sampled_from([5, 8]), st.just(3), st.sampled_from([None, 4])),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_all_chunks_that_are_seen_by_position_are_visited(
    plan: Any, one_by_one: bool, seed: int
) -> None:
    queries, keys, window = plan
    rng = np.random.default_rng(seed)
    positions = {
        "query_positions": rng.integers(-1, 9, (2, 1)) + np.arange(queries.length)[None],
        "key_positions": rng.integers(-2, 12, (2, keys.length)),
    }
    if rng.random() < 0.5:  # then there are chunks that nobody sees
        positions["key_positions"].sort()
    grid = Grid(AxisTiling(2, 1 if one_by_one else 2), queries, keys)
    rule = CausalRule(window, is_aligned=False)
    key_positions = np.where(
        positions["key_positions"] < 0, HIDDEN_POSITION, positions["key_positions"]
    )
    schedule = _causal.schedule_chunks(
        grid, rule, jnp.asarray(positions["query_positions"]), jnp.asarray(key_positions)
    )
    shape = 2, 1, queries.length, keys.length
    seen = find_seen(shape, causal=True, window=window, **positions)
    check_schedule(grid, schedule, seen[:, 0], is_exact=False)


def test_chunks_after_the_last_query_are_not_visited() -> None:
    grid = Grid(AxisTiling(2, 2), AxisTiling(4, 2), AxisTiling(12, 3))
    rule = CausalRule(4, is_aligned=False)
    queries = jnp.array([[3, 4, 5, 6], [4, 5, 6, 7]])
    schedule = _causal.schedule_chunks(grid, rule, queries, jnp.arange(12)[None])
    assert (schedule.n_full + schedule.n_partial).tolist() == [[2, 3]]
    chunks = {int(schedule.find((0, row), i)) for row, n in enumerate((2, 3)) for i in range(n)}
    assert chunks == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "tiles"),
    [({"causal": True}, 10), ({"causal": True, "window": 3}, 7)],
    ids=["causal", "window"],
)
def test_tiles_that_nobody_sees_are_not_computed(
    options: Any, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without jit, loops run in Python."""
    x = normal(1, 12, 1, 2)
    subscripts = []

    def einsum(*args: Any, **options: Any) -> Any:
        subscripts.append(args[0])
        return _numerics.einsum_accumulated(*args, **options)

    for module in (_logits, _equations):
        monkeypatch.setattr(module, "einsum_accumulated", einsum)
    attend = lambda key: jnp.sum(xn.attend(x, key, x, chunk_size=3, **options))
    with jax.disable_jit():
        attend(x)
        assert subscripts.count("bhqd,bhkd->bhqk") == tiles
        jax.grad(attend)(x)
        assert subscripts.count("bhkgq,bhgqd->bhkd") == tiles


# The choice.


def test_chunks_are_chosen_from_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 512)
    everything = _logits.Settings(1.0, None, None, 0.0, None)
    causal = dataclasses.replace(everything, causal=CausalRule(None, is_aligned=True))
    choose = functools.partial(_attend._choose_chunk_size, settings=everything)
    assert choose((1, 8, 256, 512), None) is None
    assert choose((1, 8, 1, 65_536), None) is None
    assert choose((1, 8, 512, 65_536), None) == 256
    assert choose((1, 1, 512, 65_536), None) == 2_048
    assert choose((1, 1, 512, 65_536), None, settings=causal) == 512
    assert choose((1, 8, 512, 65_536), 1_000) == 1_000
    assert choose((1, 8, 512, 65_536), 65_536) is None
    b, t = jax.export.symbolic_shape("b, t")
    assert choose((b, 8, 512, 65_536), None) is None
    assert choose((1, 8, 512, t), 64) is None
    assert choose((0, 8, 512, 64), 8) is None


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
    assert "scan" not in str(jax.make_jaxpr(whole.apply)(variables, x, None))
    assert "scan" in str(jax.make_jaxpr(chunked.apply)(variables, x, None))
    found, expected = (layer.apply(variables, x, None) for layer in (chunked, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Memory, and other platforms.


def temporaries(time_kv: int, **options: Any) -> int:
    shapes = [(2, 512, 4, 8)] + 2 * [(2, time_kv, 4, 8)] + [(2, 1, time_kv)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[:3]]
    mask = jax.ShapeDtypeStruct(shapes[3], jnp.bool_)
    f = jax.jit(functools.partial(with_gradients.__wrapped__, **options))
    analysis = f.lower(*inputs, mask=mask).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def temporaries_of(f: Any, *shapes: tuple[int, ...]) -> int:
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(f).lower(*specs).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 256}], ids=str)
def test_causal_attention_holds_nothing_of_time_squared(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 512)
    loss = lambda *inputs: jnp.sum(jnp.sin(xn.attend(*inputs, **options)))
    gradient = jax.grad(loss, (0, 1, 2))
    held = {
        time: [temporaries_of(f, *3 * [(1, time, 1, 8)]) for f in (loss, gradient)]
        for time in (4_096, 16_384)
    }
    for small, large in zip(*held.values(), strict=True):
        assert large < 16_384**2 / 20
        assert large - small < 12 * 12_288 * 8 * 4  # a few arrays as long as the inputs


def test_second_derivatives_hold_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 512)
    loss = lambda *inputs: jnp.sum(jnp.sin(xn.attend(*inputs)))
    gradient = jax.grad(loss, (0, 1, 2))
    square = lambda *inputs: sum(jnp.sum(x**2) for x in gradient(*inputs))
    forward = lambda *inputs: jax.jvp(gradient, inputs, inputs)[1]
    for second in (jax.grad(square, (0, 1, 2)), forward):
        assert (
            temporaries_of(second, (1, 512, 1, 8), *2 * [(1, 65_536, 1, 8)]) < 512 * 65_536 * 4 / 2
        )


def test_no_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 512)
    sizes = {time: temporaries(time) for time in (4_096, 32_768)}
    of_inputs = 2 * 2 * 28_672 * 4 * 8 * 4
    assert sizes[32_768] - sizes[4_096] <= of_inputs
    assert 20 * sizes[32_768] < 4 * 2 * 4 * 512 * 32_768


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_is_lowered_for_every_platform(platform: str) -> None:
    f = functools.partial(with_gradients.__wrapped__, chunk_size=3)
    exported = jax.export.export(jax.jit(f), platforms=[platform])(*problem())
    assert exported.platforms == (platform,)


def test_half_precision_is_for_cudnn_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    query = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    shorter = jax.ShapeDtypeStruct((2, 96, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)

    def count(platform: str, query: Any = query, *, forward: bool = False, **options: Any) -> Any:
        """Counts the kernels that run forwards and backwards."""

        def run(*inputs: Any) -> Any:
            f = functools.partial(xn.attend, chunk_size=64, **options)
            if forward:
                return jax.jvp(f, inputs, inputs)
            vectors, pullback = jax.vjp(f, *inputs)
            return vectors, pullback(vectors)

        program = jax.jit(run).trace(query, key, key).lower(lowering_platforms=(platform,))
        text = program.as_text()
        backwards = len(re.findall(r"custom_call @__cudnn\$fmhaSoftmaxBackward", text))
        return len(re.findall(r"custom_call @__cudnn\$fmhaSoftmax", text)) - backwards, backwards

    # XLA computes the two forward calls once: they have the same operands.
    assert count("cuda") == (2, 1)
    assert count("cuda", causal=True, window=9) == (2, 1)
    assert count("cuda", forward=True) == (1, 0)
    assert count("cuda", shorter, causal=True) == (0, 0)  # it aligns the first query and key
    assert count("cuda", mask=np.ones((2, 1, 128), bool)) == (0, 0)
    assert count("cuda", logit_cap=2.0) == (0, 0)
    assert count("cpu") == (0, 0)
