r"""An LSTM over all steps of a sequence, with a backward pass of its own.

What does not wait for the state is outside of the loop: the inputs are projected in one product
before it, or in one for each block of steps where the gates of all are not kept, and the gradients
of weights are one product each after it. Within it, all gates are one product and one tanh, for
:math:`\sigma(x) = (1 + \tanh(x / 2)) / 2`, and going back is one product, too. The state is kept in
float32 or better.

Source of the formulas: Gers, Schmidhuber and Cummins, "Learning to Forget" (2000), section 3;
going back through time: Werbos, "Backpropagation Through Time: What It Does and How to Do It"
(1990).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.recurrent import DenseParams
from flax.typing import Dtype
from jax import Array, lax

GATES = "ifgo"
"""Input, forget, what enters the memory, output: in this order the columns of fused weights lie."""

UNROLL = 2
"""How many steps a turn of the loop takes: with more, programs grow, and are no faster."""

GATES_AT_ONCE = 2**20
"""How many numbers are projected at once where they are not kept: as many as caches hold."""

Index: TypeAlias = int | Array

Size: TypeAlias = Any
"""A number, or the symbol that stands for one in a program exported for all sizes."""

_Carry = TypeVar("_Carry")

State: TypeAlias = tuple[Array, Array]
"""The memory c and the hidden state h, ``[batch, d_hidden]``."""


class Weights(NamedTuple):
    """The weights of all gates side by side."""

    of_inputs: Array
    """``[features, 4 * d_hidden]``"""
    of_state: Array
    """``[d_hidden, 4 * d_hidden]``"""
    bias: Array
    """``[1, 4 * d_hidden]``"""


class CellWeights(nn.Module):
    """Declares the parameters of an LSTM cell, by the names and with the values of linen's."""

    d_hidden: int
    param_dtype: Dtype

    @nn.compact
    def __call__(self, inputs: Array, hidden: Array) -> Weights:
        """The weights for such inputs and hidden states; of both, only the features matter."""
        dense = functools.partial(DenseParams, self.d_hidden, param_dtype=self.param_dtype)
        kernels = [dense(name=f"i{gate}", use_bias=False)(inputs)[0] for gate in GATES]
        recurrent = functools.partial(dense, kernel_init=nn.LSTMCell.recurrent_kernel_init)
        pairs = [recurrent(name=f"h{gate}")(hidden) for gate in GATES]
        return Weights(
            jnp.concatenate(kernels, axis=-1),
            jnp.concatenate([kernel for kernel, _ in pairs], axis=-1),
            jnp.concatenate([bias for _, bias in pairs if bias is not None], axis=-1)[None],
        )


class Recurrence(NamedTuple):
    """What is run, and with what."""

    inputs: Array
    """``[batch, time, features]``"""
    valid: Array | None
    """Where there is no padding, ``[time, batch, 1]``."""
    weights: Weights
    """Those of gates that open by a sigmoid halved."""
    state: State
    """Before the first step."""


