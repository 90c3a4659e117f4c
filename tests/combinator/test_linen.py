"""A pipeline is a linen module: whatever linen does with modules, it does with pipelines."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from flax_extra import combinator as cb

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def model():
    return cb.serial(
        nn.Dense(4),
        cb.residual(nn.LayerNorm(), nn.Dense(4), nn.relu),
        cb.repeat(cb.residual(nn.Dense(4), jnp.tanh), 3),
        nn.Dense(2),
    )


def shapes(variables):
    return jax.tree.map(jnp.shape, variables)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_init_and_apply():
    variables = model().init(KEY, X)
    assert model().apply(variables, X).shape == (2, 2)
    output, same = model().init_with_output(KEY, X)
    close(variables, same)
    close(output, jax.jit(model().apply)(variables, X))


def test_bind_and_its_parts():
    p = model()
    variables = p.init(KEY, X)
    bound = p.bind(variables)
    close(bound(X), p.apply(variables, X))
    close(bound[0](X), X @ variables["params"]["Dense_0"]["kernel"])
    close(bound[1:](bound[:1](X)), bound(X))
    close(cb.serial(*bound)(X), bound(X))
    close(
        bound[1][0](X), nn.LayerNorm().apply({"params": bound.LayerNorm_0.variables["params"]}, X)
    )
    assert [type(part).__name__ for part in bound] == ["Dense", "Residual", "Repeat", "Dense"]


def test_unbind():
    class Autoencoder(nn.Module):
        def setup(self):
            self.encoder = cb.serial(nn.Dense(3), cb.serial(nn.Dense(2, name="code"), nn.relu))
            self.decoder = cb.serial(nn.Dense(4))

        def __call__(self, x):
            return self.decoder(self.encoder(x))

    auto = Autoencoder()
    bound = auto.bind(auto.init(KEY, X))
    encoder, variables = bound.encoder.unbind()
    assert shapes(variables)["params"]["code"]["kernel"] == (3, 2)
    close(encoder.apply(variables, X), bound.encoder(X))
    close(encoder.init(KEY, X), encoder.init(KEY, X))


def test_a_bound_slice_unbinds_with_its_own_parameters():
    p = cb.serial(nn.Dense(4), nn.Dense(4), cb.serial(nn.Dense(4), nn.relu))
    bound = p.bind(p.init(KEY, X))
    for part in (bound[1:], bound[2:], bound[2]):
        alone, variables = part.unbind()
        close(alone.apply(variables, X), part(X))


def test_a_transformed_class_keeps_its_transform_as_a_child():
    each = nn.vmap(cb.Serial, variable_axes={"params": 0}, split_rngs={"params": True})
    x = jnp.ones((5, 2, 4))
    variables = cb.serial(each([nn.Dense(3)]), jnp.abs).init(KEY, x)
    assert shapes(variables["params"])["VmapSerial_0"]["Dense_0"]["kernel"] == (5, 4, 3)
    rematted = cb.serial(nn.remat(cb.Serial)([nn.Dense(4), jnp.sin]))
    jaxpr = jax.make_jaxpr(rematted.apply)(rematted.init(KEY, X), X)
    assert "remat" in str(jaxpr)

    class Scaled(cb.Serial):
        def __call__(self, *inputs, **context):
            return 10 * super().__call__(*inputs, **context)

    assert cb.serial(Scaled([abs]))(-1) == 10


def test_tabulate():
    table = nn.tabulate(
        model(), KEY, console_kwargs={"width": 120, "force_terminal": False, "no_color": True}
    )(X)
    assert "Repeat_0/Dense_0" in table
    assert "Total Parameters: 118" in table


def test_clone_and_copy():
    p = model()
    assert p.clone() == p
    assert p.copy() == p
    assert p.copy(name="copy").name == "copy"
    assert copy.copy(p) == p
    assert copy.deepcopy(p)[1] == p[1]
    d = nn.Dense(4)
    shared = copy.deepcopy(cb.serial(d, d))
    assert list(shared.init(KEY, X)["params"]) == ["Dense_0"]


def test_equality_and_hash():
    assert model() == model()
    assert hash(model()) == hash(model())
    assert model() != model()[:2]
    assert cb.serial(nn.Dense(4)) != cb.serial(nn.Dense(5))
    assert cb.serial(nn.relu) != cb.parallel(nn.relu)
    d = nn.Dense(4)
    assert cb.serial(d, d) != cb.serial(nn.Dense(4), nn.Dense(4))
    assert cb.serial(d, cb.serial(d)) != cb.serial(nn.Dense(4), cb.serial(nn.Dense(4)))
    assert cb.serial(d, d) == cb.serial(nn.Dense(4), d).clone(children=cb.serial(d, d).children)
    assert cb.serial(cb.serial(d, name="a"), d) != cb.serial(
        cb.serial(nn.Dense(4), name="a"), nn.Dense(4)
    )
    assert cb.fn(nn.gelu, approximate=True) != cb.fn(nn.gelu, approximate=False)
    embed = nn.Embed(3, 4)
    other = nn.Embed(3, 4)
    assert cb.serial(embed, embed.attend) == cb.serial(other, other.attend)
    assert cb.serial(embed, embed.attend) != cb.serial(embed, other.attend)
    assert cb.select((1, 0)) != cb.select((1, 0), n_in=3)


def test_a_pipeline_is_a_static_argument():
    @jax.jit
    def plain(variables, x):
        return model().apply(variables, x)

    traces = []

    def traced(p, variables, x):
        traces.append(p)
        return p.apply(variables, x)

    jitted = jax.jit(traced, static_argnums=0)
    variables = model().init(KEY, X)
    close(jitted(model(), variables, X), plain(variables, X))
    jitted(model(), variables, X)
    assert len(traces) == 1


class Scale(nn.Module):
    """A layer whose parts are all importable."""

    @nn.compact
    def __call__(self, x, scale_by: float = 1.0):
        return x * self.param("scale", nn.initializers.zeros, ()) * scale_by


def double(x):
    return 2 * x


@pytest.mark.parametrize(
    "p",
    [
        cb.serial(Scale(), double, cb.residual(nn.LayerNorm(), double, shortcut=Scale())),
        cb.repeat(Scale(), 3) >> cb.dup() >> cb.concatenate() >> cb.split(2) >> cb.add(),
        cb.fn(Scale(), scale_by=2.0),
        cb.branch(Scale(), double) >> cb.sub(),
        cb.keep(Scale()) >> cb.swap() >> cb.drop(),
    ],
)
def test_pickling(p):
    again = pickle.loads(pickle.dumps(p))
    assert again == p
    assert repr(again) == repr(p)
    close(again.init_with_output(KEY, X), p.init_with_output(KEY, X))


def test_pickling_keeps_sharing():
    d = Scale()
    again = pickle.loads(pickle.dumps(cb.serial(d, d)))
    assert again == cb.serial(d, d)


def test_sow_and_capture_intermediates():
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "seen", x)
            self.sow("losses", "loss", jnp.sum(x))
            return x

    p = cb.serial(
        Sower(), cb.repeat(Sower(), 3), cb.scan(cb.serial(cb.add(), Sower(), cb.dup()), axis=0)
    )
    carry = jnp.zeros(4)
    p = cb.serial(cb.dip(p[:2]), p[2], cb.drop())
    _, state = p.apply({}, carry, X, mutable=["intermediates", "losses"])
    assert shapes(state["intermediates"]) == {
        "Sower_0": {"seen": ((2, 4),)},
        "Repeat_0": {"Sower_0": {"seen": ((3, 2, 4),)}},
        "Scan_0": {"Sower_0": {"seen": ((2, 4),)}},
    }
    assert shapes(state["losses"]["Repeat_0"]) == {"Sower_0": {"loss": ((3,),)}}
    assert shapes(state["losses"]["Scan_0"]) == {"Sower_0": {"loss": ((2,),)}}

    variables = model().init(KEY, X)
    _, state = model().apply(variables, X, capture_intermediates=True)
    assert set(state["intermediates"]) == {
        "Dense_0",
        "LayerNorm_0",
        "Dense_1",
        "Repeat_0",
        "Dense_2",
        "__call__",
    }
    assert state["intermediates"]["Repeat_0"]["Dense_0"]["__call__"][0].shape == (3, 2, 4)


def test_a_pipeline_used_in_a_method_adds_nothing_to_what_is_captured():
    merge = cb.add()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return merge(x, cb.serial(nn.Dense(4), nn.relu)(x))

    variables = Model().init(KEY, X)
    _, state = Model().apply(variables, X, capture_intermediates=True)
    assert shapes(state["intermediates"]) == {
        "Dense_0": {"__call__": ((2, 4),)},
        "__call__": ((2, 4),),
    }
    assert "Total Parameters: 20" in nn.tabulate(Model(), KEY)(X)


@pytest.mark.parametrize("shared", [False, True])
def test_batch_statistics(shared):
    def by_hand(x, n):
        means = []
        for _ in range(n):
            means.append(x.mean(0))
            x = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
        return x, means

    norm = nn.BatchNorm(momentum=0.0)
    p = cb.repeat(norm, 3, shared=shared)
    variables = p.init(KEY, X, use_running_average=False)
    stats = variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert stats.shape == ((4,) if shared else (3, 4))
    np.testing.assert_array_equal(stats, jnp.zeros_like(stats))
    y, state = p.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    expected, means = by_hand(X, 3)
    close(y, expected)
    close(state["batch_stats"]["BatchNorm_0"]["mean"], means[-1] if shared else jnp.stack(means))
    p.apply({**variables, **state}, X, use_running_average=True)


def test_dropout_has_its_own_rng_in_each_copy_and_step():
    p = cb.repeat(cb.fn(nn.Dropout(0.5, deterministic=False)), 4)
    x = jnp.ones((1, 1000))
    y = p.apply({}, x, rngs={"dropout": KEY})
    # Four independent halvings leave one in sixteen.
    assert 0.03 < float((y != 0).mean()) < 0.1
    np.testing.assert_array_equal(y, p.apply({}, x, rngs={"dropout": KEY}))

    cell = cb.serial(cb.swap(), nn.Dropout(0.5, deterministic=False), cb.swap())
    _, ys = cb.scan(cell, axis=0).apply({}, jnp.ones(()), jnp.ones((6, 50)), rngs={"dropout": KEY})
    assert len({tuple(row) for row in np.asarray(ys).tolist()}) == 6


def test_logical_partitioning_names_the_layers_axis():
    kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    p = cb.repeat(nn.Dense(4, kernel_init=kernel_init), 3)
    variables = p.init(KEY, X)
    assert nn.get_partition_spec(variables)["params"]["Dense_0"]["kernel"] == (
        jax.sharding.PartitionSpec("layers", "in", "out")
    )
    p.apply(variables, X)


class TestLinenTransforms:
    """nn.remat, nn.vmap, nn.scan, nn.jit: of the class, of a method's pipeline, around it."""

    def test_remat_of_the_class(self):
        rematted = nn.remat(cb.Serial)(model().children)
        variables = model().init(KEY, X)
        close(rematted.apply(variables, X), model().apply(variables, X))
        gradient = jax.grad(lambda v, p: p.apply(v, X).sum())
        close(gradient(variables, rematted), gradient(variables, model()))

    def test_jit_of_the_class(self):
        jitted = nn.jit(cb.Serial)(model().children)
        variables = jitted.init(KEY, X)
        assert shapes(variables) == shapes(model().init(KEY, X))  # linen's jit draws other values
        close(jitted.apply(variables, X), model().apply(variables, X))

    def test_vmap_of_the_class(self):
        each = nn.vmap(
            cb.Serial, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2
        )(model().children)
        variables = each.init(KEY, X)
        assert variables["params"]["Dense_0"]["kernel"].shape == (2, 4, 4)
        first = jax.tree.map(lambda v: v[0], variables)
        close(each.apply(variables, X)[0], model().apply(first, X[0]))

    def test_scan_of_the_class(self):
        cell = cb.serial(cb.add(), nn.Dense(4), cb.dup())
        scanned = nn.scan(cb.Serial, variable_broadcast="params", split_rngs={"params": False})(
            cell.children
        )
        variables = scanned.init(KEY, jnp.zeros(4), X)
        ours = cb.scan(cell, axis=0)
        close(scanned.apply(variables, jnp.zeros(4), X), ours.apply(variables, jnp.zeros(4), X))

    def test_of_a_module_that_holds_pipelines(self):
        class Block(nn.Module):
            def setup(self):
                d = nn.Dense(4)
                self.one = cb.serial(d, nn.relu)
                self.two = cb.serial(d, nn.Dense(4))

            def __call__(self, x):
                return self.two(self.one(x))

        variables = Block().init(KEY, X)
        expected = Block().apply(variables, X)
        for transform in (nn.remat, nn.jit):
            assert shapes(transform(Block)().init(KEY, X)) == shapes(variables)
            close(transform(Block)().apply(variables, X), expected)

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                def step(block, x, _):
                    return block(x), None

                loop = nn.scan(
                    step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
                )
                return loop(Block(), x, None)[0]

        stacked = Stack().init(KEY, X)
        assert stacked["params"]["Block_0"]["one"]["Dense_0"]["kernel"].shape == (3, 4, 4)

    def test_of_a_pipeline_in_a_method(self):
        outside = nn.Dense(4)

        class Model(nn.Module):
            lifted: bool = False

            @nn.compact
            def __call__(self, x):
                p = cb.serial(nn.Dense(4), outside, cb.remat(cb.serial(nn.Dense(4))))
                if self.lifted:
                    return nn.remat(lambda p, x: p(x))(p, x)
                return p(x)

        variables = Model().init(KEY, X)
        close(Model(lifted=True).init(KEY, X), variables)
        close(Model(lifted=True).apply(variables, X), Model().apply(variables, X))

    def test_of_a_pipeline_that_shares_with_its_surroundings(self):
        class Model(nn.Module):
            def setup(self):
                d = nn.Dense(4)
                self.outer = cb.serial(d)
                self.inner = cb.serial(d, nn.Dense(4))

            def __call__(self, x):
                y = self.outer(x)
                return nn.remat(lambda p, x: p(x))(self.inner, y)

        variables = Model().init(KEY, X)
        assert sorted(variables["params"]) == ["inner", "outer"]
        assert list(variables["params"]["inner"]) == ["Dense_1"]
        Model().apply(variables, X)


