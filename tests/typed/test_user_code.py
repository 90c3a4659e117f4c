"""The code that the type checkers read also runs, and is right."""

import jax
import jax.numpy as jnp

from flax_extra import combinator as cb
from tests.typed import user_code

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def test_pipelines_are_built_and_run():
    model = user_code.encoder(2)
    assert "i32[b, t] -> f32[b, t, 8]" in user_code.described(model)
    variables = jax.eval_shape(lambda: user_code.trained_for_a_step(model))
    kernel = variables["params"]["Repeat_0"]["FeedForward_0"]["Dense_0"]["kernel"]
    assert kernel.shape == (2, 8, 16)
    total, sums = user_code.called_without_variables()
    assert (total.tolist(), sums.tolist()) == ([3.0], [[1.0, 2.0, 3.0]])
    user_code.taken_apart(model)


def test_every_operator_takes_a_callable_on_either_side():
    signatures = [str(p.signature) for p in user_code.wired()]
    assert signatures == [
        *("2 -> 1", "2 -> 2", "3 -> 3", "3 -> 3", "2 -> 3", "2 -> 3"),
        *("1 -> 2", "1 -> 1", "2 -> 2", "2 -> 1", "3 -> 1", "2 -> 1"),
    ]


def test_subclasses_take_any_iterable_of_callables():
    block, named, generated, scaled, twice = user_code.extended()
    assert block == generated
    assert str(block) == "pre_norm(LayerNorm(), Dense(features=4))"
    assert (named.name, str(scaled)) == ("block", "scaled(Dense(features=4), factor=0.5)")
    y, variables = block.init_with_output(jax.random.key(0), X)
    scaled_y, _ = twice.init_with_output(jax.random.key(0), X)
    assert jnp.allclose(scaled_y, y, atol=1e-6)
    assert sorted(variables["params"]) == ["Dense_0", "LayerNorm_0"]


def test_layers_have_their_shapes():
    attention, sequence, feed_forward, encoding, tagger = user_code.layers()
    x = "f32[b, 5, 8]"
    assert cb.shape_signature(attention, x, x, None) == f"{x}, {x}, None -> {x}"
    assert cb.shape_signature(sequence, x) == f"{x} -> {x}"
    assert cb.shape_signature(feed_forward, x) == f"{x} -> bf16[b, 5, 8]"
    assert cb.shape_signature(tagger, "i32[b, 5]") == "i32[b, 5] -> f32[b, 5, 3]"
    words = cb.shape_signature(encoding, ["i32[b, 5]", "i32[b, 5]"])
    assert words == "list(i32[b, 5], i32[b, 5]) -> f32[b, 10, 17], list(5, 5)"


def test_checks_pass():
    user_code.check_layers()
    user_code.check_pipelines()


def test_mistakes_are_told():
    arity, shape = user_code.mistakes()
    assert arity.startswith("How many inputs does max take?")
    assert shape.startswith("Declared and computed shapes differ.")
