"""Lengths, masks and initial states: from the stack, from context and by keyword, they are one."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn

KEY = jax.random.key(0)
BATCH, TIME, FEATURES = 2, 5, 4
PARAMETERS = ("lengths", "mask", "initial_state")
IN_STREAMS_ALONE = {"TrainablePositionalEncoding", "FourierPositionEncoding"}
"""Layers whose inputs are numbers, and whose lengths say where the rows of a stream stand."""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(BATCH, TIME, FEATURES)
LENGTHS = np.array([5, 2])
STATE = normal(BATCH, FEATURES, seed=1)
PAIR = (normal(BATCH, FEATURES, seed=2), normal(BATCH, FEATURES, seed=3))
MASK = np.array([[[1, 1, 0, 1, 0]], [[1, 0, 0, 0, 0]]], bool)
FRAMES = normal(BATCH, TIME, 6, 6, 3)
IMAGES = (normal(BATCH, 6, 6, FEATURES, seed=4), normal(BATCH, 6, 6, FEATURES, seed=5))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A layer, its inputs, and values for the parameters that may be inputs, too, in order."""

    layer: nn.Module
    inputs: tuple[Any, ...]
    more: Mapping[str, Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def recurrent(layer: Any, state: Any, **fields: Any) -> Case:
    return Case(layer(**fields), (X,), {"lengths": LENGTHS, "initial_state": state})


def convolution() -> nn.Module:
    return xn.CausalConv(FEATURES, kernel_size=2)


CASES = {
    f"{name}{', return_state' if fields['return_state'] else ''}": case
    for fields in ({"return_state": False}, {"return_state": True})
    for name, case in {
        "LSTM": recurrent(xn.LSTM, PAIR, d_hidden=FEATURES, **fields),
        "GRU": recurrent(xn.GRU, STATE, d_hidden=FEATURES, **fields),
        "LinearRecurrence": recurrent(xn.LinearRecurrence, STATE, **fields),
        "Recurrent of one": recurrent(xn.Recurrent, STATE, cell=nn.GRUCell(FEATURES), **fields),
        "Recurrent of two": recurrent(
            xn.Recurrent, PAIR, cell=nn.OptimizedLSTMCell(FEATURES), **fields
        ),
        "Recurrent over images": Case(
            xn.Recurrent(nn.ConvLSTMCell(FEATURES, kernel_size=(3, 3)), **fields),
            (FRAMES,),
            {"lengths": LENGTHS, "initial_state": IMAGES},
        ),
    }.items()
} | {
    "SelfAttention": Case(xn.SelfAttention(2), (X,), {"mask": MASK}),
    "Attention": Case(xn.Attention(2), (X, X + 1), {"mask": MASK}),
    "KVQAttention": Case(xn.KVQAttention(2), (X, X + 1), {"mask": MASK}),
    "CausalConv": Case(xn.CausalConv(FEATURES, kernel_size=2), (X,), {"lengths": LENGTHS}),
    "Encoding": Case(
        xn.Encoding(preprocessing=convolution),
        (X,),
        {"lengths": LENGTHS},
        fixed={"output_positions": None},
    ),
    "Decoding": Case(xn.Decoding(convolution), (X,), {"lengths": LENGTHS}),
}


def chosen(case: Case) -> list[dict[str, Any]]:
    """Every selection of the parameters that may be inputs."""
    names = list(case.more)
    several = [itertools.combinations(names, n) for n in range(len(names) + 1)]
    return [{n: case.more[n] for n in some} for some in itertools.chain(*several)]


def items_of(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, expected)


def test_no_layer_is_missing():
    listed = {type(case.layer).__name__ for case in CASES.values()}
    for name in xn.__all__:
        layer = getattr(xn, name)
        if inspect.isclass(layer) and issubclass(layer, nn.Module):
            parameters = inspect.signature(layer.__call__).parameters
            if layer.__name__ not in listed | IN_STREAMS_ALONE:
                assert not set(PARAMETERS) & parameters.keys(), name


@pytest.mark.parametrize("name", CASES)
def test_stack_context_and_keyword_are_one(name):
    case = CASES[name]
    absent = dict.fromkeys(case.more)
    plain = cb.fn(case.layer, **absent)
    variables = {"params": plain.init(KEY, *case.inputs)["params"]}
    inner = {"params": next(iter(variables["params"].values()))}
    for given in chosen(case):
        expected = case.layer.apply(inner, *case.inputs, **(absent | given))
        items = [item for value in given.values() for item in items_of(value)]
        unused = dict(case.fixed) | {n: None for n in case.more if n not in given}

        from_stack = cb.fn(case.layer, n_in=len(case.inputs) + len(items), **unused)
        assert from_stack.signature.n_in == len(case.inputs) + len(items)
        assert from_stack.signature.n_out == plain.signature.n_out
        assert not from_stack.keywords & given.keys()
        assert_same(from_stack.apply(variables, *case.inputs, *items), expected)
        assert_same((from_stack >> cb.identity()).apply(variables, *case.inputs, *items), expected)

        bound = {n: cb.context(f"the_{n}", default=None) for n in case.more} | case.fixed
        context = {f"the_{n}": value for n, value in given.items()}
        from_context = cb.fn(case.layer, **bound)
        assert_same(from_context.apply(variables, *case.inputs, **context), expected)


def test_lengths_pass_from_layer_to_layer():
    tower = cb.repeat(cb.keep(cb.fn(xn.LSTM(FEATURES, return_sequences=True), n_in=2)), 3)
    (y, lengths), variables = tower.init_with_output(KEY, X, LENGTHS)
    np.testing.assert_array_equal(lengths, LENGTHS)
    assert not np.any(y[1, 2:])
    by_keyword = cb.repeat(xn.LSTM(FEATURES, return_sequences=True), 3)
    np.testing.assert_array_equal(y, by_keyword.apply(variables, X, lengths=LENGTHS))


def test_shapes_name_what_comes_from_the_stack():
    lstm = cb.fn(xn.LSTM(8, return_state=True), n_in=4)
    found = cb.shape_signature(lstm, "f32[b, t, 4]", "i32[b]", "f32[b, 8]", "f32[b, 8]")
    assert str(found) == (
        "f32[b, t, 4], i32[b], f32[b, 8], f32[b, 8] -> f32[b, 8], f32[b, 8], f32[b, 8]"
    )
    assert str(lstm) == "fn(LSTM(d_hidden=8, return_state=True), n_in=4)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: cb.fn(xn.LSTM(4, return_state=True), n_in=3),
            (
                "cb.fn(f, n_in=3): LSTM takes 1 to 4 items off the stack. Correct n_in, or bind a "
                "parameter: cb.fn(f, name=value)."
            ),
        ),
        (
            lambda: cb.fn(xn.GRU(4, return_state=True), n_in=4),
            (
                "cb.fn(f, n_in=4): GRU takes 1 to 3 items off the stack. Correct n_in, or bind a "
                "parameter: cb.fn(f, name=value)."
            ),
        ),
        (
            lambda: cb.fn(xn.GRU(4, return_state=True), n_in=0),
            "cb.fn(f, n_in=0) contradicts GRU, whose signature has n_in=1. Leave n_in out.",
        ),
        (
            lambda: cb.fn(xn.LSTM(4, return_state=True), n_in=2, n_out=1),
            "cb.fn(f, n_out=1) contradicts LSTM, whose signature has n_out=3. Leave n_out out.",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(build, message):
    with pytest.raises(cb.SignatureError, match=f"^{re.escape(message)}$"):
        build()
