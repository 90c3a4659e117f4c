"""What devices exchange in the training of a decoder, read from the compiled program.

Parameters are sharded by the library's rules, and the copies of a block run in the loop of a
``repeat``. Gradients go through every kind of parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.layer.entries import LAYER_ENTRIES, Entry
from tests.mesh.programs import list_collectives, list_loops

BATCH, TIME, FEATURES, HIDDEN = 16, 8, 32, 64
RULES = {"data": {}, "tensor": {"tensor": "model"}, "FSDP": {"fsdp": "data"}}

BLOCKS = {"Attention", "KVQAttention", "SelfAttention", "FeedForward", "FeedForward: gated"}

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def mesh_of(*shape: int) -> Mesh:
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2, devices=devices)


def decoder(n_layers: int) -> cb.Combinator:
    layer = cb.fn(xn.SelfAttention(n_heads=8, causal=True), mask=None)
    attention = cb.residual(nn.LayerNorm(), layer)
    block = attention >> cb.residual(nn.LayerNorm(), xn.FeedForward(HIDDEN // FEATURES))
    return cb.serial(
        cb.fn(jax.lax.with_sharding_constraint, shardings=P("data")), cb.repeat(block, n_layers)
    )


@functools.cache
def compile_gradient(shape: tuple[int, int], kind: str, n_layers: int = 3) -> Any:
    """Loss and gradient of a decoder on a mesh, compiled for parameters and inputs."""
    mesh, model = mesh_of(*shape), decoder(n_layers)
    inputs = jax.ShapeDtypeStruct(
        (BATCH, TIME, FEATURES), jnp.float32, sharding=NamedSharding(mesh, P("data"))
    )
    with jax.set_mesh(mesh):
        params = jax.eval_shape(model.init, jax.random.key(0), inputs)
        rules = {name: axis for part in kind.split(" x ") for name, axis in RULES[part].items()}
        where = cb.shardings(params, mesh, xn.layer_rules(**rules))

        def loss(params: Any, inputs: Any) -> Any:
            return jnp.mean(jnp.square(model.apply(params, inputs)))

        gradient = quick_jit(
            jax.value_and_grad(loss),
            in_shardings=(where, inputs.sharding),
            out_shardings=(None, where),
        )
        return gradient.lower(params, inputs).compile()


def count_parameters(n_layers: int = 3) -> int:
    params = jax.eval_shape(
        cb.serial(*decoder(n_layers)[1:]).init, jax.random.key(0), jnp.ones((1, TIME, FEATURES))
    )
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_data_parallel_reduces_the_gradients_and_nothing_else() -> None:
    n_layers = 3
    found = list_collectives(compile_gradient((8, 1), "data", n_layers))
    assert {c.kind for c in found} == {"all-reduce"}
    # Those of a layer within the loop, as soon as they are known.
    reduced = sum(c.size * (n_layers if c.loop else 1) for c in found)
    assert reduced == count_parameters(n_layers) + 1  # and the loss


@pytest.mark.parametrize(("shape", "n_data"), [((1, 8), 1), ((4, 2), 4)])
def test_tensor_parallel_reduces_once_for_each_half_of_a_block(
    shape: tuple[int, int], n_data: int
) -> None:
    found = list_collectives(compile_gradient(shape, "tensor"))
    assert {c.kind for c in found} == {"all-reduce"}
    activations = (BATCH // n_data, TIME, FEATURES)
    forward, backward = list_loops(found)
    assert [c.shapes for c in forward] == [(activations,)] * 2
    halves = [c.shapes for c in backward if set(c.shapes) == {activations}]
    # XLA adds up what query, key and value hand back and reduces it, or reduces the three at once.
    assert sorted(map(len, halves)) in ([1, 1], [1, 3])
    gradients = [c for c in backward if c.shapes not in halves]
    assert len(gradients) == (n_data > 1)  # those of a layer


@pytest.mark.parametrize(("shape", "kind"), [((8, 1), "FSDP"), ((4, 2), "FSDP x tensor")])
def test_fsdp_gathers_the_parameters_of_one_layer_at_a_time(
    shape: tuple[int, int], kind: str
) -> None:
    found = list_collectives(compile_gradient(shape, kind))
    kernels = 4 * FEATURES**2 + 2 * FEATURES * HIDDEN
    forward, backward = list_loops(found)
    for loop in (forward, backward):
        gathered = [c for c in loop if c.kind == "all-gather"]
        assert sum(c.size for c in gathered) == kernels // shape[1]
    assert [c for c in found if c.kind == "all-gather" and not c.loop] == []
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}


def test_the_memory_of_a_device_falls_with_fsdp() -> None:
    sizes = {
        kind: compile_gradient(shape, kind, n_layers=12).memory_analysis()
        for shape, kind in [((8, 1), "data"), ((8, 1), "FSDP"), ((4, 2), "FSDP x tensor")]
    }
    kernel_bytes = 4 * 12 * (4 * FEATURES**2 + 2 * FEATURES * HIDDEN)
    whole = sizes["data"]
    for kind in ("FSDP", "FSDP x tensor"):
        saved = whole.argument_size_in_bytes - sizes[kind].argument_size_in_bytes
        assert saved >= kernel_bytes * 7 // 8
        assert sizes[kind].output_size_in_bytes < whole.output_size_in_bytes / 4
    # What is gathered of one layer is gone with the next.
    assert sizes["FSDP"].temp_size_in_bytes <= whole.temp_size_in_bytes + 2 * kernel_bytes // 12


@pytest.mark.parametrize("kind", ["data", "tensor", "FSDP", "FSDP x tensor"])
def test_a_program_does_not_grow_with_the_number_of_layers(kind: str) -> None:
    shape = {"data": (8, 1), "FSDP": (8, 1), "tensor": (1, 8)}.get(kind, (4, 2))
    few, many = (compile_gradient(shape, kind, n).as_text().count("\n") for n in (3, 24))
    assert many <= few * 1.02


@pytest.mark.parametrize(
    "entry",
    [
        e
        for e in LAYER_ENTRIES
        if e.name
        in {"Attention", "KVQAttention", "SelfAttention", "FeedForward", "FeedForward: gated"}
    ],
    ids=lambda entry: entry.name,
)
def test_a_layer_sharded_by_the_rules_reduces_once(entry: Entry) -> None:
    """Heads, or hidden features, on two devices; the values are those of one."""
    layer = entry.make({})
    variables = {
        "params": {
            f"{type(layer).__name__}_0": layer.init(jax.random.key(0), *entry.inputs())["params"]
        }
    }
    model, mesh = cb.serial(layer), mesh_of(1, 2)
    expected = model.apply(variables, *entry.inputs())
    where = cb.shardings(variables, mesh, xn.layer_rules(tensor="model"))
    sharded = jax.device_put(variables, where)
    program = quick_jit(model.apply).lower(sharded, *entry.inputs()).compile()
    (found,) = list_collectives(program)
    assert (found.kind, found.size) == ("all-reduce", expected.size)
    np.testing.assert_allclose(program(sharded, *entry.inputs()), expected, atol=1e-5)
