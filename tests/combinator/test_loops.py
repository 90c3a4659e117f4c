"""State and randomness in loops: what the model unrolled by hand does is the reference."""

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

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
XS = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)


class Stateful(nn.Module):
    """Keeps state in the ways that linen offers: ``kinds`` says which."""

    kinds: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, ())
        total = jnp.sum(x)
        if "append" in self.kinds:
            self.sow("appended", "seen", total)
        if "append twice" in self.kinds:
            self.sow("appended", "twice", total)
            self.sow("appended", "twice", 2 * total)
        if "sum" in self.kinds:
            self.sow("losses", "sum", total, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))
        if "count" in self.kinds:
            count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
            count.value = count.value + 1
        if "pair" in self.kinds:
            pair = self.variable("state", "pair", lambda: (jnp.zeros(()), jnp.ones(())))
            pair.value = (pair.value[0] + total, 2 * pair.value[1])
        if "norm" in self.kinds:
            x = nn.BatchNorm(use_running_average=False, axis_name=None)(x)
        return jnp.tanh(x * w + 0.1)


KINDS = ["append", "append twice", "sum", "count", "pair", "norm"]
MUTABLE = ["appended", "losses", "state", "batch_stats"]


class Unrolled(nn.Module):
    """The same layer ``n`` times, as one would write it by hand."""

    kinds: tuple[str, ...]
    n: int

    @nn.compact
    def __call__(self, x):
        layer = Stateful(self.kinds)
        for _ in range(self.n):
            x = layer(x)
        return x


class UnrolledCell(nn.Module):
    """The same cell at each step, from the last to the first with ``reverse``."""

    kinds: tuple[str, ...]
    reverse: bool

    @nn.compact
    def __call__(self, carry, xs):
        layer, ys = Stateful(self.kinds), []
        steps = [xs[:, t] for t in range(xs.shape[1])]
        for x in reversed(steps) if self.reverse else steps:
            carry = layer(carry + x)
            ys.append(carry)
        return carry, jnp.stack(ys[::-1] if self.reverse else ys, 1)


def state_of(variables: Any, in_loop: bool, reverse: bool = False) -> Any:
    """All state. A loop stacks what is appended; by hand it is one entry after the other."""
    state = {k: v for k, v in variables.items() if k != "params"}
    state = jax.tree.map(np.asarray, state)
    if "appended" not in state:
        return state
    appended = {}
    for name, entries in next(iter(state["appended"].values())).items():
        arrays = np.stack(entries)
        if in_loop:  # [calls, turns]: by hand the turns come first
            n_per_turn = 2 if name == "twice" else 1
            arrays = arrays.reshape(-1, n_per_turn, arrays.shape[-1])
            if reverse:
                arrays = arrays[:, :, ::-1]
            arrays = np.swapaxes(arrays, 1, 2).reshape(-1)
        appended[name] = arrays
    return {**state, "appended": appended}


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


kinds_of_state = st.lists(st.sampled_from(KINDS), unique=True, max_size=3).map(tuple)


@settings(max_examples=40)
@given(kinds_of_state, st.integers(1, 4), st.booleans())
def test_shared_copies_keep_state_as_if_written_one_by_one(kinds, n, remat):
    p, by_hand = cb.repeat(Stateful(kinds), n, shared=True, remat=remat), Unrolled(kinds, n)
    ours, theirs = p.init(KEY, X), by_hand.init(KEY, X)
    assert_same(state_of(ours, True), state_of(theirs, False))
    for given_ours, given_theirs in (
        ({"params": ours["params"]}, {"params": theirs["params"]}),
        (ours, theirs),
    ):
        y, found = p.apply(given_ours, X, mutable=MUTABLE)
        expected, state = by_hand.apply(given_theirs, X, mutable=MUTABLE)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert_same(state_of(found, True), state_of(state, False))


@settings(max_examples=40)
@given(kinds_of_state, st.booleans(), st.integers(1, 3))
def test_steps_keep_state_as_if_written_one_by_one(kinds, reverse, length):
    cell = cb.serial(cb.add(), Stateful(kinds), cb.dup())
    p, by_hand = cb.scan(cell, reverse=reverse), UnrolledCell(kinds, reverse)
    xs = XS[:, :length]
    ours, theirs = p.init(KEY, X, xs), by_hand.init(KEY, X, xs)
    assert_same(state_of(ours, True, reverse), state_of(theirs, False))
    y, found = p.apply({"params": ours["params"]}, X, xs, mutable=MUTABLE)
    expected, state = by_hand.apply({"params": theirs["params"]}, X, xs, mutable=MUTABLE)
    assert_same(y, expected)
    assert_same(state_of(found, True, reverse), state_of(state, False))
    y, found = p.apply(ours, X, xs, mutable=True)
    expected, state = by_hand.apply(theirs, X, xs, mutable=True)
    assert_same(y, expected)
    assert_same(state_of(found, True, reverse), state_of(state, False))


