"""``attend`` on a mesh: the numbers of one device, and a share of the work for each."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_extra import layer as xn
from flax_extra.layer import _chunked
from tests.layer.attend_reference import quick_jit

P = PartitionSpec
BATCH, TIME_Q, TIME_KV, HEADS, KV_HEADS = 16, 12, 20, 4, 2


def make_mesh(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


# The numbers.

ARRAYS = {
    "mask": np.random.default_rng(3).random((BATCH, 1, TIME_KV)) < 0.7,
    "bias": np.random.default_rng(4).normal(size=(1, HEADS, TIME_Q, 1)).astype(np.float32),
    "query_positions": np.arange(TIME_Q)[None] + np.arange(BATCH)[:, None] % 9,
    "key_positions": np.arange(TIME_KV)[None] - np.arange(BATCH)[:, None] % 5,
}
CASES: dict[str, tuple[dict[str, Any], list[str], int | None]] = {
    "direct": ({"causal": True}, ["mask", "bias"], None),
    "masked": ({"logit_cap": 2.0}, ["mask", "bias"], 8),
    "window": ({"causal": True, "window": 7}, ["mask"], 8),
    "positions": ({"causal": True}, ["query_positions", "key_positions"], 8),
    "dropout": ({"dropout_rate": 0.5}, ["mask"], 8),
}


# With dropout, each device of shard_map would draw for a batch of its own.
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case in CASES
        for kind in ("auto", "explicit", "shard_map")
        if (case, kind) != ("dropout", "shard_map")
    ],
)
def test_the_batch_is_split(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "MAX_QUERIES_PER_TILE", 8)
    options, names, chunk_size = CASES[case]
    options = {**options, "dropout_rngkey": jax.random.key(0)}
    rng = np.random.default_rng(0)
    shapes = (BATCH, TIME_Q, HEADS, 8), (BATCH, TIME_KV, KV_HEADS, 8), (BATCH, TIME_KV, KV_HEADS, 6)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    arrays += [ARRAYS[name] for name in names]
    specs = [P("data") if len(x) == BATCH else P() for x in arrays]

    def run(*arrays: Any) -> Any:
        def f(*inputs: Any) -> Any:
            others = dict(zip(names, arrays[3:], strict=True))
            return xn.attend(*inputs, **others, **options, chunk_size=chunk_size)

        vectors, pullback = jax.vjp(f, *arrays[:3])
        pushed = jax.jvp(f, arrays[:3], arrays[:3])[1] if case == "masked" else ()
        return vectors, pullback(jnp.cos(vectors)), pushed

    expected = quick_jit(run)(*arrays)
    mesh = make_mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    if kind == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=P("data"))
    with jax.set_mesh(mesh):
        found = quick_jit(run)(*placed)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected
    )
    assert {x.sharding.spec[0] for x in jax.tree.leaves(found)} == {"data"}


def test_time_is_split_by_shard_map() -> None:
    """Each device has queries of its own, and leaves out the chunks that they do not see."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(1, 64, 2, 4)).astype(np.float32) for _ in range(3)]
    mesh = make_mesh(AxisType.Auto)

    def attend(query: Any, positions: Any, key: Any, value: Any) -> Any:
        options = {"causal": True, "chunk_size": 8}
        return xn.attend(query, key, value, query_positions=positions, **options)

    split = jax.shard_map(
        attend, mesh=mesh, in_specs=(P(None, "data"),) * 2 + (P(),) * 2, out_specs=P(None, "data")
    )
    positions = jnp.arange(64)[None]
    loss = lambda f, query, key, value: jnp.sum(jnp.sin(f(query, positions, key, value)))
    value_and_grads = [
        quick_jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2)))(*inputs)
        for f in (split, attend)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *value_and_grads)


# The work.


def measure(f: Any, shapes: Any, specs: Any) -> tuple[list[str], float]:
    """Counts collectives, and the work of a device in proportion to that of one alone."""
    mesh = make_mesh(AxisType.Auto)
    alone = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    split = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(alone, specs, strict=True)
    ]
    one, each = (jax.jit(f).lower(*x).compile() for x in (alone, split))
    collectives = re.findall(
        r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        each.as_text(),
    )
    return collectives, each.cost_analysis()["flops"] / one.cost_analysis()["flops"]


def value_and_grads(**options: Any) -> Any:
    def run(*inputs: Any) -> Any:
        vectors, pullback = jax.vjp(lambda *inputs: xn.attend(*inputs, **options), *inputs)
        return vectors, pullback(vectors)

    return run


SELF = [(16, 1024, 8, 8)] * 3


@pytest.mark.parametrize(
    ("options", "shapes", "spec"),
    [
        ({}, SELF, P("data")),
        ({"causal": True, "window": 100}, SELF, P("data")),
        ({"dropout_rate": 0.5}, SELF, P("data")),
        ({"causal": True}, [(8, 64, 8, 8)] * 3, P("data")),
        ({"causal": True}, [(2, 1024, 32, 8), *[(2, 1024, 8, 8)] * 2], P(None, None, "data")),
    ],
    ids=["batch", "window", "dropout", "direct", "heads"],
)
def test_each_device_does_its_share_and_tells_nobody(options: Any, shapes: Any, spec: Any) -> None:
    options = {**options, "dropout_rngkey": jax.random.key(0)}
    collectives, work = measure(value_and_grads(**options), shapes, [spec] * 3)
    assert collectives == []
    assert work < 0.14


def test_devices_agree_on_chunks_by_position() -> None:
    def run(query: Any, key: Any, value: Any, positions: Any) -> Any:
        positions = positions.astype(int)
        return xn.attend(query, key, value, causal=True, query_positions=positions)

    collectives, work = measure(run, [*SELF, (16, 1024)], [P("data")] * 4)
    assert collectives == ["all-reduce"]
    assert work < 0.14


def test_queries_split_in_time_gather_keys_only() -> None:
    collectives, work = measure(xn.attend, [(1, 2048, 4, 8)] * 3, [P(None, "data")] * 3)
    assert collectives == ["all-gather"] * 2
    assert work < 0.14
