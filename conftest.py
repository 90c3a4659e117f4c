"""What every run of pytest shares: strict JAX, hypothesis profiles, compiled programs kept on disk.

Warnings are errors, too: see pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

MAX_CACHE_BYTES = 2**30

jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile(
    "default", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=10_000)
# The result for a commit must not depend on what is drawn; a run by hand goes on searching.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("fast", settings.get_profile("ci"), max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="fail if a test was skipped; the targets of the Makefile install all that tests need",
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


def pytest_sessionfinish(session: pytest.Session) -> None:
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
