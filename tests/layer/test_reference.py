"""The names, fields and defaults of the reference, as a table, against those of the package."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn

REQUIRED = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Function:
    """A default that is a function, known by its name; of partial ones, the keywords too."""

    name: str
    keywords: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, f: Callable[..., Any]) -> Function:
        if isinstance(f, functools.partial):
            return cls(f.func.__name__, tuple(f.keywords.items()))
        return cls(f.__name__)


@dataclasses.dataclass(frozen=True)
class AnyFunction:
    """A default that is a function without a name of its own."""


def like(kind: str, index: int) -> Function:
    return Function(f"_like_{kind}", (("index", index),))


ATTENTION = {
    "n_heads": 8,
    "d_qk": like("shape", 0),
    "d_v": like("value", 2),
    "d_output": like("value", 3),
    "kernel_init": Function("init"),
    "bias_init": Function("zeros"),
    "use_bias": True,
    "dropout_rate": 0.0,
    "deterministic": True,
    "precision": None,
}

FIELDS: dict[str, dict[str, Any]] = {
    "Attention": ATTENTION,
    "QKVAttention": ATTENTION,
    "KVQAttention": ATTENTION | {"d_qk": like("shape", 1), "d_output": like("shape", 0)},
    "SelfAttention": ATTENTION,
    "Decoding": {"embedding_decoding": AnyFunction(), "postprocessing": AnyFunction()},
    "EmbedDecoding": {"embedding": REQUIRED},
    "Encoding": {
        "preprocessing": AnyFunction(),
        "positional_encoding": None,
        "aggregation": cb.concatenate(),
    },
    "FeedForward": {
        "widening_factor": 1,
        "activation": Function("gelu"),
        "kernel_init": Function("init"),
    },
    "FourierPositionEncoding": {
        "seqshape": REQUIRED,
        "n_bands": REQUIRED,
        "spatial_coordinate_bounds": (-1.0, 1.0),
        "use_spatial_coordinates": True,
        "use_sine_only": False,
    },
    "LSTM": {"d_hidden": REQUIRED},
    "LSTMCell": {
        "gate_fn": Function("sigmoid"),
        "activation_fn": Function("tanh"),
        "kernel_init": Function("init"),
        "recurrent_kernel_init": Function("init"),
        "bias_init": Function("zeros"),
    },
    "MultimodalDecoding": {
        "modalities": REQUIRED,
        "multimodal_embedding_decoding": AnyFunction(),
    },
    "MultimodalEncoding": {"modalities": REQUIRED, "mask_rates": None, "d_reserved": 1},
    "MultimodalPositionalEncoding": {"modalities": REQUIRED, "d_reserved": 1},
    "TrainablePositionalEncoding": {
        "seqlen": REQUIRED,
        "dimension": REQUIRED,
        "kernel_init": Function("init"),
        "dtype": jnp.float32,
    },
    "TrainablePositionalMasking": {"rate": REQUIRED},
    "TrainablePositionalPadding": {"d_max": REQUIRED},
}

CALLS: dict[str, list[str]] = {
    "Attention": ["inputs_q", "inputs_kv", "mask"],
    "QKVAttention": ["inputs_q", "inputs_kv", "mask"],
    "KVQAttention": ["inputs_q", "inputs_kv", "mask"],
    "SelfAttention": ["inputs_qkv", "mask"],
    "Decoding": ["outputs"],
    "EmbedDecoding": ["outputs"],
    "Encoding": ["inputs", "output_positions"],
    "FeedForward": ["inputs"],
    "FourierPositionEncoding": ["batch_size", "output_positions"],
    "LSTM": ["inputs"],
    "LSTMCell": ["carry", "inputs"],
    "MultimodalDecoding": ["outputs", "seqlen_outputs"],
    "MultimodalEncoding": ["multimodal_inputs", "multimodal_output_positions"],
    "MultimodalPositionalEncoding": ["batch_size", "multimodal_output_positions"],
    "TrainablePositionalEncoding": ["batch_size", "output_positions"],
    "TrainablePositionalMasking": ["inputs"],
    "TrainablePositionalPadding": ["inputs"],
}

FUNCTIONS: dict[str, dict[str, Any]] = {
    "attend": {
        "query": REQUIRED,
        "key": REQUIRED,
        "value": REQUIRED,
        "mask": None,
        "dropout_rngkey": None,
        "dropout_rate": 0.0,
        "deterministic": False,
        "precision": None,
    },
    "cross_attention_mask": {"mask_q": REQUIRED, "mask_kv": REQUIRED},
}

BEYOND = {
    "CausalConv",
    "GRU",
    "Learned",
    "LinearRecurrence",
    "LinearPositionBias",
    "LinearScaling",
    "Llama3Scaling",
    "Recurrent",
    "RelativePositionBias",
    "RotaryEncoding",
    "interpolate_positions",
    "layer_rules",
    "ring_attend",
}
"""Public names that the reference does not have."""

ADDED: dict[str, dict[str, Any]] = {
    "attend": {
        "chunk_size": None,
        "causal": False,
        "window": None,
        "bias": None,
        "logit_cap": None,
        "scale": None,
        "query_positions": None,
        "key_positions": None,
    }
}
"""What functions take beyond the reference, after all that it names."""

BASES: dict[str, type] = {"LSTMCell": nn.LSTMCell, "SelfAttention": xn.Attention}

PROPERTIES = ["MultimodalDecoding", "MultimodalEncoding", "MultimodalPositionalEncoding"]

IO = ["input_encoding", "query_encoding", "output_decoding", "target_encoding"]


def test_every_name_is_there() -> None:
    assert {*FIELDS, *FUNCTIONS, "io", *BEYOND} == set(xn.__all__)
    assert {*BEYOND}.isdisjoint({*FIELDS, *FUNCTIONS})
    assert set(IO) <= set(xn.io.__all__)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    parameters = inspect.signature(getattr(xn, name)).parameters
    found = list(parameters)
    assert found[: len(FIELDS[name])] == list(FIELDS[name])
    added = found[len(FIELDS[name]) :]
    assert {"parent", "name"} <= set(added)
    assert all(parameters[field].default is not REQUIRED for field in added)


@pytest.mark.parametrize(
    ("name", "field", "default"),
    [(name, field, value) for name, fields in FIELDS.items() for field, value in fields.items()],
)
def test_defaults(name: str, field: str, default: Any) -> None:
    found = inspect.signature(getattr(xn, name)).parameters[field].default
    if isinstance(default, AnyFunction):
        assert inspect.isfunction(found)
    elif isinstance(default, Function):
        assert Function.of(found) == default
    else:
        assert found == default
        assert repr(found) == repr(default)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    parameters = inspect.signature(getattr(xn, name).__call__).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", *CALLS[name]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    parameters = inspect.signature(getattr(xn, name)).parameters.values()
    found = [(p.name, p.default) for p in parameters]
    assert found == [*FUNCTIONS[name].items(), *ADDED.get(name, {}).items()]


@pytest.mark.parametrize("name", FIELDS)
def test_bases(name: str) -> None:
    assert issubclass(getattr(xn, name), BASES.get(name, nn.Module))


def test_the_alias() -> None:
    assert xn.QKVAttention is xn.Attention


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str) -> None:
    assert isinstance(getattr(xn, name).n_modalities, property)


def test_methods() -> None:
    assert list(inspect.signature(xn.LSTM.initial_state).parameters) == ["self", "inputs"]
    concatenate = inspect.signature(xn.Encoding).parameters["aggregation"].default
    assert repr(concatenate) == (
        "Concatenate(signature=Signature(n_in=2, n_out=1, start_index=0, in_shape=((), ())), "
        "axis=-1)"
    )
