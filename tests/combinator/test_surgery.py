"""``layers``, ``replace``, ``transfer`` and copies of a ``repeat``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import testing

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 4))
SHARED = nn.Dense(4)

leaves = st.one_of(
    st.builds(nn.Dense, st.just(4)),
    st.builds(nn.Dense, st.just(4), use_bias=st.just(False), name=st.none()),
    st.builds(nn.LayerNorm),
    st.builds(nn.BatchNorm, use_running_average=st.just(True)),
    st.just(SHARED),
    st.just(jnp.tanh),
    st.just(jnp.maximum),
)
pipelines = testing.pipelines(leaves=leaves, shape=(2, 4))
# A slice of others takes a boolean, or a number.
sliceable = testing.pipelines(
    leaves=leaves,
    shape=(2, 4),
    combinators=testing.COMBINATORS - {"cond", "switch", "scan", "hold"},
)


def inputs_of(p: cb.Combinator) -> list[Any]:
    return [X + i for i in range(p.signature.n_in)]


def abstract(p: cb.Combinator) -> Any:
    """The shapes of the variables; each leaf is an object of its own."""
    return jax.eval_shape(p.init, KEY, *inputs_of(p))


def numbered(p: cb.Combinator) -> Any:
    """Variables with values that all differ."""
    shapes = abstract(p)
    flat = flatten_dict(shapes)
    starts = np.cumsum([0, *(leaf.size for leaf in flat.values())])
    arrays = [
        np.sin(np.arange(leaf.size) + start).reshape(leaf.shape).astype(np.float32)
        for leaf, start in zip(flat.values(), starts, strict=False)
    ]
    # A variance is not below zero.
    return unflatten_dict(
        {k: np.abs(x) if k[-1] == "var" else x for k, x in zip(flat, arrays, strict=True)}
    )


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def draw_slice(data: st.DataObject, n: int) -> slice:
    i = data.draw(st.integers(0, n))
    return slice(i, data.draw(st.integers(i, n)))


def draw_part(data: st.DataObject, p: cb.Combinator) -> cb.Combinator:
    """A part of a pipeline: some of its steps, and of the copies of its repeats."""
    part = cb.serial(p)[:] if type(p) is not cb.Serial else p[draw_slice(data, len(p))]

    def some_copies(tower: Any) -> Any:
        return tower[draw_slice(data, tower.n)]

    return cb.replace(part, cb.Repeat, some_copies)


# The laws


@given(pipelines)
def test_a_transfer_to_itself_is_the_identity(p):
    variables = abstract(p)
    for given_ in (variables, freeze(variables), {"params": variables.get("params", {})}):
        found = cb.transfer(given_, p, p, strict=True)
        assert type(found) is type(given_)
        assert jax.tree.structure(found) == jax.tree.structure(given_)
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (found, given_)), strict=True))
        filled = cb.transfer(given_, p, p, fresh=variables)
        assert flatten_dict(unfreeze(filled)).keys() == flatten_dict(dict(variables)).keys()


@given(pipelines, st.data())
def test_transfers_compose(p, data):
    q = draw_part(data, p)
    r = draw_part(data, q)
    other = cb.serial(nn.Dense(4), q, name="other")
    variables = numbered(p)
    once = cb.transfer(variables, p, r)
    assert_equal(cb.transfer(cb.transfer(variables, p, q), q, r), once)
    through = cb.transfer(cb.transfer(variables, p, other), other, r)
    assert_equal(through, once)
    back = cb.transfer(once, r, p, fresh=variables)
    assert_equal(back, {**variables, **back})


@given(sliceable, st.data())
def test_a_slice_computes_what_the_slice_of_the_bound_pipeline_does(p, data):
    takes_entries = any(
        getattr(f, "n_carry", None) is not None
        for f in (p, *(child.target for child in p.children))
    )
    part = draw_slice(data, p.n if isinstance(p, cb.Repeat) else len(p))
    try:
        q = p[part]
    except (cb.SignatureError, TypeError):  # a residual has one body, a remat one child
        part, q = slice(None), p
    if takes_entries:  # inputs for all copies are none for some
        return
    variables = numbered(p)
    inputs = [X + i for i in range(q.signature.n_in)]
    moved = cb.transfer(variables, p, q)
    close(q.apply(moved, *inputs), p.bind(variables)[part](*inputs))


@given(pipelines)
def test_nothing_replaced_is_nothing_changed(p):
    assert cb.replace(p, nn.Conv, lambda layer: jnp.tanh) is p
    assert cb.replace(p, nn.Module, lambda layer: layer) is p
    assert cb.replace(p, lambda layer: True, lambda layer: layer) is p


@given(pipelines)
def test_a_layer_replaced_by_its_like_keeps_its_name(p):
    q = cb.replace(p, lambda layer: isinstance(layer, nn.Dense), lambda layer: layer.clone())
    assert_equal_shapes(abstract(q), abstract(p))
    assert [(layer.path, layer.signature) for layer in cb.layers(q)] == [
        (layer.path, layer.signature) for layer in cb.layers(p)
    ]
    names = [layer.path for layer in cb.layers(q) if isinstance(layer.layer, nn.Dense)]
    assert [layer.layer.name for layer in cb.layers(q) if isinstance(layer.layer, nn.Dense)] == [
        path[-1] for path in names
    ]


def assert_equal_shapes(a: Any, b: Any) -> None:
    shape = lambda x: (x.shape, str(x.dtype))
    assert jax.tree.map(shape, a) == jax.tree.map(shape, b)


@given(pipelines)
def test_the_order_of_the_others_and_their_names_stay(p):
    before = {id(layer.layer): layer.path for layer in cb.layers(p)}
    q = cb.replace(p, nn.LayerNorm, lambda norm: jnp.tanh)
    after = {id(layer.layer): layer.path for layer in cb.layers(q)}
    kept = {i: path for i, path in before.items() if i in after}
    assert after == kept
    assert not any(isinstance(layer.layer, nn.LayerNorm) for layer in cb.layers(q))


@given(pipelines)
def test_a_layer_in_a_scope_computes_the_same(p):
    q = cb.replace(p, nn.Dense, lambda dense: cb.serial(dense))
    variables = numbered(p)
    moved = cb.transfer(variables, p, q, strict=True)
    assert_equal_shapes(moved, abstract(q))
    assert_equal(cb.transfer(moved, q, p, strict=True), variables)
    testing.assert_same_program(
        lambda *x: p.apply(variables, *x), lambda *x: q.apply(moved, *x), *inputs_of(p)
    )


def test_a_layer_in_two_places_gets_one_scope():
    dense, other = nn.Dense(4), nn.Dense(4)
    p = cb.serial(cb.vmap(other, n=2), dense, cb.dip(dense))
    q = cb.replace(p, nn.Dense, lambda dense: cb.serial(dense))
    assert [layer.path for layer in cb.layers(q)] == [
        ("Vmap_0", "Dense_0", "Dense_0"),
        ("Dense_0", "Dense_0"),
    ]


# Layers


def test_layers_are_listed_once_with_their_places():
    norm, dense = nn.LayerNorm(name="norm"), nn.Dense(4)
    block = cb.residual(norm, cb.fn(dense), jnp.tanh)
    p = cb.serial(
        nn.Embed(9, 4),
        cb.repeat(cb.repeat(block, 2), 3),
        cb.vmap(cb.serial(nn.Dense(2), name="inner"), shared=False, n=2),
        cb.remat(nn.Dense(3)),
        (shared := nn.Dense(4)),
        cb.repeat(shared, 2, shared=True),
        cb.fn(nn.MultiHeadDotProductAttention(2), n_in=2),
    )
    assert [str(layer) for layer in cb.layers(p)] == [
        "Embed_0: Embed 1 -> 1",
        "Repeat_0/Repeat_0/norm: LayerNorm 1 -> 1, 2 stacked",
        "Repeat_0/Repeat_0/Dense_0: Dense 1 -> 1, 2 stacked",
        "Vmap_0/inner/Dense_0: Dense 1 -> 1, 1 stacked",
        "Remat_0/Dense_0: Dense 1 -> 1",
        "Dense_0: Dense 1 -> 1",
        "MultiHeadDotProductAttention_0: MultiHeadDotProductAttention 2 -> 1",
    ]
    assert cb.layers(p)[2].layer is dense
    assert cb.layers(jnp.tanh) == []
    assert [(layer.path, layer.layer) for layer in cb.layers(dense)] == [((), dense)]


# Replacing


def tower() -> cb.Combinator:
    block = cb.residual(nn.LayerNorm(), nn.Dense(8), nn.Dense(4))
    return cb.serial(nn.Dense(4), cb.repeat(block, 3), nn.Dense(4), nn.Dense(2, name="head"))


def paths(p: Any) -> list[str]:
    return [f"{'/'.join(layer.path)}: {type(layer.layer).__name__}" for layer in cb.layers(p)]


def test_by_type_predicate_and_path():
    assert paths(cb.replace(tower(), (nn.LayerNorm, nn.Embed), lambda _: nn.RMSNorm()))[1] == (
        "Repeat_0/LayerNorm_0: RMSNorm"
    )
    wide = cb.replace(
        tower(),
        lambda layer: isinstance(layer, nn.Dense) and layer.features == 4,
        lambda layer: nn.DenseGeneral(4),
    )
    assert paths(wide) == [
        "Dense_0: DenseGeneral",
        "Repeat_0/LayerNorm_0: LayerNorm",
        "Repeat_0/Dense_0: Dense",
        "Repeat_0/Dense_1: DenseGeneral",
        "Dense_1: DenseGeneral",
        "head: Dense",
    ]
    one = cb.replace(tower(), "Repeat_0/Dense_0", lambda layer: nn.DenseGeneral(8))
    assert paths(one)[2:4] == ["Repeat_0/Dense_0: DenseGeneral", "Repeat_0/Dense_1: Dense"]
    assert paths(cb.replace(tower(), "head", lambda layer: nn.DenseGeneral(5)))[-1] == (
        "head: DenseGeneral"
    )
    without = cb.replace(tower(), cb.Repeat, lambda repeat: cb.identity())
    assert paths(without) == ["Dense_0: Dense", "Dense_1: Dense", "head: Dense"]
    named = cb.replace(tower(), "head", lambda layer: nn.Dense(5, name="other"))
    assert paths(named)[-1] == "other: Dense"


def test_a_layer_that_is_used_twice_is_replaced_once():
    d = nn.Dense(4)
    calls = []

    def by(layer):
        calls.append(layer)
        return nn.DenseGeneral(4)

    p = cb.serial(cb.remat(d), d, cb.repeat(d, 2, shared=True), cb.fn(d.__call__, n_in=1, n_out=1))
    q = cb.replace(p, nn.Dense, by)
    assert calls == [d]
    assert paths(q) == ["Remat_0/Dense_0: DenseGeneral"]
    one = nn.DenseGeneral(4)
    tied = cb.replace(cb.serial(nn.Dense(4), nn.Dense(4)), nn.Dense, lambda _: one)
    assert paths(tied) == ["Dense_0: DenseGeneral"]


def test_one_named_scope_that_is_used_twice_stays_one():
    block = cb.serial(nn.Dense(4), name="block")
    p = cb.serial(block, block)
    q = cb.replace(p, nn.Dense, lambda dense: nn.DenseGeneral(4))
    assert paths(q) == ["block/Dense_0: DenseGeneral"]


def test_what_is_declared_of_a_layer_holds_for_the_new_one():
    attention = nn.MultiHeadDotProductAttention(2)
    masked = cb.fn(attention, mask=cb.context("padding_mask", default=None))
    p = cb.serial(cb.residual(masked), cb.fn(nn.MultiHeadDotProductAttention(1), n_in=2) >> abs)

    q = cb.replace(p, nn.MultiHeadDotProductAttention, lambda a: a.clone(num_heads=4))
    assert "".join(str(q).split()) == (
        "serial(residual(fn(MultiHeadDotProductAttention(num_heads=4,"
        "name='MultiHeadDotProductAttention_0',),mask=context('padding_mask',default=None),),),"
        "serial(fn(MultiHeadDotProductAttention(num_heads=4,"
        "name='MultiHeadDotProductAttention_1',),n_in=2,),abs,),)"
    )
    assert q.keywords == p.keywords

    probed = cb.replace(p, nn.MultiHeadDotProductAttention, lambda a: cb.serial(a, jnp.tanh))
    assert probed.signature == p.signature
    assert "padding_mask" in probed.keywords
    mask = jnp.array([[[[True, False]] * 2]] * 1)
    x = X[None]
    variables = p.init(KEY, x, x)
    moved = cb.transfer(variables, p, probed, strict=True)
    assert_equal(cb.transfer(moved, probed, p), variables)
    found = probed[0].apply(cb.transfer(variables, p, probed[0]), x, padding_mask=mask)
    inner = {"params": variables["params"]["MultiHeadDotProductAttention_0"]}
    close(found, x + jnp.tanh(attention.apply(inner, x, mask=mask)))


def test_a_method_of_a_layer_is_that_of_the_new_one():
    embed = nn.Embed(9, 4)
    p = cb.serial(embed, embed.attend)
    q = cb.replace(p, nn.Embed, lambda e: nn.Embed(9, 4, dtype=jnp.bfloat16))
    tokens = jnp.array([[1, 2]])
    assert q.init_with_output(KEY, tokens)[0].dtype == jnp.bfloat16
    assert paths(q) == ["Embed_0: Embed"]
    with pytest.raises(TypeError) as caught:
        cb.replace(p, nn.Embed, lambda e: nn.Dense(4))
    assert str(caught.value) == (
        "The pipeline calls the method 'attend' of Embed_0, and was given Dense for it, which has "
        "no such method. Replace it by a layer that has one."
    )


def test_a_declaration_of_shapes_is_checked_again():
    p = cb.typed(cb.serial(nn.Dense(4)), "f32[b, 3] -> f32[b, 4]")
    with pytest.raises(cb.ShapeError, match="Declared and computed shapes differ"):
        cb.replace(p, nn.Dense, lambda dense: nn.Dense(5))


def test_the_shortcut_of_a_residual():
    p = cb.residual(jnp.tanh, shortcut=nn.Dense(4))
    q = cb.replace(p, nn.Dense, lambda dense: nn.DenseGeneral(4))
    assert str(q) == "residual(tanh, shortcut=DenseGeneral(features=4, name='Dense_0'))"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda: cb.replace(nn.Dense(4), nn.Dense, abs),
            TypeError,
            "replace takes a pipeline; got Dense(",
        ),
        (
            lambda: cb.replace(tower().bind({}), nn.Dense, abs),
            TypeError,
            (
                "replace takes pipelines as they were built, whose layers can be told apart; serial "
                "is bound to variables. Use the pipeline that bind was called on."
            ),
        ),
        (
            lambda: cb.replace(tower(), 3, abs),
            TypeError,
            (
                "replace selects layers by a type, a predicate or a path, such as nn.Dense, lambda "
                "layer: ..., or 'Repeat_0/Dense_0'; got 3."
            ),
        ),
        (
            lambda: cb.replace(tower(), "Dense_2", abs),
            ValueError,
            (
                "There is no layer at 'Dense_2'. There are: Dense_0, Dense_1, Repeat_0, "
                "Repeat_0/Dense_0, Repeat_0/Dense_1, Repeat_0/LayerNorm_0, head."
            ),
        ),
        (
            lambda: cb.replace(tower(), cb.Residual, lambda r: r),
            TypeError,
            (
                "replace selects what has a place in the parameter tree, and residual has none. "
                "Select the layers in it, or give it a scope: cb.serial(..., name=...)."
            ),
        ),
        (
            lambda: cb.replace(tower(), nn.LayerNorm, lambda norm: cb.dup()),
            cb.SignatureError,
            (
                "What replaces a layer takes and gives as many items: Repeat_0/LayerNorm_0 is "
                "LayerNorm() with signature 1 -> 1, and was replaced by dup(name='LayerNorm_0') "
                "with signature 1 -> 2. Pass items through, or drop them, for instance with "
                "cb.keep() or cb.drop()."
            ),
        ),
        (
            lambda: cb.replace(tower(), nn.LayerNorm, lambda norm: 3),
            TypeError,
            "A pipeline is made of callables and (nested) iterables of callables; got 3 (int).",
        ),
    ],
)
def test_what_cannot_be_replaced(change, error, message):
    with pytest.raises(error) as caught:
        change()
    assert str(caught.value).startswith(message)


def test_a_pipeline_that_is_made_in_a_method():
    class InSetup(nn.Module):
        def setup(self):
            self.part = cb.replace(cb.serial(nn.Dense(4)), nn.Dense, lambda d: nn.DenseGeneral(4))

        def __call__(self, x):
            return self.part(x)

    with pytest.raises(TypeError) as caught:
        InSetup().init(KEY, X)
    assert str(caught.value) == (
        "replace takes pipelines that belong to no module; serial was made in a method of one. "
        "Build the pipeline outside of setup and of compact methods."
    )

    class Copies(nn.Module):
        def setup(self):
            self.tower = cb.repeat(nn.Dense(4), 6)[:3]

        def __call__(self, x):
            return self.tower(x)

    assert Copies().init(KEY, X)["params"]["tower"]["Dense_0"]["bias"].shape == (3, 4)


# Copies of a repeat


def test_a_slice_of_a_repeat_is_a_repeat_of_some_copies():
    p = cb.repeat(nn.Dense(4), 6)
    assert p[:3] == cb.repeat(nn.Dense(4), 3)
    assert p[:] is p
    assert str(p[3:]) == "repeat(Dense(features=4), 3, copies=(3, 4, 5))"
    assert p[1:][1:].copies == (2, 3, 4, 5)
    assert p[::-2].copies == (5, 3, 1)
    assert p[[0, -1]].copies == (0, 5)
    assert p[np.array([2, 2])].copies == (2, 2)
    assert p[4:2].n == 0
    assert p[0] is p.children[0].target


@pytest.mark.parametrize("index", [slice(3), slice(2, None), slice(None, None, -1), [0, 4], [2, 2]])
def test_copies_have_the_variables_that_they_had(index):
    body = cb.residual(nn.LayerNorm(), nn.Dense(4), jnp.tanh)
    p = cb.repeat(cb.repeat(body, 2), 6)
    variables = numbered(p)
    copies = [jax.tree.map(lambda x, i=i: x[i], variables) for i in np.arange(6)[index]]
    expected = X
    for copy in copies:
        expected = cb.serial(p[0]).apply(copy, expected)
    moved = cb.transfer(variables, p, p[index])
    close(p[index].apply(moved, X), expected)
    close(p.bind(variables)[index](X), expected)


def test_copies_of_a_bound_pipeline():
    p = cb.serial(nn.Dense(4), cb.repeat(cb.serial(nn.Dense(4), nn.Dropout(0.5)), 4))
    variables = p.init(KEY, X, deterministic=True)
    bound = p.bind(variables, rngs={"dropout": KEY})
    first = bound[1][:2]
    rest = bound[1:][0][2:]
    whole = cb.serial(bound[0], first, rest)
    close(whole(X, deterministic=True), p.apply(variables, X, deterministic=True))
    assert (first(jnp.ones((2, 4)), deterministic=False) == 0).any()
    module, some = first.unbind()
    assert jax.tree.map(jnp.shape, some) == {
        "params": {"Dense_0": {"bias": (2, 4), "kernel": (2, 4, 4)}}
    }
    close(module.apply(some, X, deterministic=True), first(X, deterministic=True))


def test_copies_that_share_their_parameters():
    d = nn.Dense(4)
    p = cb.serial(d, cb.repeat(cb.serial(d, jnp.tanh), 4, shared=True))
    variables = p.init(KEY, X)
    short = cb.serial(d, p[1][1:3])
    y = short.apply(cb.transfer(variables, p, short, strict=True), X)
    h = d.apply({"params": variables["params"]["Dense_0"]}, X)
    for _ in range(2):
        h = jnp.tanh(d.apply({"params": variables["params"]["Dense_0"]}, h))
    close(y, h)
    bound = p.bind(variables)
    close(bound[1][1:3](bound[0](X)), h)


def test_something_put_between_copies():
    p = cb.repeat(cb.residual(nn.LayerNorm(), nn.Dense(4)), 5)
    q = cb.serial(p[:2], jnp.tanh, p[2:])
    variables = numbered(p)
    moved = cb.transfer(variables, p, q, strict=True)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, q.init(KEY, X))
    close(q.apply(moved, X), p.bind(variables)[2:](jnp.tanh(p.bind(variables)[:2](X))))
    assert_equal(cb.transfer(moved, q, q, strict=True), moved)
    assert_equal(cb.transfer(moved, q, p, strict=True), variables)
    last = cb.serial(p[1:4], name="middle")
    assert_equal(cb.transfer(moved, q, last), cb.transfer(variables, p, last))
    assert_same_shapes = [cb.transfer(abstract(p), p, q), cb.transfer(abstract(q), q, p)]
    assert_equal_shapes(assert_same_shapes[0], abstract(q))
    assert_equal_shapes(assert_same_shapes[1], abstract(p))


def test_the_same_copies_twice():
    p = cb.repeat(nn.Dense(4), 3)
    q = cb.serial(p[:2], p[:2])
    variables = numbered(p)
    moved = cb.transfer(variables, p, q)
    assert_equal(moved["params"]["Repeat_0"], moved["params"]["Repeat_1"])
    trained = numbered(q)
    assert_equal(cb.transfer(trained, q, q, strict=True), trained)
    assert_equal(cb.transfer(trained, q, p[:2])["params"], trained["params"]["Repeat_0"])
    with pytest.raises(
        ValueError, match="would be lost: params/Repeat_1/Dense_0/bias, params/Repeat_1"
    ):
        cb.transfer(trained, q, p[:2], strict=True)


def test_copies_of_what_holds_other_layers():
    class Twice(nn.Module):
        inner: Any

        def __call__(self, x):
            return self.inner(self.inner(x))

    shared = nn.Dense(4)
    body = cb.serial(
        Twice(shared), shared, cb.repeat(nn.Dense(4), 2), Twice(cb.serial(nn.Dense(4)))
    )
    p = cb.repeat(body, 4)
    q = cb.serial(p[:1], p[1:])
    variables = numbered(p)
    moved = cb.transfer(variables, p, q, strict=True)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, q.init(KEY, X))
    close(q.apply(moved, X), p.apply(variables, X))


def test_copies_that_are_refused():
    p = cb.repeat(nn.Dense(4), 3)
    with pytest.raises(IndexError) as caught:
        p[[0, 3]]
    assert str(caught.value) == ("repeat has 3 copies, numbered from 0; there is no copy 3.")
    with pytest.raises(TypeError, match="repeat takes an integer for i; got 'x'"):
        p[["x"]]
    with pytest.raises(ValueError, match=r"so copies has as many entries; got 1. Take a slice"):
        cb.Repeat(nn.Dense(4), n=2, copies=(1,))

    class Part(nn.Module):
        def setup(self):
            self.tower = cb.repeat(nn.Dense(4), 3)

        def __call__(self, x):
            return self.tower[:2](x)

    message = (
        "tower was asked for some of its copies while it is initialized, and has no variables yet. "
        "Initialize the whole, then take copies of the bound pipeline, or of its value: "
        "cb.repeat(f, n)[i:j]."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Part().init(KEY, X)
    whole = {"params": {"tower": p.init(KEY, X)["params"]}}
    close(Part().apply(whole, X), p[:2].apply(cb.transfer(p.init(KEY, X), p, p[:2]), X))


# Bound slices


def test_two_bound_slices_joined_can_be_unbound_again():
    p = cb.serial(nn.Dense(4), nn.LayerNorm(), cb.repeat(nn.Dense(4), 2), nn.Dense(4))
    variables = p.init(KEY, X)
    bound = p.bind(variables)
    for joined, expected in (
        (bound[:2] >> bound[2:], bound),
        (bound >> bound[:1], p >> p[:1]),
        (bound[2:] >> bound[:2], p[2:] >> p[:2]),
        (bound[:1] & bound[3:], p[:1] & p[3:]),
        (bound[:1] @ bound[3:], p[:1] @ p[3:]),
    ):
        inputs = inputs_of(joined)
        module, values = joined.unbind()
        assert_equal(values, variables)
        found = module.apply(values, *inputs)
        close(found, joined(*inputs))
        if expected is not bound:
            moved = cb.transfer(variables, p, expected)
            close(found, expected.apply(moved, *inputs))
        else:
            close(found, bound(*inputs))


# Transfers


def test_a_new_head_and_new_copies_take_fresh_values():
    body = nn.Dense(4)
    p = cb.serial(cb.repeat(body, 3), nn.Dense(2))
    q = cb.serial(cb.repeat(body, 5), nn.Dense(3))
    variables, fresh = numbered(p), jax.tree.map(lambda x: -x, numbered(q))
    found = cb.transfer(variables, p, q, fresh=fresh)
    kernel = found["params"]["Repeat_0"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel[:3], variables["params"]["Repeat_0"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(kernel[3:], fresh["params"]["Repeat_0"]["Dense_0"]["kernel"][3:])
    assert_equal(found["params"]["Dense_0"], fresh["params"]["Dense_0"])
    on_device = jax.tree.map(jnp.asarray, (variables, fresh))
    assert_equal(cb.transfer(on_device[0], p, q, fresh=on_device[1]), found)
    shapes = cb.transfer(abstract(p), p, q, fresh=abstract(q))
    assert_equal_shapes(shapes, abstract(q))
    assert "Dense_0" not in cb.transfer(variables, p, cb.serial(p[0], nn.Dense(3)))["params"]


def test_every_collection_goes_along():
    norm = nn.BatchNorm(use_running_average=False)
    p = cb.serial(nn.Dense(4), cb.repeat(norm, 3), cb.vmap(nn.BatchNorm(use_running_average=True)))
    variables = p.init(KEY, X)
    q = cb.serial(cb.serial(p[1][1:], name="norms"), p[2])
    found = cb.transfer(variables, p, q)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, q.init(KEY, X))
    _, seen = p.apply(
        variables, X, capture_intermediates=True, mutable=["intermediates", "batch_stats"]
    )
    kept = cb.transfer({**variables, **seen}, p, q)["intermediates"]
    assert jax.tree.map(jnp.shape, kept["norms"]["Repeat_0"]["BatchNorm_0"]["__call__"]) == (
        (2, 2, 4),
    )


class Wrapped(nn.Module):
    """A layer that holds another."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x) + nn.Dense(4)(x)


