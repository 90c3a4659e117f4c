"""What every run of pytest shares: strict JAX, hypothesis profiles, compiled programs kept on disk.

Warnings are errors, too: see pyproject.toml.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, settings

MAX_CACHE_BYTES = 2**30
TESTS_BETWEEN_FREEZES = 100
MAX_FAST_SECONDS = 0.5
SLOW = Path(__file__).parent / "tests" / "slow.txt"
"""The tests that take longer, marked ``slow``; ``make slow-tests`` measures them anew."""

STARTED = pytest.StashKey[float]()
N_DONE = pytest.StashKey[int]()
SECONDS: dict[str, float] = {}

jax.config.update("jax_numpy_rank_promotion", "raise")
# Doctests compare messages, without JAX's note that it hides frames.
jax.config.update("jax_traceback_filtering", "off")

settings.register_profile(
    "default", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=10_000)
# The result for a commit must not depend on what is drawn; a run by hand goes on searching.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, max_examples=40)
settings.register_profile("fast", settings.get_profile("ci"), max_examples=20)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
settings.load_profile(PROFILE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="fail if a test was skipped; the targets of the Makefile install all that tests need",
    )
    parser.addoption(
        "--write-slow",
        action="store_true",
        help=f"write the tests that take more than {MAX_FAST_SECONDS:g} s into tests/{SLOW.name}",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Most of the time goes into compiling. Programs are kept for the other workers and the next
    # run, under a name of this machine, since they hold its instructions.
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        cache = config.cache.mkdir(f"jax-{platform.node()}")
        if not hasattr(config, "workerinput") and _size(cache) > MAX_CACHE_BYTES:
            shutil.rmtree(cache)
        options = {
            "jax_compilation_cache_dir": str(cache),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for option, value in options.items():
            jax.config.update(option, value)
            os.environ[option.upper()] = str(value)  # for the processes that tests start


def _size(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _limit_examples(test: Any, most: int) -> None:
    """Draws fewer examples for a test that asks for more than a profile has."""
    asked = getattr(test, "_hypothesis_internal_use_settings", None)
    if asked is not None and asked.max_examples > most:
        limited = settings(asked, max_examples=most)
        test._hypothesis_internal_use_settings = limited


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if PROFILE in ("ci", "fast"):
        for item in items:
            test = getattr(item, "obj", None)
            _limit_examples(getattr(test, "__func__", test), settings().max_examples)
    slow = set(SLOW.read_text().splitlines()) if SLOW.exists() else set()
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[STARTED] = _processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if call.when == "teardown":
        item.user_properties.append(("seconds", _processor_seconds() - item.stash[STARTED]))
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    # JAX keeps what it has traced. The garbage collector would look through all of it, again and
    # again: what survives a hundred tests stays.
    item.session.stash[N_DONE] = item.session.stash.get(N_DONE, 0) + 1
    if item.session.stash[N_DONE] % TESTS_BETWEEN_FREEZES == 0:
        gc.collect()
        gc.freeze()


def _processor_seconds() -> float:
    """Of this process and those that it waited for; the clock's depend on what else runs."""
    return sum(os.times()[:4])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        SECONDS[report.nodeid] = dict(report.user_properties)["seconds"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-slow") and not hasattr(session.config, "workerinput"):
        slow = [test for test, seconds in SECONDS.items() if seconds > MAX_FAST_SECONDS]
        SLOW.write_text("".join(f"{test}\n" for test in sorted(slow)))
    if _skips_count_as_failures(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _skips_count_as_failures(config):
        terminalreporter.write_line("--fail-on-skip: these tests had to run", red=True)
        for report in terminalreporter.getreports("skipped"):
            _, _, reason = report.longrepr
            terminalreporter.write_line(f"  {report.nodeid}: {reason}", red=True)


def _skips_count_as_failures(config: pytest.Config) -> bool:
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # None in a worker of xdist
    wanted = config.getoption("--fail-on-skip") and reporter is not None
    return bool(wanted and reporter.getreports("skipped"))
