"""What the project adds to pytest: skips that fail, slow tests apart, compiled programs kept."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"
A_SKIP = """
    import pytest

    def test_runs():
        pass

    def test_needs_more():
        pytest.importorskip("no_such_package", reason="no_such_package comes with an extra")
"""
A_MODULE_SKIP = """
    import pytest

    pytest.importorskip("no_such_package", reason="no_such_package comes with an extra")
"""
REASON = "*no_such_package comes with an extra"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_other="def test_runs(): pass")
    return pytester


@pytest.mark.parametrize("code", [A_SKIP, A_MODULE_SKIP], ids=["test", "module"])
def test_a_skip_fails_where_nothing_may_be_skipped(project, code):
    project.makepyfile(test_something=code)
    result = project.runpytest_inprocess("--fail-on-skip")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["--fail-on-skip: these tests had to run", REASON])


def test_a_skip_passes_elsewhere(project):
    project.makepyfile(test_something=A_SKIP)
    result = project.runpytest_inprocess("-rs")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines([REASON])


def test_a_run_without_skips_passes(project):
    result = project.runpytest_inprocess("--fail-on-skip")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("--fail-on-skip*")


BUSY = """
    import time
    import jax

    def test_slow():
        start = time.process_time()
        while time.process_time() < start + 0.3:
            pass

    def test_compiles():
        jax.jit(lambda x: x + 1)(1.0).block_until_ready()
"""


def test_workers_report_skips_and_seconds_and_keep_programs(project, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # that of the run outside
    conftest = CONFTEST.read_text()
    assert "MAX_FAST_SECONDS = 0.5" in conftest
    project.makeconftest(conftest.replace("MAX_FAST_SECONDS = 0.5", "MAX_FAST_SECONDS = 0.25"))
    project.makepyfile(test_busy=BUSY, test_test=A_SKIP, test_module=A_MODULE_SKIP)
    slow = project.mkdir("tests") / "slow.txt"
    result = project.runpytest_subprocess("--fail-on-skip", "--write-slow", "--numprocesses=1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["--fail-on-skip: these tests had to run", REASON, REASON])
    assert "test_busy.py::test_slow" in slow.read_text().splitlines()
    assert "test_test.py::test_runs" not in slow.read_text()
    assert list((project.path / ".pytest_cache").rglob("jit__lambda*-cache"))


def test_slow_tests_can_be_left_out(project):
    (project.mkdir("tests") / "slow.txt").write_text("test_other.py::test_runs\n")
    project.makepyfile(test_something="def test_runs(): pass")
    result = project.runpytest_inprocess("-m", "not slow")
    result.assert_outcomes(passed=1, deselected=1)
