"""The conformance list: one entry, or more, for every public layer and function.

Here is what an entry says, and those of attention, feed-forward and recurrent layers;
``tests/layer/multimodal_entries.py`` has the others.

``tests/layer/test_conformance.py`` puts each entry through every test, and fails when a public
name is missing from the list.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from hypothesis import strategies as st
from jax import Array
from jaxtyping import Float

from flax_extra import layer as xn

Fields = Mapping[str, Any]
"""Fields to build a layer with: ``{"dtype": jnp.bfloat16}`` or ``{"kernel_init": ...}``, say."""


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One public layer or function, and what is documented of it.

    Attributes:
        name: the public name in ``flax_extra.layer``; ``io.input_encoding`` for one in a submodule.
            What follows a colon tells entries of one name apart: ``"LSTM: return_sequences"``.
        make: builds a fresh layer, or gives the function, from fields: dtypes, or those that
            ``initializers`` names. What has no such fields ignores them.
        inputs: the positional arguments of a call. Floating point ones are float32.
        output_shapes: a shape, or a tuple or list of them, as the call returns it; a plain number
            that the call returns stands for itself.
        param_shapes: the golden parameter tree, a documented API; empty where there are none.
        repeatable: whether the first output has the shape of the first input, for ``cb.repeat``.
        rngs: the names of the rng streams that a call needs, other than ``params``.
        initializers: the fields that initialize its parameters, each with a name for every axis.
        shapes: what ``testing.check_shapes`` is told beyond the annotations: sizes that the fields
            of ``make`` restrict, dtypes, constants. None for a variant of what is checked already.
        field_shapes: the parameter trees of modules among its fields, by the name that they have in
            an ``nn.compact`` method: linen gives a module that is made there to that method's.
    """

    name: str
    make: Callable[[Fields], Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    output_shapes: Any
    param_shapes: Mapping[str, Any]
    repeatable: bool = False
    rngs: tuple[str, ...] = ()
    initializers: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, Any] | None = None
    field_shapes: Mapping[str, Any] | None = None


SETTINGS = {"LinearScaling", "Llama3Scaling", "layer_rules", "ring_attend"}
"""Public names that are no layers, or need a mesh: they have tests of their own.

``tests/layer/test_rotary.py``, ``tests/layer/test_rules.py`` and ``tests/mesh/test_ring.py``.
"""

HEADS = {"heads": 2}
HEADS_ALONE = {"n_heads": 2}
PAIRED = st.sampled_from([2, 4])
"""Features that two heads can share."""

MASKS = {"mask": ("bool", "int32")}
"""Their annotations leave open what a mask is made of; floats are refused."""