def run_lstm(
    inputs: Array,
    weights: Weights,
    state: State,
    valid: Array | None,
    *,
    reverse: bool,
    return_sequences: bool,
) -> Array:
    """The hidden state at the last step, or at all.

    Args:
        inputs: ``[batch, time, features]``.
        weights: in the dtype of the inputs.
        state: before the first step.
        valid: where there is no padding, ``[batch, time]``.
        reverse: whether to run from the last step to the first.
        return_sequences: whether to give all steps, padding as zeros.

    Returns:
        ``[batch, d_hidden]``, or ``[batch, time, d_hidden]``, in the dtype of the inputs.
    """
    if inputs.shape[1] == 0:
        return jnp.repeat(state[1][:, None], 0, axis=1) if return_sequences else state[1]
    weights = Weights(*map(_halved, weights))
    accumulated = _accumulated(weights.bias)
    recurrence = Recurrence(
        inputs,
        valid=None if valid is None else jnp.swapaxes(valid, 0, 1)[..., None],
        weights=weights._replace(bias=weights.bias.astype(accumulated)),
        state=(state[0].astype(accumulated), state[1].astype(accumulated)),
    )
    hidden = _run(recurrence, reverse, return_sequences).astype(inputs.dtype)
    return jnp.swapaxes(hidden, 0, 1) if return_sequences else hidden


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _run(recurrence: Recurrence, reverse: bool, return_sequences: bool) -> Array:
    """Block by block, so that what is projected is read before caches forget it."""
    inputs, valid, weights, state = recurrence
    batch, time, _ = inputs.shape
    size = _block_size(batch, time, weights.bias.shape[1])

    def step(state: State, each: tuple[Array, Array | None]) -> tuple[State, Array | None]:
        state, output, _ = _step(weights, state, *each)
        return state, output if return_sequences else None

    def run_block(
        start: Index, size: Size, carry: tuple[State, Array | None]
    ) -> tuple[State, Array | None]:
        state, outputs = carry
        projected = _projected(_piece(inputs, start, size, axis=1), weights.of_inputs)
        each = projected, None if valid is None else _piece(valid, start, size, axis=0)
        state, added = _scan(step, state, each, reverse)
        if outputs is None or size == time:
            return state, added
        return state, lax.dynamic_update_slice_in_dim(outputs, added, start, axis=0)

    outputs = jnp.zeros((time, *state[1].shape), state[1].dtype) if return_sequences else None
    (_, last), outputs = _in_blocks(time, size, run_block, (state, outputs), reverse)
    return last if outputs is None else outputs


def _run_and_keep(
    recurrence: Recurrence, reverse: bool, return_sequences: bool
) -> tuple[Array, Any]:
    inputs, valid, weights, state = recurrence
    projected, of_projected = jax.vjp(_projected, inputs, weights.of_inputs)

    # The gates are written over what is projected, which is as large and no longer needed.
    def step(
        carry: tuple[Array, State], each: tuple[Array, Array | None]
    ) -> tuple[tuple[Array, State], Any]:
        (gates, state), (index, valid) = carry, each
        projected = lax.dynamic_index_in_dim(gates, index, keepdims=False)
        after, output, opened = _step(weights, state, projected, valid)
        gates = lax.dynamic_update_index_in_dim(gates, opened, index, axis=0)
        return (gates, after), (output if return_sequences else None, state)

    each = jnp.arange(projected.shape[0]), valid
    carry, (outputs, states) = _scan(step, (projected, state), each, reverse)
    gates, (_, last) = carry
    kept = of_projected, weights.of_state, valid, gates, states
    return last if outputs is None else outputs, kept


def _run_back(reverse: bool, return_sequences: bool, kept: Any, change: Array) -> tuple[Recurrence]:
    """What a change of the result asks of inputs, weights and state."""
    of_projected, kernel, valid, gates, (memory, hidden) = kept
    back = kernel.T

    def step(asked: State, each: Any) -> tuple[State, Array]:
        gates, memory, valid, of_output = each
        of_memory, of_hidden = asked
        held = tuple(_where(valid, 0, part) for part in asked)
        if of_output is not None:
            of_hidden = of_hidden + of_output
        of_memory, of_hidden = (_where(valid, part, 0) for part in (of_memory, of_hidden))
        i, f, g, o = _opened(gates)
        shown = jnp.tanh(f * memory + i * g)
        of_memory = of_memory + of_hidden * o * (1 - shown**2)
        of_gates = [of_memory * g / 2, of_memory * memory / 2, of_memory * i, of_hidden * shown / 2]
        asked_of_gates = jnp.concatenate(of_gates, axis=-1) * (1 - gates**2)
        of_memory, of_hidden = of_memory * f, _product("bg,gh->bh", asked_of_gates, back)
        if valid is not None:
            of_memory, of_hidden = of_memory + held[0], of_hidden + held[1]
        return (of_memory, of_hidden), asked_of_gates

    nothing = jnp.zeros(memory.shape[1:], memory.dtype)
    last = nothing if return_sequences else change
    each = gates, memory, valid, change if return_sequences else None
    state, of_gates = _scan(step, (nothing, last), each, not reverse)
    of_kernel = _product("eh,eg->hg", _flat(hidden), _flat(of_gates))
    of_inputs, of_input_kernel = of_projected(of_gates)
    of_bias = of_gates.sum((0, 1))[None]
    weights = Weights(of_input_kernel, of_kernel.astype(kernel.dtype), of_bias)
    return (Recurrence(of_inputs, None, weights, state),)


