"""What size costs: no frames of Python however deep, and no more calls than there are steps."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb


def nested(f: Any, levels: int) -> cb.Combinator:
    for _ in range(levels):
        f = cb.residual(f)
    return cb.serial(f)


def frames(levels: int) -> int:
    """How many frames of Python are open where the innermost function runs."""
    found: list[int] = []

    def here(x: Any) -> Any:
        found.append(len(inspect.stack(0)))
        return x

    nested(here, levels)(1.0)
    return found[0]


@pytest.mark.parametrize("levels", [1, 2, 40])
def test_a_level_costs_no_frame(levels: int) -> None:
    assert frames(levels) == frames(0)


def test_three_hundred_levels() -> None:
    x = jnp.ones((1, 2))
    p = nested(nn.Dense(2, kernel_init=nn.initializers.zeros), 300)
    y, variables = p.init_with_output(jax.random.key(0), x)
    assert y.tolist() == [[300.0, 300.0]]
    assert p.apply(variables, x).tolist() == y.tolist()


def in_series(layers: int) -> cb.Combinator:
    pipeline = cb.serial()
    for _ in range(layers):
        pipeline >>= cb.residual(nn.Dense(4), jnp.tanh)
    return pipeline


def calls(f, *arguments) -> int:
    """How many of Python's functions are called."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        f(*arguments)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    "build", [functools.partial(nested, jnp.tanh), in_series], ids=["deep", "wide"]
)
@pytest.mark.parametrize(
    "use",
    [
        str,
        hash,
        lambda p: p == copy.deepcopy(p),
        lambda p: jax.eval_shape(p.init, jax.random.key(0), jnp.ones((2, 4))),
        lambda p: cb.shape_signature(p, "f32[b, 4]"),
        lambda p: str(cb.summary(p, "f32[b, 4]")),
        lambda p: cb.diagram(p).svg,
    ],
    ids=["str", "hash", "eq", "init", "shapes", "summary", "diagram"],
)
def test_twice_the_layers_cost_twice_the_calls(build, use):
    use(build(20))  # what is cached once and for all
    few, many = build(20), build(40)
    assert calls(use, many) < 2.5 * calls(use, few)


@pytest.mark.parametrize(
    "build", [functools.partial(nested, jnp.tanh), in_series], ids=["deep", "wide"]
)
def test_building_is_linear(build):
    build(40)
    assert calls(build, 40) < 2.5 * calls(build, 20)
