"""A gated linear recurrence: the RG-LRU of Griffin, computed for all steps in parallel.

Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
Language Models" (2024), section 2.4 and appendix A.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Dtype, Initializer
from jax import Array, lax
from jaxtyping import Float, Integer

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._initializers import draw_in_float32
from flax_extra.layer._numerics import einsum_accumulated
from flax_extra.layer._padding import zero_padding
from flax_extra.layer._sharding import broadcast_like, match_varying_axes, shard_like

SHARPNESS = 8.0
"""The constant c of the paper, by which the recurrence gate can lengthen or shorten memory."""

KERNEL_INIT: Initializer = nn.initializers.lecun_normal(batch_axis=0)
BIAS_INIT: Initializer = nn.initializers.zeros_init()


def draw_decay(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
    """Draws the logits of decays a such that a to the power of c is uniform from 0.9 to 0.999."""
    decay = jax.random.uniform(key, shape, dtype, 0.9, 0.999) ** (1 / SHARPNESS)
    return jnp.log(decay) - jnp.log1p(-decay)


class LinearRecurrence(nn.Module):
    r"""Mixes a sequence over time by a gated linear recurrence of each feature.

    .. math::
        \begin{aligned}
        r_t &= \sigma(x_t W_a + b_a), \quad i_t = \sigma(x_t W_x + b_x) \\
        a_t &= a^{c r_t}, \quad a = \sigma(\Lambda), \quad c = 8 \\
        h_t &= a_t h_{t-1} + \sqrt{1 - a_t^2} \, (i_t x_t)
        \end{aligned}

    All products with h are elementwise. There is no loop over time: the steps are combined in
    parallel, in a number of rounds that grows with the logarithm of their number
    (``jax.lax.associative_scan``). The decay :math:`a_t` is computed as a logarithm and the
    recurrence in float32 or better. All derivatives are defined.

    Args:
        n_blocks: the matrices of the gates are block-diagonal with so many blocks, each for
            features / n_blocks features; 1 for full matrices.
        reverse: run from the last step to the first. The outputs stay in the order of the inputs.
        return_state: return the state after the last step, too: (outputs, h).
        kernel_init: initializer of the kernels of the gates,
            ``[n_blocks, features / n_blocks, features / n_blocks]``.
        bias_init: initializer of the biases of the gates, ``[features]``.
        decay_init: initializer of the logits of the decay, :math:`\Lambda`, ``[features]``; by
            default such that :math:`a^c` is uniform from 0.9 to 0.999.
        dtype: of the products and the outputs; that of inputs and parameters by default.
        param_dtype: of the parameters. Those of half precision are drawn in float32 and rounded.

    Raises:
        ValueError: If ``n_blocks`` is below 1.

    Source: De et al., "Griffin" (2024), equations (1) to (4).

    Shapes:
        ``xn.LinearRecurrence()``: ``f32[b, t, 32] -> f32[b, t, 32]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> inputs = jnp.ones((2, 7, 6))
        >>> layer = xn.LinearRecurrence(n_blocks=3, return_state=True)
        >>> (outputs, h), variables = layer.init_with_output(jax.random.key(0), inputs)
        >>> outputs.shape, jax.tree.map(jnp.shape, variables["params"]["input_gate"])
        ((2, 7, 6), {'bias': (6,), 'kernel': (3, 2, 2)})

        From the state, another run goes on:

        >>> outputs, h = layer.apply(variables, inputs, initial_state=h)
        >>> bool((outputs[:, -1] == h).all())
        True
    """

    n_blocks: int = 1
    reverse: bool = False
    return_state: bool = False
    kernel_init: Initializer = KERNEL_INIT
    bias_init: Initializer = BIAS_INIT
    decay_init: Initializer = draw_decay
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if self.n_blocks < 1:
            raise _errors.too_small(type(self).__name__, "n_blocks", 1, self.n_blocks)
        super().__post_init__()

    @property
    def signature(self) -> cb.Signature | None:
        """The signature with ``return_state``; without it, the annotations say it."""
        return cb.Signature(1, 2) if self.return_state else None

    @nn.nowrap
    def initial_state(
        self, inputs: Float[Array, "batch time features"]
    ) -> Float[Array, "batch features"]:
        """Makes the state before the first step, for the batch of these inputs.

        Args:
            inputs: a sequence, ``[batch, time, features]``.

        Returns:
            The state h: zeros, ``[batch, features]``, in the dtype of the computation.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax_extra import layer as xn
            >>> xn.LinearRecurrence().initial_state(jnp.ones((2, 7, 6))).shape
            (2, 6)
        """
        param_dtype = jnp.zeros((), self.param_dtype)
        zero = jnp.zeros((), canonicalize_dtype(inputs, param_dtype, dtype=self.dtype))
        batch, _, features = inputs.shape
        return broadcast_like(zero, (batch, features), inputs, 1)

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch time features"],
        *,
        lengths: Integer[Array, " batch"] | None = None,
        initial_state: Float[Array, "batch features"] | None = None,
        decode: bool = False,
    ) -> (
        Float[Array, "batch time features"]
        | tuple[Float[Array, "batch time features"], Float[Array, "batch features"]]
    ):
        """Runs over the sequence.

        Args:
            inputs: a sequence, ``[batch, time, features]``.
            lengths: how many steps of each sequence are valid, integers ``[batch]`` from 0 to time.
                The steps after them are padding: they may hold anything, NaN included, and have no
                effect. The state is that after the last valid step; with ``reverse`` the run goes
                from the last valid step to the first; with no valid step the state is the initial
                state. The outputs at padding are zeros.
            initial_state: the state h before the first step, ``[batch, features]``; zeros by
                default.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.

        Returns:
            The state after every step, ``[batch, time, features]``. With ``return_state`` a tuple
            of that and the last state, ``[batch, features]``.

        Raises:
            ValueError: If inputs, lengths or the initial state have other shapes, ``n_blocks`` does
                not divide the features, or lengths are not integers, or are known to be out of
                range.
            StreamError: If ``decode`` is true, and ``reverse`` too, or there is no state.
        """
        self._check_inputs(inputs, decode)
        cache = cb.Cache(self, inputs, decode=decode, lengths=lengths)
        valid = cache.is_valid if cache.has_padding else None
        state = self.initial_state(inputs)
        dtype = state.dtype
        if initial_state is not None:
            shape = jnp.shape(initial_state)
            if shape != state.shape:
                raise _errors.wrong_state(type(self).__name__, ["h"], [shape], state.shape)
            state = shard_like(jnp.asarray(initial_state, dtype), inputs, 1)
        (inputs,) = promote_dtype(inputs, dtype=dtype)
        inputs = zero_padding(inputs, valid)
        log_decay, forcing = self._compute_steps(inputs)
        if valid is not None:  # padding leaves the state as it is
            log_decay = jnp.where(valid[..., None], log_decay, 0)
            forcing = jnp.where(valid[..., None], forcing, 0)
        state = cache.recall("h", state.astype(forcing.dtype))
        is_zero = initial_state is None and not cache.is_streaming
        states = run_linear_recurrence(
            jnp.exp(log_decay), forcing, None if is_zero else state, reverse=self.reverse
        )
        if not _is_empty(states):
            state = states[:, 0 if self.reverse else -1]
        cache.keep("h", state)
        outputs = zero_padding(states, valid).astype(dtype)
        return (outputs, state.astype(dtype)) if self.return_state else outputs

    @nn.nowrap
    def _check_inputs(self, inputs: Array, decode: bool) -> None:
        name = type(self).__name__
        if inputs.ndim != 3:
            raise _errors.wrong_rank(name, "inputs", inputs.shape, "[batch, time, features]")
        if inputs.shape[-1] % self.n_blocks:
            raise _errors.indivisible_blocks(name, inputs.shape[-1], self.n_blocks)
        if decode and self.reverse:
            raise _errors.runs_backward(name)

    @nn.nowrap
    def _compute_steps(self, inputs: Array) -> tuple[Array, Array]:
        """Computes the logarithm of the decay at each step, and what is added to the state."""
        declare_gate = functools.partial(
            _BlockDiagonal,
            self.n_blocks,
            self.dtype,
            self.param_dtype,
            self.kernel_init,
            self.bias_init,
        )
        recurrence_gate = jax.nn.sigmoid(declare_gate(name="recurrence_gate")(inputs))
        input_gate = jax.nn.sigmoid(declare_gate(name="input_gate")(inputs))
        decay_init = draw_in_float32(self.decay_init)
        logit = self.param("decay_logit", decay_init, inputs.shape[-1:], self.param_dtype)
        dtype = recurrence_gate.dtype
        log_limit = -SHARPNESS * jax.nn.softplus(-logit.astype(dtype))
        log_decay = recurrence_gate * log_limit[None, None]
        # A square root of exactly zero would have an infinite derivative.
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), np.finfo(dtype).tiny))
        return log_decay, scale * input_gate * inputs.astype(dtype)


def _is_empty(sequence: Array) -> bool:
    time: Any = sequence.shape[1]
    return isinstance(time, int) and time == 0


class _BlockDiagonal(nn.Module):
    """A dense layer with a block-diagonal kernel, and a result in float32 or better."""

    n_blocks: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        *batch, features = inputs.shape
        size = features // self.n_blocks
        kernel_init, bias_init = map(draw_in_float32, (self.kernel_init, self.bias_init))
        shape = (self.n_blocks, size, size)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        bias = self.param("bias", bias_init, (features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        blocks = inputs.reshape(*batch, self.n_blocks, size)
        outputs = einsum_accumulated("btni,nio->btno", blocks, kernel)
        biased: Array = outputs.reshape(inputs.shape) + bias.astype(outputs.dtype)[None, None]
        return biased


def run_linear_recurrence(
    decay: Float[Array, "batch time features"],
    forcing: Float[Array, "batch time features"],
    state: Float[Array, "batch features"] | None = None,
    *,
    reverse: bool = False,
) -> Float[Array, "batch time features"]:
    """Computes h[t] = decay[t] * h[t - 1] + forcing[t] for all t.

    Args:
        decay: what the state before each step is multiplied by.
        forcing: what is added at each step.
        state: h before the first step; zeros by default.
        reverse: whether the first step is the last of the sequence.

    Returns:
        The state after each step.
    """
    decay, forcing, state = match_varying_axes((decay, forcing, state))
    time: Any = decay.shape[1]
    if state is not None:
        is_first = jnp.arange(time) == (time - 1 if reverse else 0)
        forcing = forcing + jnp.where(is_first[None, :, None], decay * state[:, None], 0)
    if not isinstance(time, int):
        return _run_step_by_step(reverse, decay, forcing)
    return forcing if time == 0 else _combine_steps(reverse, decay, forcing)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _combine_steps(reverse: bool, decay: Array, forcing: Array) -> Array:
    """Runs from a state of zeros.

    The tangents are the same recurrence with another forcing. JAX need not differentiate through
    the rounds of the scan, which would take twice the time and the memory.
    """
    return _scan_spans(reverse, decay, forcing)


@_combine_steps.defjvp
def _combine_steps_jvp(
    reverse: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (decay, forcing), (decay_dot, forcing_dot) = primals, tangents
    states = _combine_steps(reverse, decay, forcing)
    zeros = jnp.zeros_like(states[:, :1])
    parts = [states[:, 1:], zeros] if reverse else [zeros, states[:, :-1]]
    states_before = jnp.concatenate(parts, axis=1)
    return states, _scan_spans(reverse, decay, decay_dot * states_before + forcing_dot)


def _scan_spans(reverse: bool, decay: Array, forcing: Array) -> Array:
    states: Array
    spans = decay, forcing
    _, states = lax.associative_scan(_combine_spans, spans, reverse=reverse, axis=1)
    return states


def _combine_spans(before: tuple[Array, Array], after: tuple[Array, Array]) -> tuple[Array, Array]:
    """Combines two adjacent spans of steps, each h -> decay * h + forcing, into one."""
    (decay_before, forcing_before), (decay_after, forcing_after) = before, after
    return decay_before * decay_after, forcing_before * decay_after + forcing_after


def _run_step_by_step(reverse: bool, decay: Array, forcing: Array) -> Array:
    """Runs in a loop, for a program exported for all lengths: their logarithm is not known."""

    def step(state: Array, step_inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, forcing = step_inputs
        state = decay * state + forcing
        return state, state

    states: Array
    state = jnp.zeros_like(forcing).sum(1)
    time_first = jnp.swapaxes(decay, 0, 1), jnp.swapaxes(forcing, 0, 1)
    _, states = lax.scan(step, state, time_first, reverse=reverse)
    return jnp.swapaxes(states, 0, 1)
