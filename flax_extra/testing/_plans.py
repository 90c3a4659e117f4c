"""Plans of how a sequence is cut into the blocks of a stream, and what happens to its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from flax_extra.combinator._stream.axes import Axes

MAX_BLOCKS = 4
MAX_BLOCK_LENGTH = 3
BATCH_SIZES = (1, 3)

RARELY = st.sampled_from([False, False, False, True])

CAPACITY_STEP = 6
"""Capacities are multiples of it, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a plan.

    Args:
        time: the length of the block.
        lengths: how many of its steps are valid in each row; None for all.
        rows: the rows of the state to go on with; None for all, in their order.
        reset: the rows to start anew, after ``rows`` were taken.
    """

    time: int
    lengths: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    reset: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.time} step{'s' * (self.time != 1)}"]
        if self.lengths is not None:
            parts.append(f"lengths {list(self.lengths)}")
        if self.rows is not None:
            parts.append(f"then take rows {list(self.rows)}")
        if self.reset:
            parts.append(f"then reset rows {list(self.reset)}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sequence is cut, and what happens to its rows.

    ``seed`` draws the inputs. ``has_gradients`` says whether gradients are compared, too.
    """

    batch: int
    blocks: tuple[Block, ...]
    seed: int = 0
    has_gradients: bool = False

    @property
    def capacity(self) -> int:
        """The length of the whole sequence, which is the capacity of the stream."""
        n_steps = sum(block.time for block in self.blocks)
        return -(-n_steps // CAPACITY_STEP) * CAPACITY_STEP

    def __str__(self) -> str:
        blocks = "".join(f"\n  block {i}: {block}" for i, block in enumerate(self.blocks))
        rows = "1 row" if self.batch == 1 else f"{self.batch} rows"
        return f"{rows}, {self.capacity} steps in the whole{blocks}"


@dataclasses.dataclass(frozen=True)
class Visit:
    """Where the rows of a stream stand at a block.

    Args:
        index: the index of the block.
        time: the length of the block.
        order: which row of the batch each row of the state holds.
        position: how many steps each row has taken.
        lengths: how many steps of the block are valid in each row.
    """

    index: int
    time: int
    order: tuple[int, ...]
    position: tuple[int, ...]
    lengths: tuple[int, ...]


def list_visits(plan: Plan) -> Iterator[tuple[Block, Visit]]:
    """Yields each block, with where the rows stand before it."""
    order = tuple(range(plan.batch))
    position = (0,) * plan.batch
    for index, block in enumerate(plan.blocks):
        lengths = block.lengths or (block.time,) * plan.batch
        yield block, Visit(index, block.time, order, position, lengths)
        position = tuple(p + n for p, n in zip(position, lengths, strict=True))
        if block.rows is not None:
            order = tuple(order[row] for row in block.rows)
            position = tuple(position[row] for row in block.rows)
        position = tuple(0 if row in block.reset else p for row, p in enumerate(position))


@st.composite
def plans(draw: st.DrawFn, takes_lengths: bool, can_reset: bool) -> Plan:
    """Draws plans. They shrink towards one block of one step."""
    batch = draw(st.sampled_from(BATCH_SIZES))
    blocks: list[Block] = []
    for _ in range(draw(st.integers(1, MAX_BLOCKS))):
        time = draw(st.integers(1, MAX_BLOCK_LENGTH))
        lengths = rows = None
        reset: tuple[int, ...] = ()
        if takes_lengths and draw(st.booleans()):
            lengths = tuple(draw(st.integers(0, time)) for _ in range(batch))
        if batch > 1 and draw(RARELY):
            rows = tuple(draw(st.integers(0, batch - 1)) for _ in range(batch))
        if can_reset and draw(RARELY):
            reset = tuple(row for row in range(batch) if draw(st.booleans()))
        blocks.append(Block(time, lengths, rows, reset))
    return Plan(batch, tuple(blocks), draw(st.integers(0, 3)), draw(RARELY))


def cut_block(axes: Axes, whole: Any, visit: Visit, fill: Any = None) -> Any:
    """Cuts the block of a visit out of an array for the whole sequence.

    Args:
        axes: the axes of the array.
        whole: the array.
        visit: the visit.
        fill: what stands in the padding; for None, other values of the array.
    """
    # Arrays that are known are cut by numpy: JAX would compile a program for each shape.
    xp: Any = np if isinstance(whole, np.ndarray) else jnp
    order = np.asarray(visit.order)
    if axes.time is None:
        return whole if axes.batch is None else xp.take(whole, order, axes.batch)
    steps = np.arange(visit.time * axes.rate)[None]
    at = np.asarray(visit.position)[:, None] * axes.rate + steps
    if axes.batch is None:  # all rows stand at one place
        return xp.take(whole, at[0], axes.time)
    first = xp.moveaxis(whole, (axes.batch, axes.time), (0, 1))
    block = first[order[:, None], np.minimum(at, first.shape[1] - 1)]
    if fill is not None:
        is_valid = steps < np.asarray(visit.lengths)[:, None] * axes.rate
        is_valid = is_valid.reshape(*is_valid.shape, *(1,) * (block.ndim - 2))
        block = xp.where(is_valid, block, xp.asarray(fill, block.dtype))
    return xp.moveaxis(block, (0, 1), (axes.batch, axes.time))


def zero_padding(axes: Axes, block: Any, visit: Visit) -> Any:
    """Puts zeros in the padding of an array for one block."""
    rows = tuple(range(len(visit.order)))
    from_zero = dataclasses.replace(visit, order=rows, position=(0,) * len(rows))
    return cut_block(axes, block, from_zero, 0)


def list_known_rows(axes: Axes, visit: Visit, capacity: int) -> list[int]:
    """Lists the rows in which a block says what the whole says.

    A result without time is that of the last step, which only the end of the sequence shares.
    """
    if axes.time is not None:
        return [row for row, n in enumerate(visit.lengths) if n]
    ends = [p + n for p, n in zip(visit.position, visit.lengths, strict=True)]
    return [row for row, end in enumerate(ends) if end == capacity]
