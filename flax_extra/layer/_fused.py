"""Attention by the kernels of cuDNN, through JAX, for what they can compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from flax_extra.layer._logits import Inputs, Settings


def is_for_cudnn(inputs: Inputs, settings: Settings) -> bool:
    """Says whether cuDNN computes attention: in half precision, with heads of its sizes.

    From a mask it would make a bias as large as the logits. It aligns positions at the first key,
    so that there have to be as many queries as keys.
    """
    query, key, value = inputs[:3]
    d_qk, causal = query.shape[-1], settings.causal
    return (
        jax.default_backend() == "gpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (jnp.float16, jnp.bfloat16)
        and d_qk == value.shape[-1]
        and d_qk % 8 == 0
        and d_qk <= 128
        and inputs.bias is inputs.mask is inputs.rngkey is None
        and settings.precision is None
        and settings.logit_cap is None
        and (causal is None or (causal.is_aligned and query.shape[1] == key.shape[1]))
    )


def attend_by_cudnn(query: Array, key: Array, value: Array, *, settings: Settings) -> Array:
    """Attends: ``[batch, time_q, heads, d_v]``."""
    # The same call as for the cotangents, so that XLA computes the two once in one program.
    vectors: Array = jax.vjp(_bind(settings), query, key, value)[0]
    return vectors


def pull_back_by_cudnn(
    query: Array, key: Array, value: Array, grad_vectors: Array, *, settings: Settings
) -> dict[str, Array]:
    """Returns the cotangents of query, key and value by their names."""
    _, pull_back = jax.vjp(_bind(settings), query, key, value)
    return dict(zip(("query", "key", "value"), pull_back(grad_vectors), strict=True))


def _bind(settings: Settings) -> Callable[[Array, Array, Array], Array]:
    window = None if settings.causal is None else settings.causal.window
    return functools.partial(
        jax.nn.dot_product_attention,
        scale=settings.scale,
        is_causal=settings.causal is not None,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
