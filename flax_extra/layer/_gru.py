"""The GRU: a layer that runs a gated recurrent unit over time.

Source of the formulas: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for
Statistical Machine Translation" (2014), with the reset gate after the product, as in cuDNN, torch
and linen.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Integer

from flax_extra.layer._gated_layer import Gate, GatedLayer
from flax_extra.layer._gated_recurrence import State, Weights

GATES = "rzn"
"""Reset, update, candidate: the order of their columns in fused weights."""


@dataclasses.dataclass(frozen=True)
class GRUGates:
    r"""The elementwise part of a GRU.

    The gates r and z are one tanh, because :math:`\sigma(x) = (1 + \tanh(x / 2)) / 2`. ``scales``
    halves their weights.
    """

    scales: ClassVar = (0.5, 0.5, 1.0)
    sums_products: ClassVar = False

    def step(
        self, state: State, projected: Array, product: Array
    ) -> tuple[State, Array, tuple[Array, ...]]:
        """Takes one step; the other arrays are the state, and what r is multiplied with."""
        (h,) = state
        d_hidden = h.shape[-1]
        projected_rz, projected_n = _split_last(projected, d_hidden)
        product_rz, product_n = _split_last(product, d_hidden)
        tanh_rz = jnp.tanh(projected_rz + product_rz)
        r, z = _split_gates(tanh_rz)
        n = jnp.tanh(projected_n + r * product_n)
        new_h = (1 - z) * n + z * h
        return (new_h,), jnp.concatenate([tanh_rz, n], axis=-1), (h, product_n)

    def step_jvp(
        self,
        gates: Array,
        others: tuple[Array, ...],
        state_dot: State,
        projected_dot: Array,
        product_dot: Array,
    ) -> tuple[State, Array, tuple[Array, ...]]:
        """Computes the tangents of state, gates, the state before, and what r multiplies."""
        (h, product_n), (h_dot,) = others, state_dot
        d_hidden = h.shape[-1]
        projected_rz_dot, projected_n_dot = _split_last(projected_dot, d_hidden)
        product_rz_dot, product_n_dot = _split_last(product_dot, d_hidden)
        tanh_rz, n = _split_last(gates, d_hidden)
        r, z = _split_gates(tanh_rz)
        tanh_rz_dot = (projected_rz_dot + product_rz_dot) * (1 - tanh_rz**2)
        r_dot, z_dot = jnp.split(tanh_rz_dot / 2, 2, axis=-1)
        n_dot = (projected_n_dot + r_dot * product_n + r * product_n_dot) * (1 - n**2)
        new_h_dot = (1 - z) * n_dot + z_dot * (h - n) + z * h_dot
        gates_dot = jnp.concatenate([tanh_rz_dot, n_dot], axis=-1)
        return (new_h_dot,), gates_dot, (h_dot, product_n_dot)


def _split_last(x: Array, d_hidden: int) -> tuple[Array, Array]:
    """Splits the columns of the last gate from those of the gates before it."""
    return x[..., :-d_hidden], x[..., -d_hidden:]


def _split_gates(tanh_rz: Array) -> tuple[Array, Array]:
    """Takes the gates r, z from the tanh of both."""
    r, z = jnp.split(tanh_rz, 2, axis=-1)
    return r / 2 + 0.5, z / 2 + 0.5


class GRU(GatedLayer):
    r"""Runs a gated recurrent unit over the time axis and returns its last hidden state.

    .. math::
        \begin{aligned}
        r &= \sigma(x w_{ir} + b_{ir} + h w_{hr}), \quad z = \sigma(x w_{iz} + b_{iz} + h w_{hz}) \\
        n &= \tanh(x w_{in} + b_{in} + r (h w_{hn} + b_{hn})), \quad h' = (1 - z) n + z h
        \end{aligned}

    Its parameters are those of ``flax.linen.GRUCell``, in ``Scan_0/GRUCell_0``, whatever the
    options. All derivatives are defined: ``jax.grad``, ``jax.jvp`` and both of each other.

    Args:
        d_hidden: size of the hidden state h.
        return_sequences: return the hidden state of every step, so that GRUs stack.
        reverse: run from the last step to the first. The outputs stay in the order of the inputs.
        dtype: of the computation; that of inputs and parameters by default. The state is kept in
            float32 or better within a run.
        param_dtype: of the parameters. Those of half precision are drawn in float32 and rounded.
        return_state: return the state after the last step, too: (outputs, h).
        kernel_init: initializer of the kernels for the inputs, for each gate one
            ``[features, d_hidden]``.
        recurrent_kernel_init: initializer of the kernels for the hidden state, for each gate one
            ``[d_hidden, d_hidden]``.
        bias_init: initializer of the biases, ``[d_hidden]``.

    Raises:
        ValueError: If ``d_hidden`` is below 1.

    Source: Cho et al. (2014), section 2.3, with the reset gate after the product.

    Shapes:
        ``xn.GRU(64)``: ``f32[b, t, 32] -> f32[b, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> inputs = jnp.ones((2, 7, 3))
        >>> stacked = cb.serial(xn.GRU(4, return_sequences=True), xn.GRU(5))
        >>> stacked.init_with_output(jax.random.key(0), inputs)[0].shape
        (2, 5)

        With its state, from which another run can go on:

        >>> gru = xn.GRU(4, return_state=True)
        >>> (output, h), variables = gru.init_with_output(jax.random.key(0), inputs)
        >>> output, h = gru.apply(variables, inputs, initial_state=h)
        >>> bool((output == h).all())
        True
    """

    cell = GRUGates()
    state_names = ("h",)

    @nn.nowrap
    def initial_state(
        self, inputs: Float[Array, "batch time features"]
    ) -> Float[Array, "batch d_hidden"]:
        """Makes the state before the first step, for the batch of these inputs.

        Args:
            inputs: a sequence, ``[batch, time, features]``.

        Returns:
            The hidden state h: zeros, ``[batch, d_hidden]``, in the dtype of the computation.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax_extra import layer as xn
            >>> xn.GRU(4).initial_state(jnp.ones((2, 7, 3))).shape
            (2, 4)
        """
        (h,) = self._zero_state(inputs)
        return h

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch time features"],
        *,
        lengths: Integer[Array, " batch"] | None = None,
        initial_state: Float[Array, "batch d_hidden"] | None = None,
        decode: bool = False,
    ) -> (
        Float[Array, "batch *time d_hidden"]
        | tuple[Float[Array, "batch *time d_hidden"], Float[Array, "batch d_hidden"]]
    ):
        """Runs over the sequence.

        Args:
            inputs: a sequence, ``[batch, time, features]``.
            lengths: how many steps of each sequence are valid, integers ``[batch]`` from 0 to time.
                The steps after them are padding: they may hold anything, NaN included, and have no
                effect. The state is that after the last valid step; with ``reverse`` the run goes
                from the last valid step to the first; with no valid step the state is the initial
                state. The outputs at padding are zeros.
            initial_state: the hidden state h before the first step, ``[batch, d_hidden]``; zeros by
                default.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.

        Returns:
            The hidden state after the last step, ``[batch, d_hidden]``, or with
            ``return_sequences`` after every step, ``[batch, time, d_hidden]``. With
            ``return_state`` a tuple of that and the last h, ``[batch, d_hidden]``.

        Raises:
            ValueError: If inputs, lengths or the initial state have other shapes, or lengths are
                not integers, or are known to be out of range.
            StreamError: If ``decode`` is true, and ``reverse`` too, or there is no state.
        """
        self._check_inputs(inputs)
        gates = [
            *(Gate(f"i{gate}", has_bias=True) for gate in GATES),
            *(Gate(f"h{gate}", has_bias=gate == "n") for gate in GATES),
        ]
        parameters = self._declare_parameters("GRUCell_0", gates, inputs.shape[-1])
        state = None if initial_state is None else (initial_state,)
        outputs: Array | tuple[Array, Array]
        outputs = self._run(inputs, _fuse_gates(parameters), lengths, state, decode)
        return outputs


def _fuse_gates(parameters: Any) -> Weights:
    """Lays the weights of all gates side by side."""
    inputs, recurrent = ([parameters[f"{kind}{gate}"] for gate in GATES] for kind in "ih")
    *_, (_, bias_n) = recurrent
    return Weights(
        jnp.concatenate([kernel for kernel, _ in inputs], axis=-1),
        jnp.concatenate([kernel for kernel, _ in recurrent], axis=-1),
        jnp.concatenate([bias for _, bias in inputs], axis=-1)[None],
        # The other gates add this product to that of the inputs, which has their bias.
        jnp.concatenate([jnp.zeros_like(bias_n)] * 2 + [bias_n], axis=-1)[None],
    )
