"""Scores of tokens by the embedding that they came in by, as a step of a pipeline.

>>> from flax_extra import combinator as cb
>>> embed = nn.Embed(256, 8, name="embed")
>>> model = cb.serial(embed, nn.RMSNorm(), TiedScores(embed, name="scores"))
>>> print(cb.shape_signature(model, "i32[b, t]"))
i32[b, t] -> f32[b, t, 256]
"""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from flax_extra import layer as xn


class TiedScores(nn.Module):
    """Scores each token of an embedding, which stays the parameter of its own layer.

    Args:
        embed: the embedding, a step of the same pipeline.
        use_bias: whether each token has a bias.
    """

    embed: nn.Embed
    use_bias: bool = True

    @nn.compact
    def __call__(self, outputs: Array) -> Array:
        """``[batch, time, features]`` -> ``[batch, time, n_tokens]``."""
        decoding = xn.EmbedDecoding(self.embed.embedding, use_bias=self.use_bias, name="decoding")
        scores: Array = decoding(outputs)
        return scores
