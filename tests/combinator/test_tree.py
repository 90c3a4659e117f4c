"""The parameter tree obeys the algebra: see "The laws" in CONTRIBUTING.md."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from hypothesis import given

from flax_extra import combinator as cb
from tests.combinator import free

KEY = jax.random.key(0)
X = jnp.ones((2, 4))


def tree(model, *inputs):
    """The parameters of a model as ``{"path": shape}``."""
    variables = model.init(KEY, *(inputs or (X,)))
    return {
        "/".join(path): np.shape(leaf) for path, leaf in flatten_dict(variables["params"]).items()
    }


def kernels(model, *inputs):
    return {k.removesuffix("/kernel"): v for k, v in tree(model, *inputs).items() if "kernel" in k}


def dense(n=4, **kwargs):
    return nn.Dense(n, use_bias=False, **kwargs)


def expression():
    """An expression with every kind of level in it."""
    return cb.serial(
        dense(4),
        cb.residual(dense(5), nn.relu, dense(4, name="projection"), shortcut=dense(4)),
        cb.serial(dense(6), dense(4), name="named"),
        cb.repeat(cb.serial(dense(4), nn.relu), 3),
        [cb.branch(dense(2), dense(2)), cb.concatenate()],
        cb.remat(dense(4)),
    )


GOLDEN = {
    "Dense_0": (4, 4),
    "Dense_1": (4, 5),
    "projection": (5, 4),
    "Dense_2": (4, 4),
    "named/Dense_0": (4, 6),
    "named/Dense_1": (6, 4),
    "Repeat_0/Dense_0": (3, 4, 4),
    "Dense_3": (4, 2),
    "Dense_4": (4, 2),
    "Remat_0/Dense_0": (4, 4),
}


def under(prefix, shapes):
    return {f"{prefix}/{path}": shape for path, shape in shapes.items()}


class InSetup(nn.Module):
    def setup(self):
        self.encoder = expression()

    def __call__(self, x):
        return self.encoder(x)


class InCompact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return expression()(x)


class AsField(nn.Module):
    body: nn.Module = expression()

    def __call__(self, x):
        return self.body(x)


class Holder(nn.Module):
    part: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.part(x)


class InList(nn.Module):
    def setup(self):
        self.stages = [expression(), expression()]

    def __call__(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def test_standalone():
    assert kernels(expression()) == GOLDEN


def test_in_setup_it_is_under_the_attribute():
    assert kernels(InSetup()) == under("encoder", GOLDEN)
    assert kernels(InList()) == under("stages_0", GOLDEN) | under("stages_1", GOLDEN)


def test_in_compact_it_is_in_the_enclosing_scope():
    assert kernels(InCompact()) == GOLDEN


def test_as_a_field_it_is_under_the_field():
    assert kernels(AsField()) == under("body", GOLDEN)
    assert kernels(AsField(body=cb.serial(dense()))) == {"body/Dense_0": (4, 4)}


def test_inside_another_pipeline():
    assert (
        kernels(cb.serial(InSetup(), expression())) == under("InSetup_0/encoder", GOLDEN) | GOLDEN
    )
    assert kernels(cb.serial(cb.serial(expression()))) == GOLDEN
    assert kernels(cb.serial(expression(), name="outer")) == GOLDEN
    assert kernels(cb.serial(cb.serial(expression(), name="outer"))) == under("outer", GOLDEN)


def test_a_combinator_with_a_name_opens_a_scope_in_setup_and_compact():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = dense(3)(x)
            x = cb.serial(dense(4), cb.serial(dense(4), name="inner"), name="outer")(x)
            return dense(5)(x)

    assert kernels(Named()) == {
        "Dense_0": (4, 3),
        "outer/Dense_0": (3, 4),
        "outer/inner/Dense_0": (4, 4),
        "Dense_1": (4, 5),
    }


def test_layers_of_a_compact_method_and_of_its_pipelines_count_together():
    outside = dense(4)

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = dense(3)(x)
            x = cb.serial(dense(4), outside)(x)
            x = cb.repeat(cb.repeat(dense(4), 2), 3)(x)
            return cb.serial(dense(5))(dense(6)(x))

    golden = {
        "Dense_0": (4, 3),
        "Dense_1": (3, 4),
        "Dense_2": (4, 4),
        "Repeat_0/Repeat_0/Dense_0": (3, 2, 4, 4),
        "Dense_3": (6, 5),
        "Dense_4": (4, 6),
    }
    assert kernels(Mixed()) == golden

    class Twice(nn.Module):
        def setup(self):
            self.mixed = Mixed()

        def __call__(self, x):
            return self.mixed(self.mixed(x)[..., :4])

    assert kernels(Twice()) == under("mixed", golden)
    variables = Twice().init(KEY, X)
    once = Mixed().bind({"params": variables["params"]["mixed"]})
    np.testing.assert_array_equal(Twice().apply(variables, X), once(once(X)[..., :4]))


def test_every_lifted_combinator_has_a_name_of_its_own_kind():
    cell = cb.serial(cb.add(), dense(4), cb.dup())
    p = cb.parallel(cb.repeat(dense(), 2), cb.repeat(dense(), 2), cb.scan(cell, axis=0))
    assert kernels(p, X, X, jnp.ones(4), X) == {
        "Repeat_0/Dense_0": (2, 4, 4),
        "Repeat_1/Dense_0": (2, 4, 4),
        "Scan_0/Dense_0": (4, 4),
    }


# Regrouping and insertion


def seeded(signature):
    return free.Seeded(signature.n_in, signature.n_out)


@given(
    st.lists(free.pipelines(layers=st.sampled_from(free.ARITIES).map(seeded)), max_size=3),
    st.data(),
)
def test_regrouping_and_insertion_change_no_bit(parts, data):
    flat = cb.serial(*parts)
    cut = data.draw(st.integers(0, len(parts)))
    nested = cb.serial(parts[:cut], cb.serial(parts[cut:]))
    nothing = st.sampled_from(
        [
            cb.identity(),
            cb.select((0, 1)),
            cb.swap() >> cb.swap(),
            cb.dup() >> cb.drop(),
            lambda x: x,
        ]
    )
    padded = cb.serial(*(step for part in parts for step in (part, data.draw(nothing))))
    padding = cb.identity(3)  # so that what is inserted finds items to pass on
    plain, _ = run_under(flat, padding)
    for other in (nested, padded):
        assert run_under(other, padding)[0] == plain


def run_under(p, padding):
    p = cb.serial(p @ padding)
    items = [f"x{i}" for i in range(max(10, p.signature.n_in))]
    _, variables = p.init_with_output(free.KEY, *items)
    return jax.tree.map(lambda x: np.asarray(x).tolist(), variables), p


def test_a_checkpoint_survives_refactoring():
    before = nn.Embed(10, 4) >> cb.serial(dense(4), nn.relu, dense(4))
    after = cb.serial(
        nn.Embed(10, 4),
        cb.dup(),
        cb.drop(),
        cb.residual(dense(4), nn.gelu, jnp.tanh, dense(4)),
        lambda x: 2 * x,
    )
    tokens = jnp.zeros((2, 3), int)
    a, b = before.init(KEY, tokens), after.init(KEY, tokens)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    after.apply(a, tokens)


# Sharing


def test_one_instance_has_one_set_of_parameters_however_deep():
    d = dense()
    p = cb.serial(
        d,
        cb.residual(d, shortcut=cb.serial(d, name="aside")),
        cb.remat(cb.serial(d)),
        cb.repeat(d, 2, shared=True),
        cb.serial(cb.serial(cb.remat(d), name="inner"), name="outer"),
    )
    assert kernels(p) == {"Dense_0": (4, 4)}
    w = p.init(KEY, X)["params"]["Dense_0"]["kernel"]
    y = X @ w
    y = y @ w + y @ w
    np.testing.assert_allclose(p.apply(p.init(KEY, X), X), y @ w @ w @ w @ w, rtol=1e-5, atol=1e-6)


def test_the_first_use_owns_the_parameters():
    d = dense()
    assert kernels(cb.serial(cb.serial(d, name="a"), cb.serial(d, name="b"))) == {
        "a/Dense_0": (4, 4)
    }
    assert kernels(cb.serial(cb.repeat(d, 2, shared=True), d)) == {"Repeat_0/Dense_0": (4, 4)}
    cell = cb.serial(cb.add(), d, cb.dup())
    p = cb.serial(d, cb.scan(cell, axis=0), cb.drop(), d)
    assert kernels(p, jnp.ones(4), X) == {"Dense_0": (4, 4)}


def test_two_equal_instances_are_two_layers():
    assert kernels(cb.serial(dense(), dense())) == {"Dense_0": (4, 4), "Dense_1": (4, 4)}


def test_tied_embeddings():
    embed = nn.Embed(10, 4)
    p = cb.serial(embed, dense(), embed.attend)
    assert tree(p, jnp.zeros((2, 3), int)) == {
        "Embed_0/embedding": (10, 4),
        "Dense_0/kernel": (4, 4),
    }
    variables = p.init(KEY, jnp.zeros((2, 3), int))
    assert p.apply(variables, jnp.zeros((2, 3), int)).shape == (2, 3, 10)


def test_sharing_across_pipelines_of_one_module():
    class Model(nn.Module):
        def setup(self):
            d = dense()
            self.one = cb.serial(d)
            self.two = cb.serial(d, dense())
            self.own = dense()
            self.three = cb.serial(self.own, dense())

        def __call__(self, x):
            return self.three(self.two(x))

        def first(self, x):
            return self.one(x)

    golden = {
        "one/Dense_0": (4, 4),
        "two/Dense_1": (4, 4),
        "own": (4, 4),
        "three/Dense_0": (4, 4),
    }
    assert kernels(Model()) == golden
    variables = Model().init(KEY, X)
    # What is initialised through one method serves the others.
    w = variables["params"]["one"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(Model().apply(variables, X, method="first"), X @ w, rtol=1e-6)


def test_sharing_across_fields():
    class Model(nn.Module):
        encoder: nn.Module
        decoder: nn.Module

        def __call__(self, x):
            return self.encoder(self.decoder(x))

    d = dense()
    assert kernels(Model(cb.serial(d), cb.serial(d, dense()))) == {
        "encoder/Dense_0": (4, 4),
        "decoder/Dense_1": (4, 4),
    }


def test_a_layer_that_was_called_stays_with_the_method_that_called_it():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            d = dense()
            x = d(x)
            x = cb.serial(d, dense(), name="inner")(x)
            return cb.remat(d)(x)

    assert kernels(Model()) == {"Dense_0": (4, 4), "inner/Dense_1": (4, 4)}
    d = dense()
    same = cb.serial(d, cb.serial(d, dense(), name="inner"), cb.remat(d))
    assert kernels(same) == {"Dense_0": (4, 4), "inner/Dense_1": (4, 4)}


def test_a_layer_given_to_a_scope_can_be_called_later():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            d = dense()
            return d(cb.serial(d, name="inner")(x))

    assert kernels(Model()) == {"inner/Dense_0": (4, 4)}


class TestAcrossAStack:
    message = r"One instance of Dense is used both inside and outside of (repeat|stack),.*shared="

    def test_is_refused_when_built(self):
        d = dense()
        for build in (
            lambda: cb.serial(d, cb.repeat(d, 2)),
            lambda: cb.serial(cb.repeat(d, 2), d),
            lambda: cb.repeat(d, 2) >> dense() >> cb.serial(d, name="b"),
            lambda: dense() >> cb.serial(d) >> cb.serial(cb.repeat(d, 2), name="b"),
            lambda: cb.branch(cb.repeat(d, 2), cb.repeat(d, 2)),
            lambda: cb.repeat(cb.serial(d, cb.repeat(d, 2)), 2),
            lambda: cb.residual(cb.repeat(d, 2), shortcut=d),
            lambda: cb.serial(d, cb.repeat(Holder(d), 4)),
            lambda: cb.serial(cb.repeat(Holder(d), 4), d),
        ):
            with pytest.raises(cb.SharingError, match=self.message):
                build()

    def test_is_refused_when_bound(self):
        class Model(nn.Module):
            first: bool

            def setup(self):
                d = dense()
                if self.first:
                    self.plain = cb.serial(d)
                self.stack = cb.repeat(d, 2)
                if not self.first:
                    self.plain = cb.serial(d)

            def __call__(self, x):
                return self.stack(self.plain(x))

        for first in (True, False):
            with pytest.raises(cb.SharingError, match=self.message):
                Model(first).init(KEY, X)

    def test_is_refused_in_compact(self):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                d = dense()
                y = d(x)
                return cb.repeat(d, 2)(y)

        with pytest.raises(cb.SharingError, match=self.message):
            Model().init(KEY, X)

    def test_one_stack_used_twice_is_one_set(self):
        stack = cb.repeat(dense(), 2)
        assert kernels(cb.serial(stack, stack)) == {"Repeat_0/Dense_0": (2, 4, 4)}


NUMBERED = [
    (
        "before it",
        lambda: cb.serial(dense(2, name="Dense_0"), dense(4)),
        {"Dense_0": (4, 2), "Dense_1": (2, 4)},
    ),
    (
        "after it",
        lambda: cb.serial(dense(2), dense(3), dense(5, name="Dense_0"), dense(4)),
        {"Dense_1": (4, 2), "Dense_2": (2, 3), "Dense_0": (3, 5), "Dense_3": (5, 4)},
    ),
    (
        "a scope",
        lambda: cb.serial(dense(2), cb.serial(dense(3), name="Dense_1"), dense(5)),
        {"Dense_0": (4, 2), "Dense_1/Dense_0": (2, 3), "Dense_2": (3, 5)},
    ),
    (
        "a layer of another kind",
        lambda: cb.serial(nn.DenseGeneral(3, use_bias=False, name="Dense_0"), dense(5)),
        {"Dense_0": (4, 3), "Dense_1": (3, 5)},
    ),
    (
        "in a repeat",
        lambda: cb.repeat(cb.serial(dense(3), dense(4, name="Dense_0")), 2),
        {"Dense_1": (2, 4, 3), "Dense_0": (2, 3, 4)},
    ),
]


@pytest.mark.parametrize(
    ("build", "golden"), [row[1:] for row in NUMBERED], ids=[r[0] for r in NUMBERED]
)
def test_numbers_leave_out_the_names_that_the_user_gave(build, golden):
    class SetUp(nn.Module):
        def setup(self):
            self.part = build()

        def __call__(self, x):
            return self.part(x)

    outside = build()

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return cb.serial(outside)(x)

    scope = "" if type(outside) is cb.Serial else "Repeat_0/"
    assert kernels(build()) == golden
    assert kernels(cb.serial(build())) == {
        f"{scope}{path}": shape for path, shape in golden.items()
    }
    assert kernels(SetUp()) == under("part", golden)
    assert kernels(Compact()) == {f"{scope}{path}": shape for path, shape in golden.items()}
    variables = build().init(KEY, X)
    np.testing.assert_array_equal(
        build().apply(variables, X), SetUp().apply({"params": {"part": variables["params"]}}, X)
    )


def test_a_name_that_belongs_to_another_scope_is_free():
    d = dense(name="Dense_0")
    aside = cb.serial(d, dense(), name="aside")
    assert kernels(cb.serial(aside, d, dense())) == {
        "aside/Dense_0": (4, 4),
        "aside/Dense_1": (4, 4),
        "Dense_0": (4, 4),
    }


def test_layers_made_in_a_compact_method_clash_as_linen_says():
    from flax.errors import NameInUseError

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return cb.serial(dense(), dense(name="Dense_0"))(x)

    with pytest.raises(NameInUseError, match="Dense_0"):
        Compact().init(KEY, X)


def test_a_layer_may_have_the_name_of_a_field():
    p = cb.serial(dense(name="children"), dense(name="signature"), dense(name="bound"))
    assert kernels(p) == {"children": (4, 4), "signature": (4, 4), "bound": (4, 4)}
