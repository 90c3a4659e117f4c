"""Which axes of an array are batch and time, found by comparing runs of other sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax_extra.combinator._core.arrays import split_arrays


@dataclasses.dataclass(frozen=True)
class Axes:
    """Where batch and time are in an array; None for an axis that it does not have.

    ``rate`` says how many of its steps go with one step of the stream.
    """

    batch: int | None
    time: int | None
    rate: int = 1


def find_axes(two: Any, three: Any, longer: Any, more: int = 1) -> list[Axes]:
    """Finds the axes of each array in a pytree.

    Args:
        two: the pytree, as shapes for two rows.
        three: the same for three rows.
        longer: the same for two rows and ``more`` more steps of the stream.
        more: how many; below zero for fewer.
    """
    shapes = zip(*(split_arrays(tree)[0] for tree in (two, three, longer)), strict=True)
    return [_find_axes_of_array(a, b, c, more) for a, b, c in shapes]


def _find_axes_of_array(two: Any, three: Any, longer: Any, more: int) -> Axes:
    time = find_axis(two, longer)
    rate = 1 if time is None else (longer.shape[time] - two.shape[time]) // more
    return Axes(find_axis(two, three), time, rate)


def find_axis(one: Any, other: Any) -> int | None:
    """Finds the first axis along which two shapes differ."""
    sizes = zip(one.shape, other.shape, strict=True)
    return next((axis for axis, (a, b) in enumerate(sizes) if a != b), None)
