"""Runs the benchmarks: ``make bench``, or some rows alone with

    .venv/bin/python -m tests.benchmarks --row 'attention-*'

Prints a table, and writes it with all figures to build/benchmarks.json; ``--page`` writes
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).parents[2]
WIDTH = 140
sys.path.insert(0, str(ROOT / "docs/examples"))

from tests.benchmarks.measuring import OURS, Result, Row, measure  # noqa: E402
from tests.benchmarks.rows import rows  # noqa: E402


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Measures the rows that are asked for."""
    parser = _Parser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", help="a name, or a pattern such as 'lstm-*'")
    parser.add_argument("--list", action="store_true", help="only say which rows there are")
    parser.add_argument("--rounds", type=int, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, default=ROOT / "build/benchmarks.json")
    parser.add_argument("--page", type=Path, help="write a page of documentation, too")
    options = parser.parse_args(arguments)
    chosen = _chosen(options.row, parser)
    if options.list:
        print("\n".join(f"{row.name:40} {row.claim}" for row in chosen))
        return 0
    if options.rounds is not None:
        if options.rounds < 1:
            parser.error(f"--rounds is {options.rounds}; it is at least 1")
        chosen = [dataclasses.replace(row, rounds=options.rounds) for row in chosen]
    results = _measured(chosen)
    Console(width=WIDTH).print(_table(chosen, results))
    report = _report(chosen, results)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"figures: {options.json}")
    if options.page:
        options.page.write_text(_page(report))
    return 0


def _chosen(patterns: list[str] | None, parser: _Parser) -> list[Row]:
    every = rows()
    for pattern in patterns or []:
        if not fnmatch.filter([row.name for row in every], pattern):
            parser.error(f"there is no row {pattern!r}; --list says which there are")
    return [row for row in every if any(fnmatch.fnmatch(row.name, p) for p in patterns or ["*"])]


def _measured(chosen: list[Row]) -> dict[str, dict[str, Result]]:
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    results = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(row.rounds for row in chosen))
        for row in chosen:
            bar.update(task, description=row.name)
            results[row.name] = measure(row, lambda: bar.advance(task))
    return results


def _table(chosen: list[Row], results: Mapping[str, Mapping[str, Result]]) -> Table:
    table = Table("row", "against", "ours", "theirs", "theirs / ours", "temporaries", box=None)
    for row in chosen:
        for line in _lines(row.name, results[row.name]):
            table.add_row(*line)
    return table


def _lines(name: str, results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    ours = results[OURS]
    lines = []
    for peer, found in results.items():
        if peer == OURS:
            continue
        lower, middle, upper = found.ratio
        memory = ""
        if ours.temporaries is not None and found.temporaries is not None:
            memory = f"{ours.temporaries / 1e6:.1f} MB : {found.temporaries / 1e6:.1f} MB"
        ratio = f"{middle:.2f} ({lower:.2f} to {upper:.2f})"
        lines.append((name, peer, _time(ours.seconds), _time(found.seconds), ratio, memory))
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _report(chosen: list[Row], results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    libraries = ("jax", "flax", "torch", "transformers")
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in libraries if _is_installed(name)},
        },
        "rows": [
            {
                "name": row.name,
                "claim": row.claim,
                "rounds": row.rounds,
                "results": {k: dataclasses.asdict(v) for k, v in results[row.name].items()},
            }
            for row in chosen
        ],
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _page(report: Mapping[str, Any]) -> str:
    """The page of documentation: what was measured, where, and by which command."""
    machine = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("processor", "cores"))
    lines = [
        "# Benchmarks",
        "",
        "How fast the library is, against what people use today. `make bench` measures anew and",
        "writes this page; `.venv/bin/python -m tests.benchmarks --row 'lstm-*'` runs some rows alone.",
        "",
        "Implementations take turns in one process. A ratio is one of times of the same round, theirs",
        "over ours, so more than 1 says that ours is faster; the table has the median of all rounds",
        "and the quartiles. Memory is that of temporaries, as XLA plans it, ours and theirs. Traces are",
        "timed by the processor's clock, for they run on one core, and start 0, 6, ... 114 frames of",
        "Python further in, in turn, for what a call costs in CPython depends on how deep it is.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores; {versions}; torch and XLA with",
        "two threads. Such a shared machine is twice as slow on one day as on another, and ratios vary by",
        "a third: what waits for memory and what waits for arithmetic are not slowed alike.",
        "",
        "| row | against | ours | theirs | theirs / ours | temporaries |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        results = {
            name: Result(found["seconds"], tuple(found["ratio"]), found["temporaries"])
            for name, found in row["results"].items()
        }
        lines += [f"| {' | '.join(line)} |" for line in _lines(row["name"], results)]
    lines += ["", "## What should hold", ""]
    claims: dict[str, list[str]] = {}
    for row in report["rows"]:
        claims.setdefault(row["claim"], []).append(row["name"])
    lines += [f"- {claim}: {', '.join(names)}" for claim, names in claims.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
