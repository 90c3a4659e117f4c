"""Shardings by rules: which rule decides, how its spec is aligned, and every refusal."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_extra import combinator as cb
from flax_extra import layer as xn

MESH = AbstractMesh((4, 2), ("data", "model"))


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


TREE = {
    "params": {
        "Dense_0": {"kernel": struct(8, 4), "bias": struct(4)},
        "Repeat_0": {"Dense_0": {"kernel": struct(3, 4, 16), "bias": struct(3, 16)}},
    }
}


def specs(found: Any) -> dict[str, P]:
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in leaves
    }


def test_a_rule_serves_a_layer_its_copies_and_the_moments() -> None:
    variables = TREE, optax.adam(1.0).init(jax.tree.map(lambda x: jnp.zeros(x.shape), TREE))
    found = specs(cb.shardings(variables, MESH, [("Dense_0/kernel", P("data", "model"))]))
    kernels = {path: spec for path, spec in found.items() if path.endswith("kernel")}
    assert len(kernels) == 6
    for path, spec in kernels.items():
        assert spec == (P(None, "data", "model") if "Repeat_0" in path else P("data", "model"))
    others = [spec for path, spec in found.items() if path not in kernels]
    assert set(others) <= {P(), P(None), P(None, None)}


def test_the_first_rule_decides() -> None:
    rules = [("Repeat_0/Dense_0/kernel", P("model")), ("Dense_0/kernel", P("data", None))]
    found = specs(cb.shardings(TREE, MESH, rules))
    assert found["params/Repeat_0/Dense_0/kernel"] == P(None, None, "model")
    assert found["params/Dense_0/kernel"] == P("data", None)


def test_a_pattern_matches_whole_names_at_the_end() -> None:
    tree = {name: struct(8) for name in ("up", "warm_up", "up_2")} | {"a": {"up": struct(2, 8)}}
    found = specs(cb.shardings(tree, MESH, [("up", P("model"))]))
    assert found == {"up": P("model"), "warm_up": P(), "up_2": P(), "a/up": P(None, "model")}
    # A choice within a pattern needs no parentheses.
    found = specs(cb.shardings(tree, MESH, [("warm_up|up_2", P("model"))]))
    assert found == {"up": P(), "warm_up": P("model"), "up_2": P("model"), "a/up": P()}


def test_without_rules_every_device_holds_everything() -> None:
    for leaf in jax.tree.leaves(cb.shardings(TREE, MESH)):
        assert leaf == NamedSharding(MESH, P())


def test_several_axes_share_one_axis() -> None:
    found = cb.shardings(struct(3, 16), MESH, [("", P(("data", "model")))])
    assert found.shard_shape((3, 16)) == (3, 2)


def test_an_axis_may_be_left_to_xla() -> None:
    (found,) = specs(cb.shardings([struct(3, 16)], MESH, [("0", P(P.UNCONSTRAINED))])).values()
    assert found == P(None, P.UNCONSTRAINED)


def test_leaves_that_are_no_arrays_are_whole() -> None:
    tree = {"step": 3, "key": jax.random.key(0), "none": None, "x": struct(4)}
    found = cb.shardings(tree, MESH, [("x", P("data"))])
    assert specs(found) == {"step": P(), "key": P(), "x": P("data")}
    assert found["none"] is None


def test_a_box_of_metadata_has_one_sharding() -> None:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("in", "out"))
    model = cb.repeat(nn.Dense(4, kernel_init=init), 2)
    abstract = jax.eval_shape(model.init, jax.random.key(0), struct(1, 4))
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    found = cb.shardings(abstract, mesh, [("kernel", P("model"))])
    assert found["params"]["Dense_0"]["kernel"] == NamedSharding(mesh, P(None, None, "model"))
    made = jax.jit(model.init, out_shardings=found)(jax.random.key(0), jnp.ones((1, 4)))
    assert made["params"]["Dense_0"]["kernel"].names == ("layers", "in", "out")


def test_the_state_of_a_stream() -> None:
    model = nn.Embed(16, 8) >> cb.repeat(cb.residual(xn.LSTM(8, return_sequences=True)), 3)
    stream = cb.stream(model, "i32[b, t]")
    rules = [("position", P("data")), ("LSTM_0/[ch]", P("data", None))]
    found = cb.shardings(stream.state_shapes(4), MESH, rules)
    assert isinstance(found, cb.StreamState)
    assert found.position.spec == P("data")
    cache = found.cache["Repeat_0"]["LSTM_0"]
    assert cache["h"].spec == P(None, "data", None)
    assert cache["position"].spec == P(None, "data")


@dataclasses.dataclass(frozen=True)
class Drawn:
    shape: tuple[int, ...]
    spec: P


@st.composite
def drawn_specs(draw: Any) -> Drawn:
    """An array, and a spec for some of its last axes; sizes may or may not divide."""
    shape = tuple(draw(st.lists(st.integers(1, 16), max_size=4)))
    axes = draw(st.permutations(["data", "model", None, None]))
    joined = draw(st.sampled_from([axes, [("data", "model"), None, None, None]]))
    return Drawn(shape, P(*joined[: draw(st.integers(0, 4))]))


@given(drawn_specs())
def test_shards_are_what_the_spec_says_or_it_is_refused(drawn: Drawn) -> None:
    rules = [("x", drawn.spec)]
    n_devices = {None: 1, **MESH.shape, ("data", "model"): 8}
    sizes = [n_devices[entry] for entry in drawn.spec]
    n_whole = len(drawn.shape) - len(sizes)
    per_axis = [1] * n_whole + sizes
    fits = n_whole >= 0 and all(
        size % n == 0 for size, n in zip(drawn.shape, per_axis, strict=True)
    )
    if not fits:
        with pytest.raises(ValueError, match=r"^Some arrays cannot be sharded as the rules say\."):
            cb.shardings({"x": struct(*drawn.shape)}, MESH, rules)
        return
    found = cb.shardings({"x": struct(*drawn.shape)}, MESH, rules)["x"]
    expected = tuple(size // n for size, n in zip(drawn.shape, per_axis, strict=True))
    assert found.shard_shape(drawn.shape) == expected


PATHS = (
    "The paths are 'params/Dense_0/bias', 'params/Dense_0/kernel', "
    "'params/Repeat_0/Dense_0/bias', 'params/Repeat_0/Dense_0/kernel'."
)
REMEDY = (
    "  Change their sizes or the mesh, or put a rule first that leaves them whole: "
    "(path, PartitionSpec())."
)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [("Dense_1/kernel", P("model"))],
            (
                "This sharding rule matches no array: 'Dense_1/kernel'. A pattern matches the end of a "
                f"path. Correct it, or leave it out. {PATHS}"
            ),
        ),
        (
            [("kernel", P("model")), ("scale", P()), ("ense_0/bias", P())],
            (
                "These sharding rules match no array: 'scale', 'ense_0/bias'. A pattern matches the end "
                f"of a path. Correct them, or leave them out. {PATHS}"
            ),
        ),
        (
            [("kernel", P("model")), ("Dense_0/kernel", P("data"))],
            (
                "The sharding rule 'Dense_0/kernel' is never used: earlier rules match all its arrays. "
                "'params/Dense_0/kernel', for one, has the rule 'kernel'. Put the narrower rule first, "
                "or leave one out."
            ),
        ),
        (
            [cb.ShardingRule("scale", P("model"), is_optional=True)],
            (
                "None of the 1 sharding rules matches an array, so every device would hold all of them. "
                "Add rules for these paths: 'params/Dense_0/bias', 'params/Dense_0/kernel', "
                "'params/Repeat_0/Dense_0/bias', 'params/Repeat_0/Dense_0/kernel'."
            ),
        ),
        (
            [("kernel", P(None, "modle"))],
            (
                "The sharding rule 'kernel' has the spec P(None, 'modle'), and the mesh has no "
                "axis 'modle'. It has 'data', 'model'."
            ),
        ),
        (
            [("kernel", P("model", ("data", "model")))],
            (
                "The sharding rule 'kernel' has the spec P('model', ('data', 'model')), "
                "which uses the mesh axis 'model' more than once. A mesh axis can shard one axis of an "
                "array."
            ),
        ),
        (
            [("kernel", P(("data", "model"))), ("bias", P(None, None, "model"))],
            (
                "Some arrays cannot be sharded as the rules say.\n"
                "  params/Dense_0/bias is f32[4], and the rule 'bias' has a spec for 3 axes: P(None, "
                "None, 'model')\n"
                "  params/Dense_0/kernel is f32[8, 4]: 4 does not divide among the 8 devices of 'data' x "
                "'model', as the rule 'kernel' asks\n"
                "  params/Repeat_0/Dense_0/bias is f32[3, 16], and the rule 'bias' has a spec for 3 "
                "axes: P(None, None, 'model')\n"
                f"{REMEDY}"
            ),
        ),
        (
            [("kernel(", P("model"))],
            "The pattern of a sharding rule is a regular expression; 'kernel(' is none:",
        ),
    ],
)
def test_rules_that_do_not_suit_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        cb.shardings(TREE, MESH, rules)
    if not message.endswith(":"):
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cb.shardings(TREE, MESH, [("kernel", ("data", "model"))]),
            (
                "A sharding rule is a pattern and a jax.sharding.PartitionSpec, such as "
                "('Dense_0/kernel', PartitionSpec(None, 'model')); got ('kernel', ('data', 'model'))."
            ),
        ),
        (
            lambda: cb.shardings(TREE, MESH, ["kernel"]),
            (
                "A sharding rule is a pattern and a jax.sharding.PartitionSpec, such as "
                "('Dense_0/kernel', PartitionSpec(None, 'model')); got 'kernel'."
            ),
        ),
        (
            lambda: cb.shardings(TREE, {"data": 8}, ()),
            (
                "shardings takes a mesh, such as jax.make_mesh((4, 2), ('data', 'model')); got "
                "{'data': 8}."
            ),
        ),
    ],
)
def test_wrong_kinds_are_refused(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        call()


def test_many_misfits_are_cut() -> None:
    tree = {f"x_{i}": struct(3) for i in range(20)}
    with pytest.raises(ValueError, match=r"\n  \.\.\.\n") as caught:
        cb.shardings(tree, MESH, [(r"x_\d+", P("model"))])
    assert str(caught.value).count("f32[3]") == 8


def test_factored_moments_need_a_rule_of_their_own() -> None:
    """The factors of Adafactor have other shapes than the parameter that they belong to."""
    params = {"kernel": jnp.zeros((256, 128))}
    state = optax.adafactor(1e-3).init(params)
    with pytest.raises(ValueError, match=r"v_row/kernel is f32\[128\], and the rule"):
        cb.shardings((params, state), MESH, [("kernel", P("data", "model"))])
    rules = [("v(_row|_col)?/.*", P()), ("kernel", P("data", "model"))]
    assert specs(cb.shardings((params, state), MESH, rules))["0/kernel"] == P("data", "model")
