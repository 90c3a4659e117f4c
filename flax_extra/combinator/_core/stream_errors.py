"""The messages of errors in streams: what cannot go on from block to block, and why.

Each function makes one error, as those in ``errors.py`` do.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax_extra.combinator._core.errors import SignatureError, StreamError

# A layer and what it remembers.


def decode_is_no_bool(layer: str, found: str) -> TypeError:
    return TypeError(
        f"{layer} takes True or False for decode, because another program runs in each case; got "
        f"{found}. Make it a static argument of jax.jit, or bind it with functools.partial."
    )


def no_block(layer: str, found: str) -> ValueError:
    return ValueError(f"{layer} takes a block of axes [batch, time, ...]; got {found}.")


def wrong_lengths(layer: str, found: str, batch: object) -> ValueError:
    return ValueError(
        f"{layer} takes lengths as integers, one for each sequence, of shape [{batch}]; got "
        f"{found}."
    )


def lengths_beyond_block(layer: str, found: Sequence[int], time: object) -> ValueError:
    return ValueError(
        f"{layer} takes lengths from 0 to {time}, the number of steps of its inputs; got "
        f"{', '.join(map(str, found))}."
    )


def no_state(layer: str, name: str) -> StreamError:
    return StreamError(
        f"{layer} was called with decode=True, and there is no state for it to go on from: no "
        f"{name!r} in the collection 'cache'. Start a stream, stream = cb.stream(pipeline, ...), "
        f"state = stream.start(...), and call stream.step(variables, state, ...)."
    )


def fixed_state(layer: str) -> StreamError:
    return StreamError(
        f"{layer} was called with decode=True, and may not change its state: the collection "
        f"'cache' is not mutable. Use stream.step(variables, state, ...), or "
        f"apply(..., decode=True, mutable=['cache'])."
    )


def other_state(layer: str, name: str, expected: str, found: str) -> StreamError:
    return StreamError(
        f"{layer} keeps its state {name!r} as {expected}; got {found}. A state keeps its shapes "
        f"and dtypes, and serves the model and the batch size that it was started for."
    )


def no_batch_in_state(layer: str, name: str, found: str, batch: object) -> StreamError:
    return StreamError(
        f"{layer} keeps a state for each row of the batch, so that its first axis has size "
        f"{batch}; the initial state {name!r} is {found}."
    )


def no_batch_in_value(layer: str, name: str, found: str, batch: object) -> ValueError:
    return ValueError(
        f"{layer} remembers a value for each row of the batch, so that its first axis has size "
        f"{batch}; the value {name!r} is {found}."
    )


def nothing_given(layer: str, name: str) -> StreamError:
    return StreamError(
        f"{layer} got None for {name!r}, and has no earlier block to remember it from. Give it "
        f"when initializing, in calls without decode, and in the first block of a stream."
    )


def value_not_given(layer: str, name: str, rows: Sequence[int]) -> StreamError:
    return StreamError(
        f"{layer} got None for {name!r}, and rows {', '.join(map(str, rows))} were not given it "
        f"before. Give it in the first block of a row, also after a reset."
    )


def other_value(layer: str, name: str, expected: object, found: object) -> StreamError:
    return StreamError(
        f"{layer} remembers {name!r} of shape {expected}, as when the stream was made; got shape "
        f"{found}. What is remembered as a whole does not grow from block to block."
    )


def not_recalled(layer: str, name: str) -> ValueError:
    return ValueError(
        f"{layer} keeps a state {name!r} that it did not recall. Call Cache.recall({name!r}, "
        f"initial) first: it says what the state is at the start."
    )


def nothing_to_read(layer: str, name: str) -> ValueError:
    return ValueError(
        f"{layer} reads {name!r}, and put nothing under that name in this call. Call "
        f"Cache.append({name!r}, steps) or Cache.remember({name!r}, value) first."
    )


def other_steps(layer: str, name: str, found: str, batch: object, time: object) -> ValueError:
    return ValueError(
        f"{layer} remembers steps of its block, and the Cache was made for inputs with axes "
        f"[batch={batch}, time={time}]; the steps {name!r} are {found}."
    )


def no_floats(layer: str, name: str, found: str) -> TypeError:
    return TypeError(
        f"{layer} appends floats to its state {name!r}, because a row that runs over the capacity "
        f"is marked by NaN; got {found}. Remember a fixed number of steps with Cache.extend."
    )


def long_block(layer: str, time: object, capacity: object) -> StreamError:
    return StreamError(
        f"{layer} remembers {capacity} steps, and the block has {time}. Start the stream with a "
        f"larger capacity: cb.stream(..., capacity={time})."
    )


def over_capacity(
    layer: str, rows: Sequence[int], positions: Sequence[int], time: object, capacity: object
) -> StreamError:
    places = ", ".join(
        f"row {row} is at position {at}" for row, at in zip(rows, positions, strict=True)
    )
    return StreamError(
        f"{layer} remembers {capacity} steps, and a block of {time} runs over them: {places}. "
        f"Start the stream with a larger capacity: cb.stream(..., capacity=...)."
    )


def new_state(name: str) -> StreamError:
    return StreamError(
        f"A layer made the state {name!r} while the stream ran. State is made when the stream "
        f"starts: make it while initializing with decode=True, too."
    )


# Hold.


def hold_children(found: int) -> TypeError:
    return TypeError(
        f"hold takes two callables, f and initial; got {found}. Put several in series: "
        f"cb.serial(...)."
    )


def hold_arity(f: str, f_signature: str, initial: str, initial_signature: str) -> SignatureError:
    return SignatureError(
        f"hold takes f from (state.., x..) to (state.., y..) with at least one x, and initial from "
        f"the first x.. to state..; got f {f} with signature {f_signature} and initial {initial} "
        f"with signature {initial_signature}. Let f take and give each item that initial gives."
    )


def no_time_to_hold(path: Sequence[str], axis: int, stack: str) -> SignatureError:
    return SignatureError(
        f"{' -> '.join(path)} takes sequences with a batch axis and time on axis {axis}, and an "
        f"input has no room for them.\n"
        f"  stack: {stack}\n"
        f"  Choose the axis that holds time: cb.hold(f, initial, axis=...)."
    )


def no_step_to_hold(path: Sequence[str], axis: int, found: str, stack: str) -> SignatureError:
    return SignatureError(
        f"{' -> '.join(path)} runs on one step at a time, because lengths are given, and must give "
        f"one step of each output on axis {axis}; it gave {found}.\n"
        f"  stack: {stack}\n"
        f"  Choose the axis that holds time: cb.hold(f, initial, axis=...), or leave lengths out."
    )


# Streams.


def cannot_go_on(where: str, why: str, remedy: str) -> StreamError:
    return StreamError(f"{where} cannot run piece by piece: {why}. {remedy}.")


def time_sizes_parameter(name: str, found: str, longer: str) -> StreamError:
    return StreamError(
        f"The length of the block sizes the parameter {name}: it is {found} for one block and "
        f"{longer} for a longer one. A layer that mixes all steps cannot run piece by piece."
    )


def shared_state(layer: str, first: str, second: str, is_one_place: bool) -> StreamError:
    places = f"twice in {first}" if is_one_place else f"at {first} and at {second}"
    return StreamError(
        f"One instance of {layer} is used {places}, and would remember one state for both. Make a "
        f"second instance; to share parameters, use cb.repeat(..., shared=True), which keeps a "
        f"state for each copy."
    )


def no_such_name(specs: str, name: str, kind: str) -> ValueError:
    return ValueError(
        f"A stream needs to know the axis of {kind} of its inputs: no dimension of {specs} is "
        f"called {name!r}. Write specs such as 'f32[b, t, 64]', or say the name: "
        f"cb.stream(..., {kind}=...)."
    )


def unsatisfied(constraints: str, time: int) -> ValueError:
    return ValueError(
        f"No sizes satisfy {constraints!r} with {time} steps of time. Choose another capacity."
    )


def one_state_for_all(where: str) -> StreamError:
    return StreamError(
        f"Rows cannot be started anew by themselves: the state {where} is one for all rows. Let "
        f"the layer keep a state for each row, as cb.Cache does."
    )


def unknown_sizes(given: Sequence[str], known: Sequence[str]) -> TypeError:
    return TypeError(
        f"start takes sizes for the names in the specs other than batch and time, here "
        f"{', '.join(map(repr, known)) or 'none'}; got {', '.join(map(repr, given))}."
    )


def missing_sizes(missing: Sequence[str], batch: str) -> TypeError:
    return TypeError(
        f"start needs a size for {', '.join(map(repr, missing))}. Give the batch first and others "
        f"by name, as in stream.start(8, s=77)."
        if missing != [batch]
        else "start needs the number of rows of the batch, as in stream.start(8)."
    )


def needs_capacity(where: str, found: str, longer: str) -> StreamError:
    return StreamError(
        f"The stream remembers as many steps as it has room for: its state {where} is {found} for "
        f"one step, {longer} for more. Say how many: cb.stream(..., capacity=...)."
    )


def rows_of_state(where: str, found: str) -> StreamError:
    return StreamError(
        f"A stream keeps one row of state for each row of the batch; its state {where} is {found}, "
        f"with more than one axis, or other sizes, that follow the batch."
    )


def changing_state(where: str, before: str, after: str) -> StreamError:
    return StreamError(
        f"A step changes its state {where} from {before} to {after}. A state keeps its shapes and "
        f"dtypes, so that one program serves all steps: give the layer that keeps it a fixed dtype."
    )


def wrong_inputs(expected: str, found: str) -> ValueError:
    return ValueError(f"The stream takes inputs {expected}; got {found}.")


def empty_block(expected: str, found: str) -> ValueError:
    return ValueError(
        f"A block has at least one step. The stream takes inputs {expected}; got {found}."
    )


def decode_in_step(found: str) -> TypeError:
    return TypeError(
        f"step sees to decode itself; got decode={found}. Leave it out, or call the pipeline "
        f"without a stream."
    )


def other_stream(where: str, expected: str, found: str) -> StreamError:
    return StreamError(
        f"The state is not one of this stream: {where} should be {expected}, and is {found}. Start "
        f"a state with the start of the same stream."
    )


def not_a_state(found: str) -> TypeError:
    return TypeError(
        f"A stream takes the state that its start or its last step gave; got {found}. The order is "
        f"stream.step(variables, state, ...)."
    )


def other_rows(state: object, inputs: object) -> StreamError:
    return StreamError(
        f"The state has {state} rows, and the inputs have {inputs}. Start a state for "
        f"{inputs} rows, or choose rows of it: stream.take(state, rows)."
    )


def no_lengths(layers: Sequence[str]) -> StreamError:
    return StreamError(
        f"lengths cannot be given: {', '.join(layers)} would remember the padding, too, because it "
        f"does not get lengths of the block as it sees it. Give blocks without padding, or let the "
        f"layer take lengths."
    )


def rows_out_of_range(found: Sequence[int], n_rows: int) -> ValueError:
    return ValueError(f"The state has rows 0 to {n_rows - 1}; got {', '.join(map(str, found))}.")


def wrong_rows(found: str) -> ValueError:
    return ValueError(f"Rows are integers on one axis, as in [0, 2]; got {found}.")


def wrong_rows_to_reset(found: str, n_rows: object) -> ValueError:
    return ValueError(f"Booleans for rows are one for each row, bool[{n_rows}]; got {found}.")


def full_stream(positions: Sequence[tuple[int, int]], time: object, capacity: int) -> StreamError:
    places = ", ".join(f"row {row} is at position {position}" for row, position in positions)
    return StreamError(
        f"The stream has room for {capacity} steps, and a block of {time} runs over it: {places}. "
        f"Start it with a larger capacity, or start rows anew: stream.reset(state, rows)."
    )


def block_over_capacity(time: object, capacity: int) -> StreamError:
    return StreamError(
        f"The stream has room for {capacity} steps, and the block has {time}. Start it with a "
        f"larger capacity: cb.stream(..., capacity={time})."
    )
