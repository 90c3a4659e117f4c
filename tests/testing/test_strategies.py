"""Strategies draw what they say, all of it, and shrink; the impossible is refused at once."""

import jax
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from flax_extra.combinator._core.stack import flatten

once = settings(
    max_examples=600,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=list(HealthCheck),
)


def nodes(p):
    """A pipeline and all that it is made of."""
    yield p
    if isinstance(p, cb.Combinator):
        for child in p.children:
            yield from nodes(child.target)


def test_every_combinator_is_drawn():
    seen = set()

    @once
    @given(testing.pipelines())
    def draw(p):
        seen.update(node._kind for node in nodes(p) if isinstance(node, cb.Combinator))

    draw()
    assert seen == testing.COMBINATORS


@settings(max_examples=50)
@given(testing.pipelines())
def test_pipelines_are_valid(p):
    items = [jax.ShapeDtypeStruct((2, 3, 4), "float32")] * p.signature.n_in
    testing.check_signature(p, *items)
    outputs = flatten(jax.eval_shape(p.init_with_output, jax.random.key(0), *items)[0])
    assert {(x.shape, x.dtype.name) for x in outputs} <= {((2, 3, 4), "float32")}


@pytest.mark.parametrize("kind", [cb.Swap, cb.Keep, cb.Repeat, nn.Dense])
def test_a_planted_failure_shrinks_to_three_nodes(kind):
    def fails(p):
        return any(isinstance(node, kind) for node in nodes(p))

    quiet = settings(max_examples=1000, database=None)
    assert len(list(nodes(find(testing.pipelines(), fails, settings=quiet)))) <= 3


def test_pipelines_shrink_to_identity():
    assert find(testing.pipelines(), lambda p: True) == cb.identity()


@given(testing.pipelines(leaves=[abs], combinators=["serial", "dup"]))
def test_leaves_and_combinators_are_those_given(p):
    kinds = {type(node) for node in nodes(p)}
    assert kinds <= {cb.Serial, cb.Dup, cb.Identity, type(abs)}


@settings(max_examples=50)
@given(testing.signatures(grouped=True), st.data())
def test_functions_have_their_signature(signature, data):
    f = data.draw(testing.functions(signature))
    assert cb.infer_signature(f) == signature
    (arguments,) = [data.draw(testing.inputs_for(f))]
    assert len(arguments) == len(signature.in_shape)
    assert len(flatten(f(*arguments))) == signature.n_out


@given(testing.signatures(min_n_in=1, max_n_in=2, max_n_out=0))
def test_signatures_are_in_their_range(signature):
    assert 1 <= signature.n_in <= 2
    assert signature.n_out == 0


@given(testing.inputs_for(cb.add(3), specs=["f32[b, t]", "f32[b, 2*t]", None], sizes={"t": 4}))
def test_inputs_are_as_specs_say(inputs):
    a, b, c = inputs
    assert (a.shape[1], b.shape, c) == (4, (a.shape[0], 8), None)


@given(testing.inputs_for(cb.typed(nn.Dense(3), "i32[b, 5] -> f32[b, 3]")))
def test_inputs_of_a_typed_pipeline_are_as_declared(inputs):
    (x,) = inputs
    assert x.shape[1] == 5
    assert x.dtype == "int32"


@given(testing.inputs_for(xn.LSTMCell()))
def test_inputs_are_as_annotations_say(inputs):
    (c, h), x = inputs
    assert c.shape == h.shape
    assert x.shape[:-1] == c.shape[:-1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: testing.signatures(min_n_in=3, max_n_in=2), "n_in from 3 to 2, and there is none"),
        (lambda: testing.signatures(min_n_out=-1), "n_out from -1 to 2"),
        (lambda: testing.functions((1, 1)), "functions takes a cb.Signature; got tuple"),
        (lambda: testing.functions(cb.Signature(0, 1), shape=(0,)), "got \\(0,\\)"),
        (lambda: testing.pipelines(leaves=[]), "no leaves to build from"),
        (lambda: testing.pipelines(leaves=[3]), "as leaves; got 3"),
        (lambda: testing.pipelines(leaves=3), "as leaves; got 3"),
        (
            lambda: testing.pipelines(combinators=["sreial"]),
            "combinators 'sreial', .* It builds: 'a",
        ),
        (
            lambda: testing.pipelines(combinators=["scan", "vmap"], shape=(2, 3)),
            "asked for scan, .* of at least 3 axes; the shape of the items is \\(2, 3\\)",
        ),
        (
            lambda: testing.pipelines(combinators=["scan", "vmap"], shape=(2,)),
            "asked for vmap, .* of at least 2 axes; the shape of the items is \\(2,\\)",
        ),
        (lambda: testing.pipelines(max_depth=-1), "levels from 0 to -1"),
        (
            lambda: testing.inputs_for(cb.add(), specs=["f32[b]"]),
            "given 1 specs for add, .* 2 -> 1",
        ),
        (lambda: testing.inputs_for(abs, specs=["f32[b"]), "f32\\[b"),
        (lambda: testing.inputs_for(abs, specs=["f32[b]"], sizes={"t": 1}), "the size of 't'"),
        (lambda: testing.with_n_in(abs, 0), "with_n_in was asked for 0 inputs"),
    ],
)
def test_the_impossible_is_refused_at_once(request_, message):
    with pytest.raises(InvalidArgument, match=message):
        request_()
