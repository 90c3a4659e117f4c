"""Every parameter of every layer can carry a name for each of its axes.

An entry of the conformance list says which of its fields initialize its parameters, and how their
axes are called. A layer that is added without them fails here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.layer.entries import LAYER_ENTRIES, Entry
from tests.layer.multimodal_entries import MULTIMODAL_ENTRIES

WITH_PARAMETERS = [entry for entry in (*LAYER_ENTRIES, *MULTIMODAL_ENTRIES) if entry.param_shapes]

every_entry = pytest.mark.parametrize("entry", WITH_PARAMETERS, ids=lambda entry: entry.name)


@every_entry
def test_every_parameter_carries_the_names_of_its_axes(entry: Entry) -> None:
    params = _init(_make_named(entry), entry)
    for path, leaf in _list_boxes(params):
        assert isinstance(leaf, nn.LogicallyPartitioned), f"{path} has no names"
        assert len(leaf.names) == leaf.value.ndim, f"{path} has {leaf.names}"
    assert jax.tree.map(np.shape, nn.unbox(params)) == entry.param_shapes
    assert {leaf.names for _, leaf in _list_boxes(params)} <= set(entry.initializers.values())


@every_entry
def test_partition_specs_and_shardings_follow_from_the_names(entry: Entry) -> None:
    params = _init(_make_named(entry), entry)
    specs = nn.get_partition_spec(params)
    expected = [PartitionSpec(*leaf.names) for _, leaf in _list_boxes(params)]
    assert jax.tree.leaves(specs, is_leaf=_is_spec) == expected
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    names = sorted({name for spec in expected for name in spec})
    for sharded in names:
        rules = [(name, "model" if name == sharded else None) for name in names]
        shardings = jax.tree.leaves(nn.logical_to_mesh_sharding(specs, mesh, rules))
        for spec, sharding in zip(expected, shardings, strict=True):
            axes = ["model" if name == sharded else None for name in spec]
            assert sharding == NamedSharding(mesh, PartitionSpec(*axes))


@pytest.mark.parametrize(
    "entry", [entry for entry in WITH_PARAMETERS if entry.repeatable], ids=lambda entry: entry.name
)
def test_copies_of_a_repeat_add_an_axis_to_the_names(entry: Entry) -> None:
    alone, repeated = (
        _list_boxes(_init(layer, entry))
        for layer in (_make_named(entry), cb.repeat(_make_named(entry), 2))
    )
    assert [leaf.names for _, leaf in repeated] == [("layers", *leaf.names) for _, leaf in alone]


def test_a_pipeline_is_sharded_by_the_names_of_its_axes() -> None:
    """Linen's layers and ours, a repeat in a repeat; boxes, specs and shardings agree."""

    def named(*names: str) -> Any:
        return nn.with_logical_partitioning(nn.initializers.normal(1.0), names)

    attention = xn.SelfAttention(
        n_heads=2,
        kernel_init=named("embed", "heads", "kv"),
        bias_init=named("heads", "kv"),
        out_kernel_init=named("heads", "embed"),
        out_bias_init=named("embed"),
    )
    feed_forward = xn.FeedForward(
        widening_factor=2,
        kernel_init=named("embed", "mlp"),
        bias_init=named("mlp"),
        out_kernel_init=named("mlp", "embed"),
        out_bias_init=named("embed"),
    )
    block = cb.serial(
        cb.residual(cb.fn(attention, mask=None)), cb.repeat(cb.residual(feed_forward), 2)
    )
    model = nn.Embed(16, 4, embedding_init=named("vocab", "embed")) >> cb.repeat(block, 3)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5), int))
    specs = nn.get_partition_spec(abstract)["params"]
    outer = specs["Repeat_0"]
    assert specs["Embed_0"]["embedding"] == PartitionSpec("vocab", "embed")
    assert outer["SelfAttention_0"]["query"]["kernel"] == PartitionSpec(
        "layers_1", "embed", "heads", "kv"
    )
    assert outer["Repeat_0"]["FeedForward_0"]["Dense_1"]["kernel"] == PartitionSpec(
        "layers_1", "layers", "mlp", "embed"
    )
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = [
        *[("layers", None), ("layers_1", None), ("kv", None), ("embed", "data")],
        *[("vocab", "model"), ("heads", "model"), ("mlp", "model")],
    ]
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)
    # Rules for the ends of paths say the same.
    by_path = cb.shardings(abstract, mesh, xn.layer_rules(tensor="model", fsdp="data"))

    def pad(sharding: NamedSharding, leaf: Any) -> tuple[Any, ...]:
        return (*sharding.spec, *[None] * (jnp.ndim(nn.unbox(leaf)) - len(sharding.spec)))

    flat = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=_is_box)
    pairs = zip(jax.tree.leaves(shardings), jax.tree.leaves(by_path), strict=True)
    for (path, leaf), (by_name, found) in zip(flat, pairs, strict=True):
        if jnp.ndim(nn.unbox(leaf)) > 3 or "embedding" in jax.tree_util.keystr(path):
            assert pad(by_name, leaf) == pad(found, leaf), path
    made = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), jnp.zeros((1, 5), int))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, abstract)


@every_entry
def test_initializers_are_called_as_given(entry: Entry) -> None:
    """A user's initializer gets the dtype of the parameters, and its numbers are not changed."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.full(shape, 1.5, dtype)

    initializers = dict.fromkeys(entry.initializers, init)
    layer = entry.make({"param_dtype": jnp.bfloat16, **initializers})
    for leaf in jax.tree.leaves(layer.init(_rngs(entry), *entry.inputs())["params"]):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, 1.5)


# What the tests are written with.


def _make_named(entry: Entry) -> Any:
    return entry.make(
        {
            field: nn.with_logical_partitioning(nn.initializers.normal(1.0), names)
            for field, names in entry.initializers.items()
        }
    )


def _init(layer: Any, entry: Entry) -> Any:
    return jax.eval_shape(lambda: layer.init(_rngs(entry), *entry.inputs()))["params"]


def _rngs(entry: Entry) -> dict[str, Any]:
    return {name: jax.random.key(seed) for seed, name in enumerate(("params", *entry.rngs))}


def _list_boxes(params: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