def sequence(*shape: int, seed: int = 0) -> np.ndarray:
    """Features drawn from a normal distribution."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


MASK = np.array([[[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]] * 2, bool)


def _attend_by_mask(query: Any, key: Any, value: Any, mask: Any) -> Any:
    return xn.attend(query, key, value, mask)


def _attend_in_groups(query: Any, key: Any, value: Any, bias: Any) -> Any:
    return xn.attend(query, key, value, causal=True, window=2, bias=bias, logit_cap=3.0)


def _attend_by_position(query: Any, key: Any, value: Any, queries: Any, keys: Any) -> Any:
    positions = {"query_positions": queries, "key_positions": keys}
    return xn.attend(query, key, value, causal=True, **positions, chunk_size=2)


ATTENTION_NAMES = {
    "kernel_init": ("features", "heads", "head_features"),
    "bias_init": ("heads", "head_features"),
    "out_kernel_init": ("all_heads", "features"),
    "out_bias_init": ("features",),
}
DENSE_NAMES = {"kernel_init": ("features", "hidden"), "bias_init": ("hidden",)}
FEED_FORWARD_NAMES = {
    **DENSE_NAMES,
    "out_kernel_init": ("hidden", "features"),
    "out_bias_init": ("features",),
}
CONV_NAMES = {
    "kernel_init": ("kernel", "features", "features_out"),
    "bias_init": ("features_out",),
}
GATED_NAMES = {
    "kernel_init": ("features", "hidden"),
    "recurrent_kernel_init": ("hidden", "next_hidden"),
    "bias_init": ("next_hidden",),
}
LINEAR_RECURRENCE_NAMES = {
    "kernel_init": ("blocks", "features", "block_features"),
    "bias_init": ("all_features",),
    "decay_init": ("decays",),
}


def _make_biased_attention(fields: Fields) -> xn.SelfAttention:
    own = dict(fields)
    bias = {name: own[name] for name in ("dtype", "param_dtype") if name in own}
    if "position_bias_init" in own:
        bias["bias_init"] = own.pop("position_bias_init")
    position_bias = functools.partial(
        xn.RelativePositionBias, 2, n_buckets=4, max_distance=8, **bias
    )
    return xn.SelfAttention(n_heads=2, position_bias=position_bias, logit_cap=5.0, **own)


def _dense(*shape: int) -> Mapping[str, Any]:
    kernel, bias = shape, shape[1:]
    return {"kernel": kernel, "bias": bias}


def _lstm_cell(d_in: int, d: int) -> Mapping[str, Any]:
    recurrent = {f"h{gate}": _dense(d, d) for gate in "ifgo"}
    return recurrent | {f"i{gate}": {"kernel": (d_in, d)} for gate in "ifgo"}


def _gru_cell(d_in: int, d: int) -> Mapping[str, Any]:
    recurrent = {f"h{gate}": {"kernel": (d, d)} for gate in "rz"} | {"hn": _dense(d, d)}
    return recurrent | {f"i{gate}": _dense(d_in, d) for gate in "rzn"}


def _linear_recurrence(n_blocks: int, d: int) -> Mapping[str, Any]:
    gate = {"kernel": (n_blocks, d // n_blocks, d // n_blocks), "bias": (d,)}
    return {"input_gate": gate, "recurrence_gate": gate, "decay_logit": (d,)}


LAYER_ENTRIES = [
    Entry(
        name="attend",
        make=lambda fields: xn.attend,
        inputs=lambda: (
            sequence(2, 3, 2, 4),
            sequence(2, 4, 2, 4, seed=1),
            sequence(2, 4, 2, 5, seed=2),
        ),
        output_shapes=(2, 3, 10),
        param_shapes={},
        shapes={
            "sizes": {"heads": 4, "kv_heads": st.sampled_from([1, 2, 4])},
            "dtypes": MASKS,
            # Positions are for causal attention only: the entry of that name has them.
            "annotations": {"query_positions": None, "key_positions": None},
        },
    ),
    Entry(
        name="attend: mask",
        make=lambda fields: _attend_by_mask,
        inputs=lambda: (
            sequence(2, 3, 2, 4),
            sequence(2, 4, 2, 4, seed=1),
            sequence(2, 4, 2, 5, seed=2),
            MASK,
        ),
        output_shapes=(2, 3, 10),
        param_shapes={},
    ),
    Entry(
        name="attend: window, bias, groups of heads",
        make=lambda dtypes: _attend_in_groups,
        inputs=lambda: (
            sequence(2, 3, 4, 4),
            sequence(2, 5, 2, 4, seed=1),
            sequence(2, 5, 2, 3, seed=2),
            sequence(1, 4, 3, 5, seed=3),
        ),
        output_shapes=(2, 3, 12),
        param_shapes={},
    ),
    Entry(
        name="attend: positions",
        make=lambda dtypes: _attend_by_position,
        inputs=lambda: (
            sequence(2, 2, 2, 4),
            sequence(2, 4, 1, 4, seed=1),
            sequence(2, 4, 1, 4, seed=2),
            np.array([[4, 5], [1, -1]], np.int32),
            np.array([[4, 5, 2, 3], [0, 1, -1, -1]], np.int32),
        ),
        output_shapes=(2, 2, 8),
        param_shapes={},
    ),
    Entry(
        name="cross_attention_mask",
        make=lambda fields: xn.cross_attention_mask,
        inputs=lambda: (np.array([[1, 1, 0]]), np.array([[1, 0]])),
        output_shapes=(1, 3, 2),
        param_shapes={},
        shapes={},
    ),
    Entry(
        name="Attention",
        make=lambda fields: xn.Attention(n_heads=2, **fields),
        inputs=lambda: (sequence(2, 3, 4), sequence(2, 4, 6, seed=1), MASK),
        output_shapes=(2, 3, 4),
        param_shapes={
            "query": _dense(4, 2, 2),
            "key": _dense(6, 2, 2),
            "value": _dense(6, 2, 2),
            "out": _dense(4, 4),
        },
        repeatable=True,
        initializers=ATTENTION_NAMES,
        shapes={"sizes": {"features_q": PAIRED, **HEADS}, "dtypes": MASKS},
    ),
    Entry(
        name="Attention: dropout",
        make=lambda fields: xn.Attention(
            n_heads=2, d_v=6, d_output=5, dropout_rate=0.5, deterministic=False, **fields
        ),
        inputs=lambda: (sequence(2, 3, 4), sequence(2, 4, 6, seed=1), MASK),
        output_shapes=(2, 3, 5),
        param_shapes={
            "query": _dense(4, 2, 2),
            "key": _dense(6, 2, 2),
            "value": _dense(6, 2, 3),
            "out": _dense(6, 5),
        },
        rngs=("dropout",),
        initializers=ATTENTION_NAMES,
    ),
    Entry(
        name="QKVAttention",
        make=lambda fields: xn.QKVAttention(n_heads=2, use_bias=False, **fields),
        inputs=lambda: (sequence(2, 3, 4), sequence(2, 4, 6, seed=1), None),
        output_shapes=(2, 3, 4),
        param_shapes={
            "query": {"kernel": (4, 2, 2)},
            "key": {"kernel": (6, 2, 2)},
            "value": {"kernel": (6, 2, 2)},
            "out": {"kernel": (4, 4)},
        },
        repeatable=True,
        initializers=ATTENTION_NAMES,
    ),
    Entry(
        name="KVQAttention",
        make=lambda fields: xn.KVQAttention(n_heads=2, **fields),
        inputs=lambda: (sequence(2, 3, 4), sequence(2, 4, 6, seed=1), MASK),
        output_shapes=(2, 3, 4),
        param_shapes={
            "query": _dense(4, 2, 3),
            "key": _dense(6, 2, 3),
            "value": _dense(6, 2, 3),
            "out": _dense(6, 4),
        },
        repeatable=True,
        initializers=ATTENTION_NAMES,
        shapes={"sizes": {"features_kv": PAIRED, **HEADS}, "dtypes": MASKS},
    ),
    Entry(
        name="SelfAttention",
        make=lambda fields: xn.SelfAttention(n_heads=2, **fields),
        inputs=lambda: (sequence(2, 4, 6), np.tril(np.ones((1, 4, 4), np.int32))),
        output_shapes=(2, 4, 6),
        param_shapes={
            "query": _dense(6, 2, 3),
            "key": _dense(6, 2, 3),
            "value": _dense(6, 2, 3),
            "out": _dense(6, 6),
        },
        repeatable=True,
        initializers=ATTENTION_NAMES,
        shapes={"sizes": {"features_in": PAIRED, **HEADS}, "dtypes": MASKS},
    ),
    Entry(
        name="SelfAttention: causal, with rotary positions",
        make=lambda fields: xn.SelfAttention(
            n_heads=4, n_kv_heads=2, causal=True, window=3, rotary=xn.RotaryEncoding(), **fields
        ),
        inputs=lambda: (sequence(2, 5, 8), None),
        output_shapes=(2, 5, 8),
        param_shapes={
            "query": _dense(8, 4, 2),
            "key": _dense(8, 2, 2),
            "value": _dense(8, 2, 2),
            "out": _dense(8, 8),
        },
        repeatable=True,
        initializers=ATTENTION_NAMES,
    ),
    Entry(
        name="SelfAttention: with a position bias",
        make=_make_biased_attention,
        inputs=lambda: (sequence(2, 5, 6), None),
        output_shapes=(2, 5, 6),
        param_shapes={
            "query": _dense(6, 2, 3),
            "key": _dense(6, 2, 3),
            "value": _dense(6, 2, 3),
            "out": _dense(6, 6),
            "position_bias": {"bias": (4, 2)},
        },
        repeatable=True,
        initializers={
            **ATTENTION_NAMES,
            "position_bias_init": ("buckets", "heads"),
        },
    ),
    Entry(
        name="RelativePositionBias",
        make=lambda fields: xn.RelativePositionBias(2, n_buckets=4, max_distance=8, **fields),
        inputs=lambda: (np.arange(3)[None], np.arange(4)[None]),
        output_shapes=(1, 2, 3, 4),
        param_shapes={"bias": (4, 2)},
        initializers={"bias_init": ("buckets", "heads")},
        shapes={"sizes": HEADS_ALONE},
    ),
    Entry(
        name="LinearPositionBias",
        make=lambda fields: xn.LinearPositionBias(
            2, **{name: x for name, x in fields.items() if name == "dtype"}
        ),
        inputs=lambda: (np.arange(3)[None], np.arange(4)[None]),
        output_shapes=(1, 2, 3, 4),
        param_shapes={},
        shapes={"sizes": HEADS_ALONE},
    ),
    Entry(
        name="FeedForward",
        make=lambda fields: xn.FeedForward(widening_factor=3, **fields),
        inputs=lambda: (sequence(2, 5, 4),),
        output_shapes=(2, 5, 4),
        param_shapes={"Dense_0": _dense(4, 12), "Dense_1": _dense(12, 4)},
        repeatable=True,
        initializers=FEED_FORWARD_NAMES,
        shapes={},
    ),
    Entry(
        name="FeedForward: gated",
        make=lambda fields: xn.FeedForward(activation=nn.silu, d_hidden=6, gated=True, **fields),
        inputs=lambda: (sequence(2, 5, 4),),
        output_shapes=(2, 5, 4),
        param_shapes={"gate": _dense(4, 6), "up": _dense(4, 6), "out": _dense(6, 4)},
        repeatable=True,
        initializers=FEED_FORWARD_NAMES,
    ),
    Entry(
        name="CausalConv",
        make=lambda fields: xn.CausalConv(4, kernel_size=2, dilation=2, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 4),
        param_shapes=_dense(2, 3, 4) | {"bias": (4,)},
        initializers=CONV_NAMES,
        shapes={
            "annotations": {
                "inputs": Float[Array, "batch time features_in"],
                "return": Float[Array, "batch time 4"],
            }
        },
    ),
    Entry(
        name="CausalConv: depthwise, strides",
        make=lambda fields: xn.CausalConv(groups=None, strides=2, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 3, 3),
        param_shapes={"kernel": (3, 1, 3), "bias": (3,)},
        initializers=CONV_NAMES,
    ),
    Entry(
        name="RotaryEncoding",
        make=lambda fields: xn.RotaryEncoding().rotate,
        inputs=lambda: (sequence(2, 5, 2, 4), np.arange(5)[None]),
        output_shapes=(2, 5, 2, 4),
        param_shapes={},
        shapes={"sizes": {"features": PAIRED}},
    ),
    Entry(
        name="LSTMCell",
        make=lambda fields: xn.LSTMCell(**fields),
        inputs=lambda: ((sequence(2, 4), sequence(2, 4, seed=1)), sequence(2, 3, seed=2)),
        output_shapes=(((2, 4), (2, 4)), (2, 4)),
        param_shapes=_lstm_cell(3, 4),
        shapes={},
        initializers=GATED_NAMES,
    ),
    Entry(
        name="LSTM",
        make=lambda fields: xn.LSTM(4, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 4),
        param_shapes={"Scan_0": {"LSTMCell_0": _lstm_cell(3, 4)}},
        shapes={},
        initializers=GATED_NAMES,
    ),
    Entry(
        name="LSTM: return_sequences, reverse",
        make=lambda fields: xn.LSTM(3, return_sequences=True, reverse=True, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 3),
        param_shapes={"Scan_0": {"LSTMCell_0": _lstm_cell(3, 3)}},
        repeatable=True,
        initializers=GATED_NAMES,
    ),
    Entry(
        name="LSTM: return_state",
        make=lambda fields: xn.LSTM(4, return_state=True, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=((2, 4), (2, 4), (2, 4)),
        param_shapes={"Scan_0": {"LSTMCell_0": _lstm_cell(3, 4)}},
        initializers=GATED_NAMES,
    ),
    Entry(
        name="GRU",
        make=lambda fields: xn.GRU(4, **fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 4),
        param_shapes={"Scan_0": {"GRUCell_0": _gru_cell(3, 4)}},
        shapes={},
        initializers=GATED_NAMES,
    ),
    Entry(
        name="GRU: return_sequences, reverse, return_state",
        make=lambda fields: xn.GRU(
            3, return_sequences=True, reverse=True, return_state=True, **fields
        ),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=((2, 5, 3), (2, 3)),
        param_shapes={"Scan_0": {"GRUCell_0": _gru_cell(3, 3)}},
        initializers=GATED_NAMES,
    ),
    Entry(
        name="Recurrent",
        make=lambda fields: xn.Recurrent(nn.GRUCell(3, **fields), return_sequences=True),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 3),
        param_shapes={"cell": _gru_cell(3, 3)},
        field_shapes={"GRUCell_0": _gru_cell(3, 3)},
        repeatable=True,
        shapes={"annotations": {"inputs": Float[Array, "batch time features"]}},
        initializers=GATED_NAMES,
    ),
    Entry(
        name="Recurrent: reverse, return_state",
        make=lambda fields: xn.Recurrent(
            xn.LSTMCell(features=4, **fields), reverse=True, return_state=True
        ),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=((2, 4), (2, 4), (2, 4)),
        param_shapes={"cell": _lstm_cell(3, 4)},
        field_shapes={"LSTMCell_0": _lstm_cell(3, 4)},
        initializers=GATED_NAMES,
    ),
    Entry(
        name="LinearRecurrence",
        make=lambda fields: xn.LinearRecurrence(**fields),
        inputs=lambda: (sequence(2, 5, 3),),
        output_shapes=(2, 5, 3),
        param_shapes=_linear_recurrence(1, 3),
        repeatable=True,
        shapes={},
        initializers=LINEAR_RECURRENCE_NAMES,
    ),
    Entry(
        name="LinearRecurrence: n_blocks, reverse, return_state",
        make=lambda fields: xn.LinearRecurrence(2, reverse=True, return_state=True, **fields),
        inputs=lambda: (sequence(2, 5, 4),),
        output_shapes=((2, 5, 4), (2, 4)),
        param_shapes=_linear_recurrence(2, 4),
        initializers=LINEAR_RECURRENCE_NAMES,
    ),
]
