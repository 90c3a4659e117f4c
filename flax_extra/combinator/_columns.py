"""Columns: where what stands upright in a picture goes, from left to right.

A wire, and each side of a box or a frame, stands in a column. All that a picture asks of its
columns is that some stay a distance to the right of others. The least positions that do so are
found in one pass, in whole numbers, so that equal expressions are drawn alike on every machine.

    >>> columns = Columns()
    >>> side, wire, far = columns.new(leans=True), columns.new(), columns.new()
    >>> far.right_of(side, 10)
    >>> far.right_of(wire, 30)
    >>> columns.settle()
    >>> side.x, wire.x, far.x
    (20, 0, 30)
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False)
class Column:
    """Something upright, and how far it stays from what is to its left.

    Args:
        leans: whether it stands as far right as it can, as the left side of a box does, and not
            as far left.
        x: where it is, once settled.
    """

    leans: bool = False
    x: int = 0
    distances: dict[Column, int] = dataclasses.field(default_factory=dict)

    def right_of(self, other: Column, distance: int) -> None:
        """Asks to be at least this far to the right of another."""
        self.distances[other] = max(distance, self.distances.get(other, distance))


class Columns:
    """All columns of a picture."""

    def __init__(self) -> None:
        self._all: list[Column] = []

    def new(self, leans: bool = False) -> Column:
        column = Column(leans)
        self._all.append(column)
        return column

    def settle(self) -> None:
        """Gives each column its place: the leftmost is at 0."""
        order = self._from_left_to_right()
        for column in order:
            column.x = max((other.x + d for other, d in column.distances.items()), default=0)
        room: dict[Column, int] = {}
        for column in reversed(order):
            if column.leans:
                column.x = room.get(column, column.x)
            for other, distance in column.distances.items():
                limit = column.x - distance
                room[other] = min(limit, room.get(other, limit))
        start = min((column.x for column in order), default=0)
        for column in order:
            column.x -= start

    def _from_left_to_right(self) -> list[Column]:
        waiting = {column: len(column.distances) for column in self._all}
        followers: dict[Column, list[Column]] = {column: [] for column in self._all}
        for column in self._all:
            for other in column.distances:
                followers[other].append(column)
        order = [column for column, count in waiting.items() if not count]
        for column in order:  # which grows while it is read
            for follower in followers[column]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    order.append(follower)
        return order
