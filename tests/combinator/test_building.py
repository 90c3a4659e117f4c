"""Building pipelines: sequence access, operators, text, bad input and cost."""

import functools
import string
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import example, given, settings

from flax_extra import combinator as cb


def f(x):
    return ("f", x)


class Holder(nn.Module):
    parts: list

    def __call__(self, x):
        return x


def g(x):
    return ("g", x)


class TestSequence:
    def test_length_items_and_slices(self):
        p = cb.serial(f, cb.serial(g, f), nn.relu)
        assert len(p) == 3
        assert p[0] is f
        assert p[1] == cb.serial(g, f)
        assert p[-1] is nn.relu
        assert list(p) == [f, cb.serial(g, f), nn.relu]
        assert p[:2] == cb.serial(f, cb.serial(g, f))
        assert p[::-1] == cb.serial(nn.relu, cb.serial(g, f), f)
        assert p[:] == p
        assert cb.parallel(f, g)[:1] == cb.parallel(f)
        assert cb.branch(f, g)[1:] == cb.branch(g)

    def test_a_residual_is_a_sequence_of_its_body(self):
        p = cb.residual(nn.LayerNorm(), nn.Dense(4), shortcut=nn.Dense(3))
        assert len(p) == 2
        assert p[1] == nn.Dense(4)
        assert p[:1] == cb.residual(nn.LayerNorm(), shortcut=nn.Dense(3))
        assert p.shortcut == nn.Dense(3)

    def test_of_lifted_and_childless_combinators(self):
        assert list(cb.repeat(f, 3)) == [f]
        assert len(cb.swap()) == 0
        assert cb.swap()[:] == cb.swap()

    def test_is_true_even_when_empty(self):
        assert cb.serial()
        assert (cb.identity() or None) is not None

    def test_is_immutable(self):
        from flax.errors import SetAttributeFrozenModuleError

        with pytest.raises(SetAttributeFrozenModuleError):
            cb.serial(f).children = ()


class TestOperators:
    def test_build_the_same_values_as_functions(self):
        p = cb.fn(f)
        assert p >> g >> f == cb.serial(p, g, f)
        assert f >> p >> g == cb.serial(f, p, g)
        assert p >> (cb.fn(g) >> f) == cb.serial(p, cb.fn(g), f)
        assert p @ g @ f == cb.parallel(p, g, f)
        assert f @ p == cb.parallel(f, p)
        assert p & g & f == cb.branch(p, g, f)
        assert f & p == cb.branch(f, p)
        assert nn.Dense(3) >> p == cb.serial(nn.Dense(3), p)
        assert jnp.tanh >> p == cb.serial(jnp.tanh, p)
        assert [f, [g]] >> p == cb.serial(f, g, p)

    def test_keep_what_has_a_name_together(self):
        named = cb.serial(f, g, name="named")
        assert len(named >> f) == 2
        assert (named >> f)[0] == named

    def test_iterables_only_group(self):
        assert cb.serial([f, (g, iter([f]))], g) == cb.serial(f, g, f, g)
        assert cb.serial(x for x in (f, g)) == cb.serial(f, g)


class TestCalling:
    def test_no_items_one_item_several(self):
        assert cb.serial()() == ()
        assert cb.drop()(1) == ()
        assert cb.serial()(1) == 1
        assert cb.serial()(1, 2) == (1, 2)

    def test_only_plain_tuples_are_several_items(self):
        from typing import NamedTuple

        class Pair(NamedTuple):
            a: int
            b: int

        for item in ([1, 2], {"a": 1}, Pair(1, 2), None):
            assert cb.serial(lambda _, item=item: item)(0) is item

        def nested(x) -> tuple[int, tuple[int, list]]:
            return 1, (2, [3, 4])

        assert cb.serial(nested)(0) == (1, 2, [3, 4])

    def test_a_tuple_given_is_its_items(self):
        assert cb.add()((1, (2,))) == 3

    def test_context_reaches_optional_parameters_alone(self):
        def takes(x, scale=1):
            return x * scale

        def input_of_that_name(scale):
            return scale

        def takes_anything(x, **kwargs):
            return x + len(kwargs)

        p = cb.serial(takes, input_of_that_name, takes_anything, cb.repeat(takes, 2))
        assert p(1) == 1
        assert p(jnp.array(1), scale=3) == 27
        assert cb.fn(takes, scale=2).keywords == frozenset()
        assert cb.serial(cb.fn(takes, scale=2), takes)(1, scale=5) == 10
        assert cb.fn(takes, n_in=2).keywords == frozenset()

    def test_context_passes_named_scopes_and_layers(self):
        drop = nn.Dropout(0.5)
        p = cb.serial(cb.serial(drop, name="a"), cb.remat(cb.serial(nn.Dropout(0.5))), nn.Dense(2))
        x = jnp.ones((2, 3))
        variables = p.init(jax.random.key(0), x, deterministic=True)
        p.apply(variables, x, deterministic=True)
        p.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)})


