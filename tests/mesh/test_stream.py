"""Streams with the batch sharded over 8 devices: each device steps its own rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.mesh.programs import list_collectives
from tests.stream.toys import draw, make_block, quick_jit

BATCH, CAPACITY, SPEC = 16, 6, "f32[b, t, 4]"
X = draw(BATCH, CAPACITY, 4)
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("data")

MODELS = {
    "toys": cb.repeat(make_block(), 2),
    "recurrent": cb.repeat(cb.residual(xn.CausalConv(), xn.GRU(4, return_sequences=True)), 2),
    "attention": cb.repeat(cb.fn(xn.SelfAttention(2, causal=True), mask=None), 2),
}
APPENDS = {"toys", "attention"}
"""Models that write the steps of a block at a place of its own in each row.

XLA hands such steps to all devices, of which each writes its own. It moves a block, never a cache.
Inside ``jax.shard_map`` nothing is moved.
"""


@contextlib.contextmanager
def mesh_of(axis_type: AxisType) -> Iterator[jax.sharding.Mesh]:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        yield mesh


@functools.cache
def make(name: str) -> tuple[cb.Stream, Any, Any]:
    """Returns the stream of a model, its variables, and what it gives for X on one device."""
    model = MODELS[name]
    variables = quick_jit(model.init)(jax.random.key(0), X)
    whole = np.asarray(quick_jit(model.apply)(variables, X))
    return cb.stream(model, SPEC, capacity=CAPACITY), variables, whole


def find_specs(state: Any) -> Any:
    """The rows of a state lie with the batch: its axis is the one that has its size."""

    def find_spec(leaf: Any) -> PartitionSpec:
        return PartitionSpec(*(("data" if size == BATCH else None) for size in leaf.shape))

    return jax.tree.map(find_spec, state)


@pytest.mark.parametrize("kind", ["Auto", "shard_map"])
@pytest.mark.parametrize("name", MODELS)
def test_each_device_steps_its_own_rows(name: str, kind: str) -> None:
    stream, variables, whole = make(name)
    specs = find_specs(stream.state_shapes(BATCH))
    with mesh_of(AxisType.Auto) as mesh:
        place = functools.partial(NamedSharding, mesh)
        states = jax.tree.map(place, specs)
        step = stream.step
        if kind == "shard_map":
            step = jax.shard_map(
                step, mesh=mesh, in_specs=(REPLICATED, specs, SHARDED), out_specs=(specs, SHARDED)
            )
        step = quick_jit(step, donate_argnums=1, out_shardings=(states, place(SHARDED)))
        variables = jax.device_put(variables, place(REPLICATED))
        state = jax.jit(lambda: stream.start(BATCH), out_shardings=states)()
        blocks = []
        for at in range(0, CAPACITY, 2):
            block = jax.device_put(X[:, at : at + 2], place(SHARDED))
            if not blocks:
                found = list_collectives(step.lower(variables, state, block).compile())
            state, y = step(variables, state, block)
            blocks.append(y)
        assert step._cache_size() == 1
        if name in APPENDS and kind == "Auto":
            assert max(one.size for one in found) <= block.size
        else:
            assert found == []
        assert y.sharding.shard_shape(y.shape)[0] == BATCH // 8
        for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
            assert leaf.sharding.is_equivalent_to(place(spec), leaf.ndim)
    np.testing.assert_allclose(jnp.concatenate(blocks, axis=1), whole, rtol=1e-5, atol=1e-5)


def test_rows_are_checked_where_they_are_known() -> None:
    stream, variables, _ = make("toys")
    with mesh_of(AxisType.Auto) as mesh:
        state = jax.device_put(
            stream.start(BATCH),
            jax.tree.map(functools.partial(NamedSharding, mesh), find_specs(stream.start(BATCH))),
        )
        with pytest.raises(cb.StreamError, match="the block has 7"):
            stream.step(variables, state, draw(BATCH, 7, 4))
        with pytest.raises(ValueError, match="The state has rows 0 to 15; got 16"):
            stream.take(state, [16])
