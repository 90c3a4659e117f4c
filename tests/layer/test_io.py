"""io: one constructor for one modality or several."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import layer as xn
from flax_extra.layer import io

KEY = jax.random.key(0)
IMAGE, LABEL = jax.random.normal(KEY, (2, 3, 4, 5)), jnp.array([[1], [6]])
grid = functools.partial(xn.FourierPositionEncoding, (3, 4), n_bands=2)
place = functools.partial(xn.TrainablePositionalEncoding, 1, 6)
image = {"positional_encoding": grid}
label = {"preprocessing": functools.partial(nn.Embed, 7, 3)}


@pytest.mark.parametrize("build", [io.input_encoding, io.target_encoding])
def test_encoding_of_one_modality_and_of_several(build: Any) -> None:
    encoding = functools.partial(xn.Encoding, **image)
    assert build(image)() == xn.Encoding(**image)
    assert build(encoding) is encoding
    several = build(image, functools.partial(xn.Encoding, **label), d_reserved=2)()
    assert isinstance(several, xn.MultimodalEncoding)
    (sequence, lengths), variables = several.init_with_output(KEY, [IMAGE, LABEL])
    assert (sequence.shape, lengths) == ((2, 13, 17), [12, 1])
    written = xn.MultimodalEncoding(
        [encoding, functools.partial(xn.Encoding, **label)], d_reserved=2
    )
    np.testing.assert_array_equal(sequence, written.apply(variables, [IMAGE, LABEL])[0])


def test_input_encoding_masks_one_modality_too() -> None:
    encoding = io.input_encoding(label, mask_rates=[1.0])()
    (sequence, lengths), variables = encoding.init_with_output(KEY, [LABEL])
    assert (sequence.shape, lengths) == ((2, 1, 3), [1])
    assert sorted(variables["params"]) == ["encoder_0", "masking_0"]


def test_query_encoding() -> None:
    assert io.query_encoding(grid) is grid
    several = io.query_encoding(grid, place, d_reserved=0)()
    (sequence, lengths), _ = several.init_with_output(KEY, 2)
    assert (sequence.shape, lengths) == ((2, 13, 10), [12, 1])


def test_output_decoding() -> None:
    classes = {"embedding_decoding": functools.partial(nn.Dense, 10)}
    assert io.output_decoding(classes)() == xn.Decoding(**classes)
    shared = functools.partial(nn.Dense, 6)
    several = io.output_decoding({}, classes, multimodal_embedding_decoding=shared)()
    outputs = jnp.ones((2, 13, 8))
    (pixels, scores), variables = several.init_with_output(KEY, outputs, [12, 1])
    assert (pixels.shape, scores.shape) == ((2, 12, 6), (2, 1, 10))
    assert sorted(variables["params"]) == ["decoder_1", "embedding_decoder"]


def test_what_is_built_takes_further_fields() -> None:
    assert io.input_encoding(image, label)(name="inputs").name == "inputs"
    several = io.query_encoding(grid, place, dtype=jnp.bfloat16)()
    assert several.init_with_output(KEY, 2)[0][0].dtype == jnp.bfloat16


def test_one_model_for_one_modality_or_several() -> None:
    class Model(nn.Module):
        encoding: Any
        queries: Any
        decoding: Any

        @nn.compact
        def __call__(self, inputs: Any) -> Any:
            encoded = self.encoding()(inputs)
            queries = self.queries()(2)
            several = isinstance(queries, tuple)
            sequence, lengths = queries if several else (queries, None)
            read = xn.Attention(n_heads=1)(sequence, encoded[0] if several else encoded, None)
            return self.decoding()(read, *([lengths] if several else []))

    one = Model(io.input_encoding(image), io.query_encoding(grid), io.output_decoding({}))
    assert jax.eval_shape(one.init_with_output, KEY, IMAGE)[0].shape == (2, 12, 10)
    two = Model(
        io.input_encoding(image, label),
        io.query_encoding(grid, place),
        io.output_decoding({}, {"embedding_decoding": functools.partial(nn.Dense, 7)}),
    )
    pixels, scores = jax.eval_shape(two.init_with_output, KEY, [IMAGE, LABEL])[0]
    assert (pixels.shape, scores.shape) == ((2, 12, 11), (2, 1, 7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (io.input_encoding, "input_encoding takes at least 1 modality; got 0."),
        (io.query_encoding, "query_encoding takes at least 1 modality; got 0."),
        (io.output_decoding, "output_decoding takes at least 1 modality; got 0."),
        (
            lambda: io.output_decoding({}, xn.Decoding()),
            (
                "output_decoding takes a constructor for modalities[1], which it calls to make "
                "its own module; got Decoding. Give functools.partial(Module, ...) or lambda: "
                "Module(...)."
            ),
        ),
        (
            lambda: io.query_encoding({}),
            (
                "query_encoding takes a constructor for modalities[0], which it calls to make its "
                "own module; got dict. Give functools.partial(Module, ...) or lambda: "
                "Module(...)."
            ),
        ),
        (
            lambda: io.output_decoding({}, multimodal_embedding_decoding=nn.Dense),
            (
                "output_decoding takes a multimodal_embedding_decoding only if several modalities "
                "share it; got 1 modality. Give that modality its own embedding_decoding instead."
            ),
        ),
    ],
)
def test_wording_of_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        wrong()