class TestText:
    def test_is_the_expression(self):
        p = nn.Embed(256, 64) >> cb.repeat(cb.residual(nn.LayerNorm(), nn.gelu), 6) >> cb.dup()
        assert str(p) == (
            "serial(\n"
            "    Embed(num_embeddings=256, features=64),\n"
            "    repeat(residual(LayerNorm(), gelu), 6),\n"
            "    dup(),\n"
            ")"
        )
        assert repr(p) == str(p)
        assert str(cb.serial(f, name="encoder")) == "serial(f, name='encoder')"
        assert str(cb.fn(max, n_in=2, n_out=1)) == "fn(max, n_in=2, n_out=1)"
        assert str(cb.fn(nn.gelu, approximate=True)) == "fn(gelu, approximate=True)"
        assert str(cb.select((1, 0), n_in=3)) == "select((1, 0), n_in=3)"
        assert str(cb.residual(f, shortcut=g)) == "residual(f, shortcut=g)"
        assert str(cb.scan(cb.add() >> cb.dup(), axis=0)) == "scan(serial(add(), dup()), axis=0)"
        assert str(cb.concatenate(axis=1)) == "concatenate(axis=1)"
        held = Holder([functools.partial(nn.Dense, 3), nn.relu])
        assert str(cb.serial(held)) == "serial(Holder(parts=[partial(Dense, 3), relu]))"
        embed = nn.Embed(3, 4)
        assert str(cb.serial(embed.attend)) == (
            "serial(Embed(num_embeddings=3, features=4).attend)"
        )

    def test_of_childless_combinators_has_the_signature(self):
        assert repr(cb.swap()) == (
            "Swap(signature=Signature(n_in=2, n_out=2, start_index=0, in_shape=((), ())))"
        )


# Arbitrary objects


class Hostile:
    """Every question about it is answered with an exception."""

    def __getattr__(self, name):
        if name.startswith(("_repr", "__")):  # what prints a failing example asks for these
            raise AttributeError
        raise RuntimeError

    def __call__(self, x):
        return x


class HostileIterable:
    def __iter__(self):
        raise RuntimeError


objects = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers() | st.integers(-3, 10**5 + 3),
        st.floats(),
        st.text(string.ascii_letters),
        st.binary(),
        st.sampled_from(
            [abs, max, print, dict, int, type, object(), Hostile(), HostileIterable(), nn.Dense(2)]
        ),
        st.sampled_from(
            [nn.Dense, jnp.ones(2), cb.swap(), cb, lambda *a, **k: 0, NotImplemented, ...]
        ),
        st.functions(like=lambda a, b: None, returns=st.integers()),
    ),
    lambda children: (
        st.lists(children) | st.dictionaries(st.text(max_size=2), children) | st.sets(st.integers())
    ),
)

builders = st.sampled_from(
    [
        lambda x, y: cb.serial(x, y),
        lambda x, y: cb.parallel(x, y),
        lambda x, y: cb.branch(x, y),
        lambda x, y: cb.residual(x, shortcut=y),
        lambda x, y: cb.select(x, y),
        lambda x, y: cb.select(x, n_in=y),
        lambda x, y: cb.dup(x),
        lambda x, y: cb.identity(y),
        lambda x, y: cb.keep(x, y),
        lambda x, y: cb.dip(x, y),
        lambda x, y: cb.fold(x, y),
        lambda x, y: cb.add(x),
        lambda x, y: cb.concatenate(x, y),
        lambda x, y: cb.split(x, y),
        lambda x, y: cb.fn(x, y),
        lambda x, y: cb.fn(x, n_out=y),
        lambda x, y: cb.fn(x, a=y),
        lambda x, y: cb.repeat(x, y),
        lambda x, y: cb.scan(x, axis=y),
        lambda x, y: cb.scan(abs, unroll=x, n_carry=y),
        lambda x, y: cb.remat(x, y),
        lambda x, y: cb.identity() >> x,
        lambda x, y: cb.identity() @ x,
        lambda x, y: cb.identity() & x,
        lambda x, y: cb.infer_signature(x),
        lambda x, y: cb.Signature(x, y),
        lambda x, y: cb.Serial(x),
    ]
)


@settings(max_examples=1000)
@given(builders, objects, objects)
@example(lambda x, y: cb.select(x), HostileIterable(), None)
def test_building_from_anything_raises_nothing_but_our_errors(build, x, y):
    try:
        build(x, y)
    except (cb.SignatureError, TypeError, ValueError) as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        module = frame.tb_frame.f_globals["__name__"]
        assert module.startswith("flax_extra"), (module, error)


# Cost


def calls(build):
    """How many Python functions are called: a cost that no other process on the machine changes."""
    count = 0

    def profiler(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profiler)
    try:
        build()
    finally:
        sys.setprofile(None)
    return count


def chained(operator, n):
    p = cb.identity()
    for _ in range(n):
        p = operator(p, nn.Dense(4))
    return p


@pytest.mark.parametrize(
    "build",
    [
        lambda n: cb.serial(nn.Dense(4) for _ in range(n)).signature,
        lambda n: cb.branch(nn.Dense(4) for _ in range(n)).signature,
        lambda n: cb.parallel(nn.Dense(4) for _ in range(n)).signature,
        lambda n: cb.residual(nn.Dense(4) for _ in range(n)).signature,
        lambda n: cb.serial(cb.repeat(nn.Dense(4), 2) for _ in range(n)).signature,
        lambda n: chained(lambda p, q: p >> q, n).signature,
        lambda n: chained(lambda p, q: p @ q, n).signature,
        lambda n: chained(lambda p, q: p & q, n).signature,
    ],
)
def test_building_is_linear(build):
    assert calls(lambda: build(2000)) <= 2.1 * calls(lambda: build(1000)) + 100
