"""``cond`` and ``switch``: the branch that is chosen runs, and no other leaves a trace."""

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
from flax_extra.combinator._core.stack import flatten

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


class Counted(nn.Module):
    """Counts its calls, and records what it sees."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
        if self.is_mutable_collection("state"):
            count.value += 1
        self.sow("seen", "total", jnp.sum(x))
        return nn.Dense(4)(x)


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


# The laws


branches = st.lists(
    testing.pipelines(leaves=[nn.Dense(4), jnp.tanh, jnp.maximum], shape=(2, 4), max_depth=1),
    min_size=2,
    max_size=3,
)


def with_common_arity(fs: list[Any]) -> list[cb.Combinator]:
    """The same pipelines, changed to take and give as many items as one another."""
    n_in = max(1, *(f.signature.n_in for f in fs))
    wide = [cb.serial(testing.with_n_in(f, n_in)) for f in fs]
    n_out = min(f.signature.n_out for f in wide)
    return [cb.serial(f, cb.select(range(n_out), n_in=f.signature.n_out)) for f in wide]


@settings(max_examples=20)
@given(branches, st.data())
def test_the_branch_that_is_chosen_runs(fs, data):
    fs = with_common_arity(fs)
    # Each branch has a scope, so that its variables can be told from those of the others.
    scopes = [cb.serial(f, name=f"branch_{i}") for i, f in enumerate(fs)]
    index = data.draw(st.integers(0, len(fs) - 1))
    inputs = [X + i for i in range(fs[0].signature.n_in)]
    p = cb.switch(scopes)
    assert p.signature == cb.Signature(1 + fs[0].signature.n_in, fs[0].signature.n_out)
    made, variables = p.init_with_output(KEY, index, *inputs)
    # A layer that branches share has its variables in the first of them.
    alone = cb.serial(scopes[index])
    by_hand = alone.apply(cb.transfer(variables, p, alone), *inputs)
    close(p.apply(variables, index, *inputs), by_hand)
    close(jax.jit(p.apply)(variables, jnp.int32(index), *inputs), by_hand)
    close(made, by_hand)
    if len(fs) == 2:
        either = cb.cond(*scopes)
        close(either.init(KEY, True, *inputs), variables)
        close(either.apply(variables, index == 0, *inputs), by_hand)


@settings(max_examples=20)
@given(st.integers(0, 2), st.integers(1, 3))
def test_only_the_branch_that_runs_keeps_state(index, n_calls):
    p = cb.switch(Counted(), Counted(), Counted())
    variables = p.init(KEY, 0, X)
    assert [int(v["count"]) for v in variables["state"].values()] == [1, 1, 1]
    state = {"state": variables["state"]}
    for _ in range(n_calls):
        _, state = p.apply({**variables, **state}, index, X, mutable=["state"])
    expected = [1 + n_calls * (i == index) for i in range(3)]
    assert [int(v["count"]) for v in state["state"].values()] == expected


def test_only_the_branch_that_runs_has_gradients():
    p = cb.cond(nn.Dense(3), nn.Dense(3))
    variables = p.init(KEY, True, X)
    gradient = jax.grad(lambda v: p.apply(v, False, X).sum())(variables)["params"]
    assert not np.any(gradient["Dense_0"]["kernel"])
    assert np.any(gradient["Dense_1"]["kernel"])


# Variables and random numbers


def test_all_branches_make_their_variables_in_a_scope():
    p = cb.serial(cb.switch(nn.Dense(4), nn.LayerNorm(), cb.identity()), cb.drop())
    variables = p.init(KEY, 2, X)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "Switch_0": {
            "Dense_0": {"bias": (4,), "kernel": (4, 4)},
            "LayerNorm_0": {"bias": (4,), "scale": (4,)},
        }
    }
    assert cb.cond(jnp.sin, jnp.cos, name="choice").name == "choice"


def test_variables_are_made_outside_of_init_too():
    p = cb.cond(nn.Dense(4), nn.Dense(4))
    _, made = p.apply({}, True, X, rngs={"params": KEY}, mutable=["params"])
    close(made, p.init(KEY, True, X))


def test_one_instance_in_two_branches_and_outside_is_one_layer():
    d = nn.Dense(4)
    p = cb.serial(cb.dip(d), cb.cond(d, cb.serial(d, d)))
    variables = p.init(KEY, True, X)
    assert list(variables["params"]) == ["Dense_0"]
    dense = {"params": variables["params"]["Dense_0"]}
    twice = d.apply(dense, d.apply(dense, X))
    close(p.apply(variables, True, X), twice)
    close(p.apply(variables, False, X), d.apply(dense, twice))


def test_dropout_in_a_branch():
    p = cb.cond(nn.Dropout(0.5, deterministic=False), cb.identity())
    ones = jnp.ones((1, 1000))
    dropped = p.apply({}, True, ones, rngs={"dropout": KEY})
    assert 0.4 < float((dropped == 0).mean()) < 0.6
    close(p.apply({}, False, ones, rngs={"dropout": KEY}), ones)


def test_in_copies_steps_and_compact_methods():
    block = cb.keep(cb.serial(cb.swap(), cb.cond(nn.Dense(4), cb.identity())))
    tower = cb.repeat(block, 3)
    variables = tower.init(KEY, X, True)
    assert variables["params"]["Cond_0"]["Dense_0"]["kernel"].shape == (3, 4, 4)
    close(tower.apply(variables, X, False)[0], X)
    y = X
    for i in range(3):
        dense = jax.tree.map(lambda v, i=i: v[i], variables["params"]["Cond_0"]["Dense_0"])
        y = nn.Dense(4).apply({"params": dense}, y)
    close(tower.apply(variables, X, True)[0], y)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, first):
            return cb.cond(nn.Dense(4), nn.Dense(4))(first, x)

    model = Model()
    made = model.init(KEY, X, True)
    assert list(made["params"]) == ["Cond_0"]
    close(
        jax.jit(model.apply)(made, X, False),
        nn.Dense(4).apply({"params": made["params"]["Cond_0"]["Dense_1"]}, X),
    )


def test_each_row_chooses_for_itself_under_vmap():
    p = cb.vmap(cb.cond(jnp.tanh, jnp.square))
    rows = jnp.array([True, False])
    close(p(rows, X), jnp.stack([jnp.tanh(X[0]), X[1] ** 2]))


def test_items_that_are_no_arrays_pass_through_unchanged():
    def first(x: Any, n: int) -> tuple[Any, int, None]:
        return x[:n], n, None

    def last(x: Any, n: int) -> tuple[Any, int, None]:
        return x[-n:], n, None

    y, n, none = cb.cond(first, last)(False, X, 1)
    close(y, X[1:])
    assert (n, none) == (1, None)


def test_it_is_the_program_that_linen_has():
    class ByHand(nn.Module):
        @nn.compact
        def __call__(self, first, x):
            f, g = nn.Dense(3, name="Dense_0"), nn.Dense(3, name="Dense_1")
            if self.is_initializing():
                f(x)
                return g(x)
            return nn.cond(first, lambda _, x: f(x), lambda _, x: g(x), self, x)

    p = cb.cond(nn.Dense(3), nn.Dense(3))
    variables = p.init(KEY, True, X)
    testing.assert_same_program(p, ByHand(), jnp.bool_(True), X, variables=variables)


# Errors


def message(error: type[Exception], f: Any) -> str:
    with pytest.raises(error) as caught:
        f()
    return str(caught.value)


def test_branches_that_do_not_agree_in_arity():
    assert message(cb.SignatureError, lambda: cb.cond(nn.Dense(4), cb.add())) == (
        "cond runs one of its branches, so all take and give the same number of items: "
        "Dense(features=4) has 1 -> 1, add() has 2 -> 1. Pass items through, or drop them, for "
        "instance with cb.keep() or cb.drop()."
    )
    assert "abs has 1 -> 1, dup() has 1 -> 2" in message(
        cb.SignatureError, lambda: cb.switch(abs, cb.dup())
    )


def test_numbers_of_branches():
    assert message(ValueError, cb.switch) == (
        "switch takes at least one callable to choose from; got none."
    )
    assert message(TypeError, lambda: cb.Cond([abs])) == (
        "cond takes two callables, one for true and one for false; got 1. For another number of "
        "branches: cb.switch(...)."
    )
    assert cb.switch([abs, (jnp.sin,)], jnp.cos) == cb.Switch([abs, jnp.sin, jnp.cos])


@pytest.mark.parametrize(
    ("item", "found"),
    [(1, "1"), (1.0, "1.0"), (None, "None"), (X, "f32[2, 4]"), (jnp.array([True]), "bool[1]")],
)
def test_what_is_no_boolean(item, found):
    p = cb.serial(abs, cb.dip(cb.cond(jnp.sin, jnp.cos)))
    assert message(cb.SignatureError, lambda: p(-1, item, X)) == (
        f"serial[1] -> dip[0] -> cond takes from the top of the stack one boolean, which says what "
        f"runs; got {found}.\n"
        f"  stack: {found}, f32[2, 4]\n"
        f"  Compare the item (x > 0), or move the boolean to the top with cb.select(). For a boolean "
        f"for each row, run it for each row: cb.vmap(cb.cond(f, g), axis=0)."
    )


@pytest.mark.parametrize(
    ("item", "found"),
    [(True, "True"), (1.0, "1.0"), (jnp.array(True), "bool[]"), (jnp.arange(2), "i32[2]")],
)
def test_what_is_no_index(item, found):
    assert message(cb.SignatureError, lambda: cb.switch(jnp.sin, jnp.cos)(item, X)) == (
        f"switch takes from the top of the stack one integer, the number of the branch that runs; "
        f"got {found}.\n"
        f"  stack: {found}, f32[2, 4]\n"
        f"  Move the integer to the top with cb.select(). For a number for each row, run it for each "
        f"row: cb.vmap(cb.switch(...), axis=0)."
    )


@pytest.mark.parametrize("index", [-1, 2, np.int64(2), jnp.int32(-1)])
def test_a_number_that_no_branch_has(index):
    p = cb.switch(jnp.sin, jnp.cos)
    assert message(ValueError, lambda: p(index, X)) == (
        f"switch has 2 branches, numbered from 0; got number {int(index)}."
    )
    close(jax.jit(p)(index, X), [jnp.sin, jnp.cos][min(max(int(index), 0), 1)](X))


def test_outputs_that_differ():
    p = cb.cond(cb.dup(), cb.branch(cb.identity(), nn.Dense(3)))
    assert message(cb.SignatureError, lambda: p.init(KEY, True, X)) == (
        "cond runs one of its branches, so all give items of the same shape and dtype: item 1 is "
        "f32[2, 4] from the first branch, and f32[2, 3] from cond[1].\n"
        "  stack: True, f32[2, 4]\n"
        "  Project or cast the outputs of one branch."
    )
    for g in (lambda x: x.astype(jnp.bfloat16), lambda x: {"x": x}, lambda x: None, lambda x: 0):
        with pytest.raises(cb.SignatureError, match="all give items of the same shape"):
            cb.cond(cb.identity(), g)(True, X)


def test_a_branch_that_appends():
    p = cb.cond(Counted(), nn.Dense(4))
    variables = p.init(KEY, True, X)
    text = message(ValueError, lambda: p.apply(variables, True, X, mutable=["seen"]))
    assert text == (
        "cond runs one of its branches, and which one is not known when they are traced, so all "
        "keep the same variables: cond[0] makes or appends to 'Counted_0/total' in the collection "
        "'seen', and another does not. Initialise first; and leave 'seen' immutable if it records "
        "what a layer saw."
    )
    other_way = cb.cond(nn.Dense(4), Counted())
    text = message(ValueError, lambda: other_way.apply(variables, True, X, mutable=["seen"]))
    assert "cond[1] makes or appends to 'Counted_0/total'" in text
    stateless = {"params": variables["params"]}
    text = message(ValueError, lambda: p.apply(stateless, True, X, mutable=["state"]))
    assert "'Counted_0/count' in the collection 'state'" in text
    one = Counted()
    shared = cb.cond(one, cb.serial(one))
    made = shared.init(KEY, True, X)
    _, seen = shared.apply(made, True, X, mutable=["seen"])
    n_made = len(made["seen"]["Counted_0"]["total"])
    assert len(seen["seen"]["Counted_0"]["total"]) == n_made + 1


def test_a_layer_of_copies_is_not_shared_with_a_branch():
    d = nn.Dense(4)
    with pytest.raises(cb.SharingError, match=re.escape("both inside and outside of repeat")):
        cb.cond(d, cb.repeat(d, 2))


def test_what_a_branch_raises_has_a_note():
    p = cb.serial(cb.switch(jnp.sin, cb.serial(lambda x: x + jnp.ones((1, 3)))))
    with pytest.raises(TypeError) as caught:
        p(0, X)
    assert "serial[0] -> switch[1] -> serial[0] -> <lambda>" in caught.value.__notes__[0]


def test_shapes_and_text():
    p = cb.cond(nn.Dense(3), cb.serial(nn.Dense(8), nn.Dense(3)))
    assert cb.shape_signature(p, "bool[]", "f32[b, t, 4]") == "bool[], f32[b, t, 4] -> f32[b, t, 3]"
    assert str(p) == "cond(Dense(features=3), serial(Dense(features=8), Dense(features=3)))"
    assert str(cb.switch(abs, jnp.sin, name="act")) == "switch(abs, sin, name='act')"
    outputs = jax.eval_shape(p.init_with_output, KEY, True, X)[0]
    assert [x.shape for x in flatten(outputs)] == [(2, 3)]
    assert cb.cond(nn.Dense(3), nn.Dense(3))[1] == nn.Dense(3)
