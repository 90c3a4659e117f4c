"""The guide's page on meshes runs on 8 devices, and its figures are those of a compiled program."""

from __future__ import annotations

import doctest
import functools
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_extra import combinator as cb
from tests.mesh.programs import Collective, list_collectives, list_loops

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "more_than_one_device.md"

LAYER_BYTES = 176_177_152
ACTIVATION_BYTES = 2048 * 2048 * 4


@functools.cache
def run_page() -> tuple[dict[str, Any], int]:
    """What the page defines, and how many of its examples fail."""
    page = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    return page.globs, runner.run(page, clear_globs=False).failed


def test_the_examples_of_the_page_run() -> None:
    assert run_page()[1] == 0


def count_bytes(collectives: list[Collective], kind: str, *, least: int = 2**16) -> list[int]:
    """Of each collective of a kind the bytes, largest first; norms, which are small, left out."""
    sizes = (4 * c.size for c in collectives if c.kind == kind)
    return sorted((size for size in sizes if size >= least), reverse=True)


@pytest.mark.parametrize(("n_data", "n_model"), [(8, 1), (2, 4)])
def test_figures_are_those_of_the_compiled_program(n_data: int, n_model: int) -> None:
    page, _ = run_page()
    mesh = jax.make_mesh((n_data, n_model), ("data", "model"), (AxisType.Auto,) * 2)
    decoder, params, rules = page["decoder"], page["params"], page["decoder_rules"]
    where = cb.shardings(params, mesh, rules)
    tokens = jax.ShapeDtypeStruct((n_data, 2049), "i4", sharding=NamedSharding(mesh, P("data")))

    def loss(params: Any, tokens: Any) -> Any:
        logits = decoder.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data")]):
        step = jax.jit(jax.grad(loss), in_shardings=(where, tokens.sharding), out_shardings=where)
        program = step.lower(params, tokens).compile()
    held = page["count_bytes"](n_data, n_model) / 3  # without the moments
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(held, rel=1e-3)
    forward, backward = list_loops(list_collectives(program))
    for loop in (forward, backward):
        gathered = sum(count_bytes(loop, "all-gather"))
        assert gathered == pytest.approx(LAYER_BYTES / n_model, rel=1e-3)
    reduced, reduced_back = (count_bytes(loop, "all-reduce") for loop in (forward, backward))
    gradients = min(reduced_back, key=lambda size: abs(size - LAYER_BYTES / n_model))
    assert gradients == pytest.approx(LAYER_BYTES / n_model, rel=1e-3)
    reduced_back.remove(gradients)
    if n_model == 1:
        assert reduced == reduced_back == []
    else:
        assert reduced == [ACTIVATION_BYTES] * 2
        # Query, key and value; gate and up; and attention, which is computed again.
        n_arrays = [size // ACTIVATION_BYTES for size in reduced_back]
        assert n_arrays in ([3, 2, 1], [1, 1, 1])
