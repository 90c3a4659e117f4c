"""Rotary positions: against a formula of complex numbers, and its laws."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_extra import layer as xn


def rotate_by_complex_numbers(
    x: np.ndarray, positions: np.ndarray, base: float, interleaved: bool
) -> np.ndarray:
    """The formula in float64: each pair is a complex number, times exp(i p f)."""
    size = x.shape[-1]
    frequencies = base ** (-2 * np.arange(size // 2) / size)
    factors = np.exp(1j * positions[..., None, None] * frequencies)
    pairs = x.reshape(*x.shape[:-1], -1, 2) if interleaved else np.stack(np.split(x, 2, -1), -1)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * factors
    parts = np.stack([turned.real, turned.imag], -1)
    return parts.reshape(x.shape) if interleaved else np.concatenate(np.moveaxis(parts, -1, 0), -1)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("interleaved", [False, True])
@given(
    base=st.sampled_from([10.0, 1e4, 5e5]),
    size=st.sampled_from([2, 4, 8]),
    start=st.integers(0, 3000),
    each_row=st.booleans(),
)
def test_pairs_are_turned(
    interleaved: bool, base: float, size: int, start: int, each_row: bool
) -> None:
    x = draw(2, 3, 2, size)
    positions = start + np.arange(6 if each_row else 3).reshape(-1, 3)
    rotary = xn.RotaryEncoding(base=base, interleaved=interleaved)
    found = rotary.rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
    expected = rotate_by_complex_numbers(x, positions, base, interleaved)
    np.testing.assert_allclose(found, expected, atol=2e-3 if start > 100 else 1e-5)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_products_depend_on_the_distance(p: int, q: int, shift: int) -> None:
    rotary = xn.RotaryEncoding()
    query, key = (jnp.asarray(draw(1, 1, 1, 8, seed=seed), jnp.float32) for seed in (0, 1))

    def product(p: int, q: int) -> Any:
        turned = (rotary.rotate(x, jnp.array([[at]])) for x, at in ((query, p), (key, q)))
        return jnp.sum(next(turned) * next(turned))

    np.testing.assert_allclose(product(p, q), product(p + shift, q + shift), atol=1e-4)


def test_a_fraction_leaves_the_other_features() -> None:
    x = jnp.asarray(draw(2, 5, 2, 8), jnp.float32)
    positions = jnp.arange(5)[None]
    found = xn.RotaryEncoding(fraction=0.5).rotate(x, positions)
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(found[..., :4], xn.RotaryEncoding().rotate(x[..., :4], positions))


def test_layouts_are_permutations_of_each_other() -> None:
    x, positions = jnp.asarray(draw(2, 5, 1, 8), jnp.float32), jnp.arange(5)[None]
    order = np.arange(8).reshape(2, 4).T.reshape(-1)  # neighbours from halves
    halves = xn.RotaryEncoding().rotate(x, positions)
    neighbours = xn.RotaryEncoding(interleaved=True).rotate(x[..., order], positions)
    np.testing.assert_allclose(halves[..., order], neighbours, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_rounded_once(dtype: Any) -> None:
    x = jnp.asarray(draw(1, 4, 1, 8), dtype)
    positions = jnp.array([[0, 1, 1000, 100_000]])
    found = xn.RotaryEncoding().rotate(x, positions)
    expected = xn.RotaryEncoding().rotate(x.astype(jnp.float32), positions)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected.astype(dtype))


def test_linear_scaling_is_a_position_divided() -> None:
    x = jnp.asarray(draw(1, 3, 1, 4), jnp.float32)
    scaled = xn.RotaryEncoding(scaling=xn.LinearScaling(4.0))
    np.testing.assert_allclose(
        scaled.rotate(x, jnp.array([[0, 4, 8]])),
        xn.RotaryEncoding().rotate(x, jnp.array([[0, 1, 2]])),
        atol=1e-6,
    )


def test_llama3_scaling_keeps_fast_turns_and_slows_slow_ones() -> None:
    scaling = xn.Llama3Scaling(factor=8.0, original_length=8192)
    frequencies = 5e5 ** -(np.arange(0, 128, 2) / 128)
    turns = 8192 * frequencies / (2 * np.pi)
    scaled = scaling(frequencies)
    np.testing.assert_array_equal(scaled[turns > 4], frequencies[turns > 4])
    np.testing.assert_array_equal(scaled[turns < 1], frequencies[turns < 1] / 8)
    assert ((turns >= 1) & (turns <= 4)).any()
    assert (np.diff(scaled) < 0).all()


def test_the_value_is_hashable_and_compared_by_value() -> None:
    one, other = (xn.RotaryEncoding(scaling=xn.LinearScaling(2.0)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert jax.jit(one.rotate)(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), int)).shape == (1, 1, 1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xn.RotaryEncoding(base=0), "RotaryEncoding takes base above 0; got 0."),
        (
            lambda: xn.RotaryEncoding(fraction=1.5),
            "RotaryEncoding takes a fraction above 0 and at most 1; got 1.5.",
        ),
        (lambda: xn.LinearScaling(-1.0), "LinearScaling takes factor above 0; got -1.0."),
        (lambda: xn.Llama3Scaling(factor=0), "Llama3Scaling takes factor above 0; got 0."),
        (
            lambda: xn.Llama3Scaling(low_turns=4),
            "Llama3Scaling takes low_turns below high_turns; got 4 and 4.0.",
        ),
        (
            lambda: xn.RotaryEncoding(fraction=0.5).rotate(
                jnp.ones((1, 1, 1, 6)), jnp.ones((1, 1))
            ),
            (
                "RotaryEncoding turns pairs of features; of 6 features, the fraction 0.5 is 3, which is "
                "odd. Choose an even number of features for each head, or another fraction."
            ),
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
