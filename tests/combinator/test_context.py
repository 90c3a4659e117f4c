"""Keywords are context: who gets them, under which name, and what is said when it is doubtful."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from flax_extra.combinator._core import doubts

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
MASK = jnp.array([[[True, True, False]], [[True, False, False]]])


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "_given", set())


class Scale(nn.Module):
    """Takes a keyword, and has a parameter."""

    @nn.compact
    def __call__(self, x, scale=1.0):
        return x * scale * self.param("w", nn.initializers.ones, ())


class MaskedMean(nn.Module):
    """Means something else by ``mask`` than a norm does."""

    @nn.compact
    def __call__(self, x, mask=None):
        return x if mask is None else jnp.where(mask[..., None], x, 0.0)


def attention(**default: Any) -> cb.Combinator:
    return cb.fn(xn.SelfAttention(2), mask=cb.context("padding_mask", **default))


def block(**default: Any) -> cb.Combinator:
    return cb.residual(nn.LayerNorm(), attention(**default))


class TestRenamed:
    def test_it_binds_a_required_input(self):
        p = block(default=None)
        assert str(p.signature) == "1 -> 1"
        assert {"padding_mask"} <= p.keywords
        variables = p.init(KEY, X)
        by_hand = xn.SelfAttention(2).bind({"params": variables["params"]["SelfAttention_0"]})
        norm = nn.LayerNorm().bind({"params": variables["params"]["LayerNorm_0"]})
        for mask in (None, MASK):
            given = {} if mask is None else {"padding_mask": mask}
            np.testing.assert_allclose(
                p.apply(variables, X, **given), X + by_hand(norm(X), mask), rtol=1e-6
            )

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda f: cb.repeat(f, 2),
            lambda f: cb.repeat(f, 2, shared=True),
            lambda f: cb.remat(f),
            lambda f: cb.serial(cb.serial(f, name="inner"), name="outer"),
            lambda f: cb.repeat(cb.remat(cb.serial(f)), 2, remat=True),
        ],
    )
    def test_it_goes_through_every_scope_and_transformation(self, wrap):
        p = wrap(block(default=None))
        variables = p.init(KEY, X)
        masked = jax.jit(p.apply)(variables, X, padding_mask=MASK)
        changed = jax.jit(p.apply)(variables, X.at[0, 2].set(9.0), padding_mask=MASK)
        np.testing.assert_array_equal(masked[0, :2], changed[0, :2])
        assert np.any(np.asarray(masked != p.apply(variables, X)))

    def test_it_is_traced_and_differentiated(self):
        p = cb.repeat(cb.fn(Scale(), scale=cb.context("gain")), 3)
        variables = p.init(KEY, X, gain=1.0)
        gradient = jax.grad(lambda gain: p.apply(variables, X, gain=gain).sum())(2.0)
        np.testing.assert_allclose(gradient, 12 * X.sum(), rtol=1e-5, atol=1e-5)
        mapped = jax.vmap(lambda gain: p.apply(variables, X, gain=gain))(jnp.arange(3.0))
        np.testing.assert_allclose(mapped[2], 8 * X, rtol=1e-6)

    def test_two_layers_get_a_value_each(self):
        def lstm(d, which):
            return cb.fn(xn.LSTM(d), initial_state=cb.context(which, default=None))

        p = cb.branch(lstm(3, "small"), lstm(5, "large"))
        variables = p.init(KEY, X)
        small, large = (tuple(jnp.ones((2, 2, d))) for d in (3, 5))
        a, b = p.apply(variables, X, small=small, large=large)
        only, _ = p.apply(variables, X, small=small)
        np.testing.assert_array_equal(a, only)
        assert np.any(np.asarray(b != p.apply(variables, X)[1]))

    def test_of_a_combinator_it_renames_for_all_parts(self):
        inner = cb.serial(Scale(), cb.repeat(Scale(), 2))
        p = cb.serial(cb.fn(inner, scale=cb.context("gain", default=1.0)), Scale())
        assert p.keywords == {"gain", "scale"}
        variables = p.init(KEY, X)
        np.testing.assert_allclose(p.apply(variables, X, gain=2.0), 8 * X, rtol=1e-6)
        np.testing.assert_allclose(p.apply(variables, X, scale=3.0), 3 * X, rtol=1e-6)

    def test_without_a_default_a_call_must_give_it(self):
        p = cb.serial(nn.Dense(4), cb.repeat(block(), 2))
        message = (
            "serial was called without context that its layers need: 'padding_mask' (serial[1] -> "
            "repeat[0] -> residual[1] -> SelfAttention). Pass it by keyword, as in pipeline(x, "
            "padding_mask=...), or bind it: cb.fn(layer, padding_mask=...)."
        )
        with pytest.raises(TypeError, match=re.escape(message)):
            p.init(KEY, X)
        assert p.init_with_output(KEY, X, padding_mask=MASK)[0].shape == X.shape

    def test_text_equality_and_pickling(self):
        import copy

        assert str(attention(default=None)) == (
            "fn(SelfAttention(n_heads=2), mask=context('padding_mask', default=None))"
        )
        p = cb.fn(Scale(), scale=cb.context("gain"))
        assert p == cb.fn(Scale(), scale=cb.context("gain"))
        assert p != cb.fn(Scale(), scale=cb.context("gain", default=1.0))
        assert copy.deepcopy(p) == p
        assert repr(cb.context("x")) == "context('x')"

    @pytest.mark.parametrize("name", ["", "a b", 3, None])
    def test_a_name_must_be_a_keyword(self, name):
        with pytest.raises(TypeError, match="context takes the name of a keyword"):
            cb.context(name)


class TestStyles:
    """The ways in which people write the mode of a layer (flax#683)."""

    def test_a_required_keyword_only_parameter_is_context(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, *, train: bool):
                return x if train else -x

        p = cb.serial(nn.Dense(4), Layer())
        assert str(p.signature) == "1 -> 1"
        variables = p.init(KEY, X, train=True)
        np.testing.assert_array_equal(
            p.apply(variables, X, train=True), -p.apply(variables, X, train=False)
        )
        with pytest.raises(TypeError, match=re.escape("'train' (serial[1] -> Layer)")):
            p.apply(variables, X)

    def test_a_required_positional_one_is_an_input_and_the_error_says_what_to_write(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, train: bool):
                return x if train else -x

        with pytest.raises(cb.SignatureError) as caught:
            cb.serial(Layer()).init(KEY, X)
        assert str(caught.value).splitlines()[-1] == (
            "  Its parameter 'train' is annotated bool, and is an input as it stands. If it is a "
            "mode, make it context: cb.fn(layer, train=cb.context('train'))."
        )
        p = cb.serial(cb.fn(Layer(), train=cb.context("train")))
        np.testing.assert_array_equal(p.apply({}, X, train=False), -X)

    def test_a_function_with_a_required_keyword(self):
        def shift(x, *, by):
            return x + by

        assert cb.serial(shift, abs)(-3, by=1) == 2
        assert cb.serial(cb.fn(shift, by=1), abs)(-3) == 2


class TestInputs:
    """Keyword-only parameters may come from the stack, too."""

    def test_lengths_and_states_come_from_the_stack(self):
        lengths, state = jnp.array([3, 1]), (jnp.ones((2, 4)), jnp.zeros((2, 4)))
        lstm = xn.LSTM(4)
        variables = lstm.init(KEY, X)
        params = {"params": {"LSTM_0": variables["params"]}}
        expected = lstm.apply(variables, X, lengths=lengths, initial_state=state)
        whole = cb.fn(xn.LSTM(4), n_in=4)
        assert str(whole.signature) == "4 -> 1"
        np.testing.assert_array_equal(whole.apply(params, X, lengths, *state), expected)
        by_state = cb.fn(xn.LSTM(4), n_in=3, lengths=None)
        np.testing.assert_array_equal(
            by_state.apply(params, X, *state), lstm.apply(variables, X, initial_state=state)
        )
        by_lengths = cb.fn(xn.LSTM(4), n_in=2)
        assert "lengths" not in by_lengths.keywords
        np.testing.assert_array_equal(
            by_lengths.apply(params, X, lengths), lstm.apply(variables, X, lengths=lengths)
        )

    def test_a_number_that_does_not_fit(self):
        with pytest.raises(cb.SignatureError, match=r"LSTM takes 1 to 4 items off the stack"):
            cb.fn(xn.LSTM(4), n_in=5)

    def test_a_name_fixed_on_a_combinator_that_a_part_takes_off_the_stack(self):
        message = (
            "cb.fn binds 'mask' for all parts of residual, but SelfAttention takes it off the "
            "stack. Bind it there: cb.fn(layer, mask=...)."
        )
        for p in (
            cb.residual(nn.LayerNorm(), xn.SelfAttention(2)),
            cb.residual(cb.repeat(cb.keep(xn.SelfAttention(2)), 2) >> cb.select((0,), n_in=2)),
        ):
            with pytest.raises(cb.SignatureError, match=re.escape(message)):
                cb.fn(p, mask=None)
        bound = cb.fn(cb.residual(nn.LayerNorm(), attention(default=None)), mask=None)
        assert "mask" not in bound.keywords


class TestDoubts:
    def test_a_keyword_that_a_norm_takes_too_is_told_once(self):
        p = cb.serial(nn.LayerNorm(), MaskedMean())
        message = (
            "The keyword 'mask' goes to LayerNorm and MaskedMean, and may mean different things to "
            "them. Bind it where it is meant: cb.fn(layer, mask=cb.context('another_name')), or "
            "keep it away: cb.fn(LayerNorm(...), mask=None)."
        )
        mask = jnp.ones((3, 3), bool)  # a shape that both take
        with pytest.warns(UserWarning, match=re.escape(message)):
            p.init(KEY, jnp.ones((3, 3, 3)), mask=mask)
        p.init(KEY, jnp.ones((3, 3, 3)), mask=mask)  # it is not told again

    @pytest.mark.parametrize(
        "p",
        [
            cb.serial(cb.fn(nn.LayerNorm(), mask=None), MaskedMean()),
            cb.serial(nn.LayerNorm(), cb.fn(MaskedMean(), mask=cb.context("padding"))),
            cb.serial(MaskedMean(), MaskedMean()),
            cb.serial(nn.LayerNorm(), nn.LayerNorm()),
        ],
    )
    def test_nothing_is_told_where_nothing_is_doubtful(self, p):
        given = {"padding": jnp.ones((2, 3), bool)} if "padding" in p.keywords else {}
        mask = jnp.ones((2, 3, 4) if isinstance(p[0], nn.LayerNorm) else (2, 3), bool)
        given = given or {"mask": mask}
        p.init(KEY, X, **given)

    def test_the_note_says_who_else_took_the_name(self):
        norm = cb.fn(nn.Dense(4)) >> MaskedMean()

        class Other(nn.Module):
            @nn.compact
            def __call__(self, x, mask=None):
                return x + mask  # means another shape

        with pytest.raises(ValueError, match="broadcast") as caught:
            cb.serial(norm, Other()).init(KEY, X, mask=jnp.ones((2, 3)))
        (note,) = [n for n in caught.value.__notes__ if n.startswith("flax_extra")]
        assert note.splitlines()[-1] == (
            "  The keyword 'mask' also went to MaskedMean. If it means something else there, keep "
            "it away: cb.fn(MaskedMean(...), mask=None)."
        )

    def test_a_layer_that_takes_any_keyword_is_told(self):
        class Any_(nn.Module):
            @nn.compact
            def __call__(self, x, **options):
                return x

        p = cb.serial(Any_(), nn.Dropout(0.5))
        message = "Any_ accepts any keyword (**kwargs), so the context keyword 'deterministic'"
        with pytest.warns(UserWarning, match=re.escape(message)):
            p.apply({}, X, deterministic=True)
        passed = cb.fn(Any_(), deterministic=cb.context("deterministic", default=None))
        cb.serial(passed, nn.Dropout(0.5)).apply({}, X, deterministic=True)


class Drop(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, deterministic=False):
        return self.dropout(x, deterministic=deterministic)


class TestNnx:
    def test_context_reaches_a_layer_through_the_bridge(self):
        p = cb.serial(bridge.to_linen(Drop), nn.Dropout(0.5))
        assert str(p.signature) == "1 -> 1"
        rngs = {"params": KEY, "dropout": KEY}
        variables = p.init(rngs, X, deterministic=True)
        np.testing.assert_array_equal(p.apply(variables, X, deterministic=True), X)
        trained = p.apply(variables, X, deterministic=False, rngs={"dropout": KEY})
        assert np.any(np.asarray(trained == 0))

    def test_a_module_of_nnx_is_refused(self):
        message = (
            "Drop is an NNX module, which holds its own parameters: they would become constants of "
            "the program. Wrap it: nnx.bridge.to_linen(Drop, ...)."
        )
        with pytest.raises(TypeError, match=re.escape(message)):
            cb.serial(Drop(nnx.Rngs(0)))


CELLS = [
    (nn.GRUCell(4), "2 -> 2"),
    (nn.MGUCell(4), "2 -> 2"),
    (nn.SimpleCell(4), "2 -> 2"),
    (nn.LSTMCell(4), "3 -> 3"),
    (nn.OptimizedLSTMCell(4), "3 -> 3"),
    (nn.ConvLSTMCell(4, (3,)), "3 -> 3"),
    (xn.LSTMCell(), "3 -> 3"),
]


@pytest.mark.parametrize(("cell", "signature"), CELLS, ids=lambda v: type(v).__name__)
def test_linens_cells_need_no_declaration(cell: Any, signature: str) -> None:
    assert str(cb.infer_signature(cell)) == signature


def test_a_cell_of_linens_in_a_scan():
    cell = nn.LSTMCell(4)
    zeros = jnp.zeros((2, 4))
    (c, _, ys), variables = cb.scan(cell).init_with_output(KEY, zeros, zeros, X)
    rnn = nn.RNN(nn.LSTMCell(4), return_carry=True)
    ((expected_c, _), expected) = rnn.apply(
        {"params": {"cell": variables["params"]["LSTMCell_0"]}}, X
    )
    np.testing.assert_allclose(c, expected_c, rtol=1e-6)
    np.testing.assert_allclose(ys, expected, rtol=1e-6)


class TestSpecs:
    """Context has a place wherever shapes are given, and is written as they are."""

    def test_shape_signature(self):
        shapes = cb.shape_signature(block(), "f32[b, t, 4]", padding_mask="bool[b, 1, t]")
        text = "f32[b, t, 4], padding_mask: bool[b, 1, t] -> f32[b, t, 4]"
        assert str(shapes) == text
        assert shapes == text
        assert shapes == "f32[n, s, 4], padding_mask: bool[n, 1, s] -> f32[n, s, 4]"
        assert shapes != "f32[n, s, 4], padding_mask: bool[n, s, s] -> f32[n, s, 4]"
        assert shapes != "f32[n, s, 4] -> f32[n, s, 4]"
        struct = jax.ShapeDtypeStruct((2, 1, 3), bool)
        assert str(cb.shape_signature(block(), X, padding_mask=struct)) == (
            "f32[2, 3, 4], padding_mask: bool[2, 1, 3] -> f32[2, 3, 4]"
        )

    def test_a_text_that_is_no_spec_is_a_value(self):
        def f(x, mode="train"):
            return x if mode == "train" else x[:1]

        assert str(cb.shape_signature(f, "f32[3]", mode="eval")) == "f32[3] -> f32[1]"

    def test_typed(self):
        text = "f32[b, t, 4], padding_mask: bool[b, 1, t] -> f32[b, t, 4]"
        p = cb.typed(block(), text)
        assert f"'{text}'" in str(p)
        with pytest.raises(cb.ShapeError, match=re.escape("computed: f32[b, t, 4], padding_mask")):
            cb.typed(block(), f"{text[:-2]}8]")
        with pytest.raises(ValueError, match="mask"):
            cb.typed(block(), "f32[b, t, 4], padding_mask: bool[b, t, 3] -> f32[b, t, 4]")

    def test_summary_and_diagram(self):
        table = str(cb.summary(block(), "f32[b, t, 4]", padding_mask="bool[b, 1, t]"))
        assert re.search(r"context padding_mask +bool\[b, 1, t\]", table)
        picture = cb.diagram(block(), "f32[b, t, 4]", padding_mask="bool[b, 1, t]")
        assert "mask: padding_mask" in picture.svg

    def test_inputs_for_and_check_shapes(self):
        from hypothesis import given, settings

        specs, context = ["f32[b, t, 4]"], {"padding_mask": "bool[b, 1, t]"}

        @settings(max_examples=20, deadline=None)
        @given(testing.inputs_for(block(), specs=specs, context=context))
        def law(call):
            (x,), keywords = call
            assert keywords["padding_mask"].shape == (x.shape[0], 1, x.shape[1])

        law()
        typed = cb.typed(block(), "f32[b, t, 4], padding_mask: bool[b, 1, t] -> f32[b, t, 4]")
        testing.check_shapes(typed, max_examples=10)
        with pytest.raises(Exception, match="no specs of its inputs"):
            testing.inputs_for(block(), context=context)
        with pytest.raises(Exception, match="check_shapes compares a callable with its annotation"):
            testing.check_shapes(block())


class Positions(nn.Module):
    """A table that serves sequences up to 64 long."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.zeros, (64, 4))
        return x + table[None, : x.shape[1]]


class TestConstraints:
    def test_a_table_serves_all_lengths_up_to_its_own(self):
        with pytest.raises(cb.ShapeError):
            cb.shape_signature(Positions(), "f32[b, t, 4]")
        text = "f32[b, t, 4] where t <= 64 -> f32[b, t, 4]"
        assert str(cb.shape_signature(Positions(), "f32[b, t, 4] where t <= 64")) == text
        p = cb.typed(Positions(), text)
        assert text in str(p)
        testing.check_shapes(p, max_examples=30, sizes={"t": 64})
        assert cb.ShapeSignature.parse(text) == text
        assert cb.ShapeSignature.parse(text) != text.replace("64 ->", "32 ->")

    def test_several(self):
        def halves(x):
            return x.reshape(x.shape[0], x.shape[1] // 2, 2)

        text = "f32[b, t] where mod(t, 2) == 0 and t >= 4 -> f32[b, floordiv(t, 2), 2]"
        testing.check_shapes(cb.typed(halves, text), max_examples=20)

    def test_a_constraint_that_is_none(self):
        with pytest.raises(ValueError, match=re.escape("'t is even' does not constrain")):
            cb.shape_signature(abs, "f32[t] where t is even")