class Model(nn.Module):
    encoder: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(self.encoder(x))


def test_layers_in_fields_of_other_layers():
    d = nn.Dense(4)
    p = cb.serial(jnp.tanh, d)
    q = cb.replace(p, nn.Dense, Wrapped)
    variables = p.init(KEY, X)
    found = cb.transfer(variables, p, q, strict=True)
    assert list(found["params"]) == ["Dense_0"]
    assert_equal(found["params"]["Dense_0"]["inner"], variables["params"]["Dense_0"])
    fresh = q.init(KEY, X)
    assert jax.tree.structure(cb.transfer(variables, p, q, fresh=fresh)) == jax.tree.structure(
        fresh
    )
    assert_equal(cb.transfer(found, q, p), variables)

    encoder = cb.serial(d, cb.repeat(nn.Dense(4), 2))
    model = Model(encoder)
    whole = model.init(KEY, X)
    alone = cb.transfer(whole, model, encoder)
    assert jax.tree.map(jnp.shape, alone) == jax.tree.map(jnp.shape, encoder.init(KEY, X))
    assert_equal(cb.transfer(alone, encoder, model, fresh=whole), whole)


def test_partitioned_and_sharded_values():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    p = cb.repeat(nn.Dense(4, kernel_init=init), 4)
    variables = p.init(KEY, X)
    kernel = cb.transfer(variables, p, p[1:3])["params"]["Dense_0"]["kernel"]
    assert kernel.names == ("layers", None, "model")
    np.testing.assert_array_equal(kernel.value, variables["params"]["Dense_0"]["kernel"].value[1:3])
    longer = cb.repeat(p[0], 6)
    more = cb.transfer(variables, p, longer, fresh=longer.init(KEY, X))["params"]["Dense_0"][
        "kernel"
    ]
    assert more.names == kernel.names
    assert more.value.shape == (6, 4, 4)

    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    stand_in = jax.ShapeDtypeStruct((4, 4, 4), jnp.float32, sharding=sharding)
    tree = {"params": {"Dense_0": {"kernel": stand_in}}}
    found = cb.transfer(tree, p, p[:2])["params"]["Dense_0"]["kernel"]
    assert found.shape == (2, 4, 4)
    assert found.sharding == sharding
    array = jax.device_put(variables["params"]["Dense_0"]["kernel"].value, sharding)
    taken = cb.transfer({"params": {"Dense_0": {"kernel": array}}}, p, p[:2])
    assert taken["params"]["Dense_0"]["kernel"].sharding.mesh == mesh
    assert cb.transfer({"params": {"Dense_0": {"kernel": sharding}}}, p, p[:2]) == {
        "params": {"Dense_0": {"kernel": sharding}}
    }


