"""Stacked variables and those of single layers: the same model, there and back."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_extra import combinator as cb

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)


def stacked(block: Any, n: int, **options: Any) -> cb.Combinator:
    return nn.Dense(4) >> cb.serial(cb.repeat(block(), n, **options), name="body") >> nn.LayerNorm()


def apart(block: Any, n: int) -> cb.Combinator:
    layers = [cb.serial(block(), name=f"layers_{i}") for i in range(n)]
    return nn.Dense(4) >> cb.serial(layers, name="body") >> nn.LayerNorm()


class Counted(nn.Module):
    """A layer with a state."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        count = self.variable("counts", "calls", jnp.zeros, ())
        count.value += 1
        return nn.Dense(4)(x) + count.value


def split(block: cb.Combinator) -> Any:
    return cb.residual(nn.LayerNorm(), nn.Dense(8), nn.gelu, nn.Dense(4)) >> block


BLOCKS = {
    "dense": lambda: nn.Dense(4),
    "residual": lambda: split(cb.identity()),
    "state": lambda: split(cb.serial(Counted(), nn.BatchNorm(use_running_average=False))),
    "nested": lambda: cb.residual(nn.Dense(4)) >> cb.repeat(cb.residual(nn.Dense(4), jnp.tanh), 2),
    "named": lambda: cb.serial(nn.Dense(4, name="a"), cb.serial(nn.Dense(4), name="b")),
}


def assert_same(a: Any, b: Any, **tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("options", [{}, {"remat": True}, {"unroll": 2}], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_checkpoint_of_one_loads_in_the_other(block: str, options: Any) -> None:
    loop, layers = stacked(BLOCKS[block], 3, **options), apart(BLOCKS[block], 3)
    variables = loop.init(KEY, X)
    singles = cb.unstack_layers(variables, "body/Repeat_0")
    assert jax.tree.map(jnp.shape, singles) == jax.tree.map(jnp.shape, layers.init(KEY, X))
    changing = [name for name in variables if name != "params"]
    y, changed = loop.apply(variables, X, mutable=changing)
    z, changed_singles = layers.apply(singles, X, mutable=changing)
    np.testing.assert_allclose(y, z, atol=1e-3)  # batch norm multiplies rounding
    if changing:
        back = cb.stack_layers(changed_singles, "body/layers_{}", into="Repeat_0")
        assert_same(back, changed, rtol=1e-3, atol=1e-3)
    assert_same(cb.stack_layers(singles, "body/layers_{}", "Repeat_0"), variables)


@settings(max_examples=15)
@given(st.sets(st.sampled_from(list(BLOCKS)), min_size=1), st.integers(1, 3))
def test_there_and_back_is_the_identity(blocks: Any, n: int) -> None:
    repeated = cb.repeat(cb.serial(BLOCKS[name]() for name in sorted(blocks)), n)
    # Numbers that differ in every leaf, without compiling what initialises them.
    draw = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(repeated.init, KEY, X),
    )
    singles = cb.unstack_layers(variables, "")
    assert sorted(singles["params"]) == [f"layers_{i}" for i in range(n)]
    assert_same(cb.stack_layers(singles, "layers_{}", into=""), variables)


def test_a_repeat_within_a_repeat_is_taken_apart_in_turn() -> None:
    outer = cb.repeat(cb.serial(cb.repeat(nn.Dense(4), 3)), 2)
    variables = outer.init(KEY, X)
    singles = cb.unstack_layers(variables, "", into="outer_{}")
    for i in range(2):
        singles = cb.unstack_layers(singles, f"outer_{i}/Repeat_0", into="inner_{}")
    kernel = variables["params"]["Repeat_0"]["Dense_0"]["kernel"]
    found = singles["params"]["outer_1"]["inner_2"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(found, kernel[1, 2])


def test_metadata_gains_and_loses_the_axis() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    loop = cb.repeat(nn.Dense(4, kernel_init=init), 3)
    variables = loop.init(KEY, X)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert kernel.names == ("layers", "in", "out")
    singles = cb.unstack_layers(variables, "")
    assert singles["params"]["layers_1"]["Dense_0"]["kernel"].names == ("in", "out")
    back = cb.stack_layers(singles, "layers_{}", into="")
    assert back["params"]["Dense_0"]["kernel"].names == kernel.names


@pytest.mark.parametrize("name", ["stage", None])
def test_metadata_has_the_axis_name_of_the_repeat(name: str | None) -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    variables = cb.repeat(nn.Dense(4, kernel_init=init), 3, axis_name=name).init(KEY, X)
    singles = cb.unstack_layers(variables, "")
    back = cb.stack_layers(singles, "layers_{}", into="", axis_name=name)
    assert back["params"]["Dense_0"]["kernel"].names == (name, "in", "out")


def test_metadata_of_a_repeat_within_a_repeat_goes_there_and_back() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    inner = cb.repeat(nn.Dense(4, kernel_init=init), 3)
    variables = cb.repeat(cb.serial(nn.Dense(4, kernel_init=init), inner), 2).init(KEY, X)
    singles = cb.unstack_layers(variables, "", into="outer_{}")["params"]
    assert singles["outer_1"]["Dense_0"]["kernel"].names == ("in", "out")
    assert singles["outer_1"]["Repeat_0"]["Dense_0"]["kernel"].names == ("layers", "in", "out")
    back = cb.stack_layers({"params": singles}, "outer_{}", into="")
    assert nn.get_partition_spec(back) == nn.get_partition_spec(variables)
    kernel = back["params"]["Repeat_0"]["Dense_0"]["kernel"]
    assert kernel.names == ("layers_1", "layers", "in", "out")


@settings(max_examples=10)
@given(st.sets(st.sampled_from(list(BLOCKS)), min_size=1), st.integers(1, 3), st.booleans())
def test_abstract_variables_go_the_same_way(blocks: Any, n: int, is_boxed: bool) -> None:
    """Shapes, dtypes and shardings are those that arrays would have."""
    repeated = cb.repeat(cb.serial(BLOCKS[name]() for name in sorted(blocks)), n)
    abstract = jax.eval_shape(repeated.init, KEY, X)
    mesh = AbstractMesh((2, 2), ("data", "model"))
    sharded = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "model"))
            if leaf.ndim > 1
            else None,
        ),
        abstract,
    )
    if is_boxed:
        sharded = jax.tree.map(lambda leaf: nn.Partitioned(leaf, ("layers",)), sharded)
    singles = cb.unstack_layers(sharded, "")
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sharded)
    expected = jax.tree.map(jnp.shape, cb.unstack_layers(zeros, ""))
    assert jax.tree.map(jnp.shape, singles) == expected
    for leaf in jax.tree.leaves(singles):
        assert leaf.ndim == 0 or leaf.sharding.spec == P(*[None] * (leaf.ndim - 1), "model")
    back = cb.stack_layers(singles, "layers_{}", into="")
    assert jax.tree.structure(back) == jax.tree.structure(sharded)
    assert jax.tree.leaves(back) == jax.tree.leaves(sharded)


