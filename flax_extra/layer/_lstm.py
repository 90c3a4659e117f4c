"""The LSTM: a cell, and the layer that runs it over time.

Source of the formulas: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget
gate of Gers, Schmidhuber and Cummins, "Learning to Forget" (2000).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Integer

from flax_extra.layer import _errors
from flax_extra.layer._gated_layer import Gate, GatedLayer
from flax_extra.layer._gated_recurrence import State, Weights
from flax_extra.layer._initializers import draw_in_float32

GATES = "ifgo"
"""Input, forget, candidate, output: the order of their columns in fused weights."""


class LSTMCell(nn.LSTMCell):
    r"""Takes one step of an LSTM: linen's cell with annotations that say its signature, 3 -> 3.

    .. math::
        \begin{aligned}
        i &= \sigma(x w_{ii} + h w_{hi} + b_{hi}), \quad f = \sigma(x w_{if} + h w_{hf} + b_{hf}) \\
        g &= \tanh(x w_{ig} + h w_{hg} + b_{hg}), \quad o = \sigma(x w_{io} + h w_{ho} + b_{ho}) \\
        c' &= f c + i g, \quad h' = o \tanh(c')
        \end{aligned}

    Args:
        gate_fn: activation of the gates i, f and o.
        activation_fn: activation of the candidate g and of the memory in the output.
        kernel_init: initializer of the kernels for the inputs.
        recurrent_kernel_init: initializer of the kernels for the hidden state.
        bias_init: initializer of the biases.
        dtype: of the computation; that of inputs, state and parameters by default.
        param_dtype: of the parameters. Those of half precision are drawn in float32 and rounded.
        carry_init: initializer of the state that ``initialize_carry`` makes.
        features: size of the state that ``initialize_carry`` makes. The cell itself takes it from
            its carry.

    Source: Gers et al. (2000), section 3; the parameters and their names are those of
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
        c, h = carry
        dense = functools.partial(
            nn.Dense, h.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype
        )

        def apply_gate(gate: str) -> Array:
            kernel_init, recurrent_kernel_init, bias_init = map(
                draw_in_float32, (self.kernel_init, self.recurrent_kernel_init, self.bias_init)
            )
            of_inputs = dense(use_bias=False, kernel_init=kernel_init, name=f"i{gate}")
            of_hidden = dense(
                kernel_init=recurrent_kernel_init, bias_init=bias_init, name=f"h{gate}"
            )
            activation = self.activation_fn if gate == "g" else self.gate_fn
            activated: Array = activation(of_inputs(inputs) + of_hidden(h))
            return activated

        i, f, g, o = map(apply_gate, GATES)
        # The memory may be wider than the gates: then it keeps its dtype, as in linen.
        with jax.numpy_dtype_promotion("standard"):
            new_c = f * c + i * g
            new_h = o * self.activation_fn(new_c)
        return (new_c, new_h), new_h

    @nn.nowrap
    def initialize_carry(
        self, rng: Array, input_shape: tuple[int, ...]
    ) -> tuple[Float[Array, "*batch d_hidden"], Float[Array, "*batch d_hidden"]]:
        """Makes the state before the first step, for ``flax.linen.RNN``.

        Args:
            rng: key for ``carry_init``.
            input_shape: the shape of the inputs of one step, ``(..., features)``.

        Returns:
            The memory c and the hidden state h, both ``[..., features]``, from ``carry_init``.

        Raises:
            ValueError: If the field ``features`` is not given.

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


@dataclasses.dataclass(frozen=True)
class LSTMGates:
    r"""The elementwise part of an LSTM.

    All gates are one tanh, because :math:`\sigma(x) = (1 + \tanh(x / 2)) / 2`. ``scales`` halves
    the weights.
    """

    scales: ClassVar = (0.5, 0.5, 1.0, 0.5)
    sums_products: ClassVar = True

    def step(
        self, state: State, projected: Array, product: Array
    ) -> tuple[State, Array, tuple[Array, ...]]:
        """Takes one step; the other array for the derivative is the memory before it."""
        c, _ = state
        gates = jnp.tanh(projected + product)
        i, f, g, o = _split_gates(gates)
        new_c = f * c + i * g
        return (new_c, o * jnp.tanh(new_c)), gates, (c,)

    def step_jvp(
        self,
        gates: Array,
        others: tuple[Array, ...],
        state_dot: State,
        projected_dot: Array,
        product_dot: Array,
    ) -> tuple[State, Array, tuple[Array, ...]]:
        """Computes the tangents of state, gates and memory."""
        (c,), (c_dot, _) = others, state_dot
        i, f, g, o = _split_gates(gates)
        activated_c = jnp.tanh(f * c + i * g)
        gates_dot = (projected_dot + product_dot) * (1 - gates**2)
        # The tangents of the tanh; a sigmoid has half of them.
        i_dot, f_dot, g_dot, o_dot = jnp.split(gates_dot, len(GATES), axis=-1)
        new_c_dot = f * c_dot + c / 2 * f_dot + g / 2 * i_dot + i * g_dot
        new_h_dot = activated_c / 2 * o_dot + o * (1 - activated_c**2) * new_c_dot
        return (new_c_dot, new_h_dot), gates_dot, (c_dot,)


def _split_gates(gates: Array) -> tuple[Array, Array, Array, Array]:
    """Takes the gates i, f, g, o from the tanh of them all."""
    i, f, g, o = jnp.split(gates, len(GATES), axis=-1)
    return i / 2 + 0.5, f / 2 + 0.5, g, o / 2 + 0.5


class LSTM(GatedLayer):
    """Runs an LSTM cell over the time axis and returns its last hidden state.

    Its parameters are those of a :class:`LSTMCell`, in ``Scan_0/LSTMCell_0``, whatever the options.
    All derivatives are defined: ``jax.grad``, ``jax.jvp`` and both of each other.

    Args:
        d_hidden: size of the hidden state h, and of the memory c.
        return_sequences: return the hidden state of every step, so that LSTMs stack.
        reverse: run from the last step to the first. The outputs stay in the order of the inputs.
        dtype: of the computation; that of inputs and parameters by default. The state is kept in
            float32 or better within a run.
        param_dtype: of the parameters. Those of half precision are drawn in float32 and rounded.
        return_state: return the state after the last step, too: (outputs, c, h).
        kernel_init: initializer of the kernels for the inputs, for each gate one
            ``[features, d_hidden]``.
        recurrent_kernel_init: initializer of the kernels for the hidden state, for each gate one
            ``[d_hidden, d_hidden]``.
        bias_init: initializer of the biases, for each gate one ``[d_hidden]``.

    Raises:
        ValueError: If ``d_hidden`` is below 1.

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

        With its state, from which another run can go on:

        >>> lstm = xn.LSTM(4, return_state=True)
        >>> (output, c, h), variables = lstm.init_with_output(jax.random.key(0), inputs)
        >>> output, c, h = lstm.apply(variables, inputs, initial_state=(c, h))
        >>> bool((output == h).all())
        True
    """

    cell = LSTMGates()
    state_names = ("c", "h")

    @nn.nowrap
    def initial_state(
        self, inputs: Float[Array, "batch time features"]
    ) -> tuple[Float[Array, "batch d_hidden"], Float[Array, "batch d_hidden"]]:
        """Makes the state before the first step, for the batch of these inputs.

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
        c, h = self._zero_state(inputs)
        return c, h

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch time features"],
        *,
        lengths: Integer[Array, " batch"] | None = None,
        initial_state: tuple[Float[Array, "batch d_hidden"], Float[Array, "batch d_hidden"]]
        | None = None,
        decode: bool = False,
    ) -> (
        Float[Array, "batch *time d_hidden"]
        | tuple[
            Float[Array, "batch *time d_hidden"],
            Float[Array, "batch d_hidden"],
            Float[Array, "batch d_hidden"],
        ]
    ):
        """Runs over the sequence.

        Args:
            inputs: a sequence, ``[batch, time, features]``.
            lengths: how many steps of each sequence are valid, integers ``[batch]`` from 0 to time.
                The steps after them are padding: they may hold anything, NaN included, and have no
                effect. The state is that after the last valid step; with ``reverse`` the run goes
                from the last valid step to the first; with no valid step the state is the initial
                state. The outputs at padding are zeros.
            initial_state: the memory c and the hidden state h before the first step, both
                ``[batch, d_hidden]``; zeros by default.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.

        Returns:
            The hidden state after the last step, ``[batch, d_hidden]``, or with
            ``return_sequences`` after every step, ``[batch, time, d_hidden]``. With
            ``return_state`` a tuple of that and the last c and h, both ``[batch, d_hidden]``.

        Raises:
            ValueError: If inputs, lengths or the initial state have other shapes, or lengths are
                not integers, or are known to be out of range.
            StreamError: If ``decode`` is true, and ``reverse`` too, or there is no state.
        """
        self._check_inputs(inputs)
        gates = [
            *(Gate(f"i{gate}", has_bias=False) for gate in GATES),
            *(Gate(f"h{gate}", has_bias=True) for gate in GATES),
        ]
        parameters = self._declare_parameters("LSTMCell_0", gates, inputs.shape[-1])
        outputs: Array | tuple[Array, Array, Array]
        outputs = self._run(inputs, _fuse_gates(parameters), lengths, initial_state, decode)
        return outputs


def _fuse_gates(parameters: Any) -> Weights:
    """Lays the weights of all gates side by side."""
    recurrent = [parameters[f"h{gate}"] for gate in GATES]
    return Weights(
        jnp.concatenate([parameters[f"i{gate}"][0] for gate in GATES], axis=-1),
        jnp.concatenate([kernel for kernel, _ in recurrent], axis=-1),
        jnp.concatenate([bias for _, bias in recurrent], axis=-1)[None],
        recurrent_bias=None,
    )
