r"""Attention as a function: softmax(q k^T / sqrt(d)) v, masked, in the form that its sizes ask for.

Small problems are computed as the formula is written. The logits of large ones would not fit into
a CPU's cache, or into memory at all: they are computed in chunks of keys (:mod:`._chunked`), or by
cuDNN where it can (:mod:`._fused`).

Source of the formula: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _chunked, _errors, _fused, _logits
from flax_extra.layer._causal import HIDDEN_POSITION, CausalRule
from flax_extra.layer._logits import Inputs, Settings, put_heads_first
from flax_extra.layer._sharding import match_varying_axes, run_with_auto_axes

Mask: TypeAlias = (
    Shaped[Array, "#batch #time_q #time_kv"] | Shaped[Array, "#batch #heads #time_q #time_kv"]
)
"""Booleans or integers; a query attends where they are not zero. An axis of size 1 is broadcast."""

Bias: TypeAlias = (
    Float[Array, "#batch #time_q #time_kv"] | Float[Array, "#batch #heads #time_q #time_kv"]
)
"""What is added to the logits. An axis of size 1 is broadcast."""

MAX_LOGITS_AT_ONCE = 2**20
"""Number of logits of one example up to which all keys are taken at once, unless asked otherwise.

A batch may have twice as many in all.
"""


def attend(
    query: Float[Array, "batch time_q heads d_qk"],
    key: Float[Array, "batch time_kv kv_heads d_qk"],
    value: Float[Array, "batch time_kv kv_heads d_v"],
    mask: Mask | None = None,
    dropout_rngkey: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    precision: PrecisionLike = None,
    chunk_size: int | None = None,
    causal: bool = False,
    window: int | None = None,
    bias: Bias | None = None,
    logit_cap: float | None = None,
    scale: float | None = None,
    query_positions: Int[Array, "#batch time_q"] | None = None,
    key_positions: Int[Array, "#batch time_kv"] | None = None,
) -> Float[Array, "batch time_q heads*d_v"]:
    r"""Computes, for each position of the query, the values of the keys that it sees, weighted.

    .. math::
        \operatorname{softmax}(s)\, v, \quad
        s = \operatorname{cap}(\text{scale} \cdot q k^\top) + \text{bias}, \quad
        \operatorname{cap}(x) = c \tanh(x / c)

    for each head, with the heads then side by side. The scale is :math:`1 / \sqrt{d_{qk}}`, and
    there is no cap and no bias, unless given. A query sees a key that neither ``mask`` nor
    ``causal`` nor ``window`` hides. A query that sees no key gets exactly zeros, and gives zero
    gradients. The softmax is computed in float32 or better.

    What is hidden may hold anything. NaN or infinity in a key, or in its value, reaches the
    queries that see the key, and leaves the results and the gradients of all other queries as they
    are. It makes the whole vector of a query that sees it non-finite.

    Where there are many keys they are taken in chunks. Memory then grows with queries plus keys,
    not with their product, in derivatives of any order and in every mode; so it does with
    ``causal`` and ``window``. Chunks that these hide from all queries of a tile are left out: a
    causal program does about half of the work, and one with a window does work in proportion to
    the length.

    Where a mesh splits the batch or the heads, each device does its share of the work, without
    communication. (With ``query_positions``, devices agree on which chunks to leave out: an
    all-reduce of one flag for each chunk.) Where a mesh splits the time of the queries, so it is
    if ``causal`` is False, and keys and values are gathered; a causal program gathers the queries,
    too. Split those by ``jax.shard_map``, with the ``query_positions`` of each device.

    Under ``jax.checkpoint`` (``nn.remat``, ``cb.remat``, ``cb.repeat(remat=...)``) the results have
    the name ``attention``. A policy that keeps it, such as
    ``jax.checkpoint_policies.save_only_these_names("attention")``, saves the backward pass from
    computing them again.

    Args:
        query: what each position asks for, ``[batch, time_q, heads, d_qk]``.
        key: what each position answers to, ``[batch, time_kv, kv_heads, d_qk]``. The number of
            heads of the query is a multiple of ``kv_heads``: each key head serves a group of that
            many query heads, one after another, and is never repeated in memory.
        value: what each position answers, ``[batch, time_kv, kv_heads, d_v]``.
        mask: booleans or integers, not zero where a query sees a key. It broadcasts to
            ``[batch, time_q, time_kv]``, or with four axes to ``[batch, heads, time_q, time_kv]``.
        dropout_rngkey: key of the random numbers for dropout.
        dropout_rate: probability that a weight is dropped, each by itself; in [0, 1).
        deterministic: whether to leave dropout out.
        precision: numerical precision of the products; see ``jax.lax.Precision``.
        chunk_size: how many keys to take at a time; with ``time_kv`` or more, all of them. By
            default it is chosen from the sizes. Which weights are dropped depends on it.
        causal: whether a query sees only keys up to its own position. The last query is at the
            position of the last key.
        window: how many positions a query sees, its own included; all by default. It needs
            ``causal``.
        bias: what is added to the logits. It broadcasts as ``mask`` does; an axis of size 1 is
            never expanded, nor is its gradient.
        logit_cap: what the scaled products stay below, by a tanh; no cap by default. The bias is
            added, and the mask applied, after the cap.
        scale: factor of the products; ``1 / sqrt(d_qk)`` by default.
        query_positions: position of each query, ``[batch, time_q]`` or ``[1, time_q]``, to be used
            by ``causal`` and ``window`` instead of its index. A query at a negative position sees
            no key.
        key_positions: position of each key, ``[batch, time_kv]`` or ``[1, time_kv]``; the index of
            the key by default. It needs ``query_positions``. No query sees a key at a negative
            position, such as an empty slot of a ring buffer.

    Returns:
        Attention vectors, ``[batch, time_q, heads * d_v]``, in the dtype of ``value``.

    Raises:
        ValueError: If the shapes do not agree, ``heads`` is no multiple of ``kv_heads``, the mask
            is neither boolean nor integer, the bias is not floating, one of them does not
            broadcast, the rate is not in [0, 1), dropout has no key, ``chunk_size`` or ``window``
            is below 1, ``logit_cap`` is not above 0, ``scale`` is no number, or positions are not
            integers of these shapes, or are given without ``causal``.

    Source: Vaswani et al. (2017), equation 1. Ainslie et al., "GQA" (2023), for groups of heads.
    Beltagy et al., "Longformer" (2020), section 3.1, for the window. Gemma Team, "Gemma 2" (2024),
    section 2, for the cap.

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

        Two queries at the positions of the last two keys:

        >>> xn.attend(query, key, value, causal=True).tolist()
        [[[4.5], [6.0]]]
        >>> xn.attend(query, key, value, causal=True, window=2).tolist()
        [[[4.5], [7.5]]]

        Four heads of queries, and two of keys and values:

        >>> query, key = jnp.zeros((1, 2, 4, 8)), jnp.zeros((1, 3, 2, 8))
        >>> value = jnp.broadcast_to(jnp.array([1.0, 2.0])[:, None], (1, 3, 2, 1))
        >>> xn.attend(query, key, value)[0, 0].tolist()
        [1.0, 1.0, 2.0, 2.0]

        A ring buffer of four slots, of which one is empty: position 4 was written over 0.

        >>> key, value = jnp.zeros((1, 4, 1, 8)), jnp.arange(4.0).reshape(1, 4, 1, 1)
        >>> slots, here = jnp.array([[4, -1, 2, 3]]), jnp.array([[3]])
        >>> query = jnp.zeros((1, 1, 1, 8))
        >>> attended = xn.attend(
        ...     query, key, value, causal=True, query_positions=here, key_positions=slots
        ... )
        >>> attended.tolist()
        [[[2.5]]]
    """
    shape = infer_logits_shape(query, key, value)
    check_rate("attend", dropout_rate)
    check_chunk_size("attend", chunk_size)
    check_window("attend", window, causal)
    check_logit_cap("attend", logit_cap)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    elif not _is_number(scale):
        raise _errors.not_a_number("attend", "scale", _describe(scale))
    if dropout_rate == 0 or deterministic:
        dropout_rate, dropout_rngkey = 0.0, None
    elif dropout_rngkey is None:
        raise _errors.no_dropout_key(dropout_rate)
    inputs = Inputs(
        query,
        key,
        value,
        bias=_broadcast_bias(bias, shape),
        mask=broadcast_mask(mask, shape),
        rngkey=dropout_rngkey,
    )
    is_aligned = query_positions is None and key_positions is None
    if not is_aligned and not causal:
        raise _errors.positions_without_causal()
    if is_aligned:
        inputs = _drop_unseen_keys(inputs, window)
    if causal:
        inputs = _set_positions(inputs, query_positions, key_positions)
    settings = Settings(
        scale=float(scale),
        logit_cap=None if logit_cap is None else float(logit_cap),
        causal=CausalRule(window, is_aligned) if causal else None,
        dropout_rate=float(dropout_rate),
        precision=precision,
    )
    shape = infer_logits_shape(*inputs[:3])
    if chunk_size is None and isinstance(inputs.key, cb.CacheEntry):
        chunk_size = _chunked.KEYS_PER_CHUNK_OF_STATE
    chunk_size = _choose_chunk_size(shape, chunk_size, settings)
    run = functools.partial(_attend, settings=settings, chunk_size=chunk_size)
    return run_with_auto_axes(run, inputs, like=query)


def cross_attention_mask(
    mask_q: Shaped[Array, "batch time_q"], mask_kv: Shaped[Array, "batch time_kv"]
) -> Bool[Array, "batch time_q time_kv"]:
    """Says which query sees which key: valid positions see valid positions.

    Args:
        mask_q: not zero where a position of the query is valid, ``[batch, time_q]``.
        mask_kv: not zero where a position of the key is valid, ``[batch, time_kv]``.

    Returns:
        The outer product of the two, booleans ``[batch, time_q, time_kv]``.

    Raises:
        ValueError: If a mask has other axes, or the batches differ.

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


