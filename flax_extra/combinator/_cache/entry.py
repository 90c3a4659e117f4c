"""Variables of one copy, read and written in place among those that are stacked for all copies.

A ``repeat`` stacks what its copies remember on a leading axis, and runs the copies in a loop. If
the loop cut out the part of each copy and put it back, a step of one token would copy the whole
cache. Instead the loop carries the stacked arrays, and each variable is a :class:`CacheEntry` of
them. ``Variable.value`` reads and writes an entry as any other array; :class:`Cache` also reads and
writes parts of it, which is why a step touches only the positions that it needs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from flax_extra.combinator._core import stream_errors
from flax_extra.combinator._core.describe import describe_item


class CacheEntry(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):  # type: ignore[no-untyped-call]
    """One entry of an array that is stacked on leading axes: ``stacked[indices]``.

    Linen unboxes it in ``Variable.value``, as it does partitioned parameters. A layer gets one from
    :meth:`Cache.get_entry`, to read parts of it.

    Args:
        stacked: the array for all copies, ``[copies, ..., *shape]``.
        indices: the index of the copy on each leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb
        >>> entry = cb.CacheEntry(jnp.arange(12).reshape(2, 6), indices=(1,))
        >>> entry.shape, entry.read((2,), (3,)).tolist()
        ((6,), [8, 9, 10])
    """

    stacked: Array
    indices: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the entry."""
        return self.stacked.shape[len(self.indices) :]

    @property
    def dtype(self) -> Any:
        """The dtype of the entry."""
        return self.stacked.dtype

    @property
    def ndim(self) -> int:
        """How many axes the entry has."""
        return len(self.shape)

    def unbox(self) -> Array:
        """Reads the entry."""
        return self.read((0,) * len(self.shape), self.shape)

    def read(self, starts: tuple[Any, ...], sizes: tuple[int, ...]) -> Array:
        """Reads a part of the entry."""
        n_leading = len(self.indices)
        part: Array = jax.lax.dynamic_slice(
            self.stacked, (*self.indices, *starts), (*(1,) * n_leading, *sizes)
        )
        return part.reshape(sizes)

    def reshape(self, shape: tuple[int, ...]) -> CacheEntry:
        """Gives the entry other axes."""
        leading = self.stacked.shape[: len(self.indices)]
        return CacheEntry(self.stacked.reshape(*leading, *shape), self.indices)

    def replace_boxed(self, val: Any) -> CacheEntry:
        """Writes the entry.

        Raises:
            StreamError: If the shape or dtype changes.
        """
        if (jnp.shape(val), jnp.result_type(val)) != (self.shape, self.dtype):
            raise stream_errors.changing_state(
                "of one copy", describe_item(self), describe_item(jnp.asarray(val))
            )
        n_leading = len(self.indices)
        starts = (*self.indices, *(0,) * val.ndim)
        boxed = jnp.expand_dims(val, tuple(range(n_leading)))
        return CacheEntry(jax.lax.dynamic_update_slice(self.stacked, boxed, starts), self.indices)

    def write_rows(self, rows: Array, at: Array) -> CacheEntry:
        """Writes rows ``[batch, time, ...]`` of an entry ``[batch, n, ...]``.

        Args:
            rows: the rows to write.
            at: where on the second axis, ``[batch, time]``. A row at n is not written.
        """
        # An index for every leading axis and row: if the batch were a batch axis of the scatter,
        # XLA would lay out the whole array anew. On a mesh, devices exchange the rows, which are
        # few, and never the array.
        parts = [*self.indices, jnp.arange(at.shape[0])[:, None], at]
        n_indexed = len(parts)
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(2, rows.ndim)),
            inserted_window_dims=tuple(range(n_indexed)),
            scatter_dims_to_operand_dims=tuple(range(n_indexed)),
        )

        def write(stacked: Array, rows: Array, parts: list[Array]) -> Array:
            parts = [jnp.broadcast_to(jnp.asarray(x, jnp.int32), rows.shape[:2]) for x in parts]
            indices = jnp.stack(parts, axis=-1)
            return jax.lax.scatter(stacked, indices, rows, numbers, mode="drop")

        sharding: Any = jax.typeof(self.stacked).sharding
        if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
            write = jax.sharding.auto_axes(write, out_sharding=sharding.spec)
        return CacheEntry(write(self.stacked, rows.astype(self.dtype), parts), self.indices)

    def add_axis(self, index: int, params: dict[Any, Any]) -> CacheEntry:
        """Does nothing: the axes of copies are known by their number."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> CacheEntry:
        """Does nothing: the axes of copies are known by their number."""
        return self


class Copy:
    """One copy in a loop, in which variables stacked for all copies are its entries of them.

    Args:
        index: the index of the copy.
    """

    def __init__(self, index: Any) -> None:
        self._index = index
        self._entries: Any = {}

    def enter(self, variables: Any) -> Any:
        """Turns variables stacked for all copies into the entries of this one."""
        self._entries = jax.tree.map(self._enter, variables, is_leaf=_is_entry)
        return self._entries

    def leave(self, variables: Any) -> Any:
        """Turns the entries of this copy back into variables stacked for all copies.

        Raises:
            StreamError: If a layer made a variable that was not there before.
        """
        known = dict(jax.tree_util.tree_leaves_with_path(self._entries, is_leaf=_is_entry))

        def leave(path: Any, value: Any) -> Any:
            if not _is_entry(value):  # it was replaced as a whole
                if path not in known:
                    name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
                    raise stream_errors.new_state(name)
                value = known[path].replace_boxed(value)
            indices = value.indices[:-1]
            return CacheEntry(value.stacked, indices) if indices else value.stacked

        return jax.tree_util.tree_map_with_path(leave, variables, is_leaf=_is_entry)

    def _enter(self, value: Any) -> CacheEntry:
        if isinstance(value, CacheEntry):
            return CacheEntry(value.stacked, (*value.indices, self._index))
        return CacheEntry(value, (self._index,))


class Unboxed:
    """The entries of one copy as plain arrays, for a transformation that maps over their axes."""

    def __init__(self) -> None:
        self._entries: dict[Any, CacheEntry] = {}

    def enter(self, variables: Any) -> Any:
        """Reads the entries."""
        leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=_is_entry)
        self._entries = {path: leaf for path, leaf in leaves if _is_entry(leaf)}
        return nn.meta.unbox(variables)

    def leave(self, variables: Any) -> Any:
        """Writes the entries."""

        def leave(path: Any, value: Any) -> Any:
            entry = self._entries.get(path)
            return value if entry is None else entry.replace_boxed(value)

        return jax.tree_util.tree_map_with_path(leave, variables)


def has_entries(variables: Any) -> bool:
    """Whether some of the variables are entries."""
    return any(map(_is_entry, jax.tree.leaves(variables, is_leaf=_is_entry)))


def _is_entry(x: Any) -> bool:
    return isinstance(x, CacheEntry)
