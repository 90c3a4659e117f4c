"""The conformance entries of positional, encoding, decoding and multimodal layers, and of io."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Integer

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra.layer import io
from tests.layer.entries import Entry, Fields, sequence

EMBEDDING = np.linspace(-1, 1, 21, dtype=np.float32).reshape(7, 3)
"""A table that embeds 7 tokens with 3 features each."""


KERNEL_NAMES = {"kernel_init": ("rows", "columns")}
DENSE_NAMES = {**KERNEL_NAMES, "bias_init": ("columns",)}
MULTIMODAL_NAMES = {
    **DENSE_NAMES,
    "embedding_init": ("rows", "columns"),
    "padding_init": ("one", "columns"),
    "masking_init": ("one", "columns"),
}

BATCH = Annotated[int, "batch"]
IMAGE_AND_LABEL = [Float[Array, "batch 2 3 pixels"], Integer[Array, "batch 1"]]


def _dense(d_in: int, d_out: int) -> dict[str, Any]:
    return {"kernel": (d_in, d_out), "bias": (d_out,)}


def _pick(layer: Callable[..., Any], fields: Fields) -> dict[str, Any]:
    """Those of the fields that a layer has."""
    names = inspect.signature(layer).parameters
    return {name: value for name, value in fields.items() if name in names}


def _image(fields: Fields) -> dict[str, Any]:
    """Pixels to 4 features, and 14 Fourier features beside them."""
    return {
        "preprocessing": functools.partial(nn.Dense, 4, **_pick(nn.Dense, fields)),
        "positional_encoding": functools.partial(
            xn.FourierPositionEncoding,
            (2, 3),
            n_bands=3,
            **_pick(xn.FourierPositionEncoding, fields),
        ),
    }


def _place(fields: Fields) -> Any:
    return functools.partial(
        xn.TrainablePositionalEncoding, 1, 3, **_pick(xn.TrainablePositionalEncoding, fields)
    )


def _label(fields: Fields) -> dict[str, Any]:
    """A token to 3 features, with a learned encoding added."""
    return {
        "preprocessing": functools.partial(nn.Embed, 7, 3, **_pick(nn.Embed, fields)),
        "positional_encoding": _place(fields),
        "aggregation": cb.add(),
    }


def _queries(fields: Fields) -> list[Any]:
    return [_image(fields)["positional_encoding"], _place(fields)]


def _readouts(fields: Fields) -> list[dict[str, Any]]:
    """An image from the first positions, classes from the last."""
    return [
        {"postprocessing": lambda: lambda image: image.reshape(image.shape[0], 2, 3, -1)},
        {"embedding_decoding": functools.partial(nn.Dense, 5, **_pick(nn.Dense, fields))},
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
        make=lambda fields: xn.TrainablePositionalEncoding(seqlen=5, dimension=3, **fields),
        inputs=lambda: (2,),
        output_shapes=(2, 5, 3),
        param_shapes={"positional_encoding": (5, 3)},
        initializers=KERNEL_NAMES,
        shapes={"annotations": {"batch_size": BATCH, "output_positions": None}},
    ),
    Entry(
        name="FourierPositionEncoding",
        make=lambda fields: _image(fields)["positional_encoding"](),
        inputs=lambda: (2,),
        output_shapes=(2, 6, 14),
        param_shapes={},
        shapes={"annotations": {"batch_size": BATCH}},
    ),
    Entry(
        name="FourierPositionEncoding: positions",
        make=lambda fields: cb.fn(_image(fields)["positional_encoding"](), n_in=2),
        inputs=lambda: (2, np.array([5, 0, 3])),
        output_shapes=(2, 3, 14),
        param_shapes={},
    ),
    Entry(
        name="TrainablePositionalPadding",
        make=lambda fields: xn.TrainablePositionalPadding(d_max=8, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 8),
        param_shapes={"padding": (1, 5)},
        initializers=KERNEL_NAMES,
        shapes={},
    ),
    Entry(
        name="TrainablePositionalMasking",
        make=lambda fields: xn.TrainablePositionalMasking(rate=0.5, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 3),
        param_shapes={"mask": (1, 3)},
        repeatable=True,
        rngs=("masking",),
        initializers=KERNEL_NAMES,
        shapes={},
    ),
    Entry(
        name="Learned",
        make=lambda fields: xn.Learned(n_vectors=4, dimension=3, **fields),
        inputs=lambda: (sequence(2, 5, 6),),
        output_shapes=(2, 4, 3),
        param_shapes={"vectors": (4, 3)},
        initializers=KERNEL_NAMES,
        shapes={"annotations": {"inputs": Float[Array, "batch time features"]}},
    ),
    Entry(
        name="interpolate_positions",
        make=lambda fields: xn.interpolate_positions,
        inputs=lambda: (sequence(4, 3), 7),
        output_shapes=(7, 3),
        param_shapes={},
        shapes={
            "annotations": {"seqshape": Annotated[int, "new_positions"], "table_seqshape": None}
        },
    ),
    Entry(
        name="Encoding",
        make=lambda fields: xn.Encoding(**_image(fields)),
        inputs=lambda: (sequence(2, 2, 3, 3),),
        output_shapes=(2, 6, 18),
        param_shapes=ENCODED_IMAGE,
        initializers=DENSE_NAMES,
        shapes={
            "annotations": {"inputs": Float[Array, "batch 2 3 features_in"]},
            "sizes": {"features": 18},
        },
    ),
    Entry(
        name="EmbedDecoding",
        make=lambda fields: xn.EmbedDecoding(EMBEDDING, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 7),
        param_shapes={"bias": (7,)},
        initializers={"bias_init": ("columns",)},
        shapes={},
    ),
    Entry(
        name="Decoding",
        make=lambda fields: xn.Decoding(functools.partial(nn.Dense, 3, **_pick(nn.Dense, fields))),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 3),
        param_shapes={"embedding_decoder": _dense(3, 3)},
        repeatable=True,
        initializers=DENSE_NAMES,
        shapes={},
    ),
    Entry(
        name="MultimodalEncoding",
        make=lambda fields: xn.MultimodalEncoding(
            _constructors(xn.Encoding, [_image(fields), _label(fields)]),
            mask_rates=[None, 0.5],
            d_reserved=2,
            **_pick(xn.MultimodalEncoding, fields),
        ),
        inputs=_inputs,
        output_shapes=((2, 7, 20), [6, 1]),
        param_shapes={**ENCODED, "masking_1": {"mask": (1, 20)}},
        rngs=("masking",),
        initializers=MULTIMODAL_NAMES,
        shapes={"annotations": {"multimodal_inputs": IMAGE_AND_LABEL}},
    ),
    Entry(
        name="MultimodalPositionalEncoding",
        make=lambda fields: xn.MultimodalPositionalEncoding(
            _queries(fields), **_pick(xn.MultimodalPositionalEncoding, fields)
        ),
        inputs=lambda: (2,),
        output_shapes=((2, 7, 15), [6, 1]),
        param_shapes=QUERIES,
        initializers=MULTIMODAL_NAMES,
        shapes={"annotations": {"batch_size": BATCH}},
    ),
    Entry(
        name="MultimodalDecoding",
        make=lambda fields: xn.MultimodalDecoding(_constructors(xn.Decoding, _readouts(fields))),
        inputs=lambda: (sequence(2, 7, 4), [6, 1]),
        output_shapes=[(2, 2, 3, 4), (2, 1, 5)],
        param_shapes=DECODED,
        initializers=DENSE_NAMES,
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
        make=lambda fields: io.input_encoding(
            _image(fields), _label(fields), d_reserved=2, **_pick(io.input_encoding, fields)
        )(**_pick(xn.MultimodalEncoding, fields)),
        inputs=_inputs,
        output_shapes=((2, 7, 20), [6, 1]),
        param_shapes=ENCODED,
        initializers=MULTIMODAL_NAMES,
    ),
    Entry(
        name="io.input_encoding: one",
        make=lambda fields: io.input_encoding(_image(fields))(),
        inputs=lambda: (sequence(2, 2, 3, 3),),
        output_shapes=(2, 6, 18),
        param_shapes=ENCODED_IMAGE,
        initializers=DENSE_NAMES,
    ),
    Entry(
        name="io.target_encoding",
        make=lambda fields: io.target_encoding(
            _image(fields), _label(fields), d_reserved=2, **_pick(io.target_encoding, fields)
        )(**_pick(xn.MultimodalEncoding, fields)),
        inputs=_inputs,
        output_shapes=((2, 7, 20), [6, 1]),
        param_shapes=ENCODED,
        initializers=MULTIMODAL_NAMES,
    ),
    Entry(
        name="io.query_encoding",
        make=lambda fields: io.query_encoding(
            *_queries(fields), **_pick(io.query_encoding, fields)
        )(**_pick(xn.MultimodalPositionalEncoding, fields)),
        inputs=lambda: (2,),
        output_shapes=((2, 7, 15), [6, 1]),
        param_shapes=QUERIES,
        initializers=MULTIMODAL_NAMES,
    ),
    Entry(
        name="io.output_decoding",
        make=lambda fields: io.output_decoding(*_readouts(fields))(),
        inputs=lambda: (sequence(2, 7, 4), [6, 1]),
        output_shapes=[(2, 2, 3, 4), (2, 1, 5)],
        param_shapes=DECODED,
        initializers=DENSE_NAMES,
    ),
]