def test_copies_with_parameters_of_their_own_have_state_of_their_own():
    p = cb.repeat(Stateful(("sum", "count", "append")), 3)
    _, state = p.apply({"params": p.init(KEY, X)["params"]}, X, mutable=MUTABLE)
    shapes = jax.tree.map(jnp.shape, state)
    assert shapes["state"]["Stateful_0"]["count"] == (3,)
    assert shapes["losses"]["Stateful_0"]["sum"] == (3,)
    assert shapes["appended"]["Stateful_0"]["seen"] == ((3,),)


def test_a_loop_without_turns_makes_parameters_alone():
    for p, inputs in (
        (cb.repeat(Stateful(tuple(KINDS)), 0, shared=True), (X,)),
        (cb.scan(cb.serial(cb.add(), Stateful(tuple(KINDS)), cb.dup())), (X, XS[:, :0])),
    ):
        variables = p.init(KEY, *inputs)
        assert list(variables["params"]["Stateful_0"])[-1:] == ["w"] or variables["params"]
        leaves = jax.tree.leaves({k: v for k, v in variables.items() if k != "params"})
        assert leaves == []


def test_state_of_a_layer_that_belongs_to_another_scope():
    layer = Stateful(("count", "sum", "append"))
    p = cb.serial(layer, cb.repeat(layer, 3, shared=True))
    variables = p.init(KEY, X)
    assert variables["state"]["Stateful_0"]["count"] == 4
    _, state = p.apply({"params": variables["params"]}, X, mutable=["state"])
    assert state["state"]["Stateful_0"]["count"] == 4


