r"""Attention: each position of one sequence asks, all positions of another answer.

Source of the formulas: Vaswani et al., "Attention Is All You Need" (2017), sections 3.2.1 and
3.2.2. Names differ from the paper's: ``d_qk`` and ``d_v`` count the features of all heads together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Bool, Float, Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _errors

Mask: TypeAlias = (
    Shaped[Array, "#batch #time_q #time_kv"] | Shaped[Array, "#batch #heads #time_q #time_kv"]
)
"""Booleans or integers; what is not zero is attended to. An axis of size 1 is broadcast."""

SelfMask: TypeAlias = (
    Shaped[Array, "#batch #time #time"] | Shaped[Array, "#batch #heads #time #time"]
)
"""A :data:`Mask` from the positions of one sequence to themselves."""

Dimension: TypeAlias = int | Callable[[Array, Array, int | None, int | None], int]
"""A number of features, or a function of (inputs_q, inputs_kv, d_qk, d_v) that gives it.

What is not known yet is None: d_v and d_qk when d_qk is asked for, d_v when d_v is.
"""


def attend(
    query: Float[Array, "batch time_q heads d_qk"],
    key: Float[Array, "batch time_kv heads d_qk"],
    value: Float[Array, "batch time_kv heads d_v"],
    mask: Mask | None = None,
    dropout_rngkey: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    precision: PrecisionLike = None,
) -> Float[Array, "batch time_q heads*d_v"]:
    r"""Computes, for each position of the query, the values of all unmasked keys, weighted.

    .. math:: \operatorname{softmax}(q k^\top / \sqrt{d_{qk}})\, v

    for each head, the heads then side by side. A query whose keys are all masked gets exactly
    zeros, and gives zero gradients. The softmax is computed in float32 or better.

    Args:
        query: what each position asks for, ``[batch, time_q, heads, d_qk]``.
        key: what each position answers to, ``[batch, time_kv, heads, d_qk]``.
        value: what each position answers, ``[batch, time_kv, heads, d_v]``.
        mask: booleans or integers, not zero where a query attends to a key. It broadcasts to
            ``[batch, time_q, time_kv]``, or with four axes to ``[batch, heads, time_q, time_kv]``.
        dropout_rngkey: key of the random numbers for dropout.
        dropout_rate: probability that a weight is dropped, each by itself; in [0, 1).
        deterministic: whether to leave dropout out.
        precision: numerical precision of the products; see ``jax.lax.Precision``.

    Returns:
        Attention vectors, ``[batch, time_q, heads * d_v]``, in the dtype of ``value``.

    Raises:
        ValueError: where the shapes do not agree, the mask is neither boolean nor integer or does
            not broadcast, the rate is not in [0, 1), or dropout has no key.

    Source: Vaswani et al. (2017), equation 1.

    Shapes:
        ``xn.attend``: ``f32[b, q, h, 32], f32[b, k, h, 32], f32[b, k, h, 16] -> f32[b, q,
        16*h]``

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> query, key = jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 3, 1, 4))
        >>> value = jnp.array([3.0, 6.0, 9.0]).reshape(1, 3, 1, 1)
        >>> mask = jnp.array([[[1, 1, 0], [0, 0, 0]]])
        >>> xn.attend(query, key, value, mask).tolist()
        [[[4.5], [0.0]]]
    """
    shape = _logits_shape(query, key, value)
    _check_rate("attend", dropout_rate)
    accumulated = np.promote_types(query.dtype, np.float32)
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, precision=precision, preferred_element_type=accumulated
    )
    weights = _masked_softmax(logits / math.sqrt(query.shape[-1]), _with_heads(mask, shape))
    if dropout_rate > 0 and not deterministic:
        weights = _dropout(weights, dropout_rngkey, dropout_rate)
    vectors = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value, precision=precision)
    return vectors.reshape(*vectors.shape[:2], vectors.shape[2] * vectors.shape[3])


def cross_attention_mask(
    mask_q: Shaped[Array, "batch time_q"], mask_kv: Shaped[Array, "batch time_kv"]
) -> Bool[Array, "batch time_q time_kv"]:
    """Says which query attends to which key: valid positions to valid positions.

    Args:
        mask_q: not zero where a position of the query is valid, ``[batch, time_q]``.
        mask_kv: not zero where a position of the key is valid, ``[batch, time_kv]``.

    Returns:
        The outer product of the two, booleans ``[batch, time_q, time_kv]``.

    Raises:
        ValueError: where a mask has other axes, or the batches differ.

    Shapes:
        ``xn.cross_attention_mask``: ``bool[b, q], bool[b, k] -> bool[b, q, k]``

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> xn.cross_attention_mask(jnp.array([[1, 0]]), jnp.array([[1, 1, 0]])).tolist()
        [[[True, True, False], [False, False, False]]]
    """
    if mask_q.ndim != 2 or mask_kv.ndim != 2 or mask_q.shape[0] != mask_kv.shape[0]:
        raise _errors.wrong_padding_masks(mask_q.shape, mask_kv.shape)
    return mask_q[:, :, None].astype(bool) & mask_kv[:, None, :].astype(bool)


def _logits_shape(query: Array, key: Array, value: Array) -> tuple[int, int, int, int]:
    shapes = query.shape, key.shape, value.shape
    if any(len(shape) != 4 for shape in shapes):
        raise _errors.mismatched_heads(*shapes)
    (batch, time_q, heads, d_qk), time_kv = query.shape, key.shape[1]
    if key.shape != (batch, time_kv, heads, d_qk) or value.shape[:3] != (batch, time_kv, heads):
        raise _errors.mismatched_heads(*shapes)
    return batch, heads, time_q, time_kv


def _with_heads(mask: Array | None, logits_shape: tuple[int, int, int, int]) -> Array | None:
    """The mask as booleans of four axes; those of size 1 stay so, and cost no memory."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise _errors.wrong_mask_dtype(mask.dtype)
    shape = (mask.shape[0], 1, *mask.shape[1:]) if mask.ndim == 3 else mask.shape
    fits = len(shape) == 4 and all(
        size in (1, full) for size, full in zip(shape, logits_shape, strict=True)
    )
    if not fits:
        raise _errors.wrong_mask_shape(mask.shape, logits_shape)
    return mask.reshape(shape).astype(bool)


