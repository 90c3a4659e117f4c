"""The laws of the algebra, for generated pipelines."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from flax_extra import combinator as cb
from flax_extra import testing
from flax_extra.combinator._core.stack import flatten
from tests.combinator import free

pipelines = free.pipelines()


def same(p, q, law="the law"):
    testing.assert_same_meaning(p, q, *free.items_of(p), law=law)


@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.name)
@given(data=st.data())
def test_generated_pipelines_obey(law, data):
    for left, right in law.sides(*(data.draw(pipelines) for _ in range(law.n))):
        same(left, right, law.name)


@given(st.data())
def test_interchange(data):
    parts = free.pipelines(layers=free.numbered_layers())
    f, g = data.draw(parts), data.draw(free.pipelines(layers=free.numbered_layers()))
    h = free.with_n_in(data.draw(parts), f.signature.n_out)
    k = free.with_n_in(data.draw(parts), g.signature.n_out)
    left, right = (f @ g) >> (h @ k), (f >> h) @ (g >> k)
    assert left.signature == right.signature
    # The order of the expression differs, so layers without a name are named otherwise: the terms
    # agree once each layer is told by its place alone.
    assert _shape_of(left) == _shape_of(right)


def _shape_of(p):
    """The output of a pipeline with every layer replaced by a function of its own."""
    replaced = {}

    def function(module):
        name = f"layer {replaced.setdefault(id(module), len(replaced))}"
        return free.Function(name, module.signature)

    seen = sorted({id(m): m for m in p.children.modules()}.values(), key=id)
    for module in seen:
        function(module)
    q = cb.serial(p).clone(children=cb.serial(p).children.replace_modules(function))
    return q(*(f"x{i}" for i in range(p.signature.n_in)))


@given(st.integers(0, 4), st.integers(0, 3))
def test_what_is_copied_can_be_dropped(n, n_extra):
    items = [f"x{i}" for i in range(n + n_extra)]
    assert (cb.dup(n) >> cb.drop(n))(*items) == cb.identity(n)(*items)


@given(st.integers(0, 3))
def test_swapping_twice_is_identity(n_extra):
    items = [f"x{i}" for i in range(2 + n_extra)]
    assert (cb.swap() >> cb.swap())(*items) == cb.identity(2)(*items)


indices = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@given(indices, st.data())
def test_selects_compose_as_index_maps(first, data):
    second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=5))
    both = cb.select(first) >> cb.select(second, n_in=len(first))
    one = cb.select([first[i] for i in second], n_in=max(first) + 1)
    items = "abcdefgh"
    assert both(*items) == one(*items)


@given(st.lists(st.integers(0, 4), max_size=5), st.integers(0, 5), st.integers(0, 2))
def test_select_reads_deeper_than_it_pops(read, n_in, n_extra):
    p = cb.select(read, n_in=n_in)
    depth = max([n_in, *(i + 1 for i in read)])
    items = tuple(range(depth + n_extra))
    assert p.signature.n_in == depth
    assert flatten(p(*items)) == tuple(read) + items[n_in:]


@given(pipelines, pipelines)
def test_residual_is_branch_then_add(p, q):
    body, shortcut = testing.with_one_output(p), testing.with_one_output(q)
    plus = free.Function("+", cb.Signature(2, 1))
    derived = cb.residual(body, shortcut=shortcut)
    assert derived.signature == (cb.branch(body, shortcut) >> cb.add()).signature
    # Terms cannot be added, so the sum is checked on the derived expression with its last step swapped.
    meaning = derived.expand(body, shortcut)
    same(meaning[:-1] >> plus, cb.branch(cb.serial(body), shortcut) >> plus)


@given(pipelines, st.integers(0, 3))
def test_the_predicted_arity_is_what_happens(p, n_extra):
    output, _ = free.run(p, n_extra)
    beneath = tuple(f"x{p.signature.n_in + i}" for i in range(n_extra))
    assert len(flatten(output)) == p.signature.n_out + n_extra
    assert flatten(output)[p.signature.n_out :] == beneath


@given(pipelines)
def test_one_input_too_few_is_an_error(p):
    n_in = p.signature.n_in
    if n_in == 0:
        return
    items = [f"x{i}" for i in range(n_in - 1)]
    with pytest.raises(
        cb.SignatureError, match=f"takes {n_in} inputs? and was called with {n_in - 1}"
    ):
        p.init(free.KEY, *items)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_folds_go_from_the_top(sizes, data):
    f = free.Function("f", cb.Signature(2, 1))
    for n in sizes:
        items = [f"x{i}" for i in range(n)]
        expected = items[0]
        for item in items[1:]:
            expected = f(expected, item)
        assert cb.fold(f, n)(*items) == expected


@given(pipelines)
def test_signature_is_inferred_from_the_pipeline_itself(p):
    assert cb.infer_signature(p) == p.signature
    assert cb.fn(p).signature == p.signature


@given(pipelines)
def test_slices_of_a_serial_are_serial(p):
    assert all(type(p[:cut]) is cb.Serial for cut in range(len(p) + 1))
