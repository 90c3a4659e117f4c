"""Summaries: the data, its numbers against linen's, and the table."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from rich.console import Console

from flax_extra import combinator as cb
from flax_extra import layer as xn

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
KEY = jax.random.key(0)


def deep(n: int) -> cb.Combinator:
    blocks = [cb.residual(nn.LayerNorm(), nn.Dense(16), nn.relu) for _ in range(n // 3)]
    return nn.Embed(256, 16) >> cb.serial(blocks) >> nn.LayerNorm()


def demo(monkeypatch: pytest.MonkeyPatch) -> cb.Combinator:
    monkeypatch.syspath_prepend(EXAMPLES)
    from digits_autoencoder import autoencoder

    model: cb.Combinator = autoencoder(label_mask_rate=0.5)
    return model


def tabulated(model: nn.Module, *inputs: Any) -> int:
    """What ``nn.tabulate`` counts."""
    table = model.tabulate(KEY, *inputs, console_kwargs={"width": 400})
    total = re.search(r"Total Parameters: ([\d,]+)", table)
    assert total is not None
    return int(total[1].replace(",", ""))


def test_the_counts_of_the_demo_model_are_those_of_linen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo(monkeypatch)
    summary = cb.summary(model, "f32[b, 8, 8]", "i32[b]")
    expected = tabulated(model, jnp.ones((1, 8, 8)), jnp.ones(1, int))
    assert summary.root.parameters == expected
    assert summary.totals == {"params": (expected, 4 * expected)}
    assert max(map(len, str(summary).splitlines())) <= 120


def test_the_counts_of_sixty_layers_are_those_of_linen() -> None:
    model = deep(60)
    summary = cb.summary(model, "i32[b, t]")
    assert summary.root.parameters == tabulated(model, jnp.ones((1, 4), int))
    assert len(str(summary).splitlines()) > 80
    assert max(map(len, str(summary).splitlines())) <= 120


def test_the_counts_of_each_step_sum_to_its_own() -> None:
    embed = nn.Embed(9, 8)
    tower = cb.repeat(cb.residual(nn.Dense(8)), 5, name="tower")
    model = embed >> tower >> cb.branch(nn.Dense(8), nn.Dense(2)) >> embed.attend
    root = cb.summary(model, "i32[b, t]").root
    for step in (root, *root.steps()):
        if step.children:
            assert step.parameters == sum(child.parameters for child in step.children)


def test_what_a_step_says() -> None:
    model = cb.serial(nn.Dense(4), cb.residual(nn.Dense(4)), name="body")
    root = cb.summary(model, "f32[b, 3]", "i32[b]").root
    residual = root.children[1]
    (dense, shortcut) = residual.children
    assert (root.name, root.path, root.position) == ("body", ("body",), ())
    assert residual.path == ("body[1]", "residual")
    assert dense.path == ("body[1]", "residual[0]", "Dense")
    assert (dense.position, shortcut.position) == ((1, 0), (1, 1))
    assert dense.signature == cb.Signature(1, 1)
    assert [item.shape[1:] for item in residual.before] == [(4,), ()]
    assert residual.after == residual.before
    assert (dense.parameters, dense.bytes) == (20, 80)
    assert [step.name for step in root.steps()] == [
        "Dense(features=4)", "residual", "Dense(features=4)", "identity()",
    ]  # fmt: skip


def test_shared_parameters_count_once() -> None:
    embed = nn.Embed(9, 8)
    first, second = cb.summary(embed >> cb.fn(embed.attend), "i32[b]").root.children
    assert (first.parameters, first.shared) == (72, False)
    assert (second.parameters, second.shared) == (0, True)
    assert "shared" in str(cb.summary(embed >> cb.fn(embed.attend), "i32[b]"))


def test_copies_are_counted() -> None:
    twice = cb.summary(
        cb.repeat(nn.Dense(8), 6) >> cb.repeat(nn.Dense(8), 6, shared=True), "f32[8]"
    )
    stacked, shared = twice.root.children
    assert (stacked.name, stacked.parameters) == ("repeat x6", 6 * 72)
    assert (shared.name, shared.parameters) == ("repeat x6, shared", 72)
    assert stacked.children[0].parameters == 6 * 72


def test_lifted_steps_are_looked_into() -> None:
    model = cb.scan(cb.serial(cb.dip(nn.Dense(8)), cb.add(), cb.dup()))
    names = [
        step.name for step in cb.summary(cb.remat(model), "f32[b, 8]", "f32[b, t, 8]").root.steps()
    ]
    assert names == ["scan", "serial", "dip", "Dense(features=8)", "add()", "dup()"]


def test_what_declares_is_the_step_that_it_declares() -> None:
    inner = cb.typed(cb.serial(nn.Dense(3), nn.relu), "f32[b, 8] -> f32[b, 3]")
    model = cb.serial(inner, cb.fn(nn.Dropout(0.1), deterministic=True))
    names = [step.name for step in cb.summary(model, "f32[b, 8]").root.steps()]
    assert names == [
        "serial", "Dense(features=3)", "relu", "fn(Dropout(rate=0.1), deterministic=True)",
    ]  # fmt: skip


def test_other_collections_are_counted_apart() -> None:
    model = cb.serial(nn.Dense(4), nn.BatchNorm(use_running_average=False))
    summary = cb.summary(model, "f32[b, 3]")
    assert summary.totals == {"params": (24, 96), "batch_stats": (8, 32)}
    assert "batch_stats" in str(summary)


def test_rngs_are_supplied_and_context_is_passed() -> None:
    model = cb.serial(nn.Dense(4), nn.Dropout(0.5), xn.TrainablePositionalMasking(0.5))
    for deterministic in (True, False):
        summary = cb.summary(model, "f32[b, t, 3]", deterministic=deterministic)
        assert summary.error is None


def test_any_callable() -> None:
    assert cb.summary(nn.relu, "f32[b]").root.name == "relu"
    lstm = cb.summary(xn.LSTM(8), "f32[b, t, 4]")
    assert (lstm.root.name, lstm.root.parameters) == ("LSTM(d_hidden=8)", 416)


def test_a_failing_step_is_the_last_one() -> None:
    wrong = cb.serial(nn.Dense(5), cb.residual(nn.LayerNorm(), nn.Dense(3)), nn.Dense(2))
    summary = cb.summary(wrong, "f32[b, 4]")
    *_, last = summary.root.steps()
    assert isinstance(summary.error, TypeError)
    assert last.error is summary.error
    assert (last.name, last.path) == ("add", ("serial[1]", "residual", "add"))
    assert (
        str(summary)
        == """\
  step                    signature   stack after                                                    parameters   size
 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
  inputs                              f32[b, 4]
  serial                  1 -> 1      failed
    Dense(features=5)     1 -> 1      f32[b, 5]
    residual              1 -> 1      failed
      LayerNorm()         1 -> 1      f32[b, 5]
      Dense(features=3)   1 -> 1      f32[b, 3]
      add                 2 -> 1      TypeError: add got incompatible shapes for broadcasting: (b,
                                      3), (b, 5)."""
    )


def test_a_missing_input_fails_at_its_step() -> None:
    summary = cb.summary(nn.Dense(4) >> cb.add(), "f32[b, 4]")
    *_, last = summary.root.steps()
    assert last.name == "add()"
    assert isinstance(last.error, cb.SignatureError)


def test_an_unknown_keyword_fails_at_the_root() -> None:
    summary = cb.summary(nn.Dense(4) >> cb.dup(), "f32[b, 4]", nonsense=1)
    assert isinstance(summary.root.error, TypeError)
    assert "nonsense" in str(summary)


def test_the_table() -> None:
    attention = cb.keep(cb.residual(nn.LayerNorm(), xn.SelfAttention(4)))
    model = nn.Embed(256, 64) >> attention >> nn.relu
    table = str(cb.summary(model, "i32[b, t]", "bool[b, t, t]"))
    assert (
        table
        == """\
  step                                       signature   stack after                    parameters       size
 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
  inputs                                                 i32[b, t], bool[b, t, t]
  serial                                     2 -> 2      f32[b, t, 64], bool[b, t, t]       33,152   132.6 kB
    Embed(num_embeddings=256, features=64)   1 -> 1      f32[b, t, 64], bool[b, t, t]       16,384    65.5 kB
    keep                                     2 -> 2      f32[b, t, 64], bool[b, t, t]       16,768    67.1 kB
      residual                               2 -> 1      f32[b, t, 64], bool[b, t, t]       16,768    67.1 kB
        LayerNorm()                          1 -> 1      f32[b, t, 64], bool[b, t, t]          128      512 B
        SelfAttention(n_heads=4)             2 -> 1      f32[b, t, 64]                      16,640    66.6 kB
    relu                                     1 -> 1      f32[b, t, 64], bool[b, t, t]

  total                                                                                     33,152   132.6 kB"""
    )


def test_it_shows_itself_in_notebooks_and_on_consoles() -> None:
    summary = cb.summary(nn.Dense(4), "f32[b, 3]")
    html = summary._repr_html_()
    assert html.startswith("<pre")
    assert "Dense(features=4)" in html
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary)
    assert "Dense(features=4)" in console.export_text()


def test_a_name_that_looks_like_markup_is_text() -> None:
    model = cb.serial(nn.relu, name="[red]body[/red]")
    assert "[red]body[/red]" in str(cb.summary(model, "f32[b]"))


# What a stream remembers.


def _decoder(**fields: Any) -> cb.Combinator:
    attention = cb.fn(xn.SelfAttention(n_heads=2, causal=True, **fields), mask=None)
    return nn.Embed(9, 8) >> cb.repeat(cb.residual(attention), 3)


def test_state_is_shown_for_a_batch_and_a_capacity() -> None:
    summary = cb.summary(_decoder(), "i32[2, 16]", decode=True)
    state = cb.stream(_decoder(), "i32[b, t]", capacity=16).state_shapes(2).cache
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert summary.root.state == n_bytes == 3 * (2 * 2 * 16 * 8 * 4 + 2 * 4)
    embed, repeat = summary.root.children
    assert (embed.state, repeat.state) == (0, n_bytes)
    assert str(summary).splitlines()[0].split()[-1] == "state"
    assert str(summary).splitlines()[-1].split()[-2:] == ["6.2", "kB"]


def test_state_has_the_names_of_sizes() -> None:
    summary = cb.summary(_decoder(), "i32[b, t]", decode=True)
    assert str(summary.root.state) == "192*b*t + 12*b"
    assert str(summary).splitlines()[-1].endswith("192*b*t + 12*b B")


def test_without_decode_there_is_no_state() -> None:
    summary = cb.summary(_decoder(), "i32[2, 16]")
    assert summary.root.state == 0
    assert "state" not in str(summary)


def test_a_shape_signature_tells_what_is_remembered() -> None:
    shapes = cb.shape_signature(_decoder(), "i32[b, t]", decode=True)
    assert str(shapes) == "i32[b, t] -> f32[b, t, 8], remembers 192*b*t + 12*b bytes"
    assert shapes == cb.shape_signature(_decoder(), "i32[b, t]")
    assert pickle.loads(pickle.dumps(shapes)) == shapes
    window = cb.shape_signature(_decoder(window=4), "i32[2, 16]", decode=True)
    assert str(window) == "i32[2, 16] -> f32[2, 16, 8], remembers 1560 bytes"