def _masked_softmax(logits: Array, mask: Array | None) -> Array:
    return nn.softmax(logits) if mask is None else _softmax_where(logits, mask)


# By hand, for the backward pass needs the weights alone: they are zero wherever the mask is, so
# that no gradient is NaN and no mask is kept at the size of the logits.
@jax.custom_jvp
def _softmax_where(logits: Array, mask: Array) -> Array:
    masked = jnp.where(mask, logits, np.finfo(logits.dtype).min)
    # Where all is masked, the softmax is uniform; elsewhere it is zero at the mask already.
    return jnp.where(mask, nn.softmax(masked), 0)


@_softmax_where.defjvp
def _softmax_where_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    weights = _softmax_where(*primals)
    change = weights * tangents[0]
    return weights, change - weights * jnp.sum(change, axis=-1, keepdims=True)


def _dropout(weights: Array, rngkey: Array | None, rate: float) -> Array:
    if rngkey is None:
        raise _errors.no_dropout_key(rate)
    kept = jax.random.bernoulli(rngkey, 1 - rate, weights.shape)
    return jnp.where(kept, weights / (1 - rate), 0)


def _check_rate(layer: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise _errors.wrong_rate(layer, rate)


def _like_shape(*references: Any, index: int) -> int:
    """As many features as an input has."""
    return int(references[index].shape[-1])


def _like_value(*references: Any, index: int) -> int:
    """As many features as another dimension."""
    return int(references[index])


def _resolve(dimension: Dimension, *references: Any) -> int:
    return dimension(*references) if callable(dimension) else dimension


class Attention(nn.Module):
    r"""Learns, for each position of one sequence, what to take from all unmasked ones of another.

    .. math::
        \begin{aligned}
        q &= x_q w_q + b_q, \quad k = x_{kv} w_k + b_k, \quad v = x_{kv} w_v + b_v \\
        y &= \operatorname{attend}(q, k, v, mask)\, w_o + b_o
        \end{aligned}

    with :math:`w_q \in R^{d_{x_q} \times n_{heads} \times d_{qk} / n_{heads}}`,
    :math:`w_k \in R^{d_{x_{kv}} \times n_{heads} \times d_{qk} / n_{heads}}`,
    :math:`w_v \in R^{d_{x_{kv}} \times n_{heads} \times d_v / n_{heads}}` and
    :math:`w_o \in R^{d_v \times d_o}`, in the sublayers ``query``, ``key``, ``value`` and ``out``.

    Args:
        n_heads: number of attention heads.
        d_qk: features of query and key, all heads together; those of ``inputs_q`` by default.
            Like the next two an integer, or a function of (inputs_q, inputs_kv, d_qk, d_v).
        d_v: features of the value, all heads together; ``d_qk`` by default.
        d_output: features of the output; ``d_v`` by default.
        kernel_init: initializer of the weights.
        bias_init: initializer of the biases.
        use_bias: whether there are biases.
        dropout_rate: probability that an attention weight is dropped, in [0, 1). It draws from
            the rng stream ``dropout``.
        deterministic: whether to leave dropout out; a call can say otherwise.
        precision: numerical precision of all products; see ``jax.lax.Precision``.
        dtype: of the computation; that of inputs and parameters by default.
        param_dtype: of the parameters.

    Raises:
        ValueError: where ``d_qk`` or ``d_v`` are no multiple of ``n_heads``, or the rate is not in
            [0, 1).

    Source: Vaswani et al. (2017), section 3.2.2.

    Shapes:
        ``xn.Attention(n_heads=4)``: ``f32[b, q, 64], f32[b, k, 32], bool[b, q, k] -> f32[b, q,
        64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> latents, inputs = jnp.ones((2, 5, 8)), jnp.ones((2, 7, 3))
        >>> attention = xn.Attention(n_heads=2)
        >>> y, variables = attention.init_with_output(jax.random.key(0), latents, inputs, None)
        >>> y.shape, variables["params"]["key"]["kernel"].shape
        ((2, 5, 8), (3, 2, 4))
        >>> print(cb.infer_signature(attention))
        3 -> 1
    """

    n_heads: int = 8
    d_qk: Dimension = functools.partial(_like_shape, index=0)
    d_v: Dimension = functools.partial(_like_value, index=2)
    d_output: Dimension = functools.partial(_like_value, index=3)
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    use_bias: bool = True
    dropout_rate: float = 0.0
    deterministic: bool = True
    precision: PrecisionLike = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if self.n_heads < 1:
            raise _errors.too_small(type(self).__name__, "n_heads", 1, self.n_heads)
        _check_rate(type(self).__name__, self.dropout_rate)
        for name in ("d_qk", "d_v"):
            dimension = getattr(self, name)
            if not callable(dimension):
                self._split(name, dimension)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "batch time_q features_q"],
        inputs_kv: Float[Array, "batch time_kv features_kv"],
        mask: Mask | None,
        *,
        deterministic: bool | None = None,
    ) -> Float[Array, "batch time_q features"]:
        """Attends.

        Args:
            inputs_q: inputs for the query, ``[batch, time_q, features_q]``.
            inputs_kv: inputs for key and value, ``[batch, time_kv, features_kv]``.
            mask: booleans or integers, not zero where a query attends to a key, or None. It
                broadcasts to ``[batch, time_q, time_kv]`` or
                ``[batch, heads, time_q, time_kv]``.
            deterministic: whether to leave dropout out, instead of what the field says.

        Returns:
            Attention vectors, ``[batch, time_q, d_output]``.

        Raises:
            ValueError: where shapes do not agree; see :func:`attend`.
        """
        for name, inputs in (("inputs_q", inputs_q), ("inputs_kv", inputs_kv)):
            if inputs.ndim != 3:
                raise _errors.wrong_rank(
                    type(self).__name__, name, inputs.shape, "[batch, time, features]"
                )
        d_qk = _resolve(self.d_qk, inputs_q, inputs_kv, None, None)
        d_v = _resolve(self.d_v, inputs_q, inputs_kv, d_qk, None)
        d_output = _resolve(self.d_output, inputs_q, inputs_kv, d_qk, d_v)
        if deterministic is None:
            deterministic = self.deterministic
        drops = self.dropout_rate > 0 and not deterministic
        settings: dict[str, Any] = {
            "use_bias": self.use_bias,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
            "precision": self.precision,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        query = nn.DenseGeneral(self._split("d_qk", d_qk), name="query", **settings)
        key = nn.DenseGeneral(self._split("d_qk", d_qk), name="key", **settings)
        value = nn.DenseGeneral(self._split("d_v", d_v), name="value", **settings)
        out = nn.Dense(d_output, name="out", **settings)
        weighted = cb.fn(
            attend,
            n_in=4,
            dropout_rngkey=self.make_rng("dropout") if drops else None,
            dropout_rate=self.dropout_rate,
            deterministic=deterministic,
            precision=self.precision,
        )
        pipeline = (query @ cb.branch(key, value)) >> weighted >> out
        vectors: Array = pipeline(inputs_q, inputs_kv, mask)
        return vectors

    @nn.nowrap
    def _split(self, name: str, dimension: int) -> tuple[int, int]:
        """The features of all heads together, as (heads, features of one)."""
        if dimension < 1:
            raise _errors.too_small(type(self).__name__, name, 1, dimension)
        if dimension % self.n_heads:
            raise _errors.indivisible(type(self).__name__, name, dimension, self.n_heads)
        return self.n_heads, dimension // self.n_heads


QKVAttention = Attention
"""Attention whose output and key have by default as many features as the query's inputs."""


class KVQAttention(Attention):
    """Attention whose key has by default as many features as the inputs of key and value.

    The output has as many as the inputs of the query, so that it can be added to them. All else is
    as in :class:`Attention`.

    Args:
        n_heads: see :class:`Attention` for this field and those not listed here.
        d_qk: features of query and key, all heads together; those of ``inputs_kv`` by default.
        d_output: features of the output; those of ``inputs_q`` by default.

    Raises:
        ValueError: where ``d_qk`` or ``d_v`` are no multiple of ``n_heads``, or the rate is not in
            [0, 1).

    Source: Jaegle et al., "Perceiver IO" (2021), appendix E, whose cross-attention is of this form.

    Shapes:
        ``xn.KVQAttention(n_heads=4)``: ``f32[b, q, 64], f32[b, k, 32], bool[b, q, k] -> f32[b,
        q, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> latents, inputs = jnp.ones((2, 5, 8)), jnp.ones((2, 7, 6))
        >>> attention = xn.KVQAttention(n_heads=2)
        >>> y, variables = attention.init_with_output(jax.random.key(0), latents, inputs, None)
        >>> y.shape, variables["params"]["key"]["kernel"].shape
        ((2, 5, 8), (6, 2, 3))
    """

    d_qk: Dimension = functools.partial(_like_shape, index=1)
    d_output: Dimension = functools.partial(_like_shape, index=0)


class SelfAttention(Attention):
    r"""Learns, for each position of a sequence, what to take from all its unmasked positions.

    .. math:: \operatorname{SelfAttention}(x, mask) = \operatorname{Attention}(x, x, mask)

    There is no norm and no residual in it: pipelines add those.

    Args:
        n_heads: number of attention heads; see :class:`Attention` for the other fields.

    Raises:
        ValueError: where ``d_qk`` or ``d_v`` are no multiple of ``n_heads``, or the rate is not in
            [0, 1).

    Source: Vaswani et al. (2017), section 3.2.3.

    Shapes:
        ``xn.SelfAttention(n_heads=4)``: ``f32[b, t, 64], bool[b, t, t] -> f32[b, t, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb, layer as xn
        >>> attention = cb.fn(xn.SelfAttention(n_heads=2), mask=None)
        >>> tower = cb.repeat(cb.residual(nn.LayerNorm(), attention), 6)
        >>> tower.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
        (2, 5, 8)
    """

    # Its inputs are fewer than those of the class it extends, as the public API has it.
    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        inputs_qkv: Float[Array, "batch time features_in"],
        mask: SelfMask | None,
        *,
        deterministic: bool | None = None,
    ) -> Float[Array, "batch time features"]:
        """Attends.

        Args:
            inputs_qkv: inputs for query, key and value, ``[batch, time, features_in]``.
            mask: booleans or integers, not zero where a query attends to a key, or None. It
                broadcasts to ``[batch, time, time]`` or ``[batch, heads, time, time]``.
            deterministic: whether to leave dropout out, instead of what the field says.

        Returns:
            Attention vectors, ``[batch, time, d_output]``.

        Raises:
            ValueError: where shapes do not agree; see :func:`attend`.
        """
        return super().__call__(inputs_qkv, inputs_qkv, mask, deterministic=deterministic)
