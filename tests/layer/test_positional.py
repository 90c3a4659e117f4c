"""Positional layers: numbers, randomness, positions of a subset, and the wording of errors."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import layer as xn

KEY = jax.random.key(0)


def fourier(
    positions: np.ndarray, resolutions: tuple[float, ...], n_bands: int
) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64, one loop per axis: (sines, cosines) at coordinates [time, axes]."""
    sines, cosines = [], []
    for axis, resolution in enumerate(resolutions):
        for band in np.linspace(1.0, resolution / 2, n_bands):
            sines.append(np.sin(np.pi * band * positions[:, axis]))
            cosines.append(np.cos(np.pi * band * positions[:, axis]))
    return np.stack(sines, 1), np.stack(cosines, 1)


def grid(seqshape: tuple[int, ...], bounds: tuple[float, float]) -> np.ndarray:
    axes = [np.linspace(*bounds, size) for size in seqshape]
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], 1)


seqshapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
bounds = st.tuples(st.integers(-8, 8), st.integers(1, 8)).map(lambda b: (b[0] / 4, sum(b) / 4))


# Trainable positional encoding.


def test_trainable_encoding_gives_its_parameter_to_each_of_the_batch() -> None:
    encoding = xn.TrainablePositionalEncoding(seqlen=200, dimension=50)
    encoded, variables = encoding.init_with_output(KEY, 3)
    vectors = variables["params"]["positional_encoding"]
    assert encoded.shape == (3, 200, 50)
    np.testing.assert_array_equal(encoded, np.stack([vectors] * 3))


def test_trainable_encoding_is_drawn_from_a_normal_cut_at_two_sigma() -> None:
    encoding = xn.TrainablePositionalEncoding(seqlen=200, dimension=500)
    vectors = np.asarray(encoding.init(KEY, 1)["params"]["positional_encoding"])
    assert np.abs(vectors).max() <= 0.04
    assert np.abs(vectors).max() > 0.0399
    uncorrected = 0.02 * 0.87962566  # the deviation of a normal that is cut at two sigma
    assert vectors.std() == pytest.approx(uncorrected, rel=0.01)
    assert vectors.mean() == pytest.approx(0, abs=2e-4)


def test_trainable_encoding_gives_no_subset() -> None:
    encoding = xn.TrainablePositionalEncoding(seqlen=5, dimension=3)
    with pytest.raises(ValueError, match=r"^TrainablePositionalEncoding gives the vectors of"):
        encoding.init(KEY, 1, [0, 1])


@pytest.mark.parametrize("length", [0, 1, 4, 5])
def test_trainable_encoding_gives_the_first_positions(length: int) -> None:
    encoding = xn.TrainablePositionalEncoding(seqlen=5, dimension=3)
    variables = encoding.init(KEY, 2)
    expected = encoding.apply(variables, 2)[:, :length]
    np.testing.assert_array_equal(encoding.apply(variables, 2, length=length), expected)


@pytest.mark.parametrize("length", [0, 1, 4, 5])
def test_fourier_gives_the_first_positions_of_an_axis(length: int) -> None:
    encoding = xn.FourierPositionEncoding((5,), 2)
    np.testing.assert_array_equal(encoding(2, length=length), encoding(2)[:, :length])


def test_fourier_gives_a_grid_as_a_whole() -> None:
    encoding = xn.FourierPositionEncoding((2, 3), 2)
    np.testing.assert_array_equal(encoding(2, length=6), encoding(2))


@pytest.mark.parametrize(
    "encoding", [xn.TrainablePositionalEncoding(6, 3), xn.FourierPositionEncoding((2, 3), 2)]
)
def test_an_array_of_the_batch_changes_no_numbers(encoding: Any) -> None:
    expected, variables = encoding.init_with_output(KEY, 4)
    found = encoding.apply(variables, 4, like=jnp.full((4, 1), jnp.nan))
    np.testing.assert_array_equal(found, expected)


# Fourier position encoding.