def test_moments_of_an_optimizer_go_the_same_way() -> None:
    loop, layers = stacked(BLOCKS["residual"], 3), apart(BLOCKS["residual"], 3)
    adam = optax.adam(1e-2)

    def steps(model: Any, variables: Any, state: Any) -> Any:
        gradient = jax.grad(lambda v: (model.apply(v, X) ** 3).sum())(variables)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(variables, updates), state

    variables = loop.init(KEY, X)
    variables, state = steps(loop, variables, adam.init(variables))

    def converted(tree: Any) -> Any:
        return cb.unstack_layers(tree, "body/Repeat_0")

    moments = state[0]._replace(mu=converted(state[0].mu), nu=converted(state[0].nu))
    after, _ = steps(layers, converted(variables), (moments, *state[1:]))
    expected, _ = steps(loop, variables, state)
    assert_same(after, converted(expected), rtol=1e-4, atol=1e-5)


VARIABLES = stacked(BLOCKS["dense"], 2).init(KEY, X)
SINGLES = cb.unstack_layers(VARIABLES, "body/Repeat_0")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cb.unstack_layers(VARIABLES, "Repeat_0"),
            (
                "unstack_layers finds no variables in 'Repeat_0'. There are some in 'Dense_0', "
                "'LayerNorm_0', 'body/Repeat_0/Dense_0'."
            ),
        ),
        (
            lambda: cb.unstack_layers(VARIABLES, "", into="x_{}"),
            (
                "unstack_layers takes the variables of a repeat, whose leading axes are one number of "
                "copies; those in '' are params/Dense_0/kernel: 4, params/Dense_0/bias: 4, "
                "params/body/Repeat_0/Dense_0/bias: 2, params/body/Repeat_0/Dense_0/kernel: 2, "
                "params/LayerNorm_0/scale: 4, params/LayerNorm_0/bias: 4."
            ),
        ),
        (
            lambda: cb.unstack_layers(VARIABLES, "body/Repeat_0", into="layers"),
            (
                "unstack_layers takes for into the name of a scope with {} for its number, such as "
                "'layers_{}'; got 'layers'."
            ),
        ),
        (
            lambda: cb.unstack_layers({"params": {"a": {"w": X}, "a_0": X}}, "a", into="a_{}"),
            "unstack_layers would put 'a_0/w' where there is something. Change into='a_{}'.",
        ),
        (
            lambda: cb.stack_layers(SINGLES, "layers_{}", "Repeat_0"),
            (
                "stack_layers finds no variables in 'layers_{}'. There are some in 'Dense_0', "
                "'LayerNorm_0', 'body/layers_0/Dense_0', 'body/layers_1/Dense_0'."
            ),
        ),
        (
            lambda: cb.stack_layers({"params": {"a_0": {"w": X}, "a_2": {"w": X}}}, "a_{}", "a"),
            (
                "stack_layers finds 2 of 'a_{}' with 'w', and none with number 1. Copies are numbered "
                "from 0, and each has the same variables."
            ),
        ),
        (
            lambda: cb.stack_layers({"params": {"a_0": {"w": X}, "a_1": {"w": X[0]}}}, "a_{}", "a"),
            (
                "stack_layers stacks copies of one layer; 'w' is f32[2, 3, 4] in 'a_0' and f32[3, 4] in "
                "'a_1'."
            ),
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
