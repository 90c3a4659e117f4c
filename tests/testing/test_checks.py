"""Checks of laws, signatures and programs find what is planted, and say what they found."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import Array
from jaxtyping import Int, Key

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing

X = jnp.ones((2, 3))


def test_laws_hold_for_layers():
    testing.check_laws(xn.FeedForward(2), nn.LayerNorm(), cb.sub(), max_examples=1)


def test_laws_hold_for_no_layers():
    testing.check_laws()


def test_a_step_that_remembers_breaks_a_law():
    calls = itertools.count()

    def remembers(x):
        return x + next(calls)

    with pytest.raises(AssertionError) as error:
        testing.check_laws(remembers)
    assert str(error.value) == (
        "identity is neutral does not hold: the two sides differ in what they give.\n"
        "  left:  serial(identity(), remembers)\n    f32[2, 3, 4]\n"
        "  right: serial(remembers)\n    f32[2, 3, 4]"
    )


def test_sides_of_other_signatures_differ():
    with pytest.raises(AssertionError, match="differ in their signatures"):
        testing.assert_same_meaning(cb.identity(), cb.identity(2), 1, 2)


def test_sides_with_other_parameters_differ():
    with pytest.raises(AssertionError) as error:
        testing.assert_same_meaning(cb.serial(nn.Dense(2)), cb.serial(nn.Dense(2, name="d")), X)
    assert str(error.value) == (
        "The equation does not hold: the two sides differ in their variables.\n"
        "  left:  serial(Dense(features=2))\n"
        "    params/Dense_0/bias: f32[2], params/Dense_0/kernel: f32[3, 2]\n"
        "  right: serial(Dense(features=2, name='d'))\n"
        "    params/d/bias: f32[2], params/d/kernel: f32[3, 2]"
    )


def test_a_wrong_arity_is_found():
    def two(x) -> tuple[int, int]:
        return x

    with pytest.raises(AssertionError, match=r"two has signature 1 -> 2, and gave 1: f32\[2, 3\]"):
        testing.check_signature(two, X)
    with pytest.raises(AssertionError, match="1 -> 2, and check_signature was given 2 inputs"):
        testing.check_signature(two, X, X)


def test_a_right_arity_is_let_through():
    testing.check_signature(xn.LSTMCell(), X, X, X)
    testing.check_signature(cb.dup() >> cb.serial(nn.Dense(2)), X)


def test_modules_with_other_variables_are_no_program():
    with pytest.raises(AssertionError, match="cannot be one program: their variables differ"):
        testing.assert_same_program(nn.Dense(2), nn.Dense(3), X)


def test_equations_inside_of_loops_are_compared():
    def summed(step):
        return cb.scan(cb.serial(cb.add(), step, cb.dup()))

    with pytest.raises(AssertionError) as error:
        testing.assert_same_program(summed(jnp.sin), summed(jnp.cos), X[:, 0], X)
    first, ours, theirs = str(error.value).splitlines()
    assert first.startswith("scan and scan are two programs, which part at equation ")
    assert " = sin" in ours
    assert " = cos" in theirs


def test_constants_are_compared():
    def plus(constant):
        table = jnp.arange(3.0) + constant
        return lambda x: x + table

    testing.assert_same_program(plus(1), plus(1), X[0])
    with pytest.raises(AssertionError, match="are two programs"):
        testing.assert_same_program(plus(1), plus(2), X[0])


def test_without_hypothesis_the_extra_is_named():
    code = (
        "import sys; sys.modules['hypothesis'] = None; import flax_extra\n"
        "try: flax_extra.testing\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == (
        "flax_extra.testing needs hypothesis, which is not installed. Install the extra that "
        "brings it: pip install 'flax_extra[test]'.\n"
    )


def test_random_keys_are_constants_and_outputs_like_any_other():
    def noise(seed):
        key = jax.random.key(seed)
        return lambda x: jax.random.normal(key, x.shape) + x

    testing.assert_same_program(noise(1), noise(1), X)
    with pytest.raises(AssertionError, match="their constant 0 differs"):
        testing.assert_same_program(noise(1), noise(2), X)

    def keys(seed: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.key(seed)

    testing.check_shapes(keys)
