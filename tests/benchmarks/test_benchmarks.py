"""Pipelines are the programs of their handwritten twins, and the benchmarks run. No time is asserted."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flax_extra import testing
from perceiver_io import Core
from perceiver_models import masked_language_model
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import by_hand
from tests.benchmarks.measuring import Implementation, Row, measure

KEY = jax.random.key(0)
CORE = Core(n_latents=4, d_latents=8, n_layers=2, n_heads=2, n_heads_encoder=2, d_qk=8, d_v=8)


def test_the_demo_is_its_twin() -> None:
    ours, theirs = by_hand.demo().autoencoder(label_mask_rate=1.0), by_hand.Demo()
    inputs = jnp.zeros((2, 8, 8)), jnp.zeros(2, jnp.int32)
    testing.assert_same_program(ours, theirs, *inputs)


def test_the_language_model_is_its_twin() -> None:
    sizes: dict[str, Any] = {
        "n_positions": 16, "d_model": 8, "n_heads_decoder": 2, "d_qk_decoder": 8,
    }  # fmt: skip
    ours, theirs = masked_language_model(CORE, **sizes), by_hand.Language(CORE, **sizes)
    tokens = jnp.zeros((2, 16), jnp.int32)
    testing.assert_same_program(ours, theirs, tokens, jnp.ones((2, 16), bool))


def test_a_deep_stack_is_its_twin() -> None:
    ours, theirs = by_hand.stack(300, 4), by_hand.Stack(300, 4)
    testing.assert_same_program(ours, theirs, jnp.ones((2, 4)))


def test_implementations_take_turns() -> None:
    calls: list[str] = []

    def implementation(name: str) -> Implementation:
        return Implementation(lambda: calls.append(name), temporaries=8)

    row = Row("r", "", lambda: {name: implementation(name) for name in ("ours", "other")}, rounds=3)
    results = measure(row)
    assert results["ours"].ratio == (1, 1, 1)
    lower, middle, upper = results["other"].ratio
    assert 0 < lower <= middle <= upper
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert len(turns) >= 4
    assert {"ours", "other"} == set(calls)


def test_one_row_is_measured_and_written(tmp_path, capsys) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    options = ["--row", "run-demo", "--rounds", "1", "--json", str(figures), "--page", str(page)]
    assert benchmarks.main(options) == 0
    (row,) = json.loads(figures.read_text())["rows"]
    assert (row["name"], row["rounds"]) == ("run-demo", 1)
    assert row["results"]["linen by hand"]["seconds"] > 0
    assert "run-demo" in capsys.readouterr().out
    assert "| run-demo | linen by hand |" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row", "x*"], "benchmarks: there is no row 'x*'; --list says which there are"),
        (["--rounds", "0"], "benchmarks: --rounds is 0; it is at least 1"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmarks.main(options)
    assert capsys.readouterr().err == f"{message}\n"


def test_rows_are_listed(capsys) -> None:
    assert benchmarks.main(["--list", "--row", "lstm-*"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == len(set(names)) == 8