def test_nnx_bridge():
    p = model()
    wrapped = bridge.ToNNX(p, rngs=nnx.Rngs(0)).lazy_init(X)
    state = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    close(wrapped(X), p.apply({"params": state}, X))


def test_a_pipeline_in_a_module_in_a_pipeline():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic: bool = False):
            body = cb.serial(nn.Dense(4), nn.Dropout(0.5), cb.repeat(nn.Dense(4), 2))
            return body(x, deterministic=deterministic)

    p = cb.serial(Inner(), cb.repeat(Inner(), 2), cb.serial(Inner(), name="last"))
    variables = p.init(KEY, X, deterministic=True)
    assert shapes(variables["params"]["Repeat_0"]["Inner_0"]["Repeat_0"]["Dense_0"]["kernel"]) == (
        2,
        2,
        4,
        4,
    )
    close(p.apply(variables, X, deterministic=True), p.apply(variables, X, deterministic=True))
    assert p.apply(variables, X, deterministic=False, rngs={"dropout": KEY}).shape == (2, 4)


def test_a_pipeline_of_functions_is_called_without_init():
    p = cb.serial(jnp.tanh, cb.repeat(jnp.sin, 3), cb.remat(jnp.cos))
    close(p(X), jnp.cos(jnp.sin(jnp.sin(jnp.sin(jnp.tanh(X))))))
    _, sums = cb.scan(cb.add() >> cb.dup(), axis=-1)(jnp.zeros(2), X)
    close(sums, jnp.cumsum(X, axis=1))
    _, sums = cb.scan(cb.add() >> cb.dup(), axis=1, reverse=True)(jnp.zeros(2), X)
    close(sums, jnp.cumsum(X[:, ::-1], axis=1)[:, ::-1])
    close(
        jax.grad(lambda x: cb.repeat(jnp.sin, 3, remat=True)(x).sum())(X),
        jax.grad(lambda x: jnp.sin(jnp.sin(jnp.sin(x))).sum())(X),
    )