def _choose_chunk_size(
    logits_shape: tuple[int, int, int, int], asked: int | None, settings: Settings
) -> int | None:
    """Returns how many keys to take at a time, or None for all of them.

    A length that is not a number yet, in a shape signature, is taken as a whole.
    """
    if not _are_numbers(*logits_shape):
        return None
    batch, heads, time_q, time_kv = logits_shape
    per_example = heads * time_q * time_kv
    if asked is None:
        if per_example <= MAX_LOGITS_AT_ONCE or batch * per_example <= 2 * MAX_LOGITS_AT_ONCE:
            return None
        is_causal = settings.causal is not None
        return min(time_kv, _chunked.choose_chunk_size(heads, time_q, is_causal=is_causal))
    return asked if asked < time_kv and batch * per_example > 0 else None


def _attend(inputs: Inputs, settings: Settings, chunk_size: int | None) -> Array:
    """Attends in the form that is chosen: ``[batch, time_q, heads * d_v]``."""
    if chunk_size is None:
        vectors = _attend_at_once(inputs.read_all(), settings)
    else:
        has_cudnn = _fused.is_for_cudnn(inputs, settings)
        settings = dataclasses.replace(settings, has_cudnn=has_cudnn)
        vectors = _chunked.attend_in_chunks(match_varying_axes(inputs), settings, chunk_size)[0]
    return vectors.reshape(*vectors.shape[:2], vectors.shape[2] * vectors.shape[3])


