"""Encoding: preprocessing, flattening, aggregation, and positions of a subset."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

from flax_extra import combinator as cb
from flax_extra import layer as xn

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 3, 4, 5))
FIVE = jnp.zeros((2, 5, 3))
fourier = functools.partial(xn.FourierPositionEncoding, (3, 4), n_bands=2)


def test_it_preprocesses_flattens_and_aggregates() -> None:
    encoding = xn.Encoding(functools.partial(nn.Dense, 6), fourier)
    encoded, variables = encoding.init_with_output(KEY, IMAGES)
    dense = {"params": variables["params"]["preprocessor"]}
    features = nn.Dense(6).apply(dense, IMAGES).reshape(2, 12, 6)
    np.testing.assert_array_equal(encoded, jnp.concatenate([features, fourier()(2)], axis=-1))


def test_without_fields_it_flattens() -> None:
    np.testing.assert_array_equal(xn.Encoding().apply({}, IMAGES), IMAGES.reshape(2, 12, 5))


def test_features_without_time_are_one_position() -> None:
    assert xn.Encoding().apply({}, jnp.ones((2, 5))).shape == (2, 1, 5)


def test_another_aggregation() -> None:
    encoding = xn.Encoding(positional_encoding=fourier, aggregation=cb.add())
    inputs = jax.random.normal(KEY, (2, 3, 4, 10))
    expected = inputs.reshape(2, 12, 10) + fourier()(2)
    np.testing.assert_array_equal(encoding.apply({}, inputs), expected)


def test_an_aggregation_with_parameters() -> None:
    encoding = xn.Encoding(
        positional_encoding=fourier, aggregation=cb.serial(cb.concatenate(), nn.Dense(3))
    )
    encoded, variables = encoding.init_with_output(KEY, IMAGES)
    assert encoded.shape == (2, 12, 3)
    assert list(variables["params"]) == ["aggregation"]


def test_parts_keep_a_name_they_are_given() -> None:
    encoding = xn.Encoding(
        lambda: nn.Dense(4, name="pixels"),
        lambda: xn.TrainablePositionalEncoding(12, 3, name="places"),
    )
    variables = encoding.init(KEY, IMAGES)
    assert sorted(variables["params"]) == ["pixels", "places"]


def test_a_pipeline_preprocesses() -> None:
    encoding = xn.Encoding(lambda: cb.serial(nn.Dense(4), nn.relu, nn.Dense(3)))
    encoded, variables = encoding.init_with_output(KEY, IMAGES)
    assert encoded.shape == (2, 12, 3)
    assert sorted(variables["params"]["preprocessor"]) == ["Dense_0", "Dense_1"]


def test_output_positions_as_list_numpy_or_traced_agree_and_compile_once() -> None:
    encoding = xn.Encoding(positional_encoding=fourier)
    encoded = encoding.apply({}, IMAGES)
    traces = []

    @jax.jit
    def at(positions: Any) -> Any:
        traces.append(positions)
        return encoding.apply({}, IMAGES, positions)

    for positions in ([0, 11, 5], [3, 3, 1]):
        numpy, traced = np.array(positions, np.int32), jnp.array(positions, jnp.int32)
        for found in (
            encoding.apply({}, IMAGES, positions),
            encoding.apply({}, IMAGES, numpy),
            at(numpy),
            at(traced),
        ):
            np.testing.assert_array_equal(found, encoded[:, positions])
    assert len(traces) == 1


def test_output_positions_without_a_positional_encoding() -> None:
    found = xn.Encoding().apply({}, IMAGES, [7, 2])
    np.testing.assert_array_equal(found, IMAGES.reshape(2, 12, 5)[:, [7, 2]])


@pytest.mark.parametrize("seqlen", [12, 17])
def test_the_first_learned_positions_serve_a_shorter_sequence(seqlen: int) -> None:
    learned = functools.partial(xn.TrainablePositionalEncoding, seqlen, 5)
    encoding = xn.Encoding(positional_encoding=learned, aggregation=cb.add())
    encoded, variables = encoding.init_with_output(KEY, IMAGES)
    table = variables["params"]["position_encoder"]["positional_encoding"]
    assert table.shape == (seqlen, 5)
    np.testing.assert_array_equal(encoded, IMAGES.reshape(2, 12, 5) + table[None, :12])


def test_the_first_positions_of_an_axis_serve_a_shorter_sequence() -> None:
    axis = functools.partial(xn.FourierPositionEncoding, (17,), n_bands=2)
    encoded = xn.Encoding(positional_encoding=axis).apply({}, IMAGES)
    np.testing.assert_array_equal(encoded[..., 5:], axis()(2)[:, :12])


def test_a_positional_encoding_is_told_what_it_asks_for() -> None:
    def encode(batch: int, at: Any, **keywords: Any) -> Any:
        calls.append((batch, at, keywords))
        return jnp.zeros((batch, 12 if at is None else len(at), 1))

    calls: list[Any] = []
    asking = [
        lambda batch, at: encode(batch, at),
        lambda batch, at, *, length: encode(batch, at, length=length),
        lambda batch, at, *, like: encode(batch, at, like=like.shape),
    ]
    for function in asking:
        encoding = xn.Encoding(positional_encoding=lambda: function)  # noqa: B023
        encoding.apply({}, IMAGES)
        encoding.apply({}, IMAGES, [3, 1])
    at = [3, 1]
    assert calls == [
        (2, None, {}),
        (2, at, {}),
        (2, None, {"length": 12}),
        (2, at, {"length": None}),
        (2, None, {"like": (2, 12, 5)}),
        (2, at, {"like": (2, 2, 5)}),
    ]


def test_learned_positions_serve_every_length_up_to_theirs() -> None:
    learned = functools.partial(xn.TrainablePositionalEncoding, 64, 5)
    encoding = xn.Encoding(positional_encoding=learned, aggregation=cb.add())
    for constraints, message in [(["t <= 64"], None), ([], "inconclusive")]:
        batch, time = export.symbolic_shape("b, t", constraints=constraints)
        texts = jax.ShapeDtypeStruct((batch, time, 5), jnp.float32)
        init = functools.partial(jax.eval_shape, encoding.init_with_output, KEY, texts)
        if message is None:
            assert init()[0].shape == (batch, time, 5)
        else:
            with pytest.raises(Exception, match=message):
                init()


def test_shapes_are_known_for_every_batch_and_number_of_positions() -> None:
    batch, time = export.symbolic_shape("b, t")
    encoding = xn.Encoding(positional_encoding=fourier)
    images = jax.ShapeDtypeStruct((batch, 3, 4, 5), jnp.float32)
    positions = jax.ShapeDtypeStruct((time,), jnp.int32)
    encoded = jax.eval_shape(lambda *inputs: encoding.apply({}, *inputs), images, positions)
    assert encoded.shape == (batch, time, 15)
    sequences = jax.ShapeDtypeStruct((batch, time, 5), jnp.float32)
    assert jax.eval_shape(lambda x: xn.Encoding().apply({}, x), sequences).shape == (batch, time, 5)


def test_the_default_aggregation_reads_as_in_the_reference() -> None:
    default = inspect.signature(xn.Encoding).parameters["aggregation"].default
    assert repr(default) == (
        "Concatenate(signature=Signature(n_in=2, n_out=1, start_index=0, in_shape=((), ())), "
        "axis=-1)"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: xn.Encoding(nn.Dense(4)),
            (
                "Encoding takes a constructor for preprocessing, which it calls to make its own "
                "module; got Dense. Give functools.partial(Module, ...) or lambda: Module(...)."
            ),
        ),
        (
            lambda: xn.Encoding(positional_encoding=fourier()),
            (
                "Encoding takes a constructor for positional_encoding, which it calls to make its "
                "own module; got FourierPositionEncoding. Give functools.partial(Module, ...) or "
                "lambda: Module(...)."
            ),
        ),
        (
            lambda: xn.Encoding().apply({}, jnp.ones(3)),
            (
                "Encoding takes inputs with axes [batch, ..., features]; got shape [3], "
                "which has 1 axis."
            ),
        ),
        (
            lambda: xn.Encoding().apply({}, IMAGES, [0, 12]),
            "Encoding takes output positions from 0 to 11, in a sequence of length 12; got 12.",
        ),
        (
            lambda: xn.Encoding(positional_encoding=fourier).apply({}, IMAGES[:, :2]),
            (
                "FourierPositionEncoding encodes a grid of several axes as a whole, here [3, 4] "
                "with 12 positions; got a sequence of length 8. Build it with the seqshape of the "
                "inputs, or give output positions."
            ),
        ),
        (
            lambda: xn.Encoding(
                positional_encoding=functools.partial(xn.TrainablePositionalEncoding, 8, 5)
            ).init(KEY, IMAGES),
            (
                "TrainablePositionalEncoding has 8 positions; got a sequence of length 12. "
                "Shorten the sequence, or build the layer with 12 positions; "
                "xn.interpolate_positions resizes a table that is trained already."
            ),
        ),
        (
            lambda: xn.Encoding(positional_encoding=lambda: lambda batch, at: FIVE).apply(
                {}, IMAGES
            ),
            (
                "Encoding aggregates the inputs and their positional encoding, which must have the "
                "same length; the inputs have length 12 and the positional encoding has length 5."
            ),
        ),
    ],
)
def test_wording_of_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        wrong()
