"""Errors of streams say what was asked, what was found and what to do. The wording is pinned here."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra.combinator._core import stream_errors
from tests.stream.toys import Attention, Conv, Memory, Sum, draw

KEY = jax.random.key(0)
X = draw(2, 3, 4)
SPEC = "f32[b, t, 4]"
ROWS = np.zeros(2, np.float32)


class Cached(nn.Module):
    """A layer that does one thing with its cache."""

    use: Callable[[cb.Cache, Any], Any]

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        return self.use(cb.Cache(self, x, decode=decode, lengths=lengths), x)


def run_blocks(use: Callable[[cb.Cache, Any], Any], *blocks: Any) -> None:
    """Runs a layer on blocks, with a state for blocks such as X."""
    layer = Cached(use)
    state = layer.init(KEY, X, decode=True)
    for block in blocks:
        _, state = layer.apply(state, block, decode=True, mutable=["cache"])


def init(layer: nn.Module, *inputs: Any, **keywords: Any) -> Any:
    return layer.init(KEY, *inputs, **keywords)


def stream(layer: Any = None, spec: str = SPEC, **options: Any) -> cb.Stream:
    return cb.stream(Sum() if layer is None else layer, spec, **options)


def step(*inputs: Any, stream: cb.Stream | None = None, rows: int = 2, **keywords: Any) -> Any:
    """Takes the first step of a stream; that of a Sum by default."""
    stream = cb.stream(Sum(), SPEC) if stream is None else stream
    variables = {"params": {"scale": jnp.ones(())}}
    return stream.step(variables, stream.start(rows), *inputs, **keywords)


def step_attention(block: Any, position: int = 0, **keywords: Any) -> None:
    """Takes a step of a stream that has room for 4, from a position."""
    stream = cb.stream(Attention(), SPEC, capacity=4)
    state = dataclasses.replace(stream.start(2), position=np.full(2, position, np.int32))
    stream.step({}, state, block, **keywords)


class Late(nn.Module):
    """Makes a state while the stream runs."""

    @nn.compact
    def __call__(self, x, *, decode=False):
        if decode and not self.is_initializing():
            self.variable("cache", "late", jnp.zeros, (2,))
        cache = cb.Cache(self, x, decode=decode)
        cache.keep("last", cache.recall("last", x[:, 0]))
        return x


class Held(nn.Module):
    """Keeps a state of its own making, without a Cache."""

    shape: Callable[[int], tuple[int, ...]]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, decode=False):
        if decode:
            state = self.variable("cache", "s", jnp.zeros, self.shape(x.shape[0]), self.dtype)
            if not self.is_initializing():
                state.value = jnp.zeros(state.value.shape)
        return x


class Twice(nn.Module):
    """Uses one layer twice."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        total = Sum()
        once = total(x, decode=decode, lengths=lengths)
        return total(once, decode=decode, lengths=lengths)


ONE = Sum()


def hold_last() -> cb.Combinator:
    """Gives the last step of a block, without a time axis."""
    return cb.hold(cb.fn(lambda s, x: (s, x[:, -1]), n_out=2), lambda x: jnp.zeros((2,)))


def run_hold_with_lengths() -> None:
    hold = hold_last()
    state = hold.init(KEY, X, decode=True)
    hold.apply(state, X, decode=True, lengths=np.array([1, 2]), mutable=["cache"])


