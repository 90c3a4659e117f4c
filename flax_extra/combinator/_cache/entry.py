"""Variables of one copy, read and written in place among those that are stacked for all copies.

A ``repeat`` stacks what its copies remember on a leading axis, and runs the copies in a loop. If
the loop cut out the part of each copy and put it back, a step of one token would copy the whole
cache. Instead the loop carries the stacked arrays, and each variable is an :class:`Entry` of them.
``Variable.value`` reads and writes an entry as any other array; :class:`Cache` also reads and
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


class Entry(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):  # type: ignore[no-untyped-call]
    """One entry of an array that is stacked on leading axes: ``stacked[indices]``.

    Linen unboxes it in ``Variable.value``, as it does partitioned parameters.

    Args:
        stacked: the array for all copies, ``[copies, ..., *shape]``.
        indices: the index of the copy on each leading axis.
    """

    stacked: Array
    indices: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the entry."""
        return self.stacked.shape[len(self.indices) :]

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

    def replace_boxed(self, val: Any) -> Entry:
        """Writes the entry."""
        n_leading = len(self.indices)
        starts = (*self.indices, *(0,) * val.ndim)
        boxed = jnp.expand_dims(val, tuple(range(n_leading)))
        return Entry(jax.lax.dynamic_update_slice(self.stacked, boxed, starts), self.indices)

    def write_rows(self, rows: Array, at: Array) -> Entry:
        """Writes rows ``[batch, time, ...]`` of an entry ``[batch, n, ...]``.

        Args:
            rows: the rows to write.
            at: where on the second axis, ``[batch, time]``. A row at n is not written.
        """

        def write(stacked: Array, rows: Array, at: Array) -> Array:
            written: Array = stacked.at[(*self.indices, at)].set(
                rows.astype(stacked.dtype), mode="drop"
            )
            return written

        axis = len(self.indices)  # the batch
        stacked = jax.vmap(write, in_axes=(axis, 0, 0), out_axes=axis)(self.stacked, rows, at)
        return Entry(stacked, self.indices)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Entry:
        """Does nothing: the axes of copies are known by their number."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Entry:
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
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise stream_errors.new_state(name)
                value = known[path].replace_boxed(value)
            indices = value.indices[:-1]
            return Entry(value.stacked, indices) if indices else value.stacked

        return jax.tree_util.tree_map_with_path(leave, variables, is_leaf=_is_entry)

    def _enter(self, value: Any) -> Entry:
        if isinstance(value, Entry):
            return Entry(value.stacked, (*value.indices, self._index))
        return Entry(value, (self._index,))


def _is_entry(x: Any) -> bool:
    return isinstance(x, Entry)