def test_an_ensemble_keeps_its_members():
    f = nn.Dense(4)
    p = cb.vmap(f, (None,), shared=False, n=3)
    variables = numbered(p)
    q = cb.serial(cb.serial(p, name="ensemble"))
    assert_equal(cb.transfer(variables, p, q)["params"]["ensemble"]["Vmap_0"], variables["params"])
    few = cb.vmap(f, (None,), shared=False, n=2)
    taken = cb.transfer(variables, p, few)
    np.testing.assert_array_equal(
        taken["params"]["Dense_0"]["bias"], variables["params"]["Dense_0"]["bias"][:2]
    )


BODY = nn.Dense(4)
SOURCE = cb.serial(cb.repeat(BODY, 3), nn.Dense(2))
VARIABLES = numbered(SOURCE)
NEW = nn.Dense(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda: cb.transfer(VARIABLES, SOURCE, SOURCE[:1], strict=True),
            ValueError,
            (
                "The target does not hold all layers of the source. These values would be lost: "
                "params/Dense_0/bias, params/Dense_0/kernel. Leave strict out if they may be."
            ),
        ),
        (
            lambda: cb.transfer(
                VARIABLES, SOURCE, cb.serial(SOURCE[0][1:], SOURCE[1]), strict=True
            ),
            ValueError,
            (
                "The target does not hold all layers of the source. These values would be lost: "
                "params/Repeat_0/Dense_0/bias of copies 0 of repeat, params/Repeat_0/Dense_0/kernel "
                "of copies 0 of repeat. Leave strict out if they may be."
            ),
        ),
        (
            lambda: cb.transfer(VARIABLES, SOURCE, cb.serial(cb.repeat(BODY, 5))),
            ValueError,
            (
                "params/Repeat_0/Dense_0/bias has no values for copies 3, 4 of repeat, which are "
                "new in the target. Give their values: fresh=target.init(key, ...)."
            ),
        ),
        (
            lambda: cb.transfer(VARIABLES, SOURCE, cb.serial(BODY)),
            ValueError,
            (
                "params/Repeat_0/Dense_0/bias has an entry for each copy of repeat in the source, "
                "and as Dense_0 one value in the target. Give each copy a scope of its own first "
                "with cb.unstack_layers, or stack them with cb.stack_layers."
            ),
        ),
        (
            lambda: cb.transfer(VARIABLES["params"], SOURCE, SOURCE),
            ValueError,
            (
                "The variables hold values that belong to no layer of the source: Dense_0/bias, "
                "Dense_0/kernel. Give those of the source, in their collections: {'params': ...}."
            ),
        ),
        (
            lambda: cb.transfer({"params": {"Dense_9": {"bias": X}}}, SOURCE, SOURCE),
            ValueError,
            "The variables hold values that belong to no layer of the source: params/Dense_9/bias.",
        ),
        (
            lambda: cb.transfer(
                VARIABLES,
                SOURCE,
                cb.serial(SOURCE[0], NEW),
                fresh={"params": {"Dense_7": {"bias": X}}},
            ),
            ValueError,
            (
                "The fresh variables hold values that belong to no layer of the target: "
                "params/Dense_7/bias."
            ),
        ),
        (
            lambda: cb.transfer(VARIABLES, SOURCE, cb.serial(SOURCE[0], NEW), fresh={}),
            ValueError,
            (
                "The target holds layers that are new, and fresh has no values for them: Dense_0 "
                "(Dense). Give all variables of the target: fresh=target.init(key, ...)."
            ),
        ),
        (
            lambda: cb.transfer(
                {"params": {"Dense_0": {"bias": np.ones(7, np.float32)}}},
                SOURCE,
                SOURCE,
                fresh=VARIABLES,
            ),
            ValueError,
            (
                "params/Dense_0/bias is f32[7], and fresh has f32[2] for params/Dense_0/bias. A "
                "layer that both pipelines hold keeps its shapes and dtypes: let its inputs be the "
                "same."
            ),
        ),
        (
            lambda: cb.transfer(
                {"params": {"Dense_0": VARIABLES["params"]["Dense_0"]}},
                SOURCE,
                SOURCE,
                fresh=VARIABLES,
                strict=True,
            ),
            ValueError,
            (
                "The source and the target share layers that have no values in the given "
                "variables: params/Repeat_0/Dense_0/bias, params/Repeat_0/Dense_0/kernel. Give all "
                "variables of the source, or leave strict out to take those of fresh."
            ),
        ),
        (
            lambda: cb.transfer(VARIABLES, SOURCE, SOURCE.bind(VARIABLES)),
            TypeError,
            "transfer takes pipelines as they were built, whose layers can be told apart; serial",
        ),
        (
            lambda: cb.transfer([1], SOURCE, SOURCE),
            TypeError,
            (
                "transfer takes variables as init returns them: a dict of collections, such as "
                "{'params': ...}; got list(1)."
            ),
        ),
        (
            lambda: cb.transfer(VARIABLES, SOURCE, SOURCE, fresh={"params": X}),
            TypeError,
            "transfer takes fresh as init returns them: a dict of collections",
        ),
        (
            lambda: cb.transfer(VARIABLES, SOURCE, 3),
            TypeError,
            "A pipeline is made of callables and (nested) iterables of callables; got 3 (int).",
        ),
    ],
)
def test_transfers_that_are_refused(change, error, message):
    with pytest.raises(error) as caught:
        change()
    assert str(caught.value).startswith(message)


def test_frozen_dicts_stay_frozen():
    found = cb.transfer(freeze(VARIABLES), SOURCE, SOURCE[:1])
    assert isinstance(found, FrozenDict)
    assert isinstance(found["params"]["Repeat_0"], FrozenDict)


def test_each_recipe_of_the_guide_has_at_most_ten_lines():
    page = (Path(__file__).parents[2] / "docs/guide/surgery.md").read_text()
    sections = page.split("\n## ")[1:]
    assert len(sections) == 8
    for section in sections:
        for code in section.split("```python")[1:]:
            lines = re.findall(r"^(?:>>>|\.\.\.) ", code.split("```")[0], re.MULTILINE)
            assert len(lines) <= 10, section
