"""The library's sharding rules: each kernel of each layer has one, and each rule has a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.layer.entries import LAYER_ENTRIES, Entry

MESH = AbstractMesh((1, 1), ("data", "model"))
WITH_PARAMETERS = [entry for entry in LAYER_ENTRIES if entry.param_shapes]


def list_specs(entry: Entry, **axes: str) -> dict[str, P]:
    """The spec of each parameter of an entry, as a step of a pipeline."""
    kind = type(entry.make({})).__name__
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        {f"{kind}_0": entry.param_shapes, "Embed_0": {"embedding": (8, 8)}},
        is_leaf=lambda node: isinstance(node, tuple),
    )
    found = cb.shardings({"params": shapes}, MESH, xn.layer_rules(**axes))["params"]
    del found["Embed_0"]  # which a rule of either kind matches
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in leaves
    }


@pytest.mark.parametrize("entry", WITH_PARAMETERS, ids=lambda entry: entry.name)
def test_every_kernel_is_split_by_fsdp(entry: Entry) -> None:
    """A layer whose kernels no rule knows fails here: add them to the table of the rules."""
    for path, spec in list_specs(entry, fsdp="data").items():
        if path.endswith("kernel"):
            assert "data" in spec, path
        else:
            assert set(spec) <= {None}, path


@pytest.mark.parametrize(
    "entry",
    [e for e in WITH_PARAMETERS if re.match("[A-Za-z]*Attention|FeedForward", e.name)],
    ids=lambda entry: entry.name,
)
def test_blocks_are_split_by_columns_and_then_by_rows(entry: Entry) -> None:
    for path, spec in list_specs(entry, tensor="model").items():
        is_last = "/out/" in path or "/Dense_1/" in path
        if "position_bias" in path:
            assert spec == P(None, "model"), path  # by heads, too
        elif not is_last and "Attention" in path:
            assert spec == P(*[None] * (len(spec) - 2), "model", None), path  # by heads
        elif not is_last:
            assert spec == P(*[None] * (len(spec) - 1), "model"), path  # by hidden features
        elif path.endswith("kernel"):
            assert spec == P("model", None), path
        else:  # added after the all-reduce
            assert set(spec) <= {None}, path


def test_without_axes_there_are_no_rules() -> None:
    assert xn.layer_rules() == ()


def list_patterns() -> Iterator[Any]:
    for rule in xn.layer_rules(tensor="model", fsdp="data"):
        yield pytest.param(rule, id=rule.pattern)


@pytest.mark.parametrize("rule", list(list_patterns()))
def test_every_rule_has_a_parameter(rule: cb.ShardingRule) -> None:
    paths = [
        f"{type(entry.make({})).__name__}_0/{'/'.join(path)}"
        for entry in WITH_PARAMETERS
        for path in list_paths(entry.param_shapes)
    ]
    paths += ["Embed_0/embedding", "EmbedDecoding_0/bias"]
    assert [path for path in paths if re.fullmatch(f"(.*/)?({rule.pattern})", path)]


def list_paths(shapes: Any) -> Iterator[tuple[str, ...]]:
    for name, inner in shapes.items():
        if isinstance(inner, tuple):
            yield (name,)
        else:
            yield from ((name, *rest) for rest in list_paths(inner))


def test_names_that_only_end_alike_are_left_alone() -> None:
    """``input_gate`` is no ``gate``, and a layer of linen's is no layer of ours."""
    model = cb.serial(nn.Dense(4, name="stop_gate"), nn.Dense(4), xn.FeedForward(gated=True))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))["params"]
    found = cb.shardings(params, MESH, xn.layer_rules(tensor="model"))
    assert found["stop_gate"]["kernel"].spec == P()
    assert found["Dense_0"]["kernel"].spec == P()
    assert found["FeedForward_0"]["gate"]["kernel"].spec == P(None, "model")
