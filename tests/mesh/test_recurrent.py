"""Layers that run over time with the batch sharded over 8 devices, padding and state included.

Values and gradients are those of one device. Each device does its share of the work. Forwards,
devices exchange nothing; backwards, gradients of parameters are all-reduced and nothing else moves.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_extra import layer as xn

BATCH, TIME, FEATURES, HIDDEN = 16, 12, 6, 4
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("data")

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)

OPTIONS = {"return_sequences": True, "return_state": True}
LAYERS = {
    "LSTM": xn.LSTM(HIDDEN, return_state=True),
    "LSTM: sequences": xn.LSTM(HIDDEN, **OPTIONS),
    "LSTM: reverse": xn.LSTM(HIDDEN, reverse=True, **OPTIONS),
    "GRU": xn.GRU(HIDDEN, **OPTIONS),
    "Recurrent": xn.Recurrent(nn.GRUCell(HIDDEN), **OPTIONS),
    "Recurrent: last": xn.Recurrent(nn.LSTMCell(HIDDEN), return_state=True),
    "LinearRecurrence": xn.LinearRecurrence(2, return_state=True),
}
"""Of each family, the paths that treat the batch differently."""

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Problem:
    """A layer on a padded batch from a given state, as functions of parameters and the batch."""

    def __init__(self, name: str) -> None:
        self.layer = LAYERS[name]
        inputs = normal(BATCH, TIME, FEATURES)
        state = jax.tree.map(lambda x: normal(*x.shape, seed=1), self.layer.initial_state(inputs))
        lengths = np.arange(BATCH) % (TIME + 1)
        self.batched = inputs, lengths, state
        self.params = quick_jit(self.layer.init)(jax.random.key(0), inputs)

    def run(self, params: Any, batched: Any) -> Any:
        inputs, lengths, state = batched
        padded = self.layer.apply(params, inputs, lengths=lengths, initial_state=state)
        return padded, self.layer.apply(params, inputs)

    def run_back(self, params: Any, batched: Any, axis: str | None = None) -> Any:
        inputs, lengths, state = batched

        def loss(params: Any, inputs: Any, state: Any) -> Any:
            outputs = self.run(params, (inputs, lengths, state))
            total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))
            return total if axis is None else jax.lax.psum(total, axis)

        return jax.grad(loss, (0, 1, 2))(params, inputs, state)

    def run_shard_mapped(self, mesh: Any) -> tuple[Any, Any]:
        in_specs = (REPLICATED, SHARDED)
        run_back = functools.partial(self.run_back, axis="data")
        return (
            jax.shard_map(self.run, mesh=mesh, in_specs=in_specs, out_specs=SHARDED),
            jax.shard_map(
                run_back, mesh=mesh, in_specs=in_specs, out_specs=(REPLICATED, SHARDED, SHARDED)
            ),
        )


@contextlib.contextmanager
def mesh_of(kind: str) -> Iterator[jax.sharding.Mesh]:
    axis_type = AxisType.Explicit if kind == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        yield mesh


@functools.cache
def problem_of(name: str) -> Problem:
    return Problem(name)


@functools.cache
def results_on_one_device(name: str) -> tuple[list[Any], list[float]]:
    """Values and gradients, and the operations that either takes."""
    problem = problem_of(name)
    arguments = problem.params, problem.batched
    programs = [quick_jit(f).lower(*arguments).compile() for f in (problem.run, problem.run_back)]
    return [p(*arguments) for p in programs], [p.cost_analysis()["flops"] for p in programs]


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sharded_batch(name: str, kind: str) -> None:
    problem = problem_of(name)
    expected, all_work = results_on_one_device(name)
    with mesh_of(kind) as mesh:
        params = jax.device_put(problem.params, NamedSharding(mesh, REPLICATED))
        batched = jax.device_put(problem.batched, NamedSharding(mesh, SHARDED))
        functions = problem.run, problem.run_back
        if kind == "shard_map":
            functions = problem.run_shard_mapped(mesh)
        allowed: list[set[str]] = [set(), {"all-reduce"}]
        for index, function in enumerate(functions):
            program = quick_jit(function).lower(params, batched).compile()
            found = program(params, batched)
            assert set(COLLECTIVE.findall(program.as_text())) == allowed[index]
            # Bookkeeping, as of the loop and the lengths, is on every device.
            assert program.cost_analysis()["flops"] < all_work[index] * 0.15
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
                found,
                expected[index],
            )
