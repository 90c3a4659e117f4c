"""interpolate_positions, against numpy and scipy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from flax_extra import layer as xn

KEY = jax.random.key(0)

sizes = st.integers(1, 9)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, st.integers(1, 3), st.integers(0))
def test_it_is_numpys_interpolation(old: int, new: int, features: int, seed: int) -> None:
    table = normal(old, features, seed=seed)
    at = np.linspace(0, old - 1, new)
    columns = [np.interp(at, np.arange(old), table[:, i]) for i in range(features)]
    found = xn.interpolate_positions(table, new)
    np.testing.assert_allclose(found, np.stack(columns, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0], table[0])
    if new > 1:
        np.testing.assert_array_equal(found[-1], table[-1])


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0))
def test_a_grid_is_interpolated_along_each_axis(data: Any, n_axes: int, seed: int) -> None:
    shapes = st.tuples(*[st.integers(2, 5)] * n_axes)
    old, new = data.draw(shapes), data.draw(shapes)
    table = normal(math.prod(old), 2, seed=seed)
    interpolate = RegularGridInterpolator(
        [np.arange(size) for size in old], table.reshape(*old, 2).astype(np.float64)
    )
    axes = [np.linspace(0, a - 1, b) for a, b in zip(old, new, strict=True)]
    at = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], 1)
    found = xn.interpolate_positions(table, new, old)
    np.testing.assert_allclose(found, interpolate(at), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=3), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_an_equal_shape_changes_nothing(shape: list[int], dtype: Any) -> None:
    table = jnp.asarray(normal(math.prod(shape), 2), dtype)
    found = xn.interpolate_positions(table, shape, shape)
    np.testing.assert_array_equal(found, table, strict=True)


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(half: Any) -> None:
    table = jnp.asarray(normal(7, 3), half)
    expected = xn.interpolate_positions(table.astype(jnp.float32), 12).astype(half)
    found = xn.interpolate_positions(table, 12)
    np.testing.assert_array_equal(found, expected, strict=True)


def test_a_trained_table_serves_a_longer_sequence() -> None:
    trained = xn.TrainablePositionalEncoding(seqlen=5, dimension=3)
    variables = trained.init(KEY, 1)
    longer = xn.TrainablePositionalEncoding(seqlen=9, dimension=3)
    resized = jax.tree.map(lambda table: xn.interpolate_positions(table, 9), variables)
    encoded = longer.apply(resized, 1)
    np.testing.assert_allclose(encoded[:, ::2], trained.apply(variables, 1), rtol=1e-6)


def test_it_is_traced_and_differentiated() -> None:
    table = normal(4, 2)
    resize = jax.jit(lambda table: xn.interpolate_positions(table, 7))
    np.testing.assert_allclose(resize(table), xn.interpolate_positions(table, 7), rtol=1e-6)
    # Each new vector is a mean with weights that sum to 1.
    gradient = jax.grad(lambda table: resize(table).sum())(table)
    np.testing.assert_allclose(gradient.sum(0), [7, 7], rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: xn.interpolate_positions(jnp.ones(3), 5),
            (
                "interpolate_positions takes a table of floats, [positions, features]; got "
                "float32[3]."
            ),
        ),
        (
            lambda: xn.interpolate_positions(np.ones((3, 2), np.int32), 5),
            (
                "interpolate_positions takes a table of floats, [positions, features]; got "
                "int32[3, 2]."
            ),
        ),
        (
            lambda: xn.interpolate_positions(jnp.ones((3, 2)), 0),
            "interpolate_positions takes axes in seqshape of at least 1; got 0.",
        ),
        (
            lambda: xn.interpolate_positions(jnp.ones((3, 2)), (5,), (3, 0)),
            "interpolate_positions takes axes in table_seqshape of at least 1; got (3, 0).",
        ),
        (
            lambda: xn.interpolate_positions(jnp.ones((4, 2)), (3, 3)),
            (
                "interpolate_positions keeps the number of axes; got seqshape [3, 3] for a table "
                "of shape [4]. Say what grid the rows of the table stand for: table_seqshape=(...)."
            ),
        ),
        (
            lambda: xn.interpolate_positions(jnp.ones((4, 2)), (3, 3), (2, 3)),
            (
                "interpolate_positions takes as table_seqshape the grid that the rows of the table "
                "stand for; got [2, 3], which has 6 positions, for a table of 4 rows."
            ),
        ),
    ],
)
def test_wording_of_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole text is compared
        wrong()
    assert str(raised.value) == message
