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

WARM_UP = 0.1
"""Seconds of calls before any of them counts: threads that slept are slow to share the cores again."""

LEAST = 0.1
"""Seconds that one measurement takes at least, by as many calls."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What is timed.

    Args:
        run: does it once, and returns when it is done.
        temporaries: bytes that its compiled program needs beside its inputs and outputs, if known.
        spins: whether its threads keep a core busy for a while afterwards.
        clock: tells seconds: those of the wall, or for what runs on one core those of the processor,
            which stand still while others have it.
    """

    run: Callable[[], Any]
    temporaries: int | None = None
    spins: bool = False
    clock: Callable[[], float] = time.perf_counter


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
        yield name, _seconds(each.run, each.clock)
        if each.spins:
            time.sleep(SETTLE)


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """The mean time of a call, of those that begin warm, or of the one that there is time for."""
    now = start = clock()
    cold = warm = 0.0
    n_warm = 0
    while now < start + WARM_UP + LEAST:
        began, _ = now, run()
        now = clock()
        if began < start + WARM_UP:
            cold = now - began
        else:
            warm += now - began
            n_warm += 1
    return warm / n_warm if n_warm else cold


def _quartiles(ratios: list[float]) -> tuple[float, float, float]:
    if len(ratios) == 1:
        return (ratios[0],) * 3
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return lower, middle, upper