@settings(deadline=None, max_examples=15)
@given(seqshapes, st.integers(1, 5), bounds, st.booleans(), st.booleans(), st.data())
def test_fourier_is_the_formula(
    seqshape: tuple[int, ...],
    n_bands: int,
    bounds: tuple[float, float],
    with_coordinates: bool,
    sine_only: bool,
    data: st.DataObject,
) -> None:
    resolution = st.tuples(*[st.integers(1, 9)] * len(seqshape))
    max_resolution = data.draw(st.none() | resolution)
    encoding = xn.FourierPositionEncoding(
        seqshape, n_bands, bounds, with_coordinates, sine_only, max_resolution
    )
    coordinates = grid(seqshape, bounds)
    sines, cosines = fourier(coordinates, max_resolution or seqshape, n_bands)
    parts = [coordinates] * with_coordinates + [sines] + [cosines] * (not sine_only)
    expected = np.concatenate(parts, axis=1)
    encoded = encoding(2)
    assert encoded.shape == (2, *expected.shape)
    np.testing.assert_allclose(encoded[0], expected, atol=1e-5)
    np.testing.assert_array_equal(encoded[0], encoded[1])


def test_fourier_at_imagenet_size() -> None:
    seqshape = (224, 224)
    coordinates = grid(seqshape, (-1.0, 1.0))
    expected = np.concatenate([coordinates, *fourier(coordinates, seqshape, 64)], axis=1)
    encoded = xn.FourierPositionEncoding(seqshape, 64)(1)[0]
    # A coordinate is off by 9e-8 at most, and the highest phase is 112 pi times that.
    np.testing.assert_allclose(encoded, expected, atol=6e-5)


@pytest.mark.parametrize("size", [1, 2, 16, 56, 224, 1920])
def test_fourier_coordinates_are_next_to_those_of_the_formula(size: int) -> None:
    coordinates = xn.FourierPositionEncoding((size,), 1)(1)[0, :, 0]
    np.testing.assert_array_max_ulp(
        np.asarray(coordinates), np.linspace(-1, 1, size).astype(np.float32), maxulp=1
    )


@settings(deadline=None, max_examples=8)
@given(seqshapes, st.integers(1, 5), bounds, st.data())
def test_fourier_rows_of_a_subset_are_those_of_the_grid(
    seqshape: tuple[int, ...], n_bands: int, bounds: tuple[float, float], data: st.DataObject
) -> None:
    encoding = xn.FourierPositionEncoding(seqshape, n_bands, bounds)
    position = st.integers(0, math.prod(seqshape) - 1)
    positions = np.array(data.draw(st.lists(position, max_size=7)), np.int32)
    full = np.asarray(encoding(2))
    np.testing.assert_array_equal(jax.jit(lambda: encoding(2))(), full)
    rows = jax.jit(lambda positions: encoding(2, positions))
    for subset in (encoding(2, positions.tolist()), encoding(2, positions), rows(positions)):
        np.testing.assert_array_equal(subset, full[:, positions])


def test_fourier_rows_are_the_same_bits_inside_a_larger_program() -> None:
    encoding = xn.FourierPositionEncoding((50, 61), 32)
    positions = np.random.default_rng(0).integers(0, 50 * 61, 400)

    def program(positions: Any) -> Any:
        rows = encoding(1, positions)[0]
        return rows, jnp.tanh(rows * 3 + 1).sum()

    subset, _ = jax.jit(program)(positions)
    np.testing.assert_array_equal(subset, encoding(1)[0][positions])


@settings(deadline=None, max_examples=8)
@given(seqshapes, st.integers(1, 4), bounds, st.data())
def test_fourier_in_the_subset_form_of_deepmind(
    seqshape: tuple[int, ...], n_bands: int, bounds: tuple[float, float], data: st.DataObject
) -> None:
    encoding = xn.FourierPositionEncoding(seqshape, n_bands, bounds, deepmind_subset=True)
    position = st.integers(0, math.prod(seqshape) - 1)
    positions = data.draw(st.lists(position, min_size=1, max_size=7))
    lower, upper = bounds
    indices = np.stack(np.unravel_index(positions, seqshape), axis=1)
    coordinates = lower + (upper - lower) * indices / np.array(seqshape)
    expected = np.concatenate([coordinates, *fourier(coordinates, seqshape, n_bands)], axis=1)
    np.testing.assert_allclose(encoding(1, positions)[0], expected, atol=1e-5)
    plain = xn.FourierPositionEncoding(seqshape, n_bands, bounds)
    np.testing.assert_array_equal(encoding(1), plain(1))


