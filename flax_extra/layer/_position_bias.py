"""Biases of attention by position: what is added to the logits of a query and a key."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Float, Int

from flax_extra.layer import _errors
from flax_extra.layer._initializers import draw_in_float32
from flax_extra.layer._sharding import take_rows


class RelativePositionBias(nn.Module):
    r"""Learns a bias for each head and range of distances from query to key.

    .. math:: b_{h,i,j} = w_{h,\, bucket(j - i)}

    Half of the buckets hold one distance each; the ranges of the others grow exponentially up to
    ``max_distance``, and the last one holds all distances beyond. :class:`Attention` makes one from
    its field ``position_bias``.

    Args:
        n_heads: number of attention heads.
        n_buckets: number of ranges of distances, for keys before and after the query together.
        max_distance: the distance from which on all keys share a bucket.
        bidirectional: whether keys after the query have buckets of their own, as in an encoder.
            Otherwise they share the bucket of distance 0, and are meant to be hidden.
        bias_init: initializer of the parameter ``bias``, ``[n_buckets, n_heads]``.
        dtype: of the result; that of the parameter by default.
        param_dtype: of the parameter.

    Raises:
        ValueError: If ``n_heads`` is below 1, ``n_buckets`` is below 2, or for ``bidirectional`` 4,
            or ``max_distance`` does not lie beyond the buckets of one distance each.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer" (T5, 2020), section 2.1. The buckets are those of T5's code.

    Shapes:
        ``xn.RelativePositionBias(4)``: ``i32[1, q], i32[1, k] -> f32[1, 4, q, k]``

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> bias = functools.partial(xn.RelativePositionBias, 2, n_buckets=8, bidirectional=False)
        >>> attention = xn.SelfAttention(n_heads=2, causal=True, position_bias=bias)
        >>> variables = attention.init(jax.random.key(0), jnp.ones((1, 5, 4)), None)
        >>> variables["params"]["position_bias"]["bias"].shape
        (8, 2)
    """

    n_heads: int
    n_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    bias_init: Initializer = draw_in_float32(nn.initializers.normal(1.0))
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.n_heads < 1:
            raise _errors.too_small(name, "n_heads", 1, self.n_heads)
        least = 4 if self.bidirectional else 2
        if self.n_buckets < least:
            raise _errors.too_small(name, "n_buckets", least, self.n_buckets)
        if self.max_distance <= self._count_exact():
            raise _errors.too_small(
                name, "max_distance", self._count_exact() + 1, self.max_distance
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        query_positions: Int[Array, "#batch time_q"],
        key_positions: Int[Array, "#batch time_kv"],
    ) -> Float[Array, "#batch n_heads time_q time_kv"]:
        """Looks up the bias of each head, query and key.

        Args:
            query_positions: position of each query, ``[batch, time_q]`` or ``[1, time_q]``.
            key_positions: position of each key, ``[batch, time_kv]`` or ``[1, time_kv]``.

        Returns:
            What to add to the logits, ``[batch or 1, n_heads, time_q, time_kv]``.
        """
        table = self.param("bias", self.bias_init, (self.n_buckets, self.n_heads), self.param_dtype)
        distances = key_positions[:, None, :] - query_positions[:, :, None]
        bias = take_rows(table, self._find_buckets(distances))
        moved: Array = jnp.moveaxis(bias, -1, 1)
        return moved if self.dtype is None else moved.astype(self.dtype)

    @nn.nowrap
    def _count_exact(self) -> int:
        """Counts the buckets of one distance each, on one side of the query."""
        return (self.n_buckets // 2 if self.bidirectional else self.n_buckets) // 2

    @nn.nowrap
    def _find_buckets(self, distances: Array) -> Array:
        n_exact = self._count_exact()
        n_side = self.n_buckets // 2 if self.bidirectional else self.n_buckets
        if self.bidirectional:
            offset = jnp.where(distances > 0, n_side, 0)
            distances = jnp.abs(distances)
        else:
            offset = jnp.zeros_like(distances)
            distances = jnp.maximum(-distances, 0)
        ratio = jnp.maximum(distances, n_exact).astype(jnp.float32) / n_exact
        growth = jnp.log(ratio) / math.log(self.max_distance / n_exact) * (n_side - n_exact)
        far = jnp.minimum(n_exact + growth.astype(jnp.int32), n_side - 1)
        return offset + jnp.where(distances < n_exact, distances, far)


class LinearPositionBias(nn.Module):
    r"""Lowers the logits of a key in proportion to its distance from the query: ALiBi.

    .. math:: b_{h,i,j} = -m_h \, |i - j|

    with a fixed slope :math:`m_h` for each head, a geometric series from :math:`2^{-8/n}` to
    :math:`2^{-8}` for n heads, if n is a power of two. It has no parameters.

    Args:
        n_heads: number of attention heads.
        dtype: of the result.

    Raises:
        ValueError: If ``n_heads`` is below 1.

    Source: Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length
    Extrapolation" (2022), section 3; slopes for other numbers of heads as in its code.

    Shapes:
        ``xn.LinearPositionBias(4)``: ``i32[1, q], i32[1, k] -> f32[1, 4, q, k]``

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> positions = jnp.arange(3)[None]
        >>> xn.LinearPositionBias(n_heads=8).apply({}, positions, positions)[0, 0].tolist()
        [[0.0, -0.5, -1.0], [-0.5, 0.0, -0.5], [-1.0, -0.5, 0.0]]
    """

    n_heads: int
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if self.n_heads < 1:
            raise _errors.too_small(type(self).__name__, "n_heads", 1, self.n_heads)
        super().__post_init__()

    def __call__(
        self,
        query_positions: Int[Array, "#batch time_q"],
        key_positions: Int[Array, "#batch time_kv"],
    ) -> Float[Array, "#batch n_heads time_q time_kv"]:
        """Computes the bias of each head, query and key.

        Args:
            query_positions: position of each query, ``[batch, time_q]`` or ``[1, time_q]``.
            key_positions: position of each key, ``[batch, time_kv]`` or ``[1, time_kv]``.

        Returns:
            What to add to the logits, ``[batch or 1, n_heads, time_q, time_kv]``.
        """
        slopes = jnp.asarray(_list_slopes(self.n_heads), self.dtype)[None, :, None, None]
        distances = -jnp.abs(key_positions[:, None, :] - query_positions[:, :, None])
        return slopes * distances[:, None].astype(self.dtype)


def _list_slopes(n_heads: int) -> np.ndarray:
    n_first = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8 / n_first * np.arange(1, n_first + 1))
    # The other heads take every second slope of twice as many.
    between = 2.0 ** (-4 / n_first * np.arange(1, 2 * n_first, 2))
    return np.concatenate([slopes, between[: n_heads - n_first]])