CASES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "decode_is_no_bool",
        lambda: init(Sum(), X, decode=1),
        TypeError,
        (
            "Sum takes True or False for decode, because another program runs in each case; got 1. "
            "Make it a static argument of jax.jit, or bind it with functools.partial."
        ),
    ),
    (
        "no_block",
        lambda: init(Sum(), X[0, 0]),
        ValueError,
        "Sum takes a block of axes [batch, time, ...]; got f32[4].",
    ),
    (
        "wrong_lengths",
        lambda: init(Sum(), X, lengths=np.array([1, 2, 3])),
        ValueError,
        "Sum takes lengths as integers, one for each sequence, of shape [2]; got i32[3].",
    ),
    (
        "wrong_lengths",
        lambda: step(X, lengths=[1.0, 2.0]),
        ValueError,
        "The stream takes lengths as integers, one for each sequence, of shape [2]; got f32[2].",
    ),
    (
        "lengths_beyond_block",
        lambda: init(Sum(), X, lengths=np.array([4, -1])),
        ValueError,
        "Sum takes lengths from 0 to 3, the number of steps of its inputs; got 4, -1.",
    ),
    (
        "lengths_beyond_block",
        lambda: step(X, lengths=[4, 1]),
        ValueError,
        "The stream takes lengths from 0 to 3, the number of steps of its inputs; got 4.",
    ),
    (
        "no_state",
        lambda: Sum().apply(init(Sum(), X), X, decode=True),
        cb.StreamError,
        (
            "Sum was called with decode=True, and there is no state for it to go on from: no 'total' "
            "in the collection 'cache'. Start a stream, stream = cb.stream(pipeline, ...), state = "
            "stream.start(...), and call stream.step(variables, state, ...)."
        ),
    ),
    (
        "fixed_state",
        lambda: Sum().apply(init(Sum(), X, decode=True), X, decode=True),
        cb.StreamError,
        (
            "Sum was called with decode=True, and may not change its state: the collection 'cache' is "
            "not mutable. Use stream.step(variables, state, ...), or apply(..., decode=True, "
            "mutable=['cache'])."
        ),
    ),
    (
        "other_state",
        lambda: run_blocks(lambda cache, x: cache.recall("s", x[:, 0]), draw(2, 3, 5)),
        cb.StreamError,
        (
            "Cached keeps its state 's' as f32[2, 4]; got f32[2, 5]. A state keeps its shapes and "
            "dtypes, and serves the model and the batch size that it was started for."
        ),
    ),
    (
        "other_state",
        lambda: run_blocks(lambda cache, x: cache.positions, draw(3, 3, 4)),
        cb.StreamError,
        (
            "Cached keeps its state 'position' as i32[2]; got i32[3]. A state keeps its shapes and "
            "dtypes, and serves the model and the batch size that it was started for."
        ),
    ),
    (
        "other_state",
        lambda: run_blocks(lambda cache, x: cache.append("s", x), draw(2, 3, 5)),
        cb.StreamError,
        (
            "Cached keeps its state 's' as f32[2, 3, 4]; got f32[2, 3, 5]. A state keeps its shapes "
            "and dtypes, and serves the model and the batch size that it was started for."
        ),
    ),
    (
        "other_state",
        lambda: run_blocks(
            lambda cache, x: (cache.recall("s", ROWS), cache.keep("s", ROWS.astype(bool))), X
        ),
        cb.StreamError,
        (
            "Cached keeps its state 's' as f32[2]; got bool[2]. A state keeps its shapes and dtypes, "
            "and serves the model and the batch size that it was started for."
        ),
    ),
    (
        "no_batch_in_state",
        lambda: run_blocks(lambda cache, x: cache.recall("s", {"a": ROWS, "b": 0.0})),
        cb.StreamError,
        (
            "Cached keeps a state for each row of the batch, so that its first axis has size 2; the "
            "initial state 's' is 0.0."
        ),
    ),
    (
        "no_batch_in_value",
        lambda: run_blocks(lambda cache, x: cache.remember("s", jnp.ones((3, 1)))),
        ValueError,
        (
            "Cached remembers a value for each row of the batch, so that its first axis has size 2; "
            "the value 's' is f32[3, 1]."
        ),
    ),
    (
        "nothing_given",
        lambda: Memory().apply({}, X, None),
        cb.StreamError,
        (
            "Memory got None for 'memory', and has no earlier block to remember it from. Give it when "
            "initializing, in calls without decode, and in the first block of a stream."
        ),
    ),
    (
        "value_not_given",
        lambda: step(X, None, stream=cb.stream(Memory(), SPEC, "f32[b, 4]")),
        cb.StreamError,
        (
            "Memory got None for 'memory', and rows 0, 1 were not given it before. Give it in the "
            "first block of a row, also after a reset."
        ),
    ),
    (
        "other_value",
        lambda: run_blocks(lambda cache, x: cache.remember("s", x), X, X[:, :2]),
        cb.StreamError,
        (
            "Cached remembers 's' of shape (2, 3, 4), as when the stream was made; got shape (2, 2, "
            "4). What is remembered as a whole does not grow from block to block."
        ),
    ),
    (
        "not_recalled",
        lambda: init(Cached(lambda cache, x: cache.keep("s", ROWS)), X, decode=True),
        ValueError,
        (
            "Cached keeps a state 's' that it did not recall. Call Cache.recall('s', initial) first: "
            "it says what the state is at the start."
        ),
    ),
    (
        "nothing_to_read",
        lambda: Cached(lambda cache, x: cache.read("s")).apply({}, X),
        ValueError,
        (
            "Cached reads 's', and put nothing under that name in this call. Call Cache.append('s', "
            "steps) or Cache.remember('s', value) first."
        ),
    ),
    (
        "other_steps",
        lambda: Cached(lambda cache, x: cache.append("s", x[:, :1])).apply({}, X),
        ValueError,
        (
            "Cached remembers steps of its block, and the Cache was made for inputs with axes "
            "[batch=2, time=3]; the steps 's' are f32[2, 1, 4]."
        ),
    ),
    (
        "other_steps",
        lambda: Cached(lambda cache, x: cache.extend("s", x[:1], 2)).apply({}, X),
        ValueError,
        (
            "Cached remembers steps of its block, and the Cache was made for inputs with axes "
            "[batch=2, time=3]; the steps 's' are f32[1, 3, 4]."
        ),
    ),
    (
        "no_floats",
        lambda: Cached(lambda cache, x: cache.append("s", x.astype(int))).apply({}, X),
        TypeError,
        (
            "Cached appends floats to its state 's', because a row that runs over the capacity is "
            "marked by NaN; got i32[2, 3, 4]. Remember a fixed number of steps with Cache.extend."
        ),
    ),
    (
        "long_block",
        lambda: run_blocks(lambda cache, x: cache.append("s", x), draw(2, 5, 4)),
        cb.StreamError,
        (
            "Cached remembers 3 steps, and the block has 5. Start the stream with a larger capacity: "
            "cb.stream(..., capacity=5)."
        ),
    ),
    (
        "over_capacity",
        lambda: run_blocks(lambda cache, x: cache.append("s", x), X[:, :2], X[:, :2]),
        cb.StreamError,
        (
            "Cached remembers 3 steps, and a block of 2 runs over them: row 0 is at position 2, row 1 "
            "is at position 2. Start the stream with a larger capacity: cb.stream(..., capacity=...)."
        ),
    ),
    (
        "new_state",
        lambda: stream(Late()),
        cb.StreamError,
        (
            "A layer made the state 'late' while the stream ran. State is made when the stream starts: "
            "make it while initializing with decode=True, too."
        ),
    ),
    (
        "new_state",
        lambda: stream(cb.repeat(Late(), 2)),
        cb.StreamError,
        (
            "A layer made the state 'Late_0/late' while the stream ran. State is made when the stream "
            "starts: make it while initializing with decode=True, too."
        ),
    ),
    (
        "hold_children",
        lambda: cb.Hold(cb.serial(abs).children),
        TypeError,
        ("hold takes two callables, f and initial; got 1. Put several in series: cb.serial(...)."),
    ),
    (
        "hold_arity",
        lambda: cb.hold(abs, jnp.zeros_like),
        cb.SignatureError,
        (
            "hold takes f from (state.., x..) to (state.., y..) with at least one x, and initial from "
            "the first x.. to state..; got f abs with signature 1 -> 1 and initial zeros_like with "
            "signature 1 -> 1. Let f take and give each item that initial gives."
        ),
    ),
    (
        "no_time_to_hold",
        lambda: cb.hold(cb.fn(max, 2, 2), abs, axis=2)(X[0]),
        cb.SignatureError,
        (
            "hold takes sequences with a batch axis and time on axis 2, and an input has no room for "
            "them.\n"
            "  stack: f32[3, 4]\n"
            "  Choose the axis that holds time: cb.hold(f, initial, axis=...)."
        ),
    ),
    (
        "no_step_to_hold",
        run_hold_with_lengths,
        cb.SignatureError,
        (
            "hold runs on one step at a time, because lengths are given, and must give one step of "
            "each output on axis 1; it gave f32[2, 4].\n"
            "  stack: f32[2], f32[2, 1, 4]\n"
            "  Choose the axis that holds time: cb.hold(f, initial, axis=...), or leave lengths out."
        ),
    ),
    (
        "cannot_go_on",
        lambda: stream(cb.serial(Sum(), cb.residual(nn.Conv(4, [3])))),
        cb.StreamError,
        (
            "serial[1] -> residual[0] -> Conv cannot run piece by piece: its kernel of 3 steps needs "
            "steps that are not in the block. Use xn.CausalConv, which sees the past alone and "
            "remembers it."
        ),
    ),
    (
        "time_sizes_parameter",
        lambda: stream(cb.serial(nn.DenseGeneral(3, axis=(1, 2)))),
        cb.StreamError,
        (
            "The length of the block sizes the parameter DenseGeneral_0/kernel: it is f32[1, 4, 3] for "
            "one block and f32[2, 4, 3] for a longer one. A layer that mixes all steps cannot run "
            "piece by piece."
        ),
    ),
    (
        "shared_state",
        lambda: stream(cb.serial(ONE, cb.residual(ONE))),
        cb.StreamError,
        (
            "One instance of Sum is used at serial[0] -> Sum and at serial[1] -> residual[0] -> Sum, "
            "and would remember one state for both. Make a second instance; to share parameters, use "
            "cb.repeat(..., shared=True), which keeps a state for each copy."
        ),
    ),
    (
        "shared_state",
        lambda: stream(Twice()),
        cb.StreamError,
        (
            "One instance of Sum is used twice in Twice -> Sum_0, and would remember one state for "
            "both. Make a second instance; to share parameters, use cb.repeat(..., shared=True), which "
            "keeps a state for each copy."
        ),
    ),
    (
        "no_such_name",
        lambda: stream(spec="f32[b, 3, 4]"),
        ValueError,
        (
            "A stream needs to know the axis of time of its inputs: no dimension of f32[b, 3, 4] is "
            "called 't'. Write specs such as 'f32[b, t, 64]', or say the name: cb.stream(..., "
            "time=...)."
        ),
    ),
    (
        "no_such_name",
        lambda: stream(spec="f32[2, t, 4]"),
        ValueError,
        (
            "A stream needs to know the axis of batch of its inputs: no dimension of f32[2, t, 4] is "
            "called 'b'. Write specs such as 'f32[b, t, 64]', or say the name: cb.stream(..., "
            "batch=...)."
        ),
    ),
    (
        "unsatisfied",
        lambda: stream(spec="f32[b, t, d] where t >= 8", capacity=4),
        ValueError,
        "No sizes satisfy 't >= 8' with 4 steps of time. Choose another capacity.",
    ),
    (
        "one_state_for_all",
        lambda: (s := stream(Held(lambda batch: (3,)))).reset(s.start(2), [0]),
        cb.StreamError,
        (
            "Rows cannot be started anew by themselves: the state s is one for all rows. Let the layer "
            "keep a state for each row, as cb.Cache does."
        ),
    ),
    (
        "unknown_sizes",
        lambda: stream(spec="f32[b, t, d]").start(2, d=4, s=3),
        TypeError,
        (
            "start takes sizes for the names in the specs other than batch and time, here 'd'; got 'd', "
            "'s'."
        ),
    ),
    (
        "unknown_sizes",
        lambda: stream().start(2, t=3),
        TypeError,
        (
            "start takes sizes for the names in the specs other than batch and time, here none; got "
            "'t'."
        ),
    ),
    (
        "missing_sizes",
        lambda: stream(spec="f32[b, t, d]").start(2),
        TypeError,
        (
            "start needs a size for 'd'. Give the batch first and others by name, as in "
            "stream.start(8, s=77)."
        ),
    ),
    (
        "missing_sizes",
        lambda: stream().start(),
        TypeError,
        "start needs the number of rows of the batch, as in stream.start(8).",
    ),
    (
        "needs_capacity",
        lambda: stream(cb.residual(Attention())),
        cb.StreamError,
        (
            "The stream remembers as many steps as it has room for: its state Attention_0/keys is "
            "f32[2, 1, 2, 2] for one step, f32[2, 2, 2, 2] for more. Say how many: cb.stream(..., "
            "capacity=...)."
        ),
    ),
    (
        "rows_of_state",
        lambda: stream(Held(lambda batch: (batch, batch))),
        cb.StreamError,
        (
            "A stream keeps one row of state for each row of the batch; its state s is f32[2, 2], with "
            "more than one axis, or other sizes, that follow the batch."
        ),
    ),
    (
        "changing_state",
        lambda: stream(Held(lambda batch: (batch,), jnp.bfloat16)),
        cb.StreamError,
        (
            "A step changes its state s from bf16[2] to f32[2]. A state keeps its shapes and dtypes, "
            "so that one program serves all steps: give the layer that keeps it a fixed dtype."
        ),
    ),
    (
        "changing_state",
        lambda: stream(cb.repeat(Held(lambda batch: (batch,), jnp.bfloat16), 2)),
        cb.StreamError,
        (
            "A step changes its state of one copy from bf16[2] to f32[2]. A state keeps its shapes and "
            "dtypes, so that one program serves all steps: give the layer that keeps it a fixed dtype."
        ),
    ),
    (
        "wrong_inputs",
        lambda: step(X, X),
        ValueError,
        "The stream takes inputs f32[b, t, 4]; got f32[2, 3, 4], f32[2, 3, 4].",
    ),
    (
        "wrong_inputs",
        lambda: step(X[0]),
        ValueError,
        "The stream takes inputs f32[b, t, 4]; got f32[3, 4].",
    ),
    (
        "wrong_inputs",
        lambda: step(draw(2, 3, 5)),
        ValueError,
        "The stream takes inputs f32[b, t, 4]; got f32[2, 3, 5].",
    ),
    (
        "empty_block",
        lambda: step(X[:, :0]),
        ValueError,
        ("A block has at least one step. The stream takes inputs f32[b, t, 4]; got f32[2, 0, 4]."),
    ),
    (
        "empty_block",
        lambda: step(None),
        ValueError,
        "A block has at least one step. The stream takes inputs f32[b, t, 4]; got None.",
    ),
    (
        "decode_in_step",
        lambda: step(X, decode=False),
        TypeError,
        (
            "step sees to decode itself; got decode=False. Leave it out, or call the pipeline without "
            "a stream."
        ),
    ),
    (
        "other_stream",
        lambda: stream().step({}, stream(Conv()).start(2), X),
        cb.StreamError,
        (
            "The state is not one of this stream: cache/total should be f32[2, 4], and is absent. "
            "Start a state with the start of the same stream."
        ),
    ),
    (
        "other_stream",
        lambda: stream(Attention(), capacity=8).step(
            {}, stream(Attention(), capacity=4).start(2), X
        ),
        cb.StreamError,
        (
            "The state is not one of this stream: cache/keys should be f32[2, 8, 2, 2], and is f32[2, "
            "4, 2, 2]. Start a state with the start of the same stream."
        ),
    ),
    (
        "not_a_state",
        lambda: stream().step(stream().start(2), {}, X),
        TypeError,
        (
            "A stream takes the state that its start or its last step gave; got dict. The order is "
            "stream.step(variables, state, ...)."
        ),
    ),
    (
        "other_rows",
        lambda: step(X, rows=3),
        cb.StreamError,
        (
            "The state has 3 rows, and the inputs have 2. Start a state for 2 rows, or choose rows of "
            "it: stream.take(state, rows)."
        ),
    ),
    (
        "no_lengths",
        lambda: step(X, stream=stream(cb.serial(Held(lambda batch: (batch,)))), lengths=[1, 2]),
        cb.StreamError,
        (
            "lengths cannot be given: serial[0] -> Held would remember the padding, too, because it "
            "does not get lengths of the block as it sees it. Give blocks without padding, or let the "
            "layer take lengths."
        ),
    ),
    (
        "rows_out_of_range",
        lambda: stream().take(stream().start(2), [0, 2, -1]),
        ValueError,
        "The state has rows 0 to 1; got 2, -1.",
    ),
    (
        "rows_out_of_range",
        lambda: stream().reset(stream().start(2), [5]),
        ValueError,
        "The state has rows 0 to 1; got 5.",
    ),
    (
        "wrong_rows",
        lambda: stream().take(stream().start(2), 0),
        ValueError,
        "Rows are integers on one axis, as in [0, 2]; got i32[].",
    ),
    (
        "wrong_rows",
        lambda: stream().take(stream().start(2), [True, False]),
        ValueError,
        "Rows are integers on one axis, as in [0, 2]; got bool[2].",
    ),
    (
        "wrong_rows",
        lambda: stream().reset(stream().start(2), np.array([0.5])),
        ValueError,
        "Rows are integers on one axis, as in [0, 2]; got f32[1].",
    ),
    (
        "wrong_rows_to_reset",
        lambda: stream().reset(stream().start(2), [True, False, True]),
        ValueError,
        "Booleans for rows are one for each row, bool[2]; got bool[3].",
    ),
    (
        "full_stream",
        lambda: step_attention(X[:, :2], position=3),
        cb.StreamError,
        (
            "The stream has room for 4 steps, and a block of 2 runs over it: row 0 is at position 3, "
            "row 1 is at position 3. Start it with a larger capacity, or start rows anew: "
            "stream.reset(state, rows)."
        ),
    ),
    (
        "full_stream",
        lambda: step_attention(X, position=2, lengths=[2, 3]),
        cb.StreamError,
        (
            "The stream has room for 4 steps, and a block of 3 runs over it: row 1 is at position 2. "
            "Start it with a larger capacity, or start rows anew: stream.reset(state, rows)."
        ),
    ),
    (
        "block_over_capacity",
        lambda: step_attention(draw(2, 5, 4)),
        cb.StreamError,
        (
            "The stream has room for 4 steps, and the block has 5. Start it with a larger capacity: "
            "cb.stream(..., capacity=5)."
        ),
    ),
]


@pytest.mark.parametrize(
    ("name", "call", "error", "text"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_wording(
    name: str,
    call: Callable[[], Any],
    error: type[Exception],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Exception] = []
    make = getattr(stream_errors, name)

    def make_and_keep(*arguments: Any) -> Exception:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(stream_errors, name, make_and_keep)
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
    assert caught.value is made[-1]


def test_every_wording_is_pinned() -> None:
    functions = inspect.getmembers(stream_errors, inspect.isfunction)
    assert {name for name, _ in functions} == {case[0] for case in CASES}