def _attend_at_once(inputs: Inputs, settings: Settings) -> Array:
    """Computes the formula, and divides by the sum of the weights last, where there is least."""
    query, key, value = map(put_heads_first, inputs[:3])
    seen = _logits.find_seen(settings, inputs.get_present())
    multiply = _logits.multiply_keys
    if seen is not None:
        query, key = _logits.mark_queries(query), _logits.mark_keys(key, value)
        value = _logits.keep_finite(value)
        multiply = _logits.multiply_marked_keys
    query, scale = _logits.scale_query(query, settings.scale)
    products = multiply(query, key, settings.precision)
    logits = _logits.shape_logits(products, inputs.bias, scale=scale, logit_cap=settings.logit_cap)
    weights = _exponentiate(logits, seen)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if inputs.rngkey is not None:
        kept = jax.random.bernoulli(inputs.rngkey, 1 - settings.dropout_rate, weights.shape)
        weights = _logits.drop(settings, weights, kept)
    vectors = _logits.weigh_values(weights, value, settings.precision)
    return put_heads_first(_divide(vectors, total, value.dtype))


# A derivative of its own, so that the backward pass needs the weights alone: they are zero wherever
# a key is hidden, so that no gradient is NaN.
@jax.custom_jvp
def _exponentiate(logits: Array, seen: Array | None) -> Array:
    """Computes exponentials of logits, relative to the greatest of each query."""
    logits = _logits.hide(seen, logits)
    # Finite, so that what is hidden, at -inf, is always below it, and its weight zero.
    least = np.finfo(logits.dtype).min
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True, initial=least))
    # In a query that sees a NaN, the weight of what it does not see is zero, too.
    return weights if seen is None else jnp.where(seen, weights, 0)


