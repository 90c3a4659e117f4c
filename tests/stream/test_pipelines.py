"""The streaming law for generated pipelines, of layers that remember and of held cells.

A run searches a few pipelines. ``HYPOTHESIS_PROFILE=thorough`` searches 1,000.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
from flax import linen as nn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from flax_extra.testing._plans import plans
from flax_extra.testing._streaming import _Checker
from tests.stream.toys import Attention, Conv, Positions, Sum

SPEC = "f32[b, t, 4]"
LEAST_DEPTH = 3
N_PIPELINES = {"fast": 4, "thorough": 1000}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 12)

PLAIN = st.one_of(
    st.builds(nn.Dense, st.just(4)),
    st.shared(st.builds(nn.Dense, st.just(4)), key="one layer at several places"),
    st.builds(nn.LayerNorm),
    testing.signatures(min_n_in=1).flatmap(testing.functions),
)
REMEMBERING = st.sampled_from(
    [
        Attention,
        functools.partial(Attention, window=2),
        Conv,
        Sum,
        Positions,
        lambda: cb.fn(xn.SelfAttention(2, causal=True), mask=None),
        functools.partial(xn.CausalConv, kernel_size=2),
        functools.partial(xn.LSTM, 4, return_sequences=True),
        functools.partial(xn.GRU, 4, return_sequences=True),
        xn.LinearRecurrence,
    ]
).map(lambda make: make())

MIXING = {"scan", "vmap", "cond", "switch", "fold"}
"""Words whose parts may mix steps, choose by them, or use one layer, with one state, twice."""

HELD = testing.pipelines(
    leaves=PLAIN, combinators={"hold", "serial", "residual", "branch", "dup"}, max_depth=2
).filter(lambda p: "hold" in repr(p))
PIPELINES = testing.pipelines(
    leaves=st.one_of(PLAIN, REMEMBERING, REMEMBERING, HELD),
    combinators=testing.COMBINATORS - MIXING - {"hold"},
    max_depth=4,
)


def find_depth(f: Any) -> int:
    if not isinstance(f, cb.Combinator):
        return 0
    return 1 + max((find_depth(child.target) for child in f.children), default=0)


def deepen(p: cb.Combinator) -> cb.Combinator:
    """Makes a pipeline that takes and gives something, and has the least depth."""
    p = testing.with_n_in(p, max(1, p.signature.n_in))
    if not p.signature.n_out:
        p = testing.with_one_output(p)
    while find_depth(p) < LEAST_DEPTH:
        p = cb.repeat(cb.residual(testing.with_one_output(testing.with_n_in(p, 1))), 2)
    return p


def has_empty_loop(f: Any) -> bool:
    if isinstance(f, cb.Repeat) and f.n == 0:
        return True
    return isinstance(f, cb.Combinator) and any(has_empty_loop(c.target) for c in f.children)


@settings(
    max_examples=N_PIPELINES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
@given(PIPELINES.map(deepen), st.data())
def test_blocks_are_the_whole(p: cb.Combinator, data: st.DataObject) -> None:
    assume(not has_empty_loop(p))  # JAX runs none without a compiler
    specs = [SPEC] * p.signature.n_in
    # Operations are compiled once for all pipelines, programs for one each.
    with jax.disable_jit():
        checker = _Checker(functools.partial(cb.stream, p, *specs), {}, None, None)
        plan = data.draw(plans(checker.takes_lengths, checker.can_reset))
        checker.check_outputs(plan)
        if plan.has_gradients:
            checker.check_gradients(plan)


def test_what_is_drawn() -> None:
    drawn = []

    @settings(max_examples=400, database=None, suppress_health_check=list(HealthCheck))
    @given(PIPELINES.map(deepen))
    def draw(p: cb.Combinator) -> None:
        drawn.append(p)

    draw()
    depths = list(map(find_depth, drawn))
    assert min(depths) == LEAST_DEPTH
    assert max(depths) > LEAST_DEPTH
    words = " ".join(map(repr, drawn))
    for word in ("hold(", "repeat(", "remat(", "residual(", "shared=True", "Attention(", "LSTM("):
        assert word in words