def test_fourier_of_traced_positions_compiles_once() -> None:
    encoding = xn.FourierPositionEncoding((4, 6), 3)
    traces = []

    @jax.jit
    def rows(positions: Any) -> Any:
        traces.append(positions)
        return encoding(1, positions)

    for positions in ([0, 1, 2], [23, 5, 5], [9, 8, 7]):
        expected = encoding(1)[:, positions]
        for same in (np.array(positions, np.int32), jnp.array(positions, jnp.int32)):
            np.testing.assert_array_equal(rows(same), expected)
    assert len(traces) == 1
    for positions in ([0, 1, 2], [23, 5, 5]):
        np.testing.assert_array_equal(rows(positions), encoding(1)[:, positions])
    assert len(traces) == 2  # a list is another structure, and its values are traced all the same


def test_fourier_of_a_traced_position_out_of_range_is_nan() -> None:
    encoding = xn.FourierPositionEncoding((2, 3), 2)
    rows = jax.jit(lambda positions: encoding(1, positions)[0])(np.array([5, 6, -1, 100]))
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1:]).all()


@pytest.mark.parametrize("on_grid", [True, False])
def test_fourier_has_no_large_constants_in_the_program(on_grid: bool) -> None:
    encoding = xn.FourierPositionEncoding((224, 224), 64)
    positions = None if on_grid else jax.ShapeDtypeStruct((1024,), jnp.int32)
    program = jax.jit(lambda positions: encoding(1, positions)).lower(positions).compile()
    text = program.as_text()
    assert "iota" in text
    constants = re.findall(r"= \w+?(\d+)\[([\d,]*)\]\S* constant\(", text)
    assert constants
    for bits, shape in constants:
        size = math.prod(int(axis) for axis in shape.split(",") if axis)
        assert size * int(bits) // 8 <= 64_000


def test_fourier_is_computed_in_float32_and_cast_last() -> None:
    fields = {"seqshape": (50,), "n_bands": 20}
    expected = xn.FourierPositionEncoding(**fields)(1).astype(jnp.bfloat16)
    encoded = xn.FourierPositionEncoding(**fields, dtype=jnp.bfloat16)(1)
    assert encoded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(encoded, expected)


# Padding.


def test_padding_puts_one_vector_after_the_features() -> None:
    inputs = jax.random.normal(KEY, (2, 3, 4, 5))
    padded, variables = xn.TrainablePositionalPadding(d_max=8).init_with_output(KEY, inputs)
    assert padded.shape == (2, 3, 4, 8)
    np.testing.assert_array_equal(padded[..., :5], inputs)
    (vector,) = variables["params"]["padding"]
    np.testing.assert_array_equal(padded[..., 5:], np.broadcast_to(vector, (2, 3, 4, 3)))


def test_padding_of_enough_features_has_no_parameter() -> None:
    inputs = jnp.ones((2, 3, 4))
    padded, variables = xn.TrainablePositionalPadding(d_max=4).init_with_output(KEY, inputs)
    np.testing.assert_array_equal(padded, inputs)
    assert variables == {}


# Masking.


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.85])
def test_masking_meets_its_rate_and_masks_whole_positions(rate: float) -> None:
    inputs = jax.random.normal(KEY, (20, 1000, 3)) + 10
    masking = xn.TrainablePositionalMasking(rate)
    variables = masking.init(KEY, inputs)
    masked = masking.apply(variables, inputs, rngs={"masking": KEY})
    is_mask = np.asarray(masked) == np.asarray(variables["params"]["mask"])
    is_input = np.asarray(masked == inputs)
    np.testing.assert_array_equal(is_mask, ~is_input)
    assert (is_mask.all(-1) == is_mask.any(-1)).all()
    deviation = math.sqrt(rate * (1 - rate) / 20_000)
    assert is_mask[..., 0].mean() == pytest.approx(rate, abs=4 * deviation)
    per_sequence = is_mask[..., 0].mean(axis=1)
    assert len(set(per_sequence.tolist())) > 1  # each of the batch is masked by itself


