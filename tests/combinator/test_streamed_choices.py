"""``cond``, ``switch``, ``vmap`` and items for each copy in a stream: blocks are the whole."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 6, 4))
GROUPS = jax.random.normal(KEY, (2, 3, 6, 4))
LSTM = functools.partial(xn.LSTM, 4, return_sequences=True)
CONV = functools.partial(xn.CausalConv, 4, kernel_size=3)


def is_zero(x: Any) -> Any:
    """A choice that is the same for each block."""
    return x[0, 0, 0] * 0 == 0


def choose(f: Any, g: Any) -> cb.Combinator:
    return cb.branch(is_zero, cb.identity()) >> cb.cond(f, g)


PIPELINES = {
    "cond": choose(LSTM(), CONV()),
    "cond, else": cb.branch(lambda x: ~is_zero(x), cb.identity()) >> cb.cond(LSTM(), CONV()),
    "switch": cb.branch(lambda x: 1 + (0 * x[0, 0, 0]).astype(int), cb.identity())
    >> cb.switch(LSTM(), CONV(), nn.Dense(4)),
    "cond in repeat": cb.repeat(choose(LSTM(), CONV()), 2),
    "vmap": cb.vmap(LSTM(), 1),
    "ensemble": cb.vmap(CONV(), 1, shared=False),
    "repeat in vmap": cb.vmap(cb.repeat(CONV(), 2), 1, shared=False),
    "vmap in repeat": cb.repeat(cb.vmap(CONV(), 1), 2),
    "ensemble in two repeats": cb.repeat(cb.repeat(cb.vmap(CONV(), 1, shared=False), 2), 2),
    "cond in vmap in shared repeat": cb.repeat(cb.vmap(choose(CONV(), LSTM()), 1), 2, shared=True),
    "items for each copy": cb.parallel(cb.identity(), lambda: jnp.arange(1.0, 3.0))
    >> cb.repeat(cb.parallel(LSTM(), cb.identity()) >> cb.mul() >> cb.dup(), 2, n_carry=1)
    >> cb.dip(lambda states: states.sum(0))
    >> cb.add(),
    "vmap over time of what remembers nothing": cb.vmap(nn.Dense(4), 1) >> LSTM(),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_blocks_are_the_whole(name):
    p = PIPELINES[name]
    inputs, axis = (GROUPS, 2) if "vmap" in name or "ensemble" in name else (X, 1)
    if "over time" in name:
        inputs, axis = X, 1
    variables = {"params": p.init(KEY, inputs)["params"]}
    spec = "f32[b, 3, t, 4]" if axis == 2 else "f32[b, t, 4]"
    stream = cb.stream(p, spec)
    state, outputs = stream.start(2), []
    for first, last in ((0, 2), (2, 5), (5, 6)):
        block = jax.lax.slice_in_dim(inputs, first, last, axis=axis)
        state, y = stream.step(variables, state, block)
        outputs.append(y)
    whole = p.apply(variables, inputs)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis), whole, rtol=1e-5, atol=1e-6)


def test_a_branch_remembers_the_blocks_on_which_it_ran():
    p = cb.cond(LSTM(), nn.Dense(4))
    variables = {"params": p.init(KEY, True, X)["params"]}
    stream = cb.stream(p, "bool[]", "f32[b, t, 4]")
    state = stream.start(2)
    for is_first, block in ((True, X[:, :2]), (False, X[:, 2:5]), (True, X[:, 5:])):
        state, y = stream.step(variables, state, jnp.array(is_first), block)
    seen = jnp.concatenate([X[:, :2], X[:, 5:]], 1)
    np.testing.assert_allclose(y, p.apply(variables, True, seen)[:, 2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [1, -3])
def test_members_that_are_steps_cannot_remember(axis):
    p = cb.serial(cb.vmap(LSTM(), axis))
    with pytest.raises(cb.StreamError) as caught:
        cb.stream(p, "f32[b, t, 3, 4]")
    assert str(caught.value) == (
        "serial[0] -> vmap[0] -> LSTM cannot run piece by piece: vmap runs it on each step by "
        "itself, so it has none to remember. Map another axis."
    )


def test_members_that_are_rows_cannot_remember():
    with pytest.raises(ValueError, match="LSTM takes lengths") as caught:
        cb.stream(cb.vmap(LSTM(), 0), "f32[b, 3, t, 4]")
    assert "in vmap[0] -> LSTM" in caught.value.__notes__[0]