_run.defvjp(_run_and_keep, _run_back)


def _block_size(batch: Size, time: Size, gates: int) -> Size:
    """How many steps a block has: where it can be, so many that no shorter block is left over."""
    if not isinstance(batch, int) or not isinstance(time, int):
        return time
    most = max(UNROLL, GATES_AT_ONCE // max(1, batch * gates))
    if time <= most:
        return time
    return next((size for size in range(most, most // 2, -1) if time % size == 0), most)


def _in_blocks(
    time: Size,
    size: Size,
    run: Callable[[Index, Size, _Carry], _Carry],
    carry: _Carry,
    reverse: bool,
) -> _Carry:
    """Runs the blocks of so many steps, and what is left of the sequence, in their order."""
    if size == time:
        return run(0, time, carry)
    n, rest = divmod(time, size)
    if rest and reverse:
        carry = run(n * size, rest, carry)

    def run_full(turn: Index, carry: _Carry) -> _Carry:
        return run((n - 1 - turn if reverse else turn) * size, size, carry)

    carry = lax.fori_loop(0, n, run_full, carry)
    return run(n * size, rest, carry) if rest and not reverse else carry


def _piece(x: Array, start: Index, size: Size, *, axis: int) -> Array:
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, start, size, axis)


def _projected(inputs: Array, kernel: Array) -> Array:
    """What the inputs add to the gates, time first."""
    batch, time, _ = inputs.shape
    rows = _flat(jnp.swapaxes(inputs, 0, 1))
    return _product("ef,fg->eg", rows, kernel).reshape(time, batch, kernel.shape[1])


def _scan(step: Callable[[Any, Any], Any], carry: Any, each: Any, reverse: bool) -> tuple[Any, Any]:
    # A symbolic length, as of a program exported for all lengths, cannot be divided into turns.
    unroll = UNROLL if isinstance(each[0].shape[0], int) else 1
    return lax.scan(step, carry, each, reverse=reverse, unroll=unroll)


def _step(
    weights: Weights, state: State, projected: Array, valid: Array | None
) -> tuple[State, Array, Array]:
    """The next state, the output, and the gates before they are opened."""
    memory, hidden = state
    product = _product("bh,hg->bg", hidden.astype(weights.of_state.dtype), weights.of_state)
    gates = jnp.tanh(projected + product + weights.bias)
    i, f, g, o = _opened(gates)
    new_memory = f * memory + i * g
    new_hidden = o * jnp.tanh(new_memory)
    after = _where(valid, new_memory, memory), _where(valid, new_hidden, hidden)
    return after, _where(valid, new_hidden, 0), gates


def _halved(weights: Array) -> Array:
    """Fused weights, those of gates that open by a sigmoid halved."""
    d_hidden = weights.shape[-1] // len(GATES)
    halves = jnp.repeat(jnp.asarray([0.5, 0.5, 1, 0.5], weights.dtype), d_hidden)
    return weights * halves.reshape(*[1] * (weights.ndim - 1), -1)


def _opened(gates: Array) -> tuple[Array, Array, Array, Array]:
    """The values of the gates, of the tanh of all of them."""
    i, f, g, o = jnp.split(gates, len(GATES), axis=-1)
    return i / 2 + 0.5, f / 2 + 0.5, g, o / 2 + 0.5


def _where(valid: Array | None, x: Array | int, otherwise: Array | int) -> Array:
    """One where there is no padding, and the other elsewhere."""
    return jnp.asarray(x) if valid is None else jnp.where(valid, x, otherwise)


def _flat(x: Array) -> Array:
    """All steps of all examples on one axis, for which products are faster."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=_accumulated(x, y))


def _accumulated(*operands: Array) -> Any:
    """The dtype of sums of products, of gates and of the state."""
    return functools.reduce(jnp.promote_types, (x.dtype for x in operands), jnp.float32)