def test_masking_is_a_function_of_its_key() -> None:
    inputs = jnp.ones((2, 50, 3))
    masking = xn.TrainablePositionalMasking(0.5)
    variables = masking.init(KEY, inputs)
    apply = functools.partial(masking.apply, variables, inputs)
    first = apply(rngs={"masking": jax.random.key(1)})
    np.testing.assert_array_equal(first, apply(rngs={"masking": jax.random.key(1)}))
    assert not np.array_equal(first, apply(rngs={"masking": jax.random.key(2)}))


@pytest.mark.parametrize("rate", [0, 0.0, 1, 1.0])
def test_masking_at_rate_0_or_1_needs_no_rng(rate: float) -> None:
    inputs = jnp.ones((2, 50, 3))
    masking = xn.TrainablePositionalMasking(rate)
    variables = masking.init(KEY, inputs)
    expected = jnp.broadcast_to(variables["params"]["mask"], inputs.shape) if rate else inputs
    np.testing.assert_array_equal(masking.apply(variables, inputs), expected)


def test_masking_draws_from_the_stream_its_field_names() -> None:
    inputs = jnp.ones((2, 50, 3))
    masking = xn.TrainablePositionalMasking(0.5, rng_collection="hiding")
    variables = masking.init(KEY, inputs)
    assert masking.apply(variables, inputs, rngs={"hiding": KEY}).shape == inputs.shape
    with pytest.raises(ValueError, match="from the rng stream 'hiding'; got no such stream"):
        masking.apply(variables, inputs, rngs={"masking": KEY})


def test_masking_takes_one_key_for_all_streams_as_linen_does() -> None:
    inputs = jnp.ones((2, 50, 3))
    masking = xn.TrainablePositionalMasking(0.5)
    variables = masking.init(KEY, inputs)
    assert masking.apply(variables, inputs, rngs=KEY).shape == inputs.shape


# Errors.


