"""Which collectives a compiled program has, and in which loops, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
COLLECTIVE = re.compile(rf" = (?P<type>.*?) (?P<kind>{KINDS})(?:-start)?\(")
BODY = re.compile(r"\bbody=%?(?P<name>[\w.-]+)")
SHAPE = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
        kind: "all-reduce", say.
        shapes: the shapes of its results: one instruction may have several.
        loop: the name of the loop body that it is in, and "" outside of loops.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    loop: str

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))


def list_collectives(program: Any) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text."""
    text = program.as_text()
    bodies = set(BODY.findall(text))
    found, name = [], ""
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            name = start["name"]
        elif match := COLLECTIVE.search(line):
            shapes = tuple(
                tuple(map(int, filter(None, sizes.split(","))))
                for _, sizes in SHAPE.findall(match["type"])
            )
            found.append(Collective(match["kind"], shapes, name if name in bodies else ""))
    return found


def list_loops(collectives: list[Collective]) -> list[list[Collective]]:
    """The collectives of each loop that has some: the loop forwards, then that backwards."""
    names = dict.fromkeys(c.loop for c in collectives if c.loop)
    return [[c for c in collectives if c.loop == name] for name in names]
