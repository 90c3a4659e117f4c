"""Positions of a subset of a sequence: a list, a numpy array, or an array that jax traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32, Integer, Shaped

from flax_extra.layer import _errors

OutputPositions: TypeAlias = (
    Sequence[int] | Integer[Array, " time"] | Integer[np.ndarray[Any, Any], " time"]
)
"""Integers from 0 on, on one axis; of a grid, row-major (the last axis runs fastest)."""


def as_indices(layer: str, positions: OutputPositions, seqlen: int) -> Int32[Array, " time"]:
    """Output positions as an array for :func:`rows`, in range as far as can be known.

    A traced position that is out of range becomes ``seqlen``, also where it is negative, which
    numpy and jax would count from the end.
    """
    known = None if _is_traced(positions) else np.asarray(positions)
    given = jnp.asarray(positions) if known is None else known
    if given.ndim != 1 or not (given.size == 0 or jnp.issubdtype(given.dtype, jnp.integer)):
        raise _errors.wrong_positions(layer, given.dtype, given.shape)
    if known is None:
        return jnp.where((given >= 0) & (given < seqlen), given, seqlen).astype(jnp.int32)
    for position in known[(known < 0) | (known >= seqlen)][:1]:
        raise _errors.position_out_of_range(layer, position, seqlen)
    return jnp.asarray(known, jnp.int32)


def rows(
    table: Shaped[Array, "*axes"], indices: Int32[Array, " time"], axis: int
) -> Shaped[Array, "*axes"]:
    """The rows at the indices along an axis; what is out of range is NaN, as for ``jnp.take``."""
    return jnp.take(table, indices, axis=axis, mode="fill")


def is_traced(x: object) -> bool:
    """Whether the value of a number is known only when the program runs."""
    return isinstance(x, jax.core.Tracer)


def _is_traced(positions: OutputPositions) -> bool:
    return any(map(is_traced, jax.tree.leaves(positions)))
