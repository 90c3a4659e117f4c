"""Every layer of the conformance list with its batch sharded over 8 devices.

On Auto and Explicit meshes and inside ``jax.shard_map``, values and gradients are those of one
device. No device waits for another in the forward pass, unless ``SCHEDULED`` names the entry;
backwards, gradients of parameters are all-reduced and nothing else moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.layer.entries import LAYER_ENTRIES, Entry, sequence
from tests.layer.multimodal_entries import MULTIMODAL_ENTRIES

WITHOUT_BATCH = {"interpolate_positions"}
"""Entries whose inputs have no batch."""

SCHEDULED = {"attend: positions"}
"""Entries whose devices agree, by an all-reduce of flags, on the chunks of keys to leave out.

XLA runs one loop on all devices, and only the positions in the arrays say how far it has to go.
Inside ``jax.shard_map`` each device has a loop of its own.
"""

ENTRIES = [
    entry for entry in (*LAYER_ENTRIES, *MULTIMODAL_ENTRIES) if entry.name not in WITHOUT_BATCH
]
KINDS = ["Auto", "Explicit", "shard_map"]
BATCH = 8

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@every_entry
def test_a_sharded_batch(entry: Entry, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "Explicit":  # linen's lookup by indices with a sharded batch is refused there
        monkeypatch.setattr(nn.Embed, "__call__", _embed_by_product)
    problem = _Problem.of(entry)
    with _mesh_of(kind) as mesh:
        params = jax.device_put(problem.params, NamedSharding(mesh, REPLICATED))
        batched = jax.device_put(problem.batched, NamedSharding(mesh, SHARDED))
        run, run_back = problem.run, problem.run_back
        if kind == "shard_map":
            run, run_back = _shard_mapped(problem, mesh)
        forward = quick_jit(run).lower(params, batched).compile()
        outputs = forward(params, batched)
        is_scheduled = entry.name in SCHEDULED and kind != "shard_map"
        assert _list_collectives(forward) == ({"all-reduce"} if is_scheduled else set())
        for leaf in outputs:
            if kind != "Auto" or problem.has_data:  # else XLA may compute it on every device
                assert leaf.sharding.shard_shape(leaf.shape)[0] == BATCH // 8
        backward = quick_jit(run_back).lower(params, batched).compile()
        gradients = backward(params, batched)
        assert _list_collectives(backward) <= {"all-reduce"}
    each_shard = kind == "shard_map" and bool(entry.rngs)
    expected = problem.run_each_shard() if each_shard else problem.run_on_one_device()
    _assert_close((outputs, gradients), expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_positions_of_an_encoding(kind: str) -> None:
    """Output positions, and learned positions for a sequence shorter than their table."""
    fourier = xn.Encoding(positional_encoding=lambda: xn.FourierPositionEncoding((6,), 2))
    learned = xn.Encoding(
        positional_encoding=lambda: xn.TrainablePositionalEncoding(9, 3), aggregation=cb.add()
    )
    inputs = sequence(BATCH, 6, 3)
    variables = learned.init(jax.random.key(0), inputs)
    at = np.array([5, 0])

    def run(variables: Any, inputs: Any) -> Any:
        return fourier.apply({}, inputs, at), learned.apply(variables, inputs)

    def loss(variables: Any, inputs: Any) -> Any:
        return sum(jnp.sum(jnp.sin(x)) for x in run(variables, inputs))

    expected = run(variables, inputs), jax.grad(loss, (0, 1))(variables, inputs)
    with _mesh_of(kind) as mesh:
        variables = jax.device_put(variables, NamedSharding(mesh, REPLICATED))
        inputs = jax.device_put(inputs, NamedSharding(mesh, SHARDED))
        forward = quick_jit(run).lower(variables, inputs).compile()
        backward = quick_jit(jax.grad(loss, (0, 1))).lower(variables, inputs).compile()
        assert _list_collectives(forward) == set()
        assert _list_collectives(backward) == {"all-reduce"}
        found = forward(variables, inputs), backward(variables, inputs)
    _assert_close(found, expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_positional_encoding_of_ones_own_joins_sharded_inputs(kind: str) -> None:
    def own() -> Any:
        return lambda batch, at: jnp.ones((batch, 6, 2))

    def run(inputs: Any) -> Any:
        encoded = xn.Encoding(positional_encoding=own).apply({}, inputs)
        fourier = functools.partial(xn.FourierPositionEncoding, (2,), 2)
        several = xn.MultimodalPositionalEncoding([own, fourier])
        queries, _ = several.apply(variables, BATCH, like=inputs)
        return encoded, queries

    padding = {
        "padding_0": {"padding": jnp.ones((1, 4))},
        "padding_1": {"padding": jnp.ones((1, 1))},
    }
    variables = {"params": padding}
    inputs = sequence(BATCH, 6, 3)
    expected = run(inputs)
    with _mesh_of(kind) as mesh:
        found = jax.jit(run)(jax.device_put(inputs, NamedSharding(mesh, SHARDED)))
        assert found[0].sharding.shard_shape(found[0].shape)[0] == 1
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_latents_are_the_carry_of_a_loop_inside_shard_map() -> None:
    read = cb.residual(cb.fn(xn.KVQAttention(n_heads=2), mask=None))
    model = cb.serial(cb.branch(xn.Learned(3, 4), cb.identity()), cb.repeat(read, 2))
    inputs = sequence(BATCH, 5, 4)
    variables = model.init(jax.random.key(0), inputs)
    with _mesh_of("shard_map") as mesh:
        mapped = jax.shard_map(
            model.apply, mesh=mesh, in_specs=(REPLICATED, SHARDED), out_specs=SHARDED
        )
        found = jax.jit(mapped)(variables, inputs)
    _assert_close([found], [model.apply(variables, inputs)])


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.initializers], ids=lambda entry: entry.name
)
def test_parameters_are_initialized_into_their_shardings(entry: Entry) -> None:
    """With named axes, under a mesh and rules, the values are those of one device."""
    rngs = {name: jax.random.key(seed) for seed, name in enumerate(("params", *entry.rngs))}
    named = entry.make(
        {
            field: nn.with_logical_partitioning(nn.initializers.normal(1.0), names)
            for field, names in entry.initializers.items()
        }
    )

    def init() -> Any:
        return nn.unbox(named.init(rngs, *entry.inputs()))

    expected = quick_jit(init)()
    names = {name for names in entry.initializers.values() for name in names}
    with _mesh_of("Auto"), nn.logical_axis_rules([(name, None) for name in names]):
        found = quick_jit(init)()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# What the tests are written with.

REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("data")

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@contextlib.contextmanager
def _mesh_of(kind: str) -> Iterator[jax.sharding.Mesh]:
    axis_type = AxisType.Explicit if kind == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        yield mesh


def _list_collectives(program: Any) -> set[str]:
    return set(COLLECTIVE.findall(program.as_text()))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A layer on a batch of 8, as functions of its parameters and of what has a batch axis.

    Attributes:
        entry: the entry of the conformance list.
        params: parameters of the documented shapes.
        batched: the arrays among the inputs that have a batch axis.
        build: (batched arrays) -> inputs of a call, for a batch of any size.
        has_data: whether the layer computes with data, and not only with the size of the batch.
    """

    entry: Entry
    params: Any
    batched: list[Any]
    build: Callable[[list[Any]], tuple[Any, ...]]
    has_data: bool

    @classmethod
    def of(cls, entry: Entry) -> _Problem:
        leaves, tree = jax.tree.flatten(entry.inputs())
        first = leaves[0]
        takes_array = _is_array(first)
        is_batched = [takes_array and _is_array(x) and x.shape[0] == first.shape[0] for x in leaves]
        batched = [_enlarge(x) for x, flag in zip(leaves, is_batched, strict=True) if flag]
        params = jax.tree.map(
            lambda shape: sequence(*shape) / 2, entry.param_shapes, is_leaf=_is_shape
        )

        def build(batched: list[Any]) -> tuple[Any, ...]:
            if not takes_array:
                return (batched[0].shape[0], *leaves[1:])
            remaining = iter(batched)
            joined = [
                next(remaining) if flag else x for x, flag in zip(leaves, is_batched, strict=True)
            ]
            return jax.tree.unflatten(tree, joined)

        has_data = takes_array and entry.name != "Learned"
        return cls(entry, params, batched or [np.zeros((BATCH, 1), bool)], build, has_data)

    def run(self, params: Any, batched: list[Any]) -> list[Any]:
        """The arrays among the outputs."""
        layer = self.entry.make({})
        # A layer that takes no data is told how the batch is sharded.
        inputs = self.build(batched)
        keywords = {} if _is_array(jax.tree.leaves(inputs)[0]) else {"like": batched[0]}
        if isinstance(layer, nn.Module):
            rngs = {name: jax.random.key(i) for i, name in enumerate(self.entry.rngs)}
            outputs = layer.apply({"params": params}, *inputs, rngs=rngs, **keywords)
        else:
            outputs = layer(*inputs, **keywords)
        return [leaf for leaf in jax.tree.leaves(outputs) if _is_array(leaf)]

    def run_back(self, params: Any, batched: list[Any], axis: str | None = None) -> Any:
        """The gradients of parameters and floating point inputs."""
        floats = [x for x in batched if _is_float(x)]

        def loss(params: Any, floats: list[Any]) -> Any:
            remaining = iter(floats)
            joined = [next(remaining) if _is_float(x) else x for x in batched]
            outputs = self.run(params, joined)
            total = sum((jnp.sum(jnp.sin(x)) for x in outputs if _is_float(x)), start=jnp.zeros(()))
            return total if axis is None else jax.lax.psum(total, axis)

        return jax.grad(loss, (0, 1))(params, floats)

    def run_on_one_device(self) -> Any:
        params, batched = self.params, self.batched
        return quick_jit(self.run)(params, batched), quick_jit(self.run_back)(params, batched)

    def run_each_shard(self) -> Any:
        """What 8 devices compute that do not know of each other: each draws the same numbers."""
        run, run_back = quick_jit(self.run), quick_jit(self.run_back)
        shards = [[x[i : i + 1] for x in self.batched] for i in range(BATCH)]
        outputs = [run(self.params, shard) for shard in shards]
        gradients = [run_back(self.params, shard) for shard in shards]
        joined = [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
        of_params = jax.tree.map(lambda *parts: sum(parts), *[g[0] for g in gradients])
        of_inputs = [np.concatenate(x) for x in zip(*[g[1] for g in gradients], strict=True)]
        return joined, (of_params, of_inputs)


def _shard_mapped(problem: _Problem, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    in_specs = (REPLICATED, SHARDED)
    run = jax.shard_map(problem.run, mesh=mesh, in_specs=in_specs, out_specs=SHARDED)
    run_back = jax.shard_map(
        functools.partial(problem.run_back, axis="data"),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=(REPLICATED, SHARDED),
    )
    return run, run_back


def _embed_by_product(embed: nn.Embed, tokens: Any) -> Any:
    return jax.nn.one_hot(tokens, embed.num_embeddings) @ embed.embedding


def _enlarge(x: Any) -> Any:
    """A batch of 8 examples that differ where they are floats."""
    copies = np.concatenate([x] * (BATCH // x.shape[0]))
    if not _is_float(x):
        return copies
    scale = np.linspace(0.5, 1.5, BATCH, dtype=x.dtype)
    return copies * scale.reshape(BATCH, *[1] * (x.ndim - 1))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _is_float(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def _assert_close(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