@_exponentiate.defjvp
def _exponentiate_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    # That the greatest changes, too, does not matter: it is divided out.
    weights, seen = _exponentiate(*primals), primals[1]
    weights_dot = weights * tangents[0]
    return weights, weights_dot if seen is None else _hide_change(seen, weights_dot)


# The backward pass computes this again, so that it keeps a mask as it is, not as large as logits.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _hide_change(seen: Array, weights_dot: Array) -> Array:
    """Sets the change of a weight that is hidden to zero: of a query that sees a NaN it is NaN."""
    return jnp.where(seen, weights_dot, 0)


# A derivative of its own, so that the backward pass needs the result, not the products that led to
# it: where a policy of ``jax.checkpoint`` keeps it, they are not computed again.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _divide(vectors: Array, total: Array, dtype: Any) -> Array:
    """Divides vectors by the sum of the weights that they were added up with."""
    return (vectors * _logits.invert_total(total).astype(vectors.dtype)).astype(dtype)


@_divide.defjvp
def _divide_jvp(
    dtype: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (vectors, total), (vectors_dot, total_dot) = primals, tangents
    result = _chunked.name_result(_divide(vectors, total, dtype))
    change = vectors_dot - result.astype(vectors.dtype) * total_dot.astype(vectors.dtype)
    return result, _divide(change, total, dtype)


def infer_logits_shape(query: Array, key: Array, value: Array) -> tuple[int, int, int, int]:
    shapes = query.shape, key.shape, value.shape
    if any(len(shape) != 4 for shape in shapes):
        raise _errors.mismatched_heads(*shapes)
    (batch, time_q, heads, d_qk), (time_kv, kv_heads) = query.shape, key.shape[1:3]
    if key.shape != (batch, time_kv, kv_heads, d_qk):
        raise _errors.mismatched_heads(*shapes)
    if value.shape[:3] != (batch, time_kv, kv_heads):
        raise _errors.mismatched_heads(*shapes)
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise _errors.indivisible_heads(heads, kv_heads)
    return batch, heads, time_q, time_kv


def broadcast_mask(mask: Array | None, logits_shape: tuple[int, int, int, int]) -> Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    check_mask_dtype(mask.dtype)
    return _add_heads("mask", mask, logits_shape).astype(bool)


def _broadcast_bias(bias: Array | None, logits_shape: tuple[int, int, int, int]) -> Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise _errors.wrong_bias_dtype(bias.dtype)
    return _add_heads("bias", bias, logits_shape)


def _add_heads(name: str, x: Array, logits_shape: tuple[int, int, int, int]) -> Array:
    """Gives an array four axes. Those of size 1 stay so, and cost no memory."""
    shape = (x.shape[0], 1, *x.shape[1:]) if x.ndim == 3 else x.shape
    fits = len(shape) == 4 and all(
        size in (1, full) for size, full in zip(shape, logits_shape, strict=True)
    )
    if not fits:
        raise _errors.wrong_logits_shape(name, x.shape, logits_shape)
    return x.reshape(shape)


def _drop_unseen_keys(inputs: Inputs, window: int | None) -> Inputs:
    """Drops the keys that come before the window of the first query."""
    time_q, time_kv = inputs.query.shape[1], inputs.key.shape[1]
    if window is None or not _are_numbers(time_q, time_kv):
        return inputs
    start = max(0, time_kv - time_q - window + 1)
    if start == 0:
        return inputs

    def drop(x: Array | None) -> Array | None:
        return x if x is None or x.shape[3] == 1 else x[..., start:]

    return inputs._replace(
        key=inputs.key[:, start:],
        value=inputs.value[:, start:],
        bias=drop(inputs.bias),
        mask=drop(inputs.mask),
    )


def _set_positions(
    inputs: Inputs, query_positions: Array | None, key_positions: Array | None
) -> Inputs:
    """Gives queries and keys their positions: those asked for, or else their indices."""
    (batch, time_q), time_kv = inputs.query.shape[:2], inputs.key.shape[1]
    indices = jnp.arange(time_kv, dtype=jnp.int32)[None]
    if query_positions is None:
        if key_positions is not None:
            raise _errors.key_positions_alone()
        offset = jnp.asarray(time_kv - time_q, jnp.int32)
        queries = jnp.arange(time_q, dtype=jnp.int32)[None] + offset
        return inputs._replace(query_positions=queries, key_positions=indices)
    queries = _check_positions("query_positions", query_positions, batch, time_q)
    if key_positions is None:
        return inputs._replace(query_positions=queries, key_positions=indices)
    keys = _check_positions("key_positions", key_positions, batch, time_kv)
    keys = jnp.where(keys < 0, HIDDEN_POSITION, keys)
    return inputs._replace(query_positions=queries, key_positions=keys)


def _check_positions(name: str, positions: Any, batch: int, time: int) -> Array:
    positions = jnp.asarray(positions)
    fits = positions.ndim == 2 and positions.shape[0] in (1, batch) and positions.shape[1] == time
    if not fits or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise _errors.wrong_attend_positions(name, positions.dtype, positions.shape, (batch, time))
    as_int32: Array = positions.astype(jnp.int32)
    return as_int32


def _are_numbers(*sizes: Any) -> bool:
    """Says whether sizes are known; in a shape signature they have no numbers yet."""
    return all(isinstance(size, int) for size in sizes)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.integer | np.floating)


def _describe(x: Any) -> str:
    return "an array" if isinstance(x, jax.Array) else type(x).__name__


def check_mask_dtype(dtype: Any) -> None:
    if not (dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)):
        raise _errors.wrong_mask_dtype(dtype)


def check_rate(layer: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise _errors.wrong_rate(layer, rate)


def check_chunk_size(layer: str, chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise _errors.too_small(layer, "chunk_size", 1, chunk_size)


def check_window(layer: str, window: int | None, causal: bool) -> None:
    if window is None:
        return
    if window < 1:
        raise _errors.too_small(layer, "window", 1, window)
    if not causal:
        raise _errors.window_without_causal(layer, window)


def check_logit_cap(layer: str, logit_cap: float | None) -> None:
    if logit_cap is None:
        return
    if not _is_number(logit_cap):
        raise _errors.not_a_number(layer, "logit_cap", _describe(logit_cap))
    if not logit_cap > 0:
        raise _errors.not_positive(layer, "logit_cap", logit_cap)
