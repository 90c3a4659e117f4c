"""Learned vectors as an item of the stack: latents, class tokens, prompts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Float, PyTree, Shaped

from flax_extra.layer import _errors
from flax_extra.layer._initializers import TRUNCATED_NORMAL
from flax_extra.layer._sharding import broadcast_like


class Learned(nn.Module):
    r"""Learns vectors, and gives the same ones to each example of a batch.

    .. math:: x \in \mathbb{R}^{m \times \dots} \rightarrow
        h \in \mathbb{R}^{m \times n \times d}, \quad h_{b,i} = w_i, \quad
        w \in \mathbb{R}^{n \times d}

    Only the size of the batch is taken from the inputs, not their values. In a pipeline,
    ``cb.branch(xn.Learned(16, 64), cb.identity())`` puts 16 vectors on top of the inputs.

    Args:
        n_vectors: the number of vectors, n.
        dimension: the features of each vector, d.
        kernel_init: initializer of the vectors; by default a normal distribution of sigma 0.02,
            cut at two sigma.
        dtype: of the result; the dtype of the parameter by default.
        param_dtype: of the parameter.

    Raises:
        ValueError: If ``n_vectors`` or ``dimension`` is below 1.

    Source: Jaegle et al., "Perceiver: General Perception with Iterative Attention" (2021), section
    3.2, for latents; Devlin et al., "BERT" (2019), section 3, for a class token.

    Shapes:
        ``xn.Learned(16, 64)``: ``f32[b, t, 32] -> f32[b, 16, 64]``

    Example:
        A Perceiver's latents read the inputs:

        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> read = cb.fn(xn.KVQAttention(n_heads=2), mask=None)
        >>> encoder = cb.serial(cb.branch(xn.Learned(3, 8), cb.identity()), read)
        >>> latents, variables = encoder.init_with_output(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> latents.shape, jax.tree.map(jnp.shape, variables["params"]["Learned_0"])
        ((2, 3, 8), {'vectors': (3, 8)})

        A class token is put before a sequence:

        >>> embed = cb.branch(xn.Learned(1, 4), cb.identity()) >> cb.concatenate(axis=1)
        >>> embed.init_with_output(jax.random.key(0), jnp.ones((2, 5, 4)))[0].shape
        (2, 6, 4)
    """

    n_vectors: int
    dimension: int
    kernel_init: Initializer = TRUNCATED_NORMAL
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        for name in ("n_vectors", "dimension"):
            if getattr(self, name) < 1:
                raise _errors.too_small(type(self).__name__, name, 1, getattr(self, name))
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: PyTree[Shaped[Array, "batch ..."]]
    ) -> Float[Array, "batch n_vectors dimension"]:
        """Gives the vectors to each example of the inputs' batch.

        Args:
            inputs: an array, ``[batch, ...]``, or a pytree of arrays with the same batch, such as a
                list with one array for each modality.

        Returns:
            The same vectors for each example, ``[batch, n_vectors, dimension]``. On a mesh they are
            sharded along the batch as the first of these arrays is.

        Raises:
            ValueError: If the inputs hold no array with a batch axis, or different batch sizes.
        """
        arrays = jax.tree.leaves(inputs)
        shapes = [jnp.shape(array) for array in arrays]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise _errors.no_common_batch(type(self).__name__, shapes)
        shape = (self.n_vectors, self.dimension)
        vectors = self.param("vectors", self.kernel_init, shape, self.param_dtype)
        vectors = vectors.astype(self.dtype or vectors.dtype)
        return broadcast_like(vectors, (*shapes[0][:1], *shape), arrays[0], n_axes=1)
