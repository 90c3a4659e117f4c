"""Columns: the horizontal positions of wires and of the sides of boxes and frames.

A picture asks only that some columns stay a distance to the right of others. The smallest positions
that do so are found in one pass, in whole numbers, so that equal expressions look the same on every
machine.

    >>> columns = Columns()
    >>> side, wire, far = columns.add(leans_right=True), columns.add(), columns.add()
    >>> far.stay_right_of(side, 10)
    >>> far.stay_right_of(wire, 30)
    >>> columns.settle()
    >>> side.x, wire.x, far.x
    (20, 0, 30)
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False)
class Column:
    """A vertical line, and its least distances from the columns to its left.

    Args:
        leans_right: whether it goes as far right as it can, as the left side of a box does, and not
            as far left.
        x: its position, once settled.
    """

    leans_right: bool = False
    x: int = 0
    distances: dict[Column, int] = dataclasses.field(default_factory=dict)

    def stay_right_of(self, other: Column, distance: int) -> None:
        """Asks to be at least this far to the right of another column."""
        self.distances[other] = max(distance, self.distances.get(other, distance))


class Columns:
    """All columns of a picture."""

    def __init__(self) -> None:
        self._all: list[Column] = []

    def add(self, leans_right: bool = False) -> Column:
        column = Column(leans_right)
        self._all.append(column)
        return column

    def settle(self) -> None:
        """Computes the position of each column. The leftmost is at 0."""
        order = self._sort()
        for column in order:
            column.x = max((other.x + d for other, d in column.distances.items()), default=0)
        room: dict[Column, int] = {}
        for column in reversed(order):
            if column.leans_right:
                column.x = room.get(column, column.x)
            for other, distance in column.distances.items():
                limit = column.x - distance
                room[other] = min(limit, room.get(other, limit))
        start = min((column.x for column in order), default=0)
        for column in order:
            column.x -= start

    def _sort(self) -> list[Column]:
        waiting = {column: len(column.distances) for column in self._all}
        followers: dict[Column, list[Column]] = {column: [] for column in self._all}
        for column in self._all:
            for other in column.distances:
                followers[other].append(column)
        order = [column for column, count in waiting.items() if not count]
        for column in order:  # it grows while it is read
            for follower in followers[column]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    order.append(follower)
        return order