def test_pipelines_of_bound_modules_in_a_plain_method():
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            self.encoder = cb.serial(nn.Dense(4), nn.relu)

        def __call__(self, x):
            y = (self.encoder >> self.dense)(x)
            return (cb.serial(self.dense, nn.relu) & self.encoder[:1])(y)

    variables = Model().init(KEY, X)
    assert sorted(variables["params"]) == ["dense", "encoder"]
    assert len(Model().apply(variables, X)) == 2


def test_named_scopes_and_interceptors_see_layers():
    seen = []

    def note(call, args, kwargs, context):
        seen.append((type(context.module).__name__, context.method_name))
        return call(*args, **kwargs)

    p = cb.serial(nn.Dense(4), cb.residual(nn.Dense(4)))
    with nn.intercept_methods(note):
        p.init(KEY, X)
    assert seen == [("Serial", "__call__"), ("Dense", "__call__"), ("Dense", "__call__")]


class TestRepeat:
    def test_matches_a_loop_with_stacked_parameters(self):
        block = cb.residual(nn.Dense(4), jnp.tanh)
        p = cb.repeat(block, 5)
        variables = p.init(KEY, X)
        y = X
        for i in range(5):
            y = block.apply(jax.tree.map(lambda v, i=i: v[i], variables), y)
        close(p.apply(variables, X), y)
        for other in (
            cb.repeat(block, 5, unroll=5),
            cb.repeat(block, 5, remat=True),
            cb.repeat(block, 5, remat=jax.checkpoint_policies.dots_saveable),
        ):
            close(other.apply(variables, X), y)
            close(
                jax.grad(lambda v, p=other: p.apply(v, X).sum())(variables),
                jax.grad(lambda v: p.apply(v, X).sum())(variables),
            )
        kernels = variables["params"]["Dense_0"]["kernel"]
        assert not np.allclose(kernels[0], kernels[1])

    def test_its_layers_are_there_when_it_is_bound(self):
        p = cb.serial(nn.Dense(4), cb.repeat(cb.residual(nn.Dense(4), jnp.tanh), 3))
        variables = p.init(KEY, X)
        bound = p.bind(variables)
        copies = bound[1]
        close(copies.Dense_0.variables["params"], variables["params"]["Repeat_0"]["Dense_0"])
        assert "Dense_0" in dir(copies)
        assert not hasattr(copies, "Dense_1")
        close(bound(X), p.apply(variables, X))
        again, inner = p.bind(variables)[1].unbind()
        assert str(again) == "repeat(residual(Dense(features=4), tanh), 3)"
        close(inner["params"], variables["params"]["Repeat_0"])

    def test_its_layers_are_there_after_it_ran(self):
        class Looks(nn.Module):
            layer: nn.Module | None = None

            @nn.compact
            def __call__(self, x):
                layer = (
                    nn.Dense(4) if self.layer is None else self.layer.clone(parent=None, name=None)
                )
                copies = cb.repeat([layer], 2)
                return copies(copies(x)), copies.Dense_0.variables["params"]

        for layer in (nn.Dense(4), None):
            looks = Looks(layer)
            (y, seen), made = looks.init_with_output(KEY, X)
            close(seen, made["params"]["Repeat_0"]["Dense_0"])
            alone = cb.repeat(nn.Dense(4), 2)
            inner = {"params": made["params"]["Repeat_0"]}
            close(y, alone.apply(inner, alone.apply(inner, X)))
            close(looks.apply(made, X), (y, seen))

    def test_constant_inputs_reach_every_copy(self):
        masked = cb.fn(lambda x, mask: x + mask)
        assert cb.repeat(masked, 3)(1, 10) == 31
        assert cb.repeat(cb.keep(masked), 3)(jnp.array(1), jnp.array(10)) == (31, 10)
        assert cb.repeat(lambda x, m: x if m is None else m, 3)(X, None) is not None

    def test_of_nothing(self):
        p = cb.repeat(nn.Dense(4), 0)
        close(p.apply(p.init(KEY, X), X), X)

    def test_several_carried_items(self):
        p = cb.repeat(cb.swap(), 3)
        assert [float(v) for v in p(jnp.array(1.0), jnp.array(2.0))] == [2.0, 1.0]