FOURIER = xn.FourierPositionEncoding((4, 6), 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: xn.TrainablePositionalEncoding(seqlen=0, dimension=3),
            "TrainablePositionalEncoding takes seqlen of at least 1; got 0.",
        ),
        (
            lambda: xn.TrainablePositionalEncoding(seqlen=3, dimension=-1),
            "TrainablePositionalEncoding takes dimension of at least 1; got -1.",
        ),
        (
            lambda: xn.TrainablePositionalEncoding(5, 3).init(KEY, 1, [0]),
            (
                "TrainablePositionalEncoding gives the vectors of a whole sequence, not of output "
                "positions; got output positions. Leave them out, or use FourierPositionEncoding."
            ),
        ),
        (
            lambda: xn.TrainablePositionalEncoding(5, 3).init(KEY, 1, length=6),
            (
                "TrainablePositionalEncoding has 5 positions; got a sequence of length 6. Shorten "
                "the sequence, or build the layer with 6 positions; xn.interpolate_positions "
                "resizes a table that is trained already."
            ),
        ),
        (
            lambda: xn.TrainablePositionalEncoding(5, 3).init(KEY, 1, length=-1),
            "TrainablePositionalEncoding takes length of at least 0; got -1.",
        ),
        (
            lambda: jax.jit(lambda n: xn.FourierPositionEncoding((5,), 2)(1, length=n))(3),
            (
                "FourierPositionEncoding takes Python numbers for length, because they set the "
                "shape of its result; got a traced array. Take them from an array's shape, or make "
                "them static arguments of jax.jit."
            ),
        ),
        (
            lambda: jax.jit(lambda n: FOURIER(1, length=n))(24),
            (
                "FourierPositionEncoding takes Python numbers for length, because they set the "
                "shape of its result; got a traced array. Take them from an array's shape, or make "
                "them static arguments of jax.jit."
            ),
        ),
        (
            lambda: xn.FourierPositionEncoding((5,), 2)(1, length=6),
            (
                "FourierPositionEncoding has 5 positions; got a sequence of length 6. Shorten the "
                "sequence, or build the layer with 6 positions; xn.interpolate_positions resizes "
                "a table that is trained already."
            ),
        ),
        (
            lambda: FOURIER(1, length=20),
            (
                "FourierPositionEncoding encodes a grid of several axes as a whole, here [4, 6] "
                "with 24 positions; got a sequence of length 20. Build it with the seqshape of the "
                "inputs, or give output positions."
            ),
        ),
        (
            lambda: xn.FourierPositionEncoding((5,), 2)(1, [0, 1], length=2),
            (
                "FourierPositionEncoding takes a length or output positions, not both; got length "
                "2 and output positions. Give one of them."
            ),
        ),
        (
            lambda: FOURIER(2, like=jnp.ones((3, 1))),
            (
                "FourierPositionEncoding takes for like an array whose first axis is the batch, "
                "here of size 2; got shape [3, 1]."
            ),
        ),
        (
            lambda: jax.jit(FOURIER)(2),
            (
                "FourierPositionEncoding takes Python numbers for batch_size, because they set the "
                "shape of its result; got a traced array. Take them from an array's shape, or make "
                "them static arguments of jax.jit."
            ),
        ),
        (
            lambda: FOURIER(1, [3, 24]),
            (
                "FourierPositionEncoding takes output positions from 0 to 23, in a sequence "
                "of length 24; got 24."
            ),
        ),
        (
            lambda: FOURIER(1, np.array([-2])),
            (
                "FourierPositionEncoding takes output positions from 0 to 23, in a sequence "
                "of length 24; got -2."
            ),
        ),
        (
            lambda: FOURIER(1, jnp.array([0.5, 1])),
            (
                "FourierPositionEncoding takes output positions as integers on one axis, "
                "[time]; got float32[2]."
            ),
        ),
        (
            lambda: jax.jit(lambda p: FOURIER(1, p))(np.zeros((2, 3), np.int32)),
            (
                "FourierPositionEncoding takes output positions as integers on one axis, "
                "[time]; got int32[2, 3]."
            ),
        ),
        (
            lambda: xn.FourierPositionEncoding((4, 0), 2),
            "FourierPositionEncoding takes axes in seqshape of at least 1; got (4, 0).",
        ),
        (
            lambda: xn.FourierPositionEncoding((4,), 0),
            "FourierPositionEncoding takes n_bands of at least 1; got 0.",
        ),
        (
            lambda: xn.FourierPositionEncoding((4, 6), 2, max_resolution=(8,)),
            (
                "FourierPositionEncoding takes a max_resolution with one number for each "
                "axis of its seqshape; got 1 number for 2 axes."
            ),
        ),
        (
            lambda: xn.FourierPositionEncoding((4,), 2, (1.0, -1.0)),
            (
                "FourierPositionEncoding takes spatial_coordinate_bounds as (lower, upper) with "
                "lower < upper; got (1.0, -1.0)."
            ),
        ),
        (
            lambda: xn.TrainablePositionalPadding(2).init(KEY, jnp.ones((1, 2, 3))),
            (
                "TrainablePositionalPadding pads features up to d_max; the inputs have 3 features, "
                "which is more than d_max 2."
            ),
        ),
        (
            lambda: xn.TrainablePositionalMasking(1.5),
            "TrainablePositionalMasking takes rate from 0 to 1; got 1.5.",
        ),
        (
            lambda: xn.TrainablePositionalMasking(float("nan")),
            "TrainablePositionalMasking takes rate from 0 to 1; got nan.",
        ),
        (
            lambda: xn.TrainablePositionalMasking(0.5).apply(
                {"params": {"mask": jnp.zeros((1, 3))}}, jnp.ones((1, 2, 3))
            ),
            (
                "TrainablePositionalMasking masks positions at rate 0.5 and draws them from the "
                "rng stream 'masking'; got no such stream. Give one: apply(variables, inputs, "
                "rngs={'masking': key})."
            ),
        ),
    ],
)
def test_wording_of_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole text is compared
        wrong()
    assert str(raised.value) == message
