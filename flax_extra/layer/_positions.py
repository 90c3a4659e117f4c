"""Output positions: some of the positions of a sequence, and the rows of a table at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Int32, Integer, Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _errors

OutputPositions: TypeAlias = (
    Sequence[int] | Integer[Array, " time"] | Integer[np.ndarray[Any, Any], " time"]
)
"""Integers from 0 on one axis: a list, a numpy array, or a jax array, which may be traced.

In a grid, positions are counted in row-major order: along the last axis first.
"""


def convert_to_indices(
    layer: str, positions: OutputPositions, seqlen: int
) -> Int32[Array, " time"]:
    """Converts output positions to indices for :func:`take_rows`.

    A position out of range is an error if its value is known. If it is traced it becomes the index
    ``seqlen``, for which :func:`take_rows` gives NaN. This holds for negative ones, too: numpy and
    jax would count them from the end.
    """
    is_known = not any(map(is_traced, jax.tree.leaves(positions)))
    given: Any = np.asarray(positions) if is_known else jnp.asarray(positions)
    if given.ndim != 1 or not (given.size == 0 or jnp.issubdtype(given.dtype, jnp.integer)):
        raise _errors.wrong_positions(layer, given.dtype, given.shape)
    is_inside = (given >= 0) & (given < seqlen)
    if not is_known:
        return jnp.where(is_inside, given, seqlen).astype(jnp.int32)
    if not is_inside.all():
        raise _errors.position_out_of_range(layer, given[~is_inside][0], seqlen)
    return jnp.asarray(given, jnp.int32)


def take_rows(
    table: Shaped[Array, "*axes"], indices: Int32[Array, "*time"], axis: int
) -> Shaped[Array, "*axes"]:
    """Takes the rows at some indices along an axis; a row at an index out of range is NaN."""
    return jnp.take(table, indices, axis=axis, mode="fill")


def take_first_rows(
    layer: str, table: Shaped[Array, "seqlen features"], length: int | None
) -> Shaped[Array, "length features"]:
    """Takes the first ``length`` rows, or all of them for None.

    Whether a symbolic length is within the table may be undecidable: then JAX's error says so.
    """
    seqlen = table.shape[0]
    if length is None:
        return table
    if is_traced(length):
        raise _errors.traced_number(layer, "length")
    if length < 0:
        raise _errors.too_small(layer, "length", 0, length)
    if length > seqlen:
        raise _errors.too_long(layer, length, seqlen)
    return table if length == seqlen else jax.lax.slice_in_dim(table, 0, length)


def locate_block(
    layer: nn.Module, batch_size: int, length: int | None, lengths: Any, seqlen: int
) -> Int32[Array, "batch time"] | None:
    """Returns the positions of a block of a stream; None while initializing.

    Raises:
        ValueError: If a row is known to run over ``seqlen``, or the length of the block is missing.
    """
    name = type(layer).__name__
    if length is None:
        raise _errors.no_block_length(name)
    block: Any = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)  # type: ignore[no-untyped-call]
    cache = cb.Cache(layer, block, decode=True, lengths=lengths)
    positions = cache.positions
    if not cache.is_streaming:
        return None
    if not is_traced(positions):
        beyond = np.asarray(positions)[np.asarray(cache.is_valid & (positions >= seqlen))]
        if beyond.size:
            raise _errors.stream_too_long(name, int(beyond[0]), seqlen)
    return positions


def is_traced(x: object) -> bool:
    """Tells whether a number is known only when the program runs."""
    return isinstance(x, jax.core.Tracer)