def test_scan_matches_linen_rnn():
    class Cell(nn.LSTMCell):
        features: int = 6

        @nn.compact
        def __call__(
            self, carry: tuple[jax.Array, jax.Array], x: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            return super().__call__(carry, x)

    xs = jax.random.normal(KEY, (2, 5, 4))
    rnn = nn.RNN(nn.LSTMCell(6))
    theirs = rnn.init(KEY, xs)
    ours = {"params": {"Cell_0": theirs["params"]["cell"]}}
    zeros = jnp.zeros((2, 6))
    c, h, ys = cb.scan(Cell()).apply(ours, zeros, zeros, xs)
    close(ys, rnn.apply(theirs, xs))
    close(h, ys[:, -1])
    assert c.shape == (2, 6)


@pytest.mark.parametrize("kind", ["repeat", "scan"])
def test_variables_of_one_set_are_made_outside_of_init_too(kind):
    if kind == "repeat":
        p, inputs = cb.repeat(nn.Dense(4), 3, shared=True), (X,)
    else:
        p, inputs = cb.scan(cb.serial(cb.add(), nn.Dense(4), cb.dup()), axis=0), (X[0], X)
    _, made = p.apply({}, *inputs, rngs={"params": KEY}, mutable=["params"])
    close(made, p.init(KEY, *inputs))


def test_what_is_sown_at_init_is_stacked():
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "loss", x.sum())
            return x

    p = cb.repeat(cb.serial(nn.Dense(4), Sower()), 3, shared=True)
    variables = p.init(KEY, X)
    assert shapes(variables["losses"]) == {"Sower_0": {"loss": ((3,),)}}
    cell = cb.serial(cb.add(), Sower(), cb.dup())
    assert shapes(cb.scan(cell, axis=0).init(KEY, X[0], X)) == {
        "losses": {"Sower_0": {"loss": ((2,),)}}
    }


