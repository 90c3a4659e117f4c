"""Tiles of the logits: where a tile lies, and what is read and added there.

Logits are ``[batch, heads, time_q, time_kv]``. A tile is a block of them: some examples of the
batch, a row of queries and a chunk of keys, with all heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_extra import combinator as cb
from flax_extra.layer._sharding import get_varying_axes

Index: TypeAlias = int | Array
State = TypeVar("State")


class Axes(NamedTuple):
    """Which axes of an array are tiled along the batch, the queries and the keys.

    None stands for an axis that the array does not have, or has with size 1 to broadcast it.
    """

    batch: int | None = None
    queries: int | None = None
    keys: int | None = None


class TileIndex(NamedTuple):
    """The number of a tile along the batch, the queries and the keys."""

    batch: Index
    queries: Index
    keys: Index = 0


@dataclasses.dataclass(frozen=True)
class AxisTiling:
    """An axis in pieces of one size. The last piece begins early enough to fit into the axis.

    With several groups the axis is read as ``[groups, length / groups]``, and a piece takes the
    same part of each group. If a mesh splits the axis into as many groups, each device has its
    share of every piece, and no piece moves between devices.

    Attributes:
        length: length of the axis.
        size: length of a piece in each group.
        groups: number of groups, which divides ``length``.
    """

    length: int
    size: int
    groups: int = 1

    @classmethod
    def at_most(cls, length: int, max_size: int, groups: int = 1) -> AxisTiling:
        """Cuts an axis into as few pieces as possible, of at most ``max_size`` in all groups."""
        stride = length // groups
        n_pieces = -(-stride // max(1, max_size // groups))
        return cls(length, -(-stride // n_pieces), groups)

    @property
    def stride(self) -> int:
        """Length of a group."""
        return self.length // self.groups

    @property
    def n_pieces(self) -> int:
        """Number of pieces."""
        return -(-self.stride // self.size)

    def get_start(self, piece: Index) -> Array:
        """Returns where a piece begins in each group."""
        return jnp.minimum(_as_int32(piece) * self.size, self.stride - self.size)

    def get_indices(self, piece: Index) -> Array:
        """Returns the indices of a piece on the axis."""
        starts = jnp.arange(self.groups, dtype=jnp.int32) * self.stride
        return (starts[:, None] + self._get_indices_in_group(piece)[None]).reshape(-1)

    def is_new(self, piece: Index) -> Array | None:
        """Says which positions of a piece are not in the piece before it; None if all are new."""
        if self.n_pieces * self.size == self.stride:
            return None
        is_new = self._get_indices_in_group(piece) >= _as_int32(piece) * self.size
        return jnp.tile(is_new, self.groups)

    def _get_indices_in_group(self, piece: Index) -> Array:
        return self.get_start(piece) + jnp.arange(self.size, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Grid:
    """All tiles: how the batch, the queries and the keys are cut."""

    batch: AxisTiling
    queries: AxisTiling
    keys: AxisTiling

    @property
    def n_rows(self) -> int:
        """Number of rows of tiles, in all blocks of examples."""
        return self.batch.n_pieces * self.queries.n_pieces

    def find_row(self, number: Index) -> TileIndex:
        """Returns the index of the first tile of a row."""
        return TileIndex(number // self.queries.n_pieces, number % self.queries.n_pieces)

    def read(self, x: Array | cb.CacheEntry, axes: Axes, index: TileIndex) -> Array:
        """Reads the part of an array that belongs to a tile."""
        part = self._locate(x.shape, axes, index)
        if isinstance(x, cb.CacheEntry):
            return x.reshape(part.view).read(part.starts, part.sizes).reshape(part.shape)
        if part.sizes == part.view:
            return x
        return lax.dynamic_slice(x.reshape(part.view), part.starts, part.sizes).reshape(part.shape)

    def add(self, x: Array, tile: Array, axes: Axes, index: TileIndex) -> Array:
        """Adds to the part of an array that belongs to a tile."""
        tile = tile.astype(x.dtype)
        part = self._locate(x.shape, axes, index)
        if part.sizes == part.view:
            return x + tile
        whole = x.reshape(part.view)
        old = lax.dynamic_slice(whole, part.starts, part.sizes)
        new = lax.dynamic_update_slice(whole, old + tile.reshape(part.sizes), part.starts)
        return new.reshape(x.shape)

    def is_new(self, index: TileIndex) -> Array | None:
        """Says which logits of a tile are in no tile before it; None if all are new."""
        queries, keys = self.queries.is_new(index.queries), self.keys.is_new(index.keys)
        if queries is None:
            return None if keys is None else keys[None, None, None, :]
        is_new = queries[None, None, :, None]
        return is_new if keys is None else is_new & keys[None, None, None, :]

    def get_tile_shape(self, x: Array, axes: Axes) -> tuple[int, ...]:
        """Returns the shape of the part of an array that belongs to a tile."""
        return self._locate(x.shape, axes, TileIndex(0, 0)).shape

    def _locate(self, shape: tuple[int, ...], axes: Axes, index: TileIndex) -> _Part:
        tilings = zip((self.batch, self.queries, self.keys), index, strict=True)
        tiling_of = dict(zip(axes, tilings, strict=True))
        part = _Part()
        for axis, length in enumerate(shape):
            tiling, piece = tiling_of.get(axis, (None, 0))
            if tiling is None or tiling.n_pieces == 1:
                part = part.extend((length,), (_as_int32(0),), (length,))
                continue
            start = tiling.get_start(piece)
            if tiling.groups == 1:
                part = part.extend((length,), (start,), (tiling.size,))
            else:
                view, sizes = (tiling.groups, tiling.stride), (tiling.groups, tiling.size)
                part = part.extend(view, (_as_int32(0), start), sizes)
        return part


class _Part(NamedTuple):
    """A part of an array.

    Attributes:
        view: shape of the array in which it lies, with an axis in groups as two.
        starts: where it begins in the view.
        sizes: its shape in the view.
        shape: its shape, with an axis in groups as one.
    """

    view: tuple[int, ...] = ()
    starts: tuple[Array, ...] = ()
    sizes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def extend(
        self, view: tuple[int, ...], starts: tuple[Array, ...], sizes: tuple[int, ...]
    ) -> _Part:
        """Adds an axis of the array."""
        shape = (*self.shape, math.prod(sizes))
        return _Part((*self.view, *view), (*self.starts, *starts), (*self.sizes, *sizes), shape)


def loop(n: int, body: Callable[[Index, State], State], state: State) -> State:
    """Runs a body for 0 to n - 1; without a loop if n is 1."""
    return body(0, state) if n == 1 else lax.fori_loop(0, n, body, state)


def count_groups(x: Array, axis: int) -> int:
    """Counts the groups to read an axis in, so that each device has its share of every piece.

    While a program is traced, arrays do not say how a mesh splits them. As many groups as there
    are devices suit every mesh whose axes divide the axis.
    """
    n_devices = jax.device_count()
    for name in get_varying_axes(x):  # inside jax.shard_map, x is the part of one device already
        n_devices //= lax.axis_size(name)
    return math.gcd(x.shape[axis], n_devices)


def _as_int32(index: Index) -> Array:
    return jnp.asarray(index, jnp.int32)
