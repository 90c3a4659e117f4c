"""How times are compared: implementations take turns in one process, and each turn gives a ratio.

The machine is noisy, so no time is compared with one taken minutes earlier. In each round every
implementation runs once, in an order drawn anew; a ratio is one of times of the same round, and what
is told of it is the median and the quartiles over all rounds.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

OURS = "ours"
SETTLE = 0.2
"""Seconds that torch's threads go on spinning for after a call, as long as what comes next waits."""

LEAST = 0.02
"""Seconds that one measurement takes at least, by as many calls."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What is timed.

    Args:
        run: does it once, and returns when it is done.
        temporaries: bytes that its compiled program needs beside its inputs and outputs, if known.
        spins: whether its threads keep a core busy for a while afterwards.
    """

    run: Callable[[], Any]
    temporaries: int | None = None
    spins: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        name: what is typed to run it.
        claim: what should hold of the ratios, in words.
        prepare: makes the implementations by name, ``ours`` among them.
        rounds: how many times each takes its turn.
    """

    name: str
    claim: str
    prepare: Callable[[], Mapping[str, Implementation]]
    rounds: int = 9


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found of one implementation.

    Args:
        seconds: the median time of a call.
        ratio: how many times as long as ours it took: lower quartile, median, upper quartile.
        temporaries: as of :class:`Implementation`.
    """

    seconds: float
    ratio: tuple[float, float, float]
    temporaries: int | None


def measure(row: Row, tick: Callable[[], None] = lambda: None) -> dict[str, Result]:
    """Times all implementations of a row; ``tick`` is called after each of ``row.rounds``."""
    implementations = row.prepare()
    for each in implementations.values():
        each.run()
    rounds = []
    for _ in range(row.rounds):
        rounds.append(dict(_one_round(implementations)))
        tick()
    return {
        name: Result(
            statistics.median(times[name] for times in rounds),
            _quartiles([times[name] / times[OURS] for times in rounds]),
            each.temporaries,
        )
        for name, each in implementations.items()
    }


def _one_round(implementations: Mapping[str, Implementation]) -> Iterator[tuple[str, float]]:
    order = list(implementations.items())
    random.shuffle(order)
    for name, each in order:
        n, start = 0, time.perf_counter()
        while n == 0 or time.perf_counter() - start < LEAST:
            each.run()
            n += 1
        yield name, (time.perf_counter() - start) / n
        if each.spins:
            time.sleep(SETTLE)


def _quartiles(ratios: list[float]) -> tuple[float, float, float]:
    if len(ratios) == 1:
        return (ratios[0],) * 3
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return lower, middle, upper
