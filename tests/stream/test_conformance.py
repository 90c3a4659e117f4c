"""The streaming law for every layer that takes ``decode``, and the list of those."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from tests.stream.toys import Attention, Conv, Memory, Positions, Sum, make_block

SPEC = "f32[b, t, 4]"
MASK = "bool[b, 1, t]"
MEMORY = "f32[b, s, 4]"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A layer that streams.

    Args:
        layer: makes it.
        specs: its inputs.
        has_gradients: whether to compare gradients, too: for one layer of each kind.
    """

    layer: Callable[[], Any]
    specs: tuple[str, ...] = (SPEC,)
    has_gradients: bool = False


causal = functools.partial(xn.SelfAttention, 2, causal=True)
sequences = functools.partial(xn.LSTM, 4, return_sequences=True)


def encode_text(positional_encoding: Callable[..., Any]) -> xn.Encoding:
    return xn.Encoding(functools.partial(nn.Embed, 5, 4), positional_encoding, cb.add())


def tie(n: int) -> nn.Module:
    """A model whose last layer shares the embedding of the first."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens, *, decode=False, lengths=None):
            embed = nn.Embed(n, 4)
            x = xn.CausalConv(kernel_size=2)(embed(tokens), decode=decode, lengths=lengths)
            decoding = xn.Decoding(functools.partial(xn.EmbedDecoding, embed.embedding))
            return decoding(x, decode=decode, lengths=lengths)

    return Tied()


ENTRIES = {
    "SelfAttention": Entry(lambda: cb.fn(causal(), mask=None), has_gradients=True),
    "SelfAttention: window": Entry(lambda: cb.fn(causal(window=3), mask=None)),
    "SelfAttention: chunks": Entry(lambda: cb.fn(causal(chunk_size=2), mask=None)),
    "SelfAttention: chunks in a window": Entry(
        lambda: cb.fn(causal(chunk_size=2, window=2), mask=None)
    ),
    "SelfAttention: one head of keys": Entry(lambda: cb.fn(causal(n_kv_heads=1), mask=None)),
    "SelfAttention: rotary": Entry(
        lambda: cb.fn(causal(rotary=xn.RotaryEncoding(), qk_norm=nn.RMSNorm), mask=None)
    ),
    "SelfAttention: relative": Entry(
        lambda: cb.fn(
            causal(position_bias=functools.partial(xn.RelativePositionBias, 2)), mask=None
        )
    ),
    "SelfAttention: linear": Entry(
        lambda: cb.fn(causal(position_bias=functools.partial(xn.LinearPositionBias, 2)), mask=None)
    ),
    "SelfAttention: mask": Entry(causal, (SPEC, MASK)),
    "SelfAttention: mask in a window": Entry(lambda: causal(window=2), (SPEC, MASK)),
    "Attention": Entry(
        lambda: cb.fn(xn.Attention(2, causal=True), mask=None), (SPEC, "f32[b, t, 3]")
    ),
    "Attention: memory": Entry(lambda: cb.fn(xn.Attention(2), mask=None), (SPEC, MEMORY)),
    "QKVAttention: memory": Entry(
        lambda: cb.fn(xn.QKVAttention(2, rotary=xn.RotaryEncoding()), mask=None), (SPEC, MEMORY)
    ),
    "KVQAttention: memory": Entry(
        lambda: cb.fn(xn.KVQAttention(2, chunk_size=2), mask=None), (SPEC, MEMORY)
    ),
    "CausalConv": Entry(lambda: xn.CausalConv(kernel_size=3, dilation=2), has_gradients=True),
    "CausalConv: depthwise": Entry(lambda: xn.CausalConv(kernel_size=2, groups=None)),
    "CausalConv: strides": Entry(lambda: xn.CausalConv(3, 3, strides=2), ("f32[b, 2*t, 4]",)),
    "LSTM": Entry(sequences, has_gradients=True),
    "LSTM: state": Entry(lambda: sequences(return_state=True)),
    "GRU": Entry(lambda: xn.GRU(4, return_sequences=True)),
    "Recurrent": Entry(lambda: xn.Recurrent(nn.GRUCell(3), return_sequences=True)),
    "LinearRecurrence": Entry(xn.LinearRecurrence, has_gradients=True),
    "TrainablePositionalEncoding": Entry(
        lambda: encode_text(functools.partial(xn.TrainablePositionalEncoding, 16, 4)),
        ("i32[b, t]",),
    ),
    "FourierPositionEncoding": Entry(
        lambda: xn.Encoding(
            positional_encoding=functools.partial(xn.FourierPositionEncoding, (16,), n_bands=2)
        ),
    ),
    "Encoding": Entry(lambda: xn.Encoding(functools.partial(xn.CausalConv, 3))),
    "Decoding": Entry(lambda: tie(5), ("i32[b, t]",)),
}  # fmt: skip
"""What follows a colon tells entries of one layer apart."""

REFUSED = {"MultimodalEncoding", "MultimodalPositionalEncoding", "MultimodalDecoding"}
"""They take decode, and refuse it: see their own tests."""


def takes_decode(layer: Any) -> bool:
    return inspect.isclass(layer) and "decode" in inspect.signature(layer.__call__).parameters


def test_no_layer_is_missing_from_the_list() -> None:
    public = {name for name in xn.__all__ if takes_decode(getattr(xn, name))}
    assert public == {name.partition(":")[0] for name in ENTRIES} | REFUSED


@pytest.mark.parametrize("name", ENTRIES)
def test_blocks_are_the_whole(name: str) -> None:
    entry = ENTRIES[name]
    n = 3 if ":" in name else 4
    testing.check_streaming(
        entry.layer(), *entry.specs, gradients=entry.has_gradients, max_examples=n
    )


TOYS = {
    "Attention": Attention,
    "Attention: window": lambda: Attention(window=2),
    "Conv": Conv,
    "Sum": Sum,
    "Positions": Positions,
    "every kind": make_block,
}


@pytest.mark.parametrize("name", TOYS)
def test_layers_of_a_user(name: str) -> None:
    testing.check_streaming(TOYS[name](), SPEC, gradients=False, max_examples=4)


def test_a_layer_of_a_user_that_remembers_what_is_given_once() -> None:
    testing.check_streaming(Memory(), SPEC, "f32[b, 4]", gradients=False, max_examples=4)


PIPELINES = {
    "blocks of our layers": (
        lambda: cb.repeat(
            cb.serial(
                cb.residual(nn.LayerNorm(), cb.fn(causal(chunk_size=2), mask=None)),
                cb.residual(xn.CausalConv(kernel_size=2), sequences()),
                cb.residual(xn.FeedForward(1)),
            ),
            2,
            remat=True,
        ),
        (SPEC,),
    ),
    "one set of parameters, a state for each copy": (
        lambda: cb.repeat(cb.residual(cb.fn(causal(window=2), mask=None)), 3, shared=True),
        (SPEC,),
    ),
    "nested": (
        lambda: cb.repeat(cb.serial(cb.repeat(make_block(), 2, shared=True), Conv()), 2),
        (SPEC,),
    ),
    "two sequences": (
        lambda: cb.parallel(cb.repeat(sequences(), 2), xn.CausalConv()) >> cb.add(),
        (SPEC, SPEC),
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name: str) -> None:
    make, specs = PIPELINES[name]
    testing.check_streaming(make(), *specs, gradients=False, max_examples=3)


def test_in_float64() -> None:
    with jax.enable_x64(True):
        layers = cb.serial(
            cb.fn(causal(chunk_size=2, param_dtype=jnp.float64), mask=None),
            xn.CausalConv(kernel_size=2, param_dtype=jnp.float64),
            xn.GRU(4, return_sequences=True, param_dtype=jnp.float64),
            Sum(),
        )
        testing.check_streaming(layers, "f64[b, t, 4]", gradients=False, max_examples=4)
