"""Specs, shape signatures and declarations."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from flax_extra.combinator._views.specs import substitute_sizes

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def block() -> cb.Combinator:
    attention = cb.residual(nn.LayerNorm(), xn.SelfAttention(n_heads=4))
    return cb.keep(attention) >> cb.residual(nn.LayerNorm(), xn.FeedForward(widening_factor=4))


def refused(f: Any, *inputs: Any, **context: Any) -> str:
    with pytest.raises(cb.ShapeError) as caught:
        cb.shape_signature(f, *inputs, **context)
    return str(caught.value)


# What people pin


def test_a_twelve_block_encoder() -> None:
    encoder = nn.Embed(256, 64) >> cb.serial(block() for _ in range(12)) >> cb.swap() >> cb.drop()
    found = cb.shape_signature(encoder, "i32[b, t]", "bool[b, t, t]")
    assert str(found) == "i32[b, t], bool[b, t, t] -> f32[b, t, 64]"


def test_twelve_blocks_in_a_loop() -> None:
    encoder = nn.Embed(256, 64) >> cb.repeat(block(), 12, remat=True)
    found = cb.shape_signature(encoder, "i32[b, t]", "bool[1, 1, t]")
    assert str(found) == "i32[b, t], bool[1, 1, t] -> f32[b, t, 64], bool[1, 1, t]"


def test_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from digits_autoencoder import autoencoder

    found = cb.shape_signature(autoencoder(label_mask_rate=0.5), "f32[b, 8, 8]", "i32[b]")
    assert str(found) == "f32[b, 8, 8], i32[b] -> f32[b, 8, 8], f32[b, 10]"


SIGNATURES: list[tuple[Any, str]] = [
    (cb.serial(), "f32[b] -> f32[b]"),
    (cb.identity(), "f32[b], i32[t] -> f32[b], i32[t]"),
    (cb.dup(2), "f32[b], i32[t] -> f32[b], i32[t], f32[b], i32[t]"),
    (cb.drop(), "f32[b] -> ()"),
    (cb.swap(), "f32[b], i32[t] -> i32[t], f32[b]"),
    (cb.select((2, 0, 0)), "f32[a], f32[b], f32[c] -> f32[c], f32[a], f32[a]"),
    (cb.concatenate(axis=1), "f32[b, t, 8], f32[b, s, 8] -> f32[b, t + s, 8]"),
    (cb.split(2), "f32[b, 2*t] -> f32[b, t], f32[b, t]"),
    (cb.fold(jnp.matmul, n_in=3), "f32[a, b], f32[b, c], f32[c, d] -> f32[a, d]"),
    (cb.add() >> cb.fn(jnp.reshape, shape=(-1,)), "f32[b, t], f32[1, t] -> f32[b*t]"),
    (cb.parallel(nn.Dense(3), nn.Embed(9, 4)), "f32[b, 8], i32[t] -> f32[b, 3], f32[t, 4]"),
    (cb.branch(nn.Dense(3), jnp.sum), "f32[b, 8] -> f32[b, 3], f32[]"),
    (cb.residual(nn.Dense(3), shortcut=nn.Dense(3)), "f32[b, 8] -> f32[b, 3]"),
    (cb.keep(nn.Dense(3)), "f32[b, 8] -> f32[b, 3], f32[b, 8]"),
    (cb.dip(nn.Dense(3)), "bool[b], f32[b, 8] -> bool[b], f32[b, 3]"),
    (cb.scan(cb.add() >> cb.dup()), "f32[b], f32[b, t] -> f32[b], f32[b, t]"),
    (cb.repeat(nn.Dense(8), 3, shared=True), "f32[b, 8], i32[] -> f32[b, 8], i32[]"),
    (cb.remat(nn.Dense(3)), "f32[2*b, 8] -> f32[2*b, 3]"),
    (lambda modalities: modalities["a"], "dict('a': f32[b], 'n': 3) -> f32[b]"),
    (lambda x, mask: [x, mask, x.shape[0]], "f32[b], None -> list(f32[b], None, b)"),
    (lambda n: jnp.zeros(n), "n -> f32[n]"),
]


@pytest.mark.parametrize(("f", "text"), SIGNATURES, ids=[text for _, text in SIGNATURES])
def test_every_combinator(f: Any, text: str) -> None:
    declared = cb.ShapeSignature.parse(text)
    assert str(cb.shape_signature(f, *declared.inputs)) == text


def test_a_keyword_reaches_the_steps() -> None:
    model = cb.serial(nn.Dense(3), nn.Dropout(0.5))
    assert cb.shape_signature(model, "f32[b, 8]", deterministic=True) == "f32[b, 8] -> f32[b, 3]"
    with pytest.raises(ValueError, match="deterministic"):
        cb.shape_signature(model, "f32[b, 8]")


def test_inputs_of_every_kind() -> None:
    struct = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    arrays = (jnp.ones((2, 3)), np.ones((2, 3), np.float32), struct, "f32[2, 3]")
    found = cb.shape_signature(cb.fn(lambda a, b, c, d: (a + b, c + d), n_out=2), *arrays)
    assert str(found) == ", ".join(["f32[2, 3]"] * 4) + " -> f32[2, 3], f32[2, 3]"


def test_texts_share_the_names_of_given_dimensions() -> None:
    (t,) = jax.export.symbolic_shape("t", constraints=["t >= 4"])
    struct = jax.ShapeDtypeStruct((t, 3), jnp.float32)
    assert cb.shape_signature(cb.add(), struct, "f32[t, 3]") == "f32[t, 3], f32[t, 3] -> f32[t, 3]"


def test_a_bound_pipeline_and_one_in_a_compact_method() -> None:
    model = cb.serial(nn.Dense(3), nn.relu)
    bound = model.bind(model.init(jax.random.key(0), jnp.ones((1, 8))))
    assert cb.shape_signature(bound, "f32[b, 8]") == "f32[b, 8] -> f32[b, 3]"

    class Host(nn.Module):
        @nn.compact
        def __call__(self, x):
            return cb.typed(cb.serial(nn.Dense(3), nn.relu), "f32[b, 8] -> f32[b, 3]")(x)

    class SetUp(nn.Module):
        def setup(self):
            self.body = cb.typed(cb.serial(nn.Dense(3), nn.relu), "f32[b, 8] -> f32[b, 3]")

        def __call__(self, x):
            return self.body(x)

    shapes = {"Dense_0": {"bias": (3,), "kernel": (8, 3)}}
    for host, expected in ((Host(), shapes), (SetUp(), {"body": shapes})):
        params = host.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
        assert jax.tree.map(jnp.shape, params) == expected


# Equality is up to names


@given(st.permutations(["a", "b", "c", "d"]))
def test_equal_up_to_the_names_of_dimensions(names: list[str]) -> None:
    template = "f32[{0}, {1} + {2}], i32[{1}], {3} -> f32[{2}*{3}, 8*{0}]"
    one = cb.ShapeSignature.parse(template.format("w", "x", "y", "z"))
    other = cb.ShapeSignature.parse(template.format(*names))
    assert one == other
    assert hash(one) == hash(other)
    assert one == template.format(*names)


@pytest.mark.parametrize(
    "other",
    [
        "f32[b, t] -> f32[b, t]",
        "f32[b, t] -> f32[b]",
        "f32[b, b] -> f32[t]",
        "i32[b, t] -> f32[t]",
        "f32[b, t] -> f32[b + t]",
        "f32[b, t] -> f32[t], f32[t]",
        "f32[b, t], f32[t] -> ()",
        "f32[2, t] -> f32[t]",
        "f32[b, t] -> list(f32[t])",
    ],
)
def test_different_shapes_differ(other: str) -> None:
    assert cb.ShapeSignature.parse("f32[b, t] -> f32[t]") != other


def test_a_signature_is_a_value() -> None:
    found = cb.shape_signature(nn.Dense(3), "f32[b, t, 8]")
    assert repr(found) == "ShapeSignature('f32[b, t, 8] -> f32[b, t, 3]')"
    assert found == pickle.loads(pickle.dumps(found))
    assert found.inputs[0].dtype == jnp.float32
    assert found != 3


# Declarations


def test_a_declaration_is_in_the_text_and_the_documentation() -> None:
    model = cb.typed(cb.serial(nn.Dense(3), nn.relu), "f32[b,8]->f32[b,3]")
    assert str(model) == "typed(serial(Dense(features=3), relu), 'f32[b, 8] -> f32[b, 3]')"
    assert (inspect.getdoc(model) or "").startswith("A pipeline ``f32[b, 8] -> f32[b, 3]``.")
    assert (inspect.getdoc(cb.Typed) or "").startswith("A pipeline with its shapes declared.")


def test_a_declaration_changes_nothing_else() -> None:
    plain = cb.serial(nn.Dense(3), cb.residual(nn.Dense(3)))
    model = cb.typed(plain, "f32[b, 8] -> f32[b, 3]")
    x = jnp.ones((2, 8))
    params = plain.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, model.init(jax.random.key(0), x))
    np.testing.assert_array_equal(plain.apply(params, x), model.apply(params, x))
    assert len(model) == 2
    assert model[0] == plain[0]
    assert model[1:] == plain[1:]
    assert list(model) == list(plain)
    assert model.signature == plain.signature
    plain = cb.typed(cb.serial(abs, abs), "f32[b] -> f32[b]")
    assert pickle.loads(pickle.dumps(plain)) == plain
    assert len(cb.typed(nn.Dense(3), "f32[8] -> f32[3]")) == 1


def test_a_declaration_of_a_layer_in_a_pipeline_keeps_its_path_in_errors() -> None:
    inner = cb.typed(cb.serial(nn.Dense(3), nn.Dense(4)), "f32[b, 8] -> f32[b, 4]")
    model = cb.serial(inner, lambda x: x + jnp.ones((1, 5)))
    with pytest.raises(TypeError) as caught:
        model.init(jax.random.key(0), jnp.ones((1, 8)))
    assert "serial[1] -> <lambda>" in caught.value.__notes__[0]


def plant(fault: Any) -> cb.Combinator:
    return cb.serial(nn.Embed(256, 16), cb.residual(nn.LayerNorm(), nn.Dense(16)), fault, nn.relu)


FAULTS: list[tuple[Any, str, str]] = [
    (nn.Dense(8), "f32[b, t, 8]", "serial[2] -> Dense: f32[b, t, 16] -> f32[b, t, 8]"),
    (cb.fn(jnp.mean, axis=1), "f32[b, 16]", "serial[2] -> mean: f32[b, t, 16] -> f32[b, 16]"),
    (lambda x: x[:, :, None], "f32[b, t, 1, 16]", "serial[2] -> <lambda>"),
    (lambda x: x[:, 1:], "f32[b, t - 1, 16]", "serial[2] -> <lambda>"),
    (lambda x: x.swapaxes(0, 1), "f32[t, b, 16]", "serial[2] -> <lambda>"),
    (lambda x: x.astype(jnp.bfloat16), "bf16[b, t, 16]", "serial[2] -> <lambda>"),
    (
        cb.dup() >> cb.concatenate(axis=1),
        "f32[b, 2*t, 16]",
        "serial[2] -> serial[1] -> concatenate",
    ),
    (cb.dup() >> cb.concatenate(), "f32[b, t, 32]", "serial[2] -> serial[1] -> concatenate"),
    (xn.LSTM(16), "f32[b, 16]", "serial[2] -> LSTM: f32[b, t, 16] -> f32[b, 16]"),
    (nn.Conv(16, (3,), padding="VALID"), "f32[b, max(t - 2, 0), 16]", "serial[2] -> Conv"),
    (cb.remat(nn.Dense(8)), "f32[b, t, 8]", "serial[2] -> remat[0] -> Dense"),
]


@pytest.mark.parametrize(("fault", "found", "step"), FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_found_with_its_step(fault: Any, found: str, step: str) -> None:
    with pytest.raises(cb.ShapeError) as caught:
        cb.typed(plant(fault), "i32[b, t] -> f32[b, t, 16]")
    first, declared, computed, parted, remedy = str(caught.value).splitlines()
    assert first == "Declared and computed shapes differ."
    assert declared == "  declared: i32[b, t] -> f32[b, t, 16]"
    assert computed == f"  computed: i32[b, t] -> {found}"
    assert parted.startswith(f"  They part at {step}")
    assert remedy == "  Correct the declaration, or the step."


def test_a_step_that_fails_on_the_declared_inputs_says_so_itself() -> None:
    with pytest.raises(TypeError) as caught:
        cb.typed(plant(cb.residual(nn.Dense(8))), "i32[b, t] -> f32[b, t, 16]")
    assert "serial[2] -> residual -> add" in caught.value.__notes__[0]


def test_the_fault_is_followed_through_the_steps_that_hand_it_on() -> None:
    model = cb.serial(nn.Embed(9, 16), xn.LSTM(16), nn.LayerNorm(), nn.Dense(4))
    with pytest.raises(cb.ShapeError, match=r"They part at serial\[1\] -> LSTM"):
        cb.typed(model, "i32[b, t] -> f32[b, t, 4]")


def test_a_fault_in_a_list() -> None:
    model = cb.serial(cb.branch(nn.Dense(2), nn.Dense(5)), lambda a, b: [a, b], lambda x: x)
    with pytest.raises(cb.ShapeError, match=r"They part at serial\[0\] -> branch\[1\] -> Dense"):
        cb.typed(model, "f32[b, 8] -> list(f32[b, 2], f32[b, 4])")


def test_another_number_of_outputs() -> None:
    with pytest.raises(cb.ShapeError) as caught:
        cb.typed(cb.dup(), "f32[b] -> f32[b]")
    assert str(caught.value) == (
        "Declared and computed shapes differ.\n"
        "  declared: f32[b] -> f32[b]\n"
        "  computed: f32[b] -> f32[b], f32[b]\n"
        "  Correct the declaration, or the step."
    )


# What has no shape for every size


def test_a_name_that_sizes_a_parameter() -> None:
    assert refused(nn.Dense(3), "f32[b, d]") == (
        "Parameter Dense_0/kernel would be f32[d, 3], so that 'd' sizes it, and the parameters "
        "of a model have one size. Make it a number in the spec."
    )


def test_a_name_that_sizes_one_of_several_arrays_in_a_parameter() -> None:
    class Several(nn.Module):
        @nn.compact
        def __call__(self, x):
            first, _ = self.param("w", lambda key: [jnp.ones(x.shape[-1]), jnp.ones(3)])
            return x * first[None]

    assert refused(Several(), "f32[b, d]").startswith("Parameter Several_0/w/0 would be f32[d],")


def test_a_name_that_sizes_a_parameter_whose_initializer_wants_a_number() -> None:
    class Signs(nn.Module):
        @nn.compact
        def __call__(self, x):
            d = x.shape[-1]
            signs = self.param("w", lambda key: jnp.ones(d) if d % 2 == 0 else -jnp.ones(d))
            return x * signs[None]

    assert refused(Signs(), "f32[b, d]").startswith("Parameter Signs_0/w would be f32[d],")


def test_a_name_that_sizes_a_parameter_and_fails_there() -> None:
    assert refused(cb.repeat(block(), 2), "f32[b, t, d]", "bool[b, t, t]") == (
        "Parameter FeedForward_0/Dense_0/bias would be f32[2, 192] for d = 48, so that 'd' sizes "
        "it, and the parameters of a model have one size. Make it a number in the spec."
    )


def test_an_operation_that_cannot_be_decided() -> None:
    def crop(x):
        return x[:, :4] if x.shape[1] > 4 else x

    assert refused(cb.serial(nn.Dense(3), crop), "f32[b, t, 8]") == (
        "An operation cannot be decided for every size at once: Symbolic dimension comparison "
        "'t' > '4' is inconclusive.\n"
        "  serial[1] -> crop\n"
        "  signature: 1 -> 1\n"
        "  stack: f32[b, t, 3]\n"
        "  Make 't' a number in the spec."
    )


def test_a_size_that_does_not_divide_is_told_from_a_real_mismatch() -> None:
    assert refused(cb.split(3, axis=1), "f32[b, t]").endswith("Make 't' a number in the spec.")
    with pytest.raises(TypeError, match="incompatible shapes"):
        cb.shape_signature(cb.add(), "f32[b, t]", "f32[b, s]")


def test_a_missing_input_is_told_as_ever() -> None:
    with pytest.raises(cb.SignatureError, match="takes 2 items"):
        cb.shape_signature(cb.add(), "f32[b, t]")


# What is no spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("f32(b, t)", "'f32(b, t)' is not a spec: "),
        ("f32[b", "'f32[b' is not a spec. Write an array as jaxprs print it, such as"),
        ("", "'' is not a spec."),
        ("float[b]", "'float[b]' is not a spec: 'float' is no type of numbers. Jaxprs name these"),
        ("f32[b; t]", "'f32[b; t]' is not a spec: syntax error"),
        ("f32[b, -3]", "'f32[b, -3]' is not a spec: -3 is below zero. A dimension is a number, a"),
        ("f64[b]", "f64[b] has more bits than JAX keeps by default. Ask for f32, or enable"),
        (np.ones(3), "f64[3] has more bits than JAX keeps by default. Ask for f32, or enable"),
        ("b, t", "'b, t' is not a spec."),
    ],
)
def test_what_is_no_spec(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"spec|bits|declares") as caught:
        cb.shape_signature(nn.relu, spec)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["f32[b]", "f32[b] -> f32[b] -> f32[b]", ""])
def test_what_is_no_declaration(text: str) -> None:
    with pytest.raises(ValueError, match=r"spec|bits|declares") as caught:
        cb.typed(nn.relu, text)
    assert str(caught.value) == (
        f"{text!r} declares no shapes. Write inputs, one arrow and outputs, such as "
        f"'i32[b, t] -> f32[b, t, 64]'."
    )


def test_typed_takes_one_callable() -> None:
    with pytest.raises(TypeError, match="typed takes one callable; got 2"):
        cb.typed([nn.relu, nn.relu], "f32[b] -> f32[b]")  # type: ignore[arg-type]


# One signature, every size

N_PIPELINES, N_SIZES = 100, 20
sizes = st.fixed_dictionaries({"b": st.integers(1, 50), "t": st.integers(1, 50)})
leaves = st.one_of(
    st.builds(nn.Dense, st.just(4)),
    st.builds(nn.LayerNorm),
    st.sampled_from([jnp.tanh, jnp.maximum, jnp.hypot]),
)
# Of these sizes, the generator cuts the last axis alone; the others are names here.
# The number of members of a vmap is a number, and the sizes here are names.
pipelines = testing.pipelines(
    leaves=leaves, shape=(7, 5, 4), combinators=testing.COMBINATORS - {"vmap"}
)


@settings(max_examples=N_PIPELINES)
@given(p=pipelines, drawn=st.lists(sizes, min_size=N_SIZES, max_size=N_SIZES))
def test_what_is_known_symbolically_holds_at_every_size(p: Any, drawn: list[Any]) -> None:
    specs = ["f32[b, t, 4]"] * p.signature.n_in
    symbolic = cb.shape_signature(p, *specs)
    for size in drawn:
        inputs = [jax.ShapeDtypeStruct((size["b"], size["t"], 4), jnp.float32) for _ in specs]
        found, _ = jax.eval_shape(p.init_with_output, jax.random.key(0), *inputs)
        expected = substitute_sizes(symbolic.outputs, size)
        assert jax.tree.leaves(found) == jax.tree.leaves(expected)
