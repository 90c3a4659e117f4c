r"""Attention as a function: softmax(q k^T / sqrt(d)) v, masked, in the form that its sizes ask for.

Small problems are computed as the formula is written. Of large ones the logits would not fit in a
processor's cache, or in memory at all: they are walked in chunks of keys (:mod:`._chunked`), or
handed to cuDNN where it can compute them.

Source of the formula: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike
from jax import Array, lax
from jaxtyping import Bool, Float, Shaped

from flax_extra.layer import _chunked, _errors

Mask: TypeAlias = (
    Shaped[Array, "#batch #time_q #time_kv"] | Shaped[Array, "#batch #heads #time_q #time_kv"]
)
"""Booleans or integers; what is not zero is attended to. An axis of size 1 is broadcast."""


def attend(
    query: Float[Array, "batch time_q heads d_qk"],
    key: Float[Array, "batch time_kv heads d_qk"],
    value: Float[Array, "batch time_kv heads d_v"],
    mask: Mask | None = None,
    dropout_rngkey: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    precision: PrecisionLike = None,
    chunk_size: int | None = None,
) -> Float[Array, "batch time_q heads*d_v"]:
    r"""Computes, for each position of the query, the values of all unmasked keys, weighted.

    .. math:: \operatorname{softmax}(q k^\top / \sqrt{d_{qk}})\, v

    for each head, the heads then side by side. A query whose keys are all masked gets exactly
    zeros, and gives zero gradients. The softmax is computed in float32 or better.

    Where there are many keys they are taken in chunks, so that memory grows with queries plus keys,
    not with their product, forwards and backwards. Derivatives are then taken in reverse
    (``jax.grad``, ``jax.vjp``), of any order; for ``jax.jvp`` take all keys in one chunk.

    Under ``jax.checkpoint`` (``nn.remat``, ``cb.remat``, ``cb.repeat(remat=...)``) what was found
    goes by the name ``attention``. A policy that keeps it, such as
    ``jax.checkpoint_policies.save_only_these_names("attention")``, spares the backward pass most of
    the work of finding it again.

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
        chunk_size: how many keys to take at a time; with ``time_kv`` or more, all of them. By
            default it is chosen from the sizes. Which weights are dropped depends on it.

    Returns:
        Attention vectors, ``[batch, time_q, heads * d_v]``, in the dtype of ``value``.

    Raises:
        ValueError: where the shapes do not agree, the mask is neither boolean nor integer or does
            not broadcast, the rate is not in [0, 1), dropout has no key, or
            ``chunk_size`` is below 1.

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
    check_rate("attend", dropout_rate)
    check_chunk_size("attend", chunk_size)
    mask = _with_heads(mask, shape)
    if dropout_rate == 0 or deterministic:
        dropout_rate, dropout_rngkey = 0.0, None
    elif dropout_rngkey is None:
        raise _errors.no_dropout_key(dropout_rate)
    inputs = _chunked.Inputs(query, key, value, mask, dropout_rngkey)
    chunk_size = _chunk_size(shape, chunk_size)
    if chunk_size is None:
        vectors = _attend_at_once(inputs, dropout_rate, precision)
    else:
        vectors = _attend_to_many(inputs, _chunked.Settings(chunk_size, dropout_rate, precision))
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


FEW_LOGITS = 2**20
"""With no more logits of one example, keys are taken all at once where nobody says otherwise.

And so they are with no more than twice these of all examples together.
"""


def _chunk_size(logits_shape: tuple[int, int, int, int], asked: int | None) -> int | None:
    """How many keys to take at a time, or None for all of them.

    A length that is not a number yet, in a shape signature, is taken as a whole.
    """
    if not all(isinstance(size, int) for size in logits_shape):
        return None
    batch, heads, time_q, time_kv = logits_shape
    of_one = heads * time_q * time_kv
    if asked is None:
        if of_one <= FEW_LOGITS or batch * of_one <= 2 * FEW_LOGITS:
            return None
        return min(time_kv, _chunked.best_chunk_size(heads, time_q))
    return asked if asked < time_kv and batch * of_one > 0 else None


def _attend_at_once(
    inputs: _chunked.Inputs, dropout_rate: float, precision: PrecisionLike
) -> Array:
    """The formula, with the sum of the weights divided out last, where there is least to divide.

    Where all of a query's keys are masked, that sum is zero: so are the vectors then, and all
    gradients.
    """
    # Heads lie first, as in the products.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in inputs[:3])
    query, scale = _chunked.scaled(query)
    logits = _chunked.product("bhqd,bhkd->bhqk", query, key, precision)
    weights = _weights(_chunked.times(logits, scale), inputs.mask)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if inputs.rngkey is not None:
        kept = jax.random.bernoulli(inputs.rngkey, 1 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    vectors = _chunked.product("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, precision)
    return jnp.swapaxes(_shared_out(vectors, total, value.dtype), 1, 2)


# By hand, for the backward pass needs the weights alone: they are zero wherever the mask is, so
# that no gradient is NaN and no mask is kept at the size of the logits.
@jax.custom_jvp
def _weights(logits: Array, mask: Array | None) -> Array:
    """Exponentials of logits, relative to the greatest of each query."""
    logits = _chunked.where_seen(mask, logits)
    # Finite, so that what is masked, at -inf, is always below it, and its weight zero.
    least = np.finfo(logits.dtype).min
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True, initial=least))


@_weights.defjvp
def _weights_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    # That the greatest changes, too, does not matter: it is divided out.
    weights = _weights(*primals)
    return weights, weights * tangents[0]


# By hand, for the backward pass needs what was found, not the products that led to it: where that
# is kept, under ``jax.checkpoint``, they are not computed again.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _shared_out(vectors: Array, total: Array, dtype: Any) -> Array:
    """Vectors over the sum of the weights that they were added up with."""
    return (vectors * _chunked.inverse(total).astype(vectors.dtype)).astype(dtype)


@_shared_out.defjvp
def _shared_out_jvp(
    dtype: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (vectors, total), (of_vectors, of_total) = primals, tangents
    found = _chunked.named(_shared_out(vectors, total, dtype))
    change = of_vectors - found.astype(vectors.dtype) * of_total.astype(vectors.dtype)
    return found, _shared_out(change, total, dtype)


def _attend_to_many(inputs: _chunked.Inputs, settings: _chunked.Settings) -> Array:
    in_chunks = functools.partial(_chunked.attend_in_chunks, settings=settings)
    if not _is_for_cudnn(inputs, settings):
        return in_chunks(inputs)
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    # The program may yet be compiled for another platform than the one it is traced on.
    vectors: Array = lax.platform_dependent(
        inputs, cuda=lambda inputs: fused(*inputs[:3]), default=in_chunks
    )
    return vectors


def _is_for_cudnn(inputs: _chunked.Inputs, settings: _chunked.Settings) -> bool:
    """Whether JAX's fused kernel can compute it: half precision, heads of its sizes, no more.

    Of a mask it would make a bias as large as the logits.
    """
    query, key, value, mask, rngkey = inputs
    d_qk = query.shape[-1]
    return (
        jax.default_backend() == "gpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (jnp.float16, jnp.bfloat16)
        and mask is None
        and rngkey is None
        and settings.precision is None
        and d_qk == value.shape[-1]
        and d_qk % 8 == 0
        and d_qk <= 128
    )


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


def check_rate(layer: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise _errors.wrong_rate(layer, rate)


def check_chunk_size(layer: str, chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise _errors.too_small(layer, "chunk_size", 1, chunk_size)
