"""Layers for sequence models: linen modules, to be used alone or as steps of a pipeline.

>>> import jax, jax.numpy as jnp
>>> from flax import linen as nn
>>> from flax_extra import combinator as cb, layer as xn
>>> block = cb.serial(
...     cb.residual(nn.LayerNorm(), cb.fn(xn.SelfAttention(n_heads=4), mask=None)),
...     cb.residual(nn.LayerNorm(), xn.FeedForward(widening_factor=4)),
... )
>>> encoder = nn.Embed(256, 8) >> cb.repeat(block, 6) >> nn.LayerNorm()
>>> encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 5), int))[0].shape
(2, 5, 8)
"""

from flax_extra.layer import io
from flax_extra.layer._attend import attend, cross_attention_mask
from flax_extra.layer._attention import Attention, KVQAttention, QKVAttention, SelfAttention
from flax_extra.layer._causal_conv import CausalConv
from flax_extra.layer._decoding import Decoding, EmbedDecoding
from flax_extra.layer._encoding import Encoding
from flax_extra.layer._feed_forward import FeedForward
from flax_extra.layer._gru import GRU
from flax_extra.layer._interpolation import interpolate_positions
from flax_extra.layer._learned import Learned
from flax_extra.layer._linear_recurrence import LinearRecurrence
from flax_extra.layer._lstm import LSTM, LSTMCell
from flax_extra.layer._multimodal import (
    MultimodalDecoding,
    MultimodalEncoding,
    MultimodalPositionalEncoding,
)
from flax_extra.layer._position_bias import LinearPositionBias, RelativePositionBias
from flax_extra.layer._positional import (
    FourierPositionEncoding,
    TrainablePositionalEncoding,
    TrainablePositionalMasking,
    TrainablePositionalPadding,
)
from flax_extra.layer._recurrent import Recurrent
from flax_extra.layer._ring import ring_attend
from flax_extra.layer._rotary import LinearScaling, Llama3Scaling, RotaryEncoding
from flax_extra.layer._rules import layer_rules

__all__ = [
    # attention
    "attend",
    "cross_attention_mask",
    "Attention",
    "QKVAttention",
    "KVQAttention",
    "SelfAttention",
    # feed-forward
    "FeedForward",
    # convolutional
    "CausalConv",
    # recurrent
    "LSTM",
    "LSTMCell",
    "GRU",
    "Recurrent",
    "LinearRecurrence",
    # positional
    "RotaryEncoding",
    "LinearScaling",
    "Llama3Scaling",
    "RelativePositionBias",
    "LinearPositionBias",
    "TrainablePositionalEncoding",
    "FourierPositionEncoding",
    "interpolate_positions",
    "TrainablePositionalPadding",
    "TrainablePositionalMasking",
    "Learned",
    # encoding
    "Encoding",
    "MultimodalEncoding",
    "MultimodalPositionalEncoding",
    # decoding
    "Decoding",
    "EmbedDecoding",
    "MultimodalDecoding",
    # encoding and decoding, for one modality or several
    "io",
    # more than one device
    "layer_rules",
    "ring_attend",
]