def test_a_collection_of_both_kinds_is_refused():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("both", "seen", x.sum())
            self.sow("both", "sum", x.sum(), reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))
            return x

    message = (
        "In repeat, each step or copy appends to 'Mixed_0/seen' in the collection 'both', and "
        "replaces 'Mixed_0/sum' there."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        cb.repeat(Mixed(), 2, shared=True).apply({}, X, mutable=["both"])


# A cache is the state of a stream: each copy has its own.


class Cached(nn.Module):
    """Adds the inputs of all calls so far."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.constant(0.5), ())
        total = self.variable("cache", "total", jnp.zeros, x.shape)
        if not self.is_initializing():
            total.value = total.value + x
        return w * total.value + x


class CachedCopies(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x, totals):
        w = self.param("w", nn.initializers.constant(0.5), ())
        new = []
        for total in totals:
            new.append(total + x)
            x = w * new[-1] + x
        return x, jnp.stack(new)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("remat", [False, True])
def test_shared_copies_have_a_cache_each(n, remat):
    p = cb.repeat(Cached(), n, shared=True, remat=remat)
    variables = p.init(KEY, X)
    assert jax.tree.map(jnp.shape, variables["cache"]) == {"Cached_0": {"total": (n, 2, 4)}}
    totals, by_hand = jnp.zeros((n, 2, 4)), CachedCopies(n)
    cache = variables["cache"]
    for step in range(3):
        y, state = p.apply({**variables, "cache": cache}, X + step, mutable=["cache"])
        cache = state["cache"]
        expected, totals = by_hand.apply({"params": {"w": 0.5}}, X + step, totals)
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        np.testing.assert_allclose(cache["Cached_0"]["total"], totals, rtol=1e-6)


def test_linens_cached_attention_in_shared_copies():
    attention = nn.MultiHeadDotProductAttention(2, decode=True)
    p = cb.repeat(cb.residual(attention), 3, shared=True)
    x = jax.random.normal(KEY, (2, 5, 4))
    variables = p.init(KEY, x)
    causal = nn.make_causal_mask(x[..., 0])
    whole = x
    plain = nn.MultiHeadDotProductAttention(2)
    for _ in range(3):
        inner = {"params": variables["params"]["MultiHeadDotProductAttention_0"]}
        whole = whole + plain.apply(inner, whole, mask=causal)
    cache, found = variables["cache"], []
    for t in range(5):
        y, state = p.apply({**variables, "cache": cache}, x[:, t : t + 1], mutable=["cache"])
        cache = state["cache"]
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-5)


# Items that each copy has of its own


class Layer(nn.Module):
    """A layer with an input of its own, beneath the carry, and outputs of its own."""

    @nn.compact
    def __call__(self, x, memory, scale) -> tuple[Any, Any, Any, Any]:
        y = jnp.tanh(nn.Dense(4)(x) * scale)
        return y, memory + y.sum(), y, {"norm": jnp.square(y).sum(-1)}


class Layers(nn.Module):
    n: int
    shared: bool

    @nn.compact
    def __call__(self, x, memory, scales):
        layers = [Layer() for _ in range(1 if self.shared else self.n)] * self.n
        states, norms = [], []
        for layer, scale in zip(layers, scales, strict=False):
            x, memory, state, norm = layer(x, memory, scale)
            states.append(state)
            norms.append(norm)
        stack = lambda *entries: jnp.stack(entries)
        return x, memory, jnp.stack(states), jax.tree.map(stack, *norms)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("remat", [False, True, jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize("n", [1, 3])
def test_each_copy_takes_and_gives_entries_of_its_own(n, remat, shared):
    p = cb.repeat(Layer(), n, n_carry=2, shared=shared, remat=remat)
    assert p.signature == cb.Signature(3, 4)
    scales = jnp.arange(1.0, 1.0 + n)
    memory = jnp.zeros(())
    variables = p.init(KEY, X, memory, scales)
    by_hand = Layers(n, shared)
    if shared:
        apart = {"params": variables["params"]}
    else:
        apart = cb.unstack_layers({"params": {"all": variables["params"]}}, "all", into="{}")
        apart = {"params": {f"Layer_{i}": apart["params"][str(i)]["Layer_0"] for i in range(n)}}

    def loss(f, variables):
        def total(variables, x, scales):
            outputs = f.apply(variables, x, memory, scales)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(outputs))

        return jax.grad(total, (1, 2))(variables, X, scales)

    assert_same(p.apply(variables, X, memory, scales), by_hand.apply(apart, X, memory, scales))
    assert_same(loss(p, variables), loss(by_hand, apart))


def test_no_copies_give_no_entries():
    p = cb.repeat(Layer(), 0, n_carry=2)
    y, variables = p.init_with_output(KEY, X, jnp.zeros(()), jnp.zeros((0,)))
    assert jax.tree.map(jnp.shape, y) == ((2, 4), (), (0, 2, 4), {"norm": (0, 2)})
    assert_same(p.apply(variables, X, jnp.zeros(()), jnp.zeros((0,))), y)


def test_an_item_without_arrays_is_the_same_for_every_copy():
    def attend(x, mask) -> Any:
        return x if mask is None else x * mask

    p = cb.repeat(cb.fn(attend), 3, n_carry=1)
    masks = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(p(X, masks), 6 * X, rtol=1e-6)
    np.testing.assert_allclose(p(X, None), X)
    dense = cb.repeat(cb.parallel(nn.Dense(4), cb.drop()), 3, n_carry=1)
    variables = dense.init(KEY, X, None)
    assert dense.apply(variables, X, None).shape == (2, 4)


def test_a_key_for_each_copy():
    p = cb.repeat(cb.fn(lambda x, key: x + jax.random.normal(key, x.shape)), 3, n_carry=1)
    keys = jax.random.split(KEY, 3)
    expected = X + sum(jax.random.normal(key, X.shape) for key in keys)
    np.testing.assert_allclose(p(X, keys), expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_handed_on():
    p = cb.repeat(nn.Dense(3), 2, n_carry=0)
    xs = jnp.stack([X, 2 * X])
    ys, variables = p.init_with_output(KEY, xs)
    members = cb.vmap(nn.Dense(3), shared=False)
    np.testing.assert_allclose(ys, members.apply(variables, xs), rtol=1e-5, atol=1e-6)


def test_shapes_of_entries():
    p = cb.repeat(Layer(), 6, n_carry=2)
    found = cb.shape_signature(p, "f32[b, t, 4]", "f32[]", "f32[6]")
    assert str(found) == (
        "f32[b, t, 4], f32[], f32[6] -> f32[b, t, 4], f32[], f32[6, b, t, 4], dict('norm': f32[6, b, t])"
    )
    assert str(p) == "repeat(Layer(), 6, n_carry=2)"


def test_entries_that_are_missing():
    p = cb.serial(cb.repeat(Layer(), 3, n_carry=2))
    for scales, text in ((jnp.ones(2), "f32[2]"), (jnp.ones(()), "f32[]")):
        with pytest.raises(cb.SignatureError) as caught:
            p.init(KEY, X, jnp.zeros(()), scales)
        assert str(caught.value) == (
            f"serial[0] -> repeat runs 3 copies, and each takes an entry of item 2, which has a "
            f"leading axis of size 3; got {text}.\n"
            f"  stack: f32[2, 4], f32[], {text}\n"
            f"  Stack one entry for each copy. An item that is the same for all goes through the "
            f"carry: cb.repeat(f, n, n_carry=...)."
        )


@pytest.mark.parametrize(
    ("f", "text", "signature"),
    [
        (nn.Dense(4), "Dense(features=4)", "1 -> 1"),
        (cb.dup(), "dup()", "1 -> 2"),
        (cb.add(), "add()", "2 -> 1"),
    ],
)
def test_more_is_carried_than_goes_in_and_out(f, text, signature):
    with pytest.raises(cb.SignatureError) as caught:
        cb.repeat(f, 3, n_carry=2)
    assert str(caught.value) == (
        f"repeat hands 2 items from copy to copy, so f takes and gives at least as many; got {text} "
        f"with signature {signature}. Let it give back every item that is handed on, or say how "
        f"many there are: cb.repeat(f, n, n_carry=...)."
    )


# Randomness


@pytest.mark.parametrize("rngs", [KEY, {"params": KEY}, {"dropout": KEY}])
def test_each_step_and_copy_has_random_numbers_of_its_own(rngs):
    drop = nn.Dropout(0.5, deterministic=False)
    ones = jnp.ones((6, 50))
    _, ys = cb.scan(cb.dip(drop), axis=0).apply({}, jnp.zeros(()), ones, rngs=rngs)
    assert len({tuple(row) for row in np.asarray(ys).tolist()}) == 6
    for shared in (False, True):
        y = cb.repeat(drop, 4, shared=shared).apply({}, jnp.ones((1, 1000)), rngs=rngs)
        assert 0.03 < float((y != 0).mean()) < 0.1  # four independent halvings


def test_masking_falls_back_to_the_parameters_stream_too():
    from flax_extra import layer as xn

    layer = xn.TrainablePositionalMasking(0.5)
    cell = cb.dip(layer)
    xs = jnp.ones((6, 1, 40))
    variables = cb.scan(cell, axis=0).init(KEY, jnp.zeros(()), xs)
    _, ys = cb.scan(cb.dip(xn.TrainablePositionalMasking(0.5)), axis=0).apply(
        variables, jnp.zeros(()), jnp.ones((6, 40, 40)), rngs=KEY
    )
    assert len({tuple(row) for row in np.asarray(ys[..., 0]).tolist()}) == 6


# Names of the axis, and variables of another number of copies


def partitioned(names: tuple[Any, ...]) -> nn.Dense:
    return nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), names))


@pytest.mark.parametrize("axis_name", ["layers", "stage", None])
def test_the_axis_of_the_copies_has_the_name_that_one_chooses(axis_name):
    p = cb.repeat(partitioned((None, "model")), 3, axis_name=axis_name)
    spec = nn.get_partition_spec(p.init(KEY, X))["params"]["Dense_0"]["kernel"]
    assert spec == jax.sharding.PartitionSpec(axis_name, None, "model")
    p.apply(p.init(KEY, X), X)


def test_nested_repeats_name_their_axes_apart():
    p = cb.repeat(cb.repeat(cb.repeat(partitioned(("in", "out")), 2), 2), 2)
    kernel = p.init(KEY, X)["params"]["Repeat_0"]["Repeat_0"]["Dense_0"]["kernel"]
    assert kernel.names == ("layers_2", "layers_1", "layers", "in", "out")


def test_variables_of_another_number_of_copies():
    variables = cb.repeat(nn.Dense(4), 3).init(KEY, X)
    message = (
        "repeat runs 4 copies, each with variables of its own on a leading axis of size 4; "
        "params/Dense_0/bias is f32[3, 4]."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        cb.repeat(nn.Dense(4), 4).apply(variables, X)


def test_sequences_of_different_lengths():
    cell = cb.fn(lambda c, x, y: (c, x + y), n_in=3, n_out=2)
    message = "scan runs over axis 1 of its sequences, whose lengths differ: 3, 2."
    with pytest.raises(cb.SignatureError, match=re.escape(message)):
        cb.scan(cell, n_carry=1)(X, XS, XS[:, :2])
