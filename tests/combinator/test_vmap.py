"""``vmap``: a callable over one more axis, and ensembles."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import testing

KEY = jax.random.key(0)
N = 3
X = jnp.linspace(-1.0, 1.0, 2 * N * 4).reshape(2, N, 4)


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def take(tree: Any, i: int, axis: int = 0) -> Any:
    return jax.tree.map(lambda x: jnp.take(x, i, axis=axis), tree)


def stack(trees: list[Any], axis: int = 0) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x, axis), *trees)


# The laws


members = testing.pipelines(
    leaves=[nn.Dense(4), nn.LayerNorm(), jnp.tanh, jnp.maximum], shape=(2, 4), max_depth=2
)


@settings(max_examples=40)
@given(members, st.integers(0, 2), st.booleans(), st.data())
def test_each_member_runs_by_itself(f, axis, shared, data):
    items = [jax.tree.map(jnp.asarray, data.draw(testing.inputs_for(f))) for _ in range(N)]
    inputs = stack(items, axis)
    p = cb.vmap(f, axis, shared=shared, n=N)
    assert p.signature == cb.Signature(f.signature.n_in, f.signature.n_out)
    y, variables = p.init_with_output(KEY, *inputs)
    one = [variables if shared else take(variables, i) for i in range(N)]
    by_hand = cb.serial(f)  # a remat that is no outermost one has a scope of its own
    expected = stack([by_hand.apply(v, *x) for v, x in zip(one, items, strict=True)], axis)
    close(y, expected)
    close(jax.jit(p.apply)(variables, *inputs), expected)


def test_members_are_initialized_alike_if_shared_and_apart_if_not():
    shared = cb.vmap(nn.Dense(4), 1).init(KEY, X)
    assert shared["params"]["Dense_0"]["kernel"].shape == (4, 4)
    apart = cb.vmap(nn.Dense(4), 1, shared=False).init(KEY, X)["params"]["Dense_0"]["kernel"]
    assert apart.shape == (N, 4, 4)
    assert not jnp.allclose(apart[0], apart[1])


def test_it_is_the_program_that_linen_has():
    class ByHand(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=1,
                out_axes=1,
            )
            return over(4, name="Dense_0")(x)

    p = cb.vmap(nn.Dense(4), 1, shared=False)
    testing.assert_same_program(p, ByHand(), X, variables=p.init(KEY, X))


# Axes


def test_an_axis_for_each_input_and_one_for_the_outputs():
    p = cb.vmap(jnp.subtract, axis=(1, None), out_axis=-1)
    rows = jnp.ones((2, 4))
    close(p(X, rows), jnp.moveaxis(X, 1, -1) - rows[..., None])
    close(cb.vmap(jnp.subtract, axis=(-2, None))(X, rows), X - rows[:, None])


def test_items_that_hold_no_arrays_are_the_same_for_all():
    def scale(x: Any, mask: Any, factor: int) -> Any:
        return x * factor if mask is None else x

    close(cb.vmap(scale, 1)(X, None, 3), 3 * X)
    pair = cb.vmap(lambda d: {"sum": d["a"] + d["b"]}, 1)({"a": X, "b": X})
    close(pair, {"sum": 2 * X})


def test_it_passes_through_what_it_does_not_take():
    y, z = cb.vmap(jnp.tanh, 0)(X, "beneath")
    close(y, jnp.tanh(X))
    assert z == "beneath"


# Variables and random numbers


def test_an_ensemble_is_converted_to_scopes_and_back():
    ensemble = nn.Dense(4) >> cb.vmap(nn.Dense(2), (None,), shared=False, n=5)
    x = X[:, 0]
    y, variables = ensemble.init_with_output(KEY, x)
    apart = cb.unstack_layers(variables, "Vmap_0", into="member_{}")
    shapes = {"Dense_0": {"bias": (2,), "kernel": (4, 2)}}
    assert jax.tree.map(jnp.shape, apart["params"]["member_4"]) == shapes
    branches = [cb.serial(nn.Dense(2), name=f"member_{i}") for i in range(5)]
    close(stack((nn.Dense(4) >> cb.branch(branches)).apply(apart, x)), y)
    close(cb.stack_layers(apart, "member_{}", into="Vmap_0"), variables)


def test_each_member_has_state_and_random_numbers_of_its_own():
    norm = cb.vmap(nn.BatchNorm(use_running_average=False), 1)
    variables = norm.init(KEY, X)
    assert variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (N, 4)
    assert variables["params"]["BatchNorm_0"]["scale"].shape == (4,)
    _, after = norm.apply(variables, X, mutable=["batch_stats"])
    close(after["batch_stats"]["BatchNorm_0"]["mean"], 0.01 * X.mean(0))

    ones = jnp.ones((N, 100))
    dropped = cb.vmap(nn.Dropout(0.5, deterministic=False), 0).apply(
        {}, ones, rngs={"dropout": KEY}
    )
    assert len({tuple(row) for row in (dropped > 0).tolist()}) == N


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("around", [cb.remat, lambda f: cb.repeat(f, 2, shared=True)])
def test_state_of_members_in_other_transforms(shared, around):
    f = cb.vmap(nn.BatchNorm(use_running_average=False), 1, shared=shared)
    variables = around(f).init(KEY, X)
    mean = variables["batch_stats"]["Vmap_0"]["BatchNorm_0"]["mean"]
    assert mean.shape == (N, 4)
    _, after = around(f).apply(variables, X, mutable=["batch_stats"])
    assert jax.tree.map(jnp.shape, after["batch_stats"]) == jax.tree.map(
        jnp.shape, variables["batch_stats"]
    )


def test_variables_are_made_outside_of_init_too():
    p = cb.vmap(nn.Dense(4), 1)
    _, made = p.apply({}, X, rngs={"params": KEY}, mutable=["params"])
    close(made, p.init(KEY, X))


def test_one_instance_inside_and_outside_is_one_layer_if_shared():
    d = nn.Dense(4)
    p = cb.serial(d, cb.vmap(cb.serial(d, d), 1))
    variables = p.init(KEY, X)
    assert list(variables["params"]) == ["Dense_0"]
    close(p.apply(variables, X), cb.serial(d, d, d).apply(variables, X))
    with pytest.raises(cb.SharingError, match="both inside and outside of vmap"):
        cb.serial(d, cb.vmap(d, 1, shared=False))


def test_partition_names():
    d = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    variables = cb.vmap(cb.repeat(d, 2), 1, shared=False).init(KEY, X)
    assert variables["params"]["Repeat_0"]["Dense_0"]["kernel"].names == (
        "layers_1",
        "layers",
        "in",
        "out",
    )
    shared = cb.vmap(d, 1).init(KEY, X)
    assert shared["params"]["Dense_0"]["kernel"].names == ("in", "out")


def test_shapes_and_text():
    p = cb.vmap(nn.Dense(3), 1, shared=False)
    assert cb.shape_signature(p, "f32[b, 5, t, 4]") == "f32[b, 5, t, 4] -> f32[b, 5, t, 3]"
    assert str(p) == "vmap(Dense(features=3), axis=1, shared=False)"
    assert str(cb.vmap(jnp.add, (0, None))) == "vmap(add, axis=(0, None))"
    assert p[0] == nn.Dense(3)


# Errors


def message(error: type[Exception], f: Any) -> str:
    with pytest.raises(error) as caught:
        f()
    return str(caught.value)


def test_another_number_of_axes():
    assert message(cb.SignatureError, lambda: cb.vmap(jnp.add, axis=(0, 1, 0))) == (
        "vmap takes an axis for each input, or one for all; got axis=(0, 1, 0) for a callable with "
        "signature 2 -> 1. Give one entry for each input."
    )


@pytest.mark.parametrize("fields", [{"axis": "0"}, {"axis": (0.5,)}, {"out_axis": 1.5}, {"n": "3"}])
def test_what_is_no_number(fields):
    ((name, value),) = fields.items()
    found = value[0] if isinstance(value, tuple) else value
    assert message(TypeError, lambda: cb.vmap(jnp.abs, **fields)) == (
        f"vmap takes an integer for {name}; got {found!r}."
    )
    assert message(ValueError, lambda: cb.vmap(jnp.abs, n=0)) == (
        "vmap takes n of at least 1; got 0."
    )


def test_no_members_and_unequal_members():
    assert message(cb.SignatureError, lambda: cb.vmap(jnp.abs, (None,))(X)) == (
        "vmap runs on each member of an axis, and no input has that axis.\n"
        "  stack: f32[2, 3, 4]\n"
        "  Say how many members there are: cb.vmap(f, axis, n=...)."
    )
    remedy = (
        "  Give all inputs one number of members, or None as the axis of those that all members "
        "share: cb.vmap(f, axis=(0, None))."
    )
    assert message(cb.SignatureError, lambda: cb.vmap(jnp.add, (0, 1))(X, X)) == (
        f"vmap runs on each member of an axis, whose sizes differ: 2, 3.\n"
        f"  stack: f32[2, 3, 4], f32[2, 3, 4]\n{remedy}"
    )
    assert message(cb.SignatureError, lambda: cb.vmap(jnp.abs, 1, n=5)(X)) == (
        f"vmap, with n=5, runs on each member of an axis, whose sizes differ: 3.\n"
        f"  stack: f32[2, 3, 4]\n{remedy}"
    )


def test_an_item_without_the_axis():
    remedy = (
        "  Choose another axis, or None for an input that all members share: cb.vmap(f, axis=(0, "
        "None)); for the outputs, cb.vmap(f, out_axis=...)."
    )
    assert message(cb.SignatureError, lambda: cb.vmap(jnp.add, 1)(X, 1.0 * X[0, 0])) == (
        f"vmap runs over axis 1, and its input f32[4] has no room for one.\n"
        f"  stack: f32[2, 3, 4], f32[4]\n{remedy}"
    )
    assert message(cb.SignatureError, lambda: cb.vmap(jnp.sum, 1)(X)) == (
        f"vmap runs over axis 1, and its output f32[] has no room for one.\n"
        f"  stack: f32[2, 3, 4]\n{remedy}"
    )


def test_variables_of_another_number_of_members():
    p = cb.vmap(nn.Dense(4), 1, shared=False)
    variables = p.init(KEY, X)
    assert message(ValueError, lambda: p.apply(variables, X[:, :2])) == (
        "vmap runs 2 members, each with variables of its own on a leading axis of size 2; "
        "params/Dense_0/bias is f32[3, 4]. The variables are those of another number of members: "
        "initialise again, or give it inputs for as many members as there are."
    )


def test_state_of_a_layer_that_is_also_used_outside():
    norm = nn.BatchNorm(use_running_average=False)
    p = cb.serial(norm, cb.vmap(norm, 1))
    text = message(ValueError, lambda: p.init(KEY, X))
    assert text == (
        "In vmap, each member has a state of its own, and BatchNorm, which is also used outside of "
        "it, has one state for all in the collection 'batch_stats'. Make a second instance."
    )


def test_what_a_member_raises_has_a_note():
    p = cb.serial(cb.vmap(cb.serial(lambda x: x + jnp.ones((1, 7))), 1))
    with pytest.raises(TypeError) as caught:
        p(X)
    assert re.search(r"serial\[0\] -> vmap\[0\] -> serial\[0\]", caught.value.__notes__[0])
