r"""Runs a gated cell, as that of an LSTM or a GRU, over a sequence, with its derivatives.

The gates of such a cell depend on two products: of the inputs, and of the hidden state. All work
that does not depend on the state is hoisted out of the loop over time: the inputs of many steps are
projected by one product, and one product of all steps gives the gradient of each kernel. Within the
loop, each step has one product, in the backward pass as in the forward pass.

Derivatives are a ``jax.custom_jvp``: the tangents of a step are linear in those of the step before,
with coefficients that follow from the gates. JAX transposes that loop for reverse mode, and
differentiates it for higher orders. The state is kept in float32 or better.

Source of the derivative: Werbos, "Backpropagation Through Time: What It Does and How to Do It"
(1990).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from flax_extra.layer._numerics import einsum_accumulated, get_accumulation_dtype
from flax_extra.layer._sharding import broadcast_like, match_varying_axes

UNROLL = 2
"""How many steps one iteration of a loop takes. More make larger programs that are no faster."""

MAX_GATES_PER_BLOCK = 2**20
"""How many numbers are projected at once if gates are not saved: as many as fit in caches."""

Index: TypeAlias = int | Array

Size: TypeAlias = Any
"""A number, or a symbolic dimension of a program that is exported for all sizes."""

State: TypeAlias = tuple[Array, ...]
"""The arrays that a cell passes from step to step, ``[batch, d_hidden]``: the hidden state last."""

_Carry = TypeVar("_Carry")


class GatedCell(Protocol):
    """The elementwise part of a cell: how the gates and the state follow from the two products.

    A cell has no parameters; it is hashable and compared by value.
    """

    @property
    def scales(self) -> tuple[float, ...]:
        """What the columns of each gate are multiplied by before ``step`` sees the products."""

    @property
    def sums_products(self) -> bool:
        """Whether the gates depend on the sum of the two products only."""

    def step(
        self, state: State, projected: Array, product: Array
    ) -> tuple[State, Array, tuple[Array, ...]]:
        """Takes one step.

        Args:
            state: before the step.
            projected: the product of the inputs, with its bias, ``[batch, n_gates * d_hidden]``.
            product: the product of the hidden state, with its bias, of the same shape.

        Returns:
            The state after the step, and all that ``step_jvp`` needs: the gates, of the shape of
            ``projected``, and other arrays ``[batch, d_hidden]``.
        """

    def step_jvp(
        self,
        gates: Array,
        others: tuple[Array, ...],
        state_dot: State,
        projected_dot: Array,
        product_dot: Array,
    ) -> tuple[State, Array, tuple[Array, ...]]:
        """Computes the tangents of all results of ``step``.

        If ``sums_products``, ``projected_dot`` is the tangent of everything in the sum that does
        not depend on the state.
        """


class Weights(NamedTuple):
    """The weights of all gates side by side."""

    kernel: Array
    """For the inputs, ``[features, n_gates * d_hidden]``."""
    recurrent_kernel: Array
    """For the hidden state, ``[d_hidden, n_gates * d_hidden]``."""
    bias: Array
    """Added to the product of the inputs, ``[1, n_gates * d_hidden]``."""
    recurrent_bias: Array | None
    """Added to the product of the hidden state, if it has a bias of its own."""


class Options(NamedTuple):
    """What is static in a run."""

    cell: GatedCell
    reverse: bool
    return_sequences: bool


class Arguments(NamedTuple):
    """The arrays that a run depends on."""

    inputs: Array
    """``[batch, time, features]``"""
    valid: Array | None
    """False at padding, ``[time, batch, 1]``."""
    weights: Weights
    state: State
    """Before the first step, in the dtype of accumulation."""


class Results(NamedTuple):
    """What a run computes."""

    outputs: Array | None
    """The hidden state after every step, zeros at padding, ``[time, batch, d_hidden]``."""
    state: State
    """After the last step."""


class Residuals(NamedTuple):
    """What the derivative needs of every step."""

    gates: Array
    """``[time, batch, n_gates * d_hidden]``"""
    others: tuple[Array, ...]
    """``[time, batch, d_hidden]``"""
    hidden: Array
    """The hidden state before the step, ``[batch, time, d_hidden]``.

    With the batch first, batch and time can be merged into one axis for the gradient of the
    recurrent kernel even if the batch is sharded.
    """


def run_gated_cell(
    cell: GatedCell,
    inputs: Array,
    weights: Weights,
    state: State,
    valid: Array | None = None,
    *,
    reverse: bool = False,
    return_sequences: bool = False,
) -> tuple[Array | None, State]:
    """Runs a cell over a sequence, from one state to the next.

    Args:
        cell: the elementwise part of the cell.
        inputs: ``[batch, time, features]``.
        weights: in the dtype of the inputs; not yet scaled.
        state: before the first step.
        valid: False at padding, ``[batch, time]``. Padded inputs have to be finite.
        reverse: whether to run from the last step to the first.
        return_sequences: whether to return the hidden state after every step.

    Returns:
        The hidden states ``[batch, time, d_hidden]``, with zeros at padding, in the dtype of the
        inputs, or None; and the state after the last valid step, in the dtype of accumulation.
    """
    dtype = get_accumulation_dtype(inputs, weights.kernel)
    state = tuple(part.astype(dtype) for part in state)
    if inputs.shape[1] == 0:
        no_outputs = state[-1][:, None][:, :0].astype(inputs.dtype)
        return no_outputs if return_sequences else None, state
    if valid is not None:
        valid = jnp.swapaxes(valid, 0, 1)[..., None]
    scaled = Weights._make(None if x is None else _scale(x, cell.scales) for x in weights)
    arguments = Arguments(inputs, valid, scaled, state)
    options = Options(cell, reverse, return_sequences)
    outputs, state = _run(options, match_varying_axes(arguments))
    if outputs is not None:
        outputs = jnp.swapaxes(outputs.astype(inputs.dtype), 0, 1)
    return outputs, state


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(options: Options, arguments: Arguments) -> Results:
    """Runs without residuals, block by block, so that the gates of one block stay in caches."""
    inputs, valid, weights, state = arguments
    batch, time, _ = inputs.shape
    size = _choose_block_size(batch, time, weights.bias.shape[1])

    def run_block(start: Index, size: Size, carry: Results) -> Results:
        outputs, state = carry
        projected = _project(_slice(inputs, start, size, axis=1), weights.kernel)
        block_valid = None if valid is None else _slice(valid, start, size, axis=0)
        (block_outputs, state), _ = _scan_cell(
            options, weights, projected, state, block_valid, hidden_buffer=None
        )
        if outputs is None or block_outputs is None or size == time:
            return Results(block_outputs, state)
        outputs = lax.dynamic_update_slice_in_dim(outputs, block_outputs, start, axis=0)
        return Results(outputs, state)

    # Broadcast from the state, the buffer is sharded as the state is.
    buffer = jnp.broadcast_to(state[-1][None], (time, *state[-1].shape))
    carry = Results(buffer if options.return_sequences else None, state)
    return _run_in_blocks(time, size, run_block, carry, options.reverse)


def _run_jvp(
    options: Options, primals: tuple[Arguments], tangents: tuple[Arguments]
) -> tuple[Results, Results]:
    results, residuals = _run_with_residuals(options, *primals)
    results_dot, _ = _compute_tangents(
        options, *primals, residuals, *tangents, with_residuals=False
    )
    return results, results_dot


_run.defjvp(_run_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run_with_residuals(options: Options, arguments: Arguments) -> tuple[Results, Residuals]:
    """Runs all steps at once, and saves what the derivative needs."""
    inputs, valid, weights, state = arguments
    batch, time, _ = inputs.shape
    buffer = jnp.broadcast_to(state[-1][:, None], (batch, time, state[-1].shape[-1]))
    return _scan_cell(
        options, weights, _project(inputs, weights.kernel), state, valid, hidden_buffer=buffer
    )


def _run_with_residuals_jvp(
    options: Options, primals: tuple[Arguments], tangents: tuple[Arguments]
) -> tuple[tuple[Results, Residuals], tuple[Results, Residuals]]:
    results, residuals = _run_with_residuals(options, *primals)
    results_dot, residuals_dot = _compute_tangents(
        options, *primals, residuals, *tangents, with_residuals=True
    )
    return (results, residuals), (results_dot, residuals_dot)


_run_with_residuals.defjvp(_run_with_residuals_jvp, symbolic_zeros=True)


def _compute_tangents(
    options: Options,
    arguments: Arguments,
    residuals: Residuals,
    arguments_dot: Arguments,
    *,
    with_residuals: bool,
) -> tuple[Results, Any]:
    """Computes the tangents of results and residuals (None for these unless asked for).

    The backward pass needs the residuals only: each step computes the coefficients of its tangents
    anew from them.
    """
    valid, recurrent_kernel = arguments.valid, arguments.weights.recurrent_kernel
    # Transposed here, the kernel is in the right order for the product of the backward pass.
    transposed = recurrent_kernel.T

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state_dot: State, step_inputs: Any) -> tuple[State, Any]:
        (projected_dot, hoisted_dot), gates, others, valid = step_inputs
        product_dot = einsum_accumulated("bh,gh->bg", state_dot[-1], transposed)
        if hoisted_dot is not None:
            product_dot = product_dot + hoisted_dot
        after_dot, gates_dot, others_dot = options.cell.step_jvp(
            gates, others, state_dot, projected_dot, product_dot
        )
        output_dot = _where(valid, after_dot[-1], 0) if options.return_sequences else None
        residuals_dot = (gates_dot, others_dot, state_dot[-1]) if with_residuals else None
        return _select_state(valid, after_dot, state_dot), (output_dot, residuals_dot)

    def scan_steps(state_dot: State, hoisted: Any) -> tuple[State, Any]:
        step_inputs = hoisted, residuals.gates, residuals.others, valid
        return _scan(step, state_dot, step_inputs, options.reverse)

    state_dot = tuple(map(_materialize, arguments_dot.state, arguments.state))
    linear_inputs = state_dot, _hoist_tangents(options.cell, arguments, residuals, arguments_dot)
    # The loop is linear: its tangents at any point are the loop itself. It goes through jax.jvp
    # because jax 0.8 transposes no other loops. XLA removes the unused loop over zeros.
    zeros = jax.tree.map(jnp.zeros_like, linear_inputs)
    _, (state_dot, (outputs_dot, residuals_dot)) = jax.jvp(scan_steps, zeros, linear_inputs)
    if residuals_dot is not None:
        gates_dot, others_dot, hidden_dot = residuals_dot
        residuals_dot = Residuals(gates_dot, others_dot, jnp.swapaxes(hidden_dot, 0, 1))
    return Results(outputs_dot, state_dot), residuals_dot


def _hoist_tangents(
    cell: GatedCell, arguments: Arguments, residuals: Residuals, arguments_dot: Arguments
) -> tuple[Array, Array | None]:
    """Computes the tangents of both products as far as they do not depend on the state's tangent.

    Transposed, each product here is the gradient of a kernel, or of the inputs, in one product.
    Batch and time are merged for it, the batch first: merged, they are one axis to sum over, for
    which XLA does not copy the operands; with the batch first, it stays sharded.
    """
    inputs, _, weights, _ = arguments
    inputs_dot, _, weights_dot, _ = arguments_dot
    time, batch, n_columns = residuals.gates.shape

    def multiply(x: Any, kernel: Any) -> Array | None:
        if isinstance(x, SymbolicZero) or isinstance(kernel, SymbolicZero):
            return None
        rows = x.reshape(batch * time, x.shape[2])
        return einsum_accumulated("eh,hg->eg", rows, kernel).reshape(batch, time, n_columns)

    def broadcast(bias: Any) -> Array | None:
        if bias is None or isinstance(bias, SymbolicZero):
            return None
        shape = batch, time, n_columns
        return broadcast_like(bias.astype(residuals.gates.dtype), shape, inputs, 1)

    projected = [
        multiply(inputs_dot, weights.kernel),
        multiply(inputs, weights_dot.kernel),
        broadcast(weights_dot.bias),
    ]
    product = [
        multiply(residuals.hidden, weights_dot.recurrent_kernel),
        broadcast(weights_dot.recurrent_bias),
    ]
    if cell.sums_products:
        projected, product = [*projected, *product], []
    projected_dot, product_dot = map(_add, (projected, product))
    if projected_dot is None:
        projected_dot = jnp.zeros_like(residuals.gates)
    return projected_dot, product_dot


def _add(terms: list[Array | None]) -> Array | None:
    """Adds the terms that there are, and puts time first."""
    present = [term for term in terms if term is not None]
    return jnp.swapaxes(functools.reduce(jnp.add, present), 0, 1) if present else None


def _materialize(tangent: Any, primal: Array) -> Array:
    return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent


def _scale(weights: Array, scales: tuple[float, ...]) -> Array:
    """Multiplies the columns of each gate by its scale."""
    d_hidden = weights.shape[-1] // len(scales)
    columns = jnp.concatenate([jnp.full(d_hidden, scale, weights.dtype) for scale in scales])
    return weights * columns[None]


def _scan_cell(
    options: Options,
    weights: Weights,
    projected: Array,
    state: State,
    valid: Array | None,
    *,
    hidden_buffer: Array | None,
) -> tuple[Results, Any]:
    """Runs the cell over projected inputs; also returns residuals if ``hidden_buffer`` is given.

    The gates overwrite the projected inputs, which have the same size and are no longer needed.
    This is also faster if nothing reads the gates later. XLA has to compute them as one array,
    in vector instructions; fused into the computation of the state, each would be a strided part.
    """

    def step(
        carry: tuple[Array, Array | None, State], step_inputs: tuple[Array, Array | None]
    ) -> tuple[tuple[Array, Array | None, State], tuple[Array | None, tuple[Array, ...]]]:
        (gates, hidden, state), (index, valid) = carry, step_inputs
        if hidden is not None:
            hidden = lax.dynamic_update_index_in_dim(hidden, state[-1], index, axis=1)
        projected = lax.dynamic_index_in_dim(gates, index, keepdims=False)
        state, output, step_gates, others = _step(options.cell, weights, state, projected, valid)
        gates = lax.dynamic_update_index_in_dim(gates, step_gates, index, axis=0)
        saved = (output if options.return_sequences else None, () if hidden is None else others)
        return (gates, hidden, state), saved

    steps = jnp.arange(projected.shape[0]), valid
    carry, (outputs, others) = _scan(
        step, (projected, hidden_buffer, state), steps, options.reverse
    )
    gates, hidden, state = carry
    residuals = None if hidden is None else Residuals(gates, others, hidden)
    return Results(outputs, state), residuals


def _step(
    cell: GatedCell, weights: Weights, state: State, projected: Array, valid: Array | None
) -> tuple[State, Array, Array, tuple[Array, ...]]:
    """Takes a step; returns the state, the output and what the derivative needs."""
    kernel = weights.recurrent_kernel
    product = einsum_accumulated("bh,hg->bg", state[-1].astype(kernel.dtype), kernel)
    if weights.recurrent_bias is not None:
        product = product + weights.recurrent_bias.astype(product.dtype)
    projected = projected + weights.bias.astype(projected.dtype)
    after, gates, others = cell.step(state, projected, product)
    return _select_state(valid, after, state), _where(valid, after[-1], 0), gates, others


def _select_state(valid: Array | None, after: State, before: State) -> State:
    """Takes the state after a step, or at padding the state before it."""
    return tuple(_where(valid, *parts) for parts in zip(after, before, strict=True))


def _where(valid: Array | None, x: Array, otherwise: Array | int) -> Array:
    return x if valid is None else jnp.where(valid, x, otherwise)


def _project(inputs: Array, kernel: Array) -> Array:
    """Multiplies the inputs of all steps with the kernel; the result has time first."""
    return einsum_accumulated("tbf,fg->tbg", jnp.swapaxes(inputs, 0, 1), kernel)


def _scan(
    step: Callable[[Any, Any], Any], carry: Any, step_inputs: Any, reverse: bool
) -> tuple[Any, Any]:
    # A loop of symbolic length, in a program exported for all lengths, cannot be unrolled.
    has_known_length = isinstance(jax.tree.leaves(step_inputs)[0].shape[0], int)
    unroll = UNROLL if has_known_length else 1
    return lax.scan(step, carry, step_inputs, reverse=reverse, unroll=unroll)


def _choose_block_size(batch: Size, time: Size, n_columns: int) -> Size:
    """Chooses how many steps a block has: if possible, a divisor of the number of all steps."""
    if not isinstance(batch, int) or not isinstance(time, int):
        return time
    most = max(UNROLL, MAX_GATES_PER_BLOCK // max(1, batch * n_columns))
    if time <= most:
        return time
    return next((size for size in range(most, most // 2, -1) if time % size == 0), most)


def _run_in_blocks(
    time: Size,
    size: Size,
    run: Callable[[Index, Size, _Carry], _Carry],
    carry: _Carry,
    reverse: bool,
) -> _Carry:
    """Runs blocks of ``size`` steps, and a shorter block at the end of the sequence, in order."""
    if size == time:
        return run(0, time, carry)
    n, rest = divmod(time, size)
    if rest and reverse:
        carry = run(n * size, rest, carry)

    def run_full_block(index: Index, carry: _Carry) -> _Carry:
        return run((n - 1 - index if reverse else index) * size, size, carry)

    carry = lax.fori_loop(0, n, run_full_block, carry)
    return run(n * size, rest, carry) if rest and not reverse else carry


def _slice(x: Array, start: Index, size: Size, *, axis: int) -> Array:
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, start, size, axis)
