"""Multimodal layers: several modalities in one sequence and back, bit for bit."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from flax_extra import combinator as cb
from flax_extra import layer as xn

KEY = jax.random.key(0)
IMAGE = jax.random.normal(KEY, (2, 3, 4, 5))
LABEL = jax.random.normal(jax.random.key(1), (2, 1, 7))
grid = functools.partial(xn.FourierPositionEncoding, (3, 4), n_bands=2)
place = functools.partial(xn.TrainablePositionalEncoding, 1, 6)
with_grid = functools.partial(xn.Encoding, positional_encoding=grid)

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4)
"""For each modality its length and its features."""


def _modality(index: int, batch: int, length: int, features: int) -> jax.Array:
    return jax.random.normal(jax.random.key(index), (batch, length, features))


# Encoding.


@settings(deadline=None, max_examples=7)
@given(shapes, st.integers(1, 3), st.integers(0, 3))
def test_encoding_then_splitting_gives_each_modality_back(
    shapes: list[tuple[int, int]], batch: int, d_reserved: int
) -> None:
    inputs = [_modality(i, batch, *shape) for i, shape in enumerate(shapes)]
    encode = [functools.partial(nn.Dense, features) for _, features in shapes]
    encoding = xn.MultimodalEncoding(
        [functools.partial(xn.Encoding, preprocessing) for preprocessing in encode],
        d_reserved=d_reserved,
    )
    (sequence, lengths), variables = encoding.init_with_output(KEY, inputs)
    params = variables["params"]
    widest = max(features for _, features in shapes)
    assert lengths == [length for length, _ in shapes]
    assert all(type(length) is int for length in lengths)
    d_max = widest + d_reserved if len(shapes) > 1 else widest
    assert sequence.shape == (batch, sum(lengths), d_max)
    decoding = xn.MultimodalDecoding([xn.Decoding] * len(shapes))
    parts = decoding.apply({}, sequence, lengths)
    for i, part in enumerate(parts if len(shapes) > 1 else [parts]):
        _, features = shapes[i]
        alone = xn.Encoding(encode[i]).apply({"params": params[f"encoder_{i}"]}, inputs[i])
        np.testing.assert_array_equal(part[..., :features], alone)
        if features < d_max:
            vector = params[f"padding_{i}"]["padding"][0]
            padding = part[..., features:]
            np.testing.assert_array_equal(padding, np.broadcast_to(vector, padding.shape))


@settings(deadline=None, max_examples=6)
@given(shapes)
def test_splitting_gives_back_what_was_put_together(shapes: list[tuple[int, int]]) -> None:
    modalities = [_modality(i, 2, length, 3) for i, (length, _) in enumerate(shapes)]
    joined = jnp.concatenate(modalities, axis=1)
    lengths = [length for length, _ in shapes]
    parts = xn.MultimodalDecoding([xn.Decoding] * len(shapes)).apply({}, joined, lengths)
    for part, modality in zip(parts if len(shapes) > 1 else [parts], modalities, strict=True):
        np.testing.assert_array_equal(part, modality)


def test_each_modality_is_masked_at_its_rate() -> None:
    inputs = [_modality(i, 30, 200, 4) for i in range(4)]
    encoding = xn.MultimodalEncoding([xn.Encoding] * 4, mask_rates=[None, 0.0, 0.3, 1])
    variables = encoding.init(KEY, inputs)
    assert "masking_0" not in variables["params"]
    sequence, lengths = encoding.apply(variables, inputs, rngs={"masking": KEY})
    rates = []
    for i, part in enumerate(np.split(sequence, np.cumsum(lengths)[:-1], axis=1)):
        masked = (part[..., :4] != inputs[i]).any(-1)
        rates.append(masked.mean())
        if i:
            mask = variables["params"][f"masking_{i}"]["mask"][0]
            assert (np.asarray(part)[np.asarray(masked)] == np.asarray(mask)).all()
    assert rates[:2] == [0, 0]
    assert rates[2] == pytest.approx(0.3, abs=0.024)  # four standard deviations
    assert rates[3] == 1


def test_rates_of_0_1_and_none_need_no_rng() -> None:
    inputs = [IMAGE, LABEL, LABEL]
    encoding = xn.MultimodalEncoding([xn.Encoding] * 3, mask_rates=[0.0, 1.0, None])
    variables = encoding.init(KEY, inputs)
    assert encoding.apply(variables, inputs)[0].shape == (2, 14, 8)


def test_a_single_modality_is_masked_and_not_padded() -> None:
    encoding = xn.MultimodalEncoding([xn.Encoding], mask_rates=[1.0], d_reserved=3)
    variables = encoding.init(KEY, [LABEL])
    assert jax.tree.map(jnp.shape, variables["params"]) == {"masking_0": {"mask": (1, 7)}}
    sequence, lengths = encoding.apply(variables, [LABEL])
    assert lengths == [1]
    mask = variables["params"]["masking_0"]["mask"]
    np.testing.assert_array_equal(sequence, jnp.broadcast_to(mask, (2, 1, 7)))


def test_output_positions_as_list_numpy_or_traced_agree_and_compile_once() -> None:
    encoding = xn.MultimodalEncoding([with_grid, xn.Encoding])
    queries = xn.MultimodalPositionalEncoding([grid, grid])
    encoding_params = encoding.init(KEY, [IMAGE, LABEL])
    queries_params = queries.init(KEY, 2)
    traces = []

    def at(positions: Any) -> Any:
        encoded, _ = encoding.apply(encoding_params, [IMAGE, LABEL], [positions, None])
        asked, _ = queries.apply(queries_params, 2, [None, positions])
        return encoded, asked

    @jax.jit
    def jitted(positions: Any) -> Any:
        traces.append(positions)
        return at(positions)

    encoded, _ = encoding.apply(encoding_params, [IMAGE, LABEL])
    asked, _ = queries.apply(queries_params, 2)
    for positions in ([0, 11, 5], [3, 3, 1]):
        rows = np.array(positions, np.int32)
        expected = (
            encoded[:, [*positions, 12]],
            asked[:, [*range(12), *(rows + 12)]],
        )
        for found in (at(positions), at(rows), jitted(rows), jitted(jnp.array(rows))):
            jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert len(traces) == 1


def test_shapes_are_known_for_every_batch_and_length() -> None:
    batch, time = export.symbolic_shape("b, t")
    encoding = xn.MultimodalEncoding([xn.Encoding] * 2, mask_rates=[0.5, None])
    text = jax.ShapeDtypeStruct((batch, time, 5), jnp.float32)
    label = jax.ShapeDtypeStruct((batch, 1, 7), jnp.float32)
    variables = encoding.init(KEY, [IMAGE.reshape(2, 12, 5), LABEL])

    def there_and_back(text: Any, label: Any, key: Any) -> Any:
        encoded, lengths = encoding.apply(variables, [text, label], rngs={"masking": key})
        return encoded, xn.MultimodalDecoding([xn.Decoding] * 2).apply({}, encoded, lengths)

    encoded, decoded = jax.eval_shape(there_and_back, text, label, KEY)
    assert encoded.shape == (batch, time + 1, 8)
    assert [part.shape for part in decoded] == [(batch, time, 8), (batch, 1, 8)]


def test_the_dtype_is_that_of_a_single_modality_too() -> None:
    encoding = xn.MultimodalEncoding([xn.Encoding], dtype=jnp.bfloat16)
    assert encoding.apply({}, [LABEL])[0].dtype == jnp.bfloat16


def test_padding_and_masking_have_initializers_of_their_own() -> None:
    constant = nn.initializers.constant
    encoding = xn.MultimodalEncoding(
        [xn.Encoding] * 2,
        mask_rates=[1.0, None],
        padding_init=constant(3),
        masking_init=constant(4),
    )
    params = encoding.init(KEY, [IMAGE, LABEL])["params"]
    values = jax.tree.map(lambda leaf: np.unique(leaf).tolist(), params)
    assert values == {
        "padding_0": {"padding": [3]},
        "padding_1": {"padding": [3]},
        "masking_0": {"mask": [4]},
    }
    queries = xn.MultimodalPositionalEncoding([grid, place], padding_init=constant(5))
    params = queries.init(KEY, 2)["params"]
    for index in range(2):
        np.testing.assert_array_equal(np.unique(params[f"padding_{index}"]["padding"]), [5])


# Positional encoding.


def test_positional_encodings_are_padded_and_joined() -> None:
    queries = xn.MultimodalPositionalEncoding([grid, place], d_reserved=2)
    (sequence, lengths), variables = queries.init_with_output(KEY, 3)
    assert (sequence.shape, lengths) == ((3, 13, 12), [12, 1])
    np.testing.assert_array_equal(sequence[:, :12, :10], grid()(3))
    params = variables["params"]
    last = [params["position_encoder_1"]["positional_encoding"], params["padding_1"]["padding"]]
    np.testing.assert_array_equal(sequence[0, 12:], np.concatenate(last, axis=1))


def test_a_single_positional_encoding_is_as_it_is() -> None:
    sequence, lengths = xn.MultimodalPositionalEncoding([grid]).apply({}, 2, [[5, 1]])
    np.testing.assert_array_equal(sequence, grid()(2, [5, 1]))
    assert lengths == [2]


# Decoding.


def test_modalities_share_a_decoding_and_have_their_own() -> None:
    outputs = jax.random.normal(KEY, (2, 13, 8))
    decoding = xn.MultimodalDecoding(
        [
            lambda: xn.Decoding(postprocessing=lambda: lambda x: x.reshape(-1, 3, 4, 6)),
            lambda: xn.Decoding(functools.partial(nn.Dense, 10)),
        ],
        functools.partial(nn.Dense, 6),
    )
    (image, label), variables = decoding.init_with_output(KEY, outputs, [12, 1])
    params = variables["params"]
    shared = nn.Dense(6).apply({"params": params["embedding_decoder"]}, outputs)
    np.testing.assert_array_equal(image, shared[:, :12].reshape(2, 3, 4, 6))
    own = {"params": params["decoder_1"]["embedding_decoder"]}
    np.testing.assert_array_equal(label, nn.Dense(10).apply(own, shared[:, 12:]))


# Around a model.


def test_in_a_pipeline_the_lengths_wait_beneath_the_sequence() -> None:
    model = cb.serial(
        xn.MultimodalEncoding([with_grid, xn.Encoding]),
        nn.Dense(6),
        xn.MultimodalDecoding([xn.Decoding, xn.Decoding]),
    )
    (image, label), _ = model.init_with_output(KEY, [IMAGE, LABEL])
    assert (image.shape, label.shape) == ((2, 12, 6), (2, 1, 6))


def test_a_table_is_shared_between_two_modalities_and_the_decoding() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, question: Any, answer: Any) -> Any:
            embed = nn.Embed(7, 4, name="embed")
            text = functools.partial(xn.Encoding, lambda: embed)
            sequence, lengths = xn.MultimodalEncoding([text, text], d_reserved=0)(
                [question, answer]
            )
            tied = functools.partial(xn.EmbedDecoding, embed.embedding)
            return xn.MultimodalDecoding([xn.Decoding] * 2, tied)(sequence, lengths)

    tokens = jnp.zeros((2, 3), int)
    decoded, variables = Model().init_with_output(KEY, tokens, tokens[:, :2])
    assert [part.shape for part in decoded] == [(2, 3, 7), (2, 2, 7)]
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "embed": {"embedding": (7, 4)},
        "MultimodalDecoding_0": {"embedding_decoder": {"bias": (7,)}},
    }


def test_named_modalities_keep_their_names() -> None:
    encoding = xn.MultimodalEncoding(
        [
            lambda: xn.Encoding(functools.partial(nn.Dense, 4), name="image"),
            lambda: xn.Encoding(functools.partial(nn.Dense, 4), name="label"),
        ]
    )
    variables = encoding.init(KEY, [IMAGE, LABEL])
    assert sorted(variables["params"]) == ["image", "label", "padding_0", "padding_1"]


def test_layers_are_values() -> None:
    encoding = xn.MultimodalEncoding([xn.Encoding], mask_rates=[0.5])
    same = xn.MultimodalEncoding((xn.Encoding,), mask_rates=(0.5,))
    assert encoding == same
    assert hash(encoding) == hash(same)


@pytest.mark.parametrize(
    "layer", [xn.MultimodalEncoding, xn.MultimodalPositionalEncoding, xn.MultimodalDecoding]
)
def test_number_of_modalities(layer: Any) -> None:
    assert layer([xn.Encoding] * 3).n_modalities == 3


# Errors.

TWO = xn.MultimodalEncoding([with_grid, xn.Encoding])
QUERIES = xn.MultimodalPositionalEncoding([grid, grid])
DECODING = xn.MultimodalDecoding([xn.Decoding] * 2)
OUTPUTS = jnp.ones((2, 13, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: xn.MultimodalEncoding([]),
            "MultimodalEncoding takes at least 1 modality; got 0.",
        ),
        (
            lambda: xn.MultimodalDecoding(xn.Decoding),
            (
                "MultimodalDecoding takes modalities as a list with one item for each modality; "
                "got type."
            ),
        ),
        (
            lambda: xn.MultimodalDecoding([xn.Decoding, nn.Dense(3)]),
            (
                "MultimodalDecoding takes a constructor for modalities[1], which it calls to make "
                "its own module; got Dense. Give functools.partial(Module, ...) or lambda: "
                "Module(...)."
            ),
        ),
        (
            lambda: TWO.init(KEY, [IMAGE]),
            (
                "MultimodalEncoding takes multimodal_inputs with one item for each modality; got "
                "1 for 2 modalities."
            ),
        ),
        (
            lambda: xn.MultimodalEncoding([xn.Encoding]).init(KEY, [IMAGE, LABEL, LABEL]),
            (
                "MultimodalEncoding takes multimodal_inputs with one item for each modality; got "
                "3 for 1 modality."
            ),
        ),
        (
            lambda: TWO.init(KEY, jnp.ones((2, 3, 4))),
            (
                "MultimodalEncoding takes multimodal_inputs as a list with one item for each "
                "modality; got ArrayImpl."
            ),
        ),
        (
            lambda: TWO.init(KEY, [IMAGE, LABEL], [[0, 1]]),
            (
                "MultimodalEncoding takes multimodal_output_positions with one item for each "
                "modality; got 1 for 2 modalities."
            ),
        ),
        (
            lambda: TWO.init(KEY, [IMAGE, LABEL], [[0, 12], None]),
            "Encoding takes output positions from 0 to 11, in a sequence of length 12; got 12.",
        ),
        (
            lambda: QUERIES.init(KEY, 2, [None, [0], [1]]),
            (
                "MultimodalPositionalEncoding takes multimodal_output_positions with one item "
                "for each modality; got 3 for 2 modalities."
            ),
        ),
        (
            lambda: QUERIES.init(KEY, 2, [None, [-1]]),
            (
                "FourierPositionEncoding takes output positions from 0 to 11, in a sequence of "
                "length 12; got -1."
            ),
        ),
        (
            lambda: xn.MultimodalEncoding([xn.Encoding] * 3, mask_rates=[0.5, None]),
            (
                "MultimodalEncoding takes mask_rates with one item for each modality; got 2 for "
                "3 modalities."
            ),
        ),
        (
            lambda: xn.MultimodalEncoding([xn.Encoding] * 2, mask_rates=[0.5, 1.5]),
            "MultimodalEncoding takes mask_rates from 0 to 1; got 1.5.",
        ),
        (
            lambda: xn.MultimodalPositionalEncoding([grid], d_reserved=-1),
            "MultimodalPositionalEncoding takes d_reserved of at least 0; got -1.",
        ),
        (
            lambda: xn.MultimodalEncoding([lambda: lambda x, at: x]).init(KEY, [IMAGE]),
            (
                "MultimodalEncoding takes the encoding of modality 0 with axes [batch, time, "
                "features]; got shape [2, 3, 4, 5], which has 4 axes."
            ),
        ),
        (
            lambda: DECODING.apply({}, OUTPUTS, [12, 2]),
            (
                "MultimodalDecoding splits its outputs by seqlen_outputs, [12, 2], which sum to "
                "14; the outputs have length 13."
            ),
        ),
        (
            lambda: DECODING.apply({}, OUTPUTS, [13]),
            (
                "MultimodalDecoding takes seqlen_outputs with one item for each modality; got 1 "
                "for 2 modalities."
            ),
        ),
        (
            lambda: DECODING.apply({}, OUTPUTS, [14, -1]),
            "MultimodalDecoding takes lengths in seqlen_outputs of at least 0; got -1.",
        ),
        (
            lambda: jax.jit(lambda lengths: DECODING.apply({}, OUTPUTS, lengths))([12, 1]),
            (
                "MultimodalDecoding takes Python numbers for seqlen_outputs, because they set the "
                "shape of its result; got a traced array. Take them from an array's shape, or make "
                "them static arguments of jax.jit."
            ),
        ),
    ],
)
def test_wording_of_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        wrong()


def test_a_missing_masking_stream_is_named() -> None:
    encoding = xn.MultimodalEncoding([xn.Encoding] * 2, mask_rates=[0.5, None])
    variables = encoding.init(KEY, [IMAGE, LABEL])
    with pytest.raises(
        ValueError, match=r"at rate 0\.5 and draws them from the rng stream 'masking'"
    ):
        encoding.apply(variables, [IMAGE, LABEL])
