"""What the project asks of pytest itself: nothing that had to run may be skipped in silence."""

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


def test_a_skip_in_a_worker_fails_too(project):
    project.makepyfile(test_test=A_SKIP, test_module=A_MODULE_SKIP)
    result = project.runpytest_subprocess("--fail-on-skip", "--numprocesses=1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["--fail-on-skip: these tests had to run", REASON, REASON])


def test_a_skip_passes_elsewhere(project):
    project.makepyfile(test_something=A_SKIP)
    result = project.runpytest_inprocess("-rs")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines([REASON])


def test_a_run_without_skips_passes(project):
    result = project.runpytest_inprocess("--fail-on-skip")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("--fail-on-skip*")


def test_compiled_programs_are_kept_for_the_next_run(project, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # that of the run outside
    project.makepyfile(
        "import jax\ndef test_compiles(): jax.jit(lambda x: x + 1)(1.0).block_until_ready()"
    )
    project.runpytest_subprocess().assert_outcomes(passed=2)
    assert list((project.path / ".pytest_cache").rglob("jit__lambda*-cache"))