def test_a_scan_over_no_steps():
    p = cb.scan(cb.serial(cb.add(), nn.Dense(4), cb.dup()))
    carry, none = jnp.ones((2, 4)), jnp.ones((2, 0, 4))
    variables = p.init(KEY, carry, none)
    assert shapes(variables["params"]["Dense_0"]["kernel"]) == (4, 4)
    last, ys = p.apply(variables, carry, none)
    close(last, carry)
    assert ys.shape == (2, 0, 4)


def test_scan_takes_several_sequences():
    cell = cb.fn(lambda carry, x, m: (carry + x * m, carry), n_out=2)
    xs = jnp.arange(8.0).reshape(2, 4)
    last, _ = cb.scan(cell, n_carry=1)(jnp.zeros(2), xs, xs > 2)
    close(last, jnp.where(xs > 2, xs, 0).sum(1))


def test_remat_keeps_numbers_that_are_no_arrays():
    def lengths(xs: list) -> tuple[jax.Array, int]:
        return jnp.concatenate(xs), len(xs)

    x, n = cb.remat(lengths)([X, X])
    assert (x.shape, n) == ((4, 4), 2)
    assert type(n) is int
    use = cb.remat(cb.fn(lambda x, n: x[:n]))
    assert jax.jit(lambda x: use(x, 3))(x).shape == (3, 4)
    assert "remat" in str(jax.make_jaxpr(lambda x: cb.remat(jnp.sin)(x))(X))


def test_a_policy_says_what_a_repeat_keeps():
    def kept(remat):
        p = cb.repeat(cb.serial(nn.Dense(4, use_bias=False), jnp.sin), 3, remat=remat)
        variables = p.init(KEY, X)
        text = str(jax.make_jaxpr(jax.grad(lambda v: p.apply(v, X).sum()))(variables))
        return text.count("dot_general"), "remat" in text

    policies = jax.checkpoint_policies
    assert kept(False) == (3, False)  # one product forward, two backward
    assert kept(True) == kept(policies.nothing_saveable) == (4, True)
    assert kept(policies.dots_saveable) == (3, True)


def test_remat_policy():
    p = cb.remat(cb.serial(nn.Dense(4), jnp.sin), policy=jax.checkpoint_policies.dots_saveable)
    variables = p.init(KEY, X)
    text = str(jax.make_jaxpr(p.apply)(variables, X))
    assert "dots_saveable" in text or "dot_general" in text
    assert "Remat_0" not in variables["params"]
