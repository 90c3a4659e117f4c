"""``ring_attend``: the numbers of ``attend``, and memory in proportion to a device's part of time."""

from __future__ import annotations

import functools
import re
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
from tests.layer.attend_reference import normal, quick_jit
from tests.mesh.programs import list_collectives

BATCH, TIME, HEADS, KV_HEADS = 2, 16, 4, 2
QUERY, KEY = normal(BATCH, TIME, HEADS, 8), normal(BATCH, TIME, KV_HEADS, 8, seed=1)
VALUE = normal(BATCH, TIME, KV_HEADS, 6, seed=2)
PADDING = np.random.default_rng(3).random((BATCH, 1, TIME)) < 0.5
MASK = np.random.default_rng(4).random((BATCH, 1, TIME, TIME)) < 0.3

ring = functools.partial(xn.ring_attend, axis="time")


def make_mesh(data: int, time: int, axis_type: AxisType = AxisType.Auto) -> Mesh:
    devices = jax.devices()[: data * time]
    return jax.make_mesh((data, time), ("data", "time"), (axis_type,) * 2, devices=devices)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "padding": (PADDING, {"logit_cap": 2.0}),
    "causal": (None, {"causal": True}),
    "window": (PADDING, {"causal": True, "window": 3, "scale": 0.5}),
    "mask": (MASK, {"causal": True}),  # queries that see no key included
}


def differentiate(attend: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Values, and the derivatives of both modes."""
    f = functools.partial(attend, mask=mask)
    vectors, pullback = jax.vjp(f, query, key, value)
    dot = jax.jvp(f, (query, key, value), (jnp.cos(query), jnp.sin(key), value))[1]
    return vectors, pullback(jnp.cos(vectors)), dot


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    ("case", "kind"),
    [*[(case, "auto") for case in CASES], ("causal", "explicit"), ("causal", "shard_map")],
)
def test_numbers_are_those_of_attend(case: str, kind: str) -> None:
    mask, options = CASES[case]
    one, other = (
        functools.partial(differentiate, functools.partial(attend, **options), mask=mask)
        for attend in (xn.attend, ring)
    )
    expected = quick_jit(one)(QUERY, KEY, VALUE)
    mesh = make_mesh(2, 4, AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    spec = P("data", "time")
    if kind == "shard_map":
        other = jax.shard_map(other, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    with jax.set_mesh(mesh):
        placed = jax.device_put((QUERY, KEY, VALUE), NamedSharding(mesh, spec))
        found = quick_jit(other)(*placed)
    assert found[0].sharding.shard_shape(found[0].shape) == (1, TIME // 4, HEADS * 6)
    assert_close(found, expected)


def test_second_derivatives() -> None:
    def differentiate_twice(attend: Any, query: Any) -> Any:
        def loss(query: Any) -> Any:
            return jnp.sum(jnp.sin(attend(query, KEY, VALUE, causal=True)))

        return jax.jvp(jax.grad(loss), (query,), (jnp.cos(query),))[1]

    expected = quick_jit(functools.partial(differentiate_twice, xn.attend))(QUERY)
    with jax.set_mesh(make_mesh(1, 2)):
        found = quick_jit(functools.partial(differentiate_twice, ring))(QUERY)
    assert_close(found, expected)


def test_fewer_queries_than_keys() -> None:
    """The last query is at the position of the last key."""
    expected = xn.attend(QUERY[:, -8:], KEY, VALUE, causal=True, window=5)
    with jax.set_mesh(make_mesh(1, 4)):
        found = quick_jit(functools.partial(ring, causal=True, window=5))(QUERY[:, -8:], KEY, VALUE)
    assert_close(found, expected)


def make_layer(**fields: Any) -> cb.Combinator:
    layer = xn.SelfAttention(n_heads=4, causal=True, rotary=xn.RotaryEncoding(), **fields)
    return cb.residual(nn.LayerNorm(), cb.fn(layer, mask=None))


def test_a_layer_goes_around_the_ring_in_a_loop() -> None:
    x = normal(1, 32, 32)
    one, other = (cb.repeat(make_layer(**f), 2) for f in ({}, {"attention_fn": ring}))
    variables = one.init(jax.random.key(0), x)
    with jax.set_mesh(make_mesh(1, 8)):
        found = quick_jit(other.apply)(variables, x)
    assert_close(found, one.apply(variables, x))


@functools.cache
def compile_gradient(n_devices: int, time: int) -> Any:
    mesh, model = make_mesh(1, n_devices), make_layer(attention_fn=ring)
    x = jax.ShapeDtypeStruct((1, time, 64), "f4", sharding=NamedSharding(mesh, P(None, "time")))
    with jax.set_mesh(mesh):
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        gradient = jax.grad(lambda params, x: model.apply(params, x).sum(), (0, 1))
        step = jax.jit(gradient, out_shardings=(NamedSharding(mesh, P()), x.sharding))
        return step.lower(params, x).compile()


def test_memory_is_in_proportion_to_the_part_of_a_device() -> None:
    def measure(n_devices: int, time: int) -> int:
        return compile_gradient(n_devices, time).memory_analysis().temp_size_in_bytes

    tiles = measure(1, 2048)  # what a tile takes, and a part of 2,048 positions
    assert measure(8, 8 * 2048) < 1.4 * tiles
    assert measure(8, 8 * 2048) < measure(1, 8 * 2048) / 2


def test_devices_hand_keys_on_and_gather_nothing() -> None:
    found = list_collectives(compile_gradient(8, 8 * 2048))
    assert {c.kind for c in found} == {"collective-permute", "all-reduce"}
    part = 2048 * 64
    assert max(c.size for c in found if c.kind == "collective-permute") <= part
    assert max(c.size for c in found if c.kind == "all-reduce") < part  # gradients


def test_errors() -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(
            "ring_attend splits time over the mesh axis 'time', and there is no mesh. Run it in a "
            "context: with jax.set_mesh(mesh)."
        ),
    ):
        ring(QUERY, KEY, VALUE)
    with (
        jax.set_mesh(make_mesh(2, 4)),
        pytest.raises(
            ValueError,
            match=re.escape(
                "ring_attend splits time over the mesh axis 'tiem', and the mesh has 'data', 'time'."
            ),
        ),
    ):
        xn.ring_attend(QUERY, KEY, VALUE, axis="tiem")
    with (
        jax.set_mesh(make_mesh(1, 8)),
        pytest.raises(
            ValueError,
            match=re.escape(
                "ring_attend splits time_q over the 8 devices of 'time'; 10 does not divide among "
                "them. Pad the sequence."
            ),
        ),
    ):
        ring(QUERY[:, :10], KEY, VALUE)
