r"""Decodes a model's outputs: scores of embeddings, and postprocessing.

Source: Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs"
(2021), section 3.2 and appendix A; for tied embeddings Press and Wolf, "Using the Output Embedding
to Improve Language Models" (2017).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Float, Integer, Shaped

from flax_extra.layer import _errors
from flax_extra.layer._constructor import (
    Constructor,
    check_constructor,
    make_identity,
    select_keywords,
)
from flax_extra.layer._sharding import broadcast_like


class EmbedDecoding(nn.Module):
    r"""Computes a score for each embedding at each position: its product with the output.

    .. math:: y \in \mathbb{R}^{m \times T \times d} \rightarrow
        o \in \mathbb{R}^{m \times T \times n}, \quad o = y e^\top + b, \quad
        e \in \mathbb{R}^{n \times d}, \quad b \in \mathbb{R}^{n}

    The embedding is shared, not copied: it stays a parameter of the layer that it comes from, and
    gets gradients from both of its uses. The bias is the only parameter of this layer.

    Args:
        embedding: the vectors, ``[n_embeddings, features]``, such as those of ``nn.Embed``.
        dtype: of the computation; the dtype to which outputs and parameters promote by default.
        param_dtype: of the bias.
        bias_init: initializer of the bias.
        use_bias: whether there is a bias.

    Raises:
        ValueError: If the embedding is not an array.

    Shapes:
        ``xn.EmbedDecoding(jnp.zeros((256, 64)))``: ``f32[b, t, 64] -> f32[b, t, 256]``

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from flax_extra.layer import EmbedDecoding
        >>> class LanguageModel(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, tokens):
        ...         embed = nn.Embed(100, 8, name="embed")
        ...         return EmbedDecoding(embed.embedding)(embed(tokens))
        >>> tokens = jax.numpy.zeros((2, 5), int)
        >>> logits, variables = LanguageModel().init_with_output(jax.random.key(0), tokens)
        >>> logits.shape, jax.tree.map(jax.numpy.shape, variables["params"])
        ((2, 5, 100), {'EmbedDecoding_0': {'bias': (100,)}, 'embed': {'embedding': (100, 8)}})
    """

    embedding: Float[Array, "n_embeddings features"]
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    bias_init: Initializer = nn.initializers.zeros
    use_bias: bool = True

    def __post_init__(self) -> None:
        if not hasattr(self.embedding, "shape"):
            raise _errors.no_embedding(type(self.embedding).__name__)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, outputs: Float[Array, "batch *time features"]
    ) -> Float[Array, "batch *time n_embeddings"]:
        """Computes a score for each embedding at each position.

        Args:
            outputs: the model's outputs, ``[batch, ..., features]``.

        Returns:
            The scores, ``[batch, ..., n_embeddings]``.

        Raises:
            ValueError: If the embedding is not of shape ``[n_embeddings, features]``.
        """
        shape, features = self.embedding.shape, outputs.shape[-1]
        if len(shape) != 2 or shape[1] != features:
            raise _errors.wrong_embedding(shape, features)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[:1], self.param_dtype)
        outputs, embedding, bias = promote_dtype(outputs, self.embedding, bias, dtype=self.dtype)
        scores: Array = outputs @ embedding.T
        if bias is None:
            return scores
        return scores + broadcast_like(bias, scores.shape, scores, n_axes=scores.ndim - 1)


class Decoding(nn.Module):
    r"""Decodes a model's outputs position by position, then postprocesses them to their own shape.

    .. math:: y \in \mathbb{R}^{m \times T \times d} \rightarrow
        o \in \mathbb{R}^{m \times \dots \times d^{\prime}}, \quad
        o = \mathrm{postprocess}(\mathrm{decode}(y))

    The parameters are those of its sub-layers ``embedding_decoder`` and ``postprocessor``. A
    sub-layer that is made with a name keeps it.

    Args:
        embedding_decoding: a constructor of a module or function that decodes each position, such
            as :class:`~flax_extra.layer.EmbedDecoding` or ``nn.Dense``.
        postprocessing: a constructor of a module or function that is applied to the decoded
            positions.

    Raises:
        ValueError: If an argument that should be a constructor is not, for instance a module.

    Shapes:
        ``xn.Decoding(partial(nn.Dense, 10))``: ``f32[b, t, 64] -> f32[b, t, 10]``

    Example:
        >>> import functools, jax
        >>> from flax import linen as nn
        >>> from flax_extra.layer import Decoding
        >>> decoding = Decoding(
        ...     embedding_decoding=functools.partial(nn.Dense, 3),
        ...     postprocessing=lambda: lambda pixels: pixels.reshape(-1, 4, 4, 3),
        ... )
        >>> outputs = jax.numpy.ones((2, 16, 8))
        >>> decoded, variables = decoding.init_with_output(jax.random.key(0), outputs)
        >>> decoded.shape, jax.tree.map(jax.numpy.shape, variables)
        ((2, 4, 4, 3), {'params': {'embedding_decoder': {'bias': (3,), 'kernel': (8, 3)}}})
    """

    embedding_decoding: Constructor = make_identity
    postprocessing: Constructor = make_identity

    def __post_init__(self) -> None:
        check_constructor(type(self).__name__, "embedding_decoding", self.embedding_decoding)
        check_constructor(type(self).__name__, "postprocessing", self.postprocessing)
        super().__post_init__()

    def setup(self) -> None:
        self.embedding_decoder = self.embedding_decoding()
        self.postprocessor = self.postprocessing()

    def __call__(
        self,
        outputs: Float[Array, "batch time features"],
        *,
        lengths: Integer[Array, " batch"] | None = None,
        decode: bool = False,
    ) -> Shaped[Array, "batch ..."]:
        """Decodes the outputs.

        Args:
            outputs: the model's outputs, ``[batch, time, features]``.
            lengths: how many steps of each sequence are valid, integers ``[batch]``: for parts that
                take it.
            decode: whether the outputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.

        Returns:
            The decoded and postprocessed outputs, ``[batch, ...]``.
        """
        decoded: Array = outputs
        for part in (self.embedding_decoder, self.postprocessor):
            decoded = part(decoded, **select_keywords(part, lengths=lengths, decode=decode))
        return decoded
