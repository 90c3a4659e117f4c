"""The conformance entries of positional, encoding, decoding and multimodal layers, and of io."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Integer

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra.layer import io
from tests.layer.entries import Dtypes, Entry, sequence

EMBEDDING = np.linspace(-1, 1, 21, dtype=np.float32).reshape(7, 3)
"""A table that embeds 7 tokens with 3 features each."""


BATCH = Annotated[int, "batch"]
IMAGE_AND_LABEL = [Float[Array, "batch 2 3 pixels"], Integer[Array, "batch 1"]]


def _dense(d_in: int, d_out: int) -> dict[str, Any]:
    return {"kernel": (d_in, d_out), "bias": (d_out,)}


def _image(dtypes: Dtypes) -> dict[str, Any]:
    """Pixels to 4 features, and 14 Fourier features beside them."""
    only_dtype = {name: dtypes[name] for name in dtypes if name == "dtype"}
    return {
        "preprocessing": functools.partial(nn.Dense, 4, **dtypes),
        "positional_encoding": functools.partial(
            xn.FourierPositionEncoding, (2, 3), n_bands=3, **only_dtype
        ),
    }


def _label(dtypes: Dtypes) -> dict[str, Any]:
    """A token to 3 features, with a learned encoding added."""
    return {
        "preprocessing": functools.partial(nn.Embed, 7, 3, **dtypes),
        "positional_encoding": functools.partial(xn.TrainablePositionalEncoding, 1, 3, **dtypes),
        "aggregation": cb.add(),
    }


def _queries(dtypes: Dtypes) -> list[Any]:
    return [
        _image(dtypes)["positional_encoding"],
        functools.partial(xn.TrainablePositionalEncoding, 1, 3, **dtypes),
    ]


def _readouts(dtypes: Dtypes) -> list[dict[str, Any]]:
    """An image from the first positions, classes from the last."""
    return [
        {"postprocessing": lambda: lambda image: image.reshape(image.shape[0], 2, 3, -1)},
        {"embedding_decoding": functools.partial(nn.Dense, 5, **dtypes)},
    ]


def _constructors(layer: Any, modalities: list[dict[str, Any]]) -> list[Any]:
    return [functools.partial(layer, **fields) for fields in modalities]


def _inputs() -> tuple[Any, ...]:
    return ([sequence(2, 2, 3, 3), np.array([[1], [6]])],)


ENCODED_IMAGE = {"preprocessor": _dense(3, 4)}
ENCODED_LABEL = {
    "preprocessor": {"embedding": (7, 3)},
    "position_encoder": {"positional_encoding": (1, 3)},
}
ENCODED = {
    "encoder_0": ENCODED_IMAGE,
    "encoder_1": ENCODED_LABEL,
    "padding_0": {"padding": (1, 2)},
    "padding_1": {"padding": (1, 17)},
}
QUERIES = {
    "position_encoder_1": {"positional_encoding": (1, 3)},
    "padding_0": {"padding": (1, 1)},
    "padding_1": {"padding": (1, 12)},
}
DECODED = {"decoder_1": {"embedding_decoder": _dense(4, 5)}}

MULTIMODAL_ENTRIES: list[Entry] = [
    Entry(
        name="TrainablePositionalEncoding",
        make=lambda dtypes: xn.TrainablePositionalEncoding(seqlen=5, dimension=3, **dtypes),
        inputs=lambda: (2,),
        output_shapes=(2, 5, 3),
        param_shapes={"positional_encoding": (5, 3)},
        shapes={"annotations": {"batch_size": BATCH, "output_positions": None}},
    ),
    Entry(
        name="FourierPositionEncoding",
        make=lambda dtypes: _image(dtypes)["positional_encoding"](),
        inputs=lambda: (2,),
        output_shapes=(2, 6, 14),
        param_shapes={},
        shapes={"annotations": {"batch_size": BATCH}},
    ),
    Entry(
        name="FourierPositionEncoding: positions",
        make=lambda dtypes: cb.fn(_image(dtypes)["positional_encoding"](), n_in=2),
        inputs=lambda: (2, np.array([5, 0, 3])),
        output_shapes=(2, 3, 14),
        param_shapes={},
    ),
    Entry(
        name="TrainablePositionalPadding",
        make=lambda dtypes: xn.TrainablePositionalPadding(d_max=8, **dtypes),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 8),
        param_shapes={"padding": (1, 5)},
        shapes={},
    ),
    Entry(
        name="TrainablePositionalMasking",
        make=lambda dtypes: xn.TrainablePositionalMasking(rate=0.5, **dtypes),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 3),
        param_shapes={"mask": (1, 3)},
        repeatable=True,
        rngs=("masking",),
        shapes={},
    ),
    Entry(
        name="Encoding",
        make=lambda dtypes: xn.Encoding(**_image(dtypes)),
        inputs=lambda: (sequence(2, 2, 3, 3),),
        output_shapes=(2, 6, 18),
        param_shapes=ENCODED_IMAGE,
        shapes={
            "annotations": {"inputs": Float[Array, "batch 2 3 features_in"]},
            "sizes": {"features": 18},
        },
    ),
    Entry(
        name="EmbedDecoding",
        make=lambda dtypes: xn.EmbedDecoding(EMBEDDING, **dtypes),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 7),
        param_shapes={"bias": (7,)},
        shapes={},
    ),
    Entry(
        name="Decoding",
        make=lambda dtypes: xn.Decoding(functools.partial(nn.Dense, 3, **dtypes)),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 3),
        param_shapes={"embedding_decoder": _dense(3, 3)},
        repeatable=True,
        shapes={},
    ),
    Entry(
        name="MultimodalEncoding",
        make=lambda dtypes: xn.MultimodalEncoding(
            _constructors(xn.Encoding, [_image(dtypes), _label(dtypes)]),
            mask_rates=[None, 0.5],
            d_reserved=2,
            **dtypes,
        ),
        inputs=_inputs,
        output_shapes=((2, 7, 20), [6, 1]),
        param_shapes={**ENCODED, "masking_1": {"mask": (1, 20)}},
        rngs=("masking",),
        shapes={"annotations": {"multimodal_inputs": IMAGE_AND_LABEL}},
    ),
    Entry(
        name="MultimodalPositionalEncoding",
        make=lambda dtypes: xn.MultimodalPositionalEncoding(_queries(dtypes), **dtypes),
        inputs=lambda: (2,),
        output_shapes=((2, 7, 15), [6, 1]),
        param_shapes=QUERIES,
        shapes={"annotations": {"batch_size": BATCH}},
    ),
    Entry(
        name="MultimodalDecoding",
        make=lambda dtypes: xn.MultimodalDecoding(_constructors(xn.Decoding, _readouts(dtypes))),
        inputs=lambda: (sequence(2, 7, 4), [6, 1]),
        output_shapes=[(2, 2, 3, 4), (2, 1, 5)],
        param_shapes=DECODED,
        shapes={
            "annotations": {
                "outputs": Float[Array, "batch 7 features"],
                "seqlen_outputs": [6, 1],
                "return": [Float[Array, "batch 2 3 features"], Float[Array, "batch 1 5"]],
            }
        },
    ),
    Entry(
        name="io.input_encoding",
        make=lambda dtypes: io.input_encoding(
            _image(dtypes), _label(dtypes), d_reserved=2, **dtypes
        )(),
        inputs=_inputs,
        output_shapes=((2, 7, 20), [6, 1]),
        param_shapes=ENCODED,
    ),
    Entry(
        name="io.input_encoding: one",
        make=lambda dtypes: io.input_encoding(_image(dtypes))(),
        inputs=lambda: (sequence(2, 2, 3, 3),),
        output_shapes=(2, 6, 18),
        param_shapes=ENCODED_IMAGE,
    ),
    Entry(
        name="io.target_encoding",
        make=lambda dtypes: io.target_encoding(
            _image(dtypes), _label(dtypes), d_reserved=2, **dtypes
        )(),
        inputs=_inputs,
        output_shapes=((2, 7, 20), [6, 1]),
        param_shapes=ENCODED,
    ),
    Entry(
        name="io.query_encoding",
        make=lambda dtypes: io.query_encoding(*_queries(dtypes), **dtypes)(),
        inputs=lambda: (2,),
        output_shapes=((2, 7, 15), [6, 1]),
        param_shapes=QUERIES,
    ),
    Entry(
        name="io.output_decoding",
        make=lambda dtypes: io.output_decoding(*_readouts(dtypes))(),
        inputs=lambda: (sequence(2, 7, 4), [6, 1]),
        output_shapes=[(2, 2, 3, 4), (2, 1, 5)],
        param_shapes=DECODED,
    ),
]
