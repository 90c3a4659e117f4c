"""The initializers that layers use by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import Array


def draw_in_float32(initializer: Initializer) -> Initializer:
    """Makes an initializer that draws float16 and bfloat16 parameters in float32 and rounds them.

    Drawn in half precision, a distribution has few distinct values: a uniform draw in bfloat16,
    from which the others are made, has 128. Initializers that factorize a matrix do not support
    half precision at all. Partitioning metadata around the parameter stays as it is.
    """

    def init(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Any:
        is_half = jnp.dtype(dtype).itemsize < 4
        drawn = initializer(key, shape, jnp.float32 if is_half else dtype)
        return jax.tree.map(lambda x: x.astype(dtype), drawn) if is_half else drawn

    return init


def reshape_drawn(initializer: Initializer, shape: tuple[int, ...]) -> Initializer:
    """Makes an initializer that reshapes what another one draws, with or without axis names.

    ``nn.DenseGeneral`` asks for a kernel of two axes and reshapes it. If the initializer names the
    axes of the reshaped kernel, as ``nn.with_logical_partitioning`` does, linen applies the names
    on a mesh before it reshapes, and fails. Reshaped here, the kernel fits its names.
    """

    def init(key: Array, flat_shape: Sequence[int], dtype: Dtype = jnp.float32) -> Any:
        drawn = initializer(key, flat_shape, dtype)
        return jax.tree.map(lambda values: jnp.reshape(values, shape), drawn)

    return init


LECUN_NORMAL = draw_in_float32(nn.initializers.lecun_normal())
"""For kernels: a normal distribution of variance 1 / fan_in, cut at two sigma."""

TRUNCATED_NORMAL = draw_in_float32(nn.initializers.truncated_normal(stddev=0.02))
"""For learned vectors: a normal distribution of sigma 0.02, cut at two sigma.

The cut lowers the standard deviation to 0.0176; this is not corrected for, as in the Perceiver.
"""
