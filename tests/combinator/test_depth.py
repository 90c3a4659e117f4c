"""How deep an expression is does not show in Python's stack: neither in its limit nor in its frames."""

from __future__ import annotations

import inspect
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
