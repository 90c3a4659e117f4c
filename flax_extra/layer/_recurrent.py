"""Recurrence: a cell, and the layer that runs it over time.

Source of the formulas: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget
gate of Gers, Schmidhuber and Cummins, "Learning to Forget" (2000).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Dtype
from jax import Array
from jaxtyping import Float, Integer

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._lstm import CellWeights, Weights, run_lstm


class LSTMCell(nn.LSTMCell):
    r"""Linen's LSTM cell, with typed inputs and outputs: its signature is ``3 -> 3``.

    .. math::
        \begin{aligned}
        i &= \sigma(x w_{ii} + h w_{hi} + b_{hi}), \quad f = \sigma(x w_{if} + h w_{hf} + b_{hf}) \\
        g &= \tanh(x w_{ig} + h w_{hg} + b_{hg}), \quad o = \sigma(x w_{io} + h w_{ho} + b_{ho}) \\
        c' &= f c + i g, \quad h' = o \tanh(c')
        \end{aligned}

    Args:
        gate_fn: activation of the gates.
        activation_fn: activation of the output and of what enters the memory.
        kernel_init: initializer of the weights of the inputs.
        recurrent_kernel_init: initializer of the weights of the hidden state.
        bias_init: initializer of the biases.
        dtype: of the computation; that of inputs, state and parameters by default.
        param_dtype: of the parameters.
        carry_init: initializer of the state that ``initialize_carry`` makes.
        features: size of the state that ``initialize_carry`` makes. The cell itself takes it from
            its carry.

    Source: Gers et al. (2000), section 3; the weights and their names are those of
    ``flax.linen.LSTMCell``.

    Shapes:
        ``xn.LSTMCell()``: ``f32[b, 64], f32[b, 64], f32[b, 32] -> f32[b, 64], f32[b, 64],
        f32[b, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> print(cb.infer_signature(xn.LSTMCell()))
        3 -> 3
        >>> state, inputs = jnp.zeros((2, 4)), jnp.ones((2, 7, 3))
        >>> outputs, _ = cb.scan(xn.LSTMCell()).init_with_output(
        ...     jax.random.key(0), state, state, inputs
        ... )
        >>> [output.shape for output in outputs]
        [(2, 4), (2, 4), (2, 7, 4)]
    """

    # Linen requires it, and reads it in initialize_carry alone.
    features: int | None = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "*batch d_hidden"], Float[Array, "*batch d_hidden"]],
        inputs: Float[Array, "*batch features"],
    ) -> tuple[
        tuple[Float[Array, "*batch d_hidden"], Float[Array, "*batch d_hidden"]],
        Float[Array, "*batch d_hidden"],
    ]:
        """Takes one step.

        Args:
            carry: the memory c and the hidden state h, both ``[..., d_hidden]``.
            inputs: the inputs of this step, ``[..., features]``.

        Returns:
            The new (c, h), and h once more as the output.
        """
        (c, h), output = super().__call__(carry, inputs)  # type: ignore[no-untyped-call]
        return (c, h), output

    @nn.nowrap
    def initialize_carry(
        self, rng: Array, input_shape: tuple[int, ...]
    ) -> tuple[Float[Array, "*batch d_hidden"], Float[Array, "*batch d_hidden"]]:
        """The state before the first step, for ``flax.linen.RNN``.

        Args:
            rng: key for ``carry_init``.
            input_shape: the shape of the inputs of one step, ``(..., features)``.

        Returns:
            The memory c and the hidden state h, both ``[..., features]``, from ``carry_init``.

        Raises:
            ValueError: where the field ``features`` is not given.

        Example:
            >>> import jax
            >>> from flax_extra import layer as xn
            >>> c, h = xn.LSTMCell(features=4).initialize_carry(jax.random.key(0), (2, 3))
            >>> c.shape
            (2, 4)
        """
        if self.features is None:
            raise _errors.no_state_size(type(self).__name__)
        c, h = super().initialize_carry(rng, input_shape)
        return c, h


class LSTM(nn.Module):
    """Runs an LSTM cell over the time axis, and gives its hidden state at the last step.

    The memory, the other half of its state, is dropped. Its parameters are those of an
    :class:`LSTMCell`, in ``Scan_0/LSTMCell_0``, whatever the options. Derivatives are taken in
    reverse (``jax.grad``, ``jax.vjp``), of any order; for ``jax.jvp``, as for a cell of your own,
    there is ``cb.scan(cell)``.

    Args:
        d_hidden: size of the hidden state, and of the memory.
        return_sequences: give the hidden state of every step, so that LSTMs stack.
        reverse: run from the last step to the first. The outputs of every step stay in their
            places.
        dtype: of the computation; that of inputs and parameters by default.
        param_dtype: of the parameters.

    Raises:
        ValueError: where ``d_hidden`` is below 1.

    Source: Gers et al., "Learning to Forget" (2000), section 3.

    Shapes:
        ``xn.LSTM(64)``: ``f32[b, t, 32] -> f32[b, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> inputs = jnp.ones((2, 7, 3))
        >>> stacked = cb.serial(xn.LSTM(4, return_sequences=True), xn.LSTM(5))
        >>> stacked.init_with_output(jax.random.key(0), inputs)[0].shape
        (2, 5)

        In both directions, over sequences of different lengths:

        >>> both = cb.branch(xn.LSTM(4), xn.LSTM(4, reverse=True)) >> cb.concatenate()
        >>> lengths = jnp.array([7, 2])
        >>> both.init_with_output(jax.random.key(0), inputs, lengths=lengths)[0].shape
        (2, 8)
    """

    d_hidden: int
    return_sequences: bool = False
    reverse: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if self.d_hidden < 1:
            raise _errors.too_small(type(self).__name__, "d_hidden", 1, self.d_hidden)
        super().__post_init__()

    @nn.nowrap
    def initial_state(
        self, inputs: Float[Array, "batch time features"]
    ) -> tuple[Float[Array, "batch d_hidden"], Float[Array, "batch d_hidden"]]:
        """The state before the first step.

        Args:
            inputs: a sequence, ``[batch, time, features]``.

        Returns:
            The memory c and the hidden state h: zeros, ``[batch, d_hidden]``, in the dtype of the
            computation.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax_extra import layer as xn
            >>> c, h = xn.LSTM(4).initial_state(jnp.ones((2, 7, 3)))
            >>> c.shape
            (2, 4)
        """
        zeros = jnp.zeros((inputs.shape[0], self.d_hidden), self._computed_dtype(inputs))
        return zeros, zeros

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch time features"],
        *,
        lengths: Integer[Array, " batch"] | None = None,
        initial_state: tuple[Float[Array, "batch d_hidden"], Float[Array, "batch d_hidden"]]
        | None = None,
    ) -> Float[Array, "batch *time d_hidden"]:
        """Runs over the sequence.

        Args:
            inputs: a sequence, ``[batch, time, features]``.
            lengths: how many steps of each sequence are valid, integers ``[batch]``; those after
                are padding. The state is that of the last valid step, or with ``reverse`` that
                of a run from the last valid step to the first; with no valid step it is the
                initial state. The outputs of padding are zeros.
            initial_state: the memory c and the hidden state h before the first step, both
                ``[batch, d_hidden]``; zeros by default.

        Returns:
            The hidden state of the last step, ``[batch, d_hidden]``, or with
            ``return_sequences`` of every step, ``[batch, time, d_hidden]``.

        Raises:
            ValueError: where inputs, lengths or the initial state are of another shape, or lengths
                are no integers.
        """
        if inputs.ndim != 3:
            name = type(self).__name__
            raise _errors.wrong_rank(name, "inputs", inputs.shape, "[batch, time, features]")
        state = self._first_state(inputs, initial_state)
        # The scopes that a scan over a cell would open: its parameters are these.
        weights = cb.serial(
            CellWeights(self.d_hidden, self.param_dtype, name="LSTMCell_0"), name="Scan_0"
        )(inputs, state[1])
        inputs, *weights = promote_dtype(inputs, *weights, dtype=self.dtype)
        return run_lstm(
            inputs,
            Weights(*weights),
            state,
            None if lengths is None else _valid(inputs, lengths),
            reverse=self.reverse,
            return_sequences=self.return_sequences,
        )

    def _first_state(
        self, inputs: Array, initial_state: tuple[Array, Array] | None
    ) -> tuple[Array, Array]:
        zeros = self.initial_state(inputs)
        if initial_state is None:
            return zeros
        expected, dtype = zeros[0].shape, zeros[0].dtype
        shapes = [jnp.shape(state) for state in initial_state]
        if shapes != [expected, expected]:
            raise _errors.wrong_state(shapes, expected)
        c, h = (jnp.asarray(state, dtype) for state in initial_state)
        return c, h

    @nn.nowrap
    def _computed_dtype(self, inputs: Array) -> Dtype:
        dtype: Dtype = canonicalize_dtype(inputs, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        return dtype


def _valid(inputs: Array, lengths: Array) -> Array:
    """Which steps of each sequence are valid, ``[batch, time]``."""
    lengths, (batch, time, _) = jnp.asarray(lengths), inputs.shape
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise _errors.wrong_lengths(lengths.shape, lengths.dtype, batch)
    return jnp.arange(time)[None, :] < lengths[:, None]
