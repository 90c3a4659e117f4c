"""Learned positions for a sequence of another length than that of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from flax_extra.layer import _errors


def interpolate_positions(
    table: Float[Array, "positions features"],
    seqshape: int | Sequence[int],
    table_seqshape: int | Sequence[int] | None = None,
) -> Float[Array, "new_positions features"]:
    r"""Resizes a table of learned positions to a sequence of another length, or to another grid.

    .. math:: h_p = (1 - f)\, w_i + f\, w_{i + 1}, \quad
        i + f = p \, \frac{T - 1}{T^{\prime} - 1}, \quad p = 0 \dots T^{\prime} - 1

    where T is the length of the table, :math:`T^{\prime}` the new one, i an integer and
    :math:`0 \le f < 1`. The first and the last position keep their vectors ("align corners"), and
    those between are interpolated linearly; in a grid, along each axis in turn.

    Args:
        table: the vectors of all positions, ``[positions, features]``, such as the parameter of
            :class:`~flax_extra.layer.TrainablePositionalEncoding`.
        seqshape: the new length, or the new shape of a grid.
        table_seqshape: the shape of the grid that the rows of the table stand for, in row-major
            order. By default the table has one axis.

    Returns:
        The vectors of all new positions, ``[new_positions, features]``, in the dtype of the table.
        They are computed in float32 or better. An axis that keeps its length keeps its vectors; a
        new axis of length 1 has the vector of the first position.

    Raises:
        ValueError: If the table does not consist of floats ``[positions, features]``, the two
            shapes have different numbers of axes, ``table_seqshape`` does not have as many
            positions as the table has rows, or an axis is below 1.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), section 3.2, for the use of
    interpolated positions at another resolution.

    Shapes:
        ``partial(xn.interpolate_positions, seqshape=512)``: ``f32[256, d] -> f32[512, d]``

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> table = jnp.array([[0.0], [1.0], [4.0]])
        >>> xn.interpolate_positions(table, 5)[:, 0].tolist()
        [0.0, 0.5, 1.0, 2.5, 4.0]
        >>> grid = jnp.array([[0.0], [1.0], [4.0], [5.0]])
        >>> xn.interpolate_positions(grid, (3, 2), table_seqshape=(2, 2))[:, 0].tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    table = jnp.asarray(table)
    if table.ndim != 2 or not jnp.issubdtype(table.dtype, jnp.floating):
        raise _errors.wrong_table(table.dtype, table.shape)
    positions, features = table.shape
    found = _convert_to_shape(
        "table_seqshape", positions if table_seqshape is None else table_seqshape
    )
    asked = _convert_to_shape("seqshape", seqshape)
    if len(found) != len(asked):
        raise _errors.different_grids(asked, found)
    if math.prod(found) != positions:
        raise _errors.wrong_grid(found, math.prod(found), positions)
    is_half = table.dtype.itemsize < 4
    grid = table.astype(jnp.float32 if is_half else table.dtype).reshape(*found, features)
    for axis, size in enumerate(asked):
        grid = _interpolate_axis(grid, axis, size)
    return grid.reshape(math.prod(asked), features).astype(table.dtype)


def _interpolate_axis(grid: Array, axis: int, size: int) -> Array:
    last = grid.shape[axis] - 1
    if size == last + 1:
        return grid
    places = np.linspace(0, last, size)
    lower = places.astype(np.int32)
    upper = np.minimum(lower + 1, last)
    fraction = np.expand_dims(places - lower, [i for i in range(grid.ndim) if i != axis])
    weight = jnp.asarray(fraction, grid.dtype)
    return (1 - weight) * jnp.take(grid, lower, axis) + weight * jnp.take(grid, upper, axis)


def _convert_to_shape(name: str, seqshape: int | Sequence[int]) -> tuple[int, ...]:
    shape = tuple(seqshape) if isinstance(seqshape, Sequence) else (seqshape,)
    if not shape or min(shape) < 1:
        raise _errors.too_small("interpolate_positions", f"axes in {name}", 1, seqshape)
    return shape
