"""A layer that runs any recurrent cell of linen over time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from jax import Array
from jaxtyping import Float, Integer, Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._padding import zero_padding
from flax_extra.layer._sharding import match_varying_axes, shard_like


class Recurrent(nn.Module):
    """Runs a recurrent cell over the time axis and returns its last output.

    The parameters are those of the cell, in ``cell``, as for ``flax.linen.RNN``; a cell made in an
    ``nn.compact`` method belongs to that method's module and has a name there. The parameters are
    the same at every step; random numbers, for dropout in the cell, say, are new at every step. For
    an LSTM or a GRU, :class:`LSTM` and :class:`GRU` are faster.

    Args:
        cell: a ``flax.linen.RNNCellBase``: one of linen's, or of your own.
        return_sequences: return the output of every step, so that such layers stack.
        reverse: run from the last step to the first. The outputs stay in the order of the inputs.
        return_state: return the carry after the last step, too: (outputs, carry). A carry that is a
            tuple is several items: (outputs, c, h) for an LSTM cell.

    Raises:
        ValueError: If ``cell`` is not a recurrent cell.

    Source: the loop is ``flax.linen.scan``; the outputs are those of ``flax.linen.RNN``.

    Shapes:
        ``xn.Recurrent(nn.GRUCell(64))``: ``f32[b, t, 32] -> f32[b, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import layer as xn
        >>> inputs = jnp.ones((2, 7, 3))
        >>> layer = xn.Recurrent(nn.MGUCell(4), return_sequences=True)
        >>> outputs, variables = layer.init_with_output(jax.random.key(0), inputs)
        >>> outputs.shape, list(variables["params"])
        ((2, 7, 4), ['cell'])

        Over images, with the carry:

        >>> frames = jnp.ones((2, 7, 8, 8, 3))
        >>> layer = xn.Recurrent(nn.ConvLSTMCell(4, kernel_size=(3, 3)), return_state=True)
        >>> items, _ = layer.init_with_output(jax.random.key(0), frames)
        >>> [item.shape for item in items]
        [(2, 8, 8, 4), (2, 8, 8, 4), (2, 8, 8, 4)]
    """

    cell: nn.RNNCellBase
    return_sequences: bool = False
    reverse: bool = False
    return_state: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.cell, nn.RNNCellBase):
            raise _errors.not_a_cell(type(self).__name__, repr(self.cell))
        super().__post_init__()

    @property
    def signature(self) -> cb.Signature | None:
        """The signature with ``return_state``; without it, the annotations say it."""
        if not self.return_state:
            return None
        return cb.Signature(1, 1 + len(_flatten_tuples(self._carry_shape)))

    @property
    def in_shapes(self) -> dict[str, Any]:
        """How the items of ``initial_state`` are grouped if they are inputs from the stack."""
        return {"initial_state": _get_nesting(self._carry_shape)}

    @property
    def _carry_shape(self) -> Any:
        input_shape = (1,) * (1 + self.cell.num_feature_axes)
        return jax.eval_shape(lambda: self.cell.initialize_carry(jax.random.key(0), input_shape))

    @nn.nowrap
    def initial_state(self, inputs: Float[Array, "batch time *features"]) -> Any:
        """Makes the carry before the first step, for the batch of these inputs.

        Args:
            inputs: a sequence, ``[batch, time, ..., features]``.

        Returns:
            What the cell's ``initialize_carry`` gives for the key ``jax.random.key(0)``, as
            ``flax.linen.RNN`` does; for a cell with a field ``dtype`` in the dtype of the
            computation.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import linen as nn
            >>> from flax_extra import layer as xn
            >>> xn.Recurrent(nn.GRUCell(4)).initial_state(jnp.ones((2, 7, 3))).shape
            (2, 4)
        """
        input_shape = (inputs.shape[0], *inputs.shape[2:])
        carry = self.cell.initialize_carry(jax.random.key(0), input_shape)
        return jax.tree.map(lambda x: shard_like(self._cast(x, inputs), inputs, 1), carry)

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch time *features"],
        *,
        lengths: Integer[Array, " batch"] | None = None,
        initial_state: Any = None,
        decode: bool = False,
    ) -> Shaped[Array, " batch *time_and_features"] | tuple[Any, ...]:
        """Runs over the sequence.

        Args:
            inputs: a sequence, ``[batch, time, ..., features]``, with as many feature axes as the
                cell takes.
            lengths: how many steps of each sequence are valid, integers ``[batch]`` from 0 to time.
                The steps after them are padding: they may hold anything, NaN included, and have no
                effect. The carry is that after the last valid step; with ``reverse`` the run goes
                from the last valid step to the first; with no valid step the carry is the initial
                one. The outputs at padding are zeros.
            initial_state: the carry before the first step; ``initial_state(inputs)`` by default.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.

        Returns:
            The output of the last valid step, zeros if there is none, or with ``return_sequences``
            of every step, time at axis 1. With ``return_state`` a tuple of that and the items of
            the last carry.

        Raises:
            ValueError: If inputs, lengths or the initial state have other shapes, or lengths are
                not integers, or are known to be out of range.
            StreamError: If ``decode`` is true, and ``reverse`` too, or there is no state.
        """
        name = type(self).__name__
        n_axes = 2 + self.cell.num_feature_axes
        if inputs.ndim != n_axes:
            axes = ", ".join(["batch", "time", *["..."] * (n_axes > 3), "features"])
            raise _errors.wrong_rank(name, "inputs", inputs.shape, f"[{axes}]")
        cache = cb.Cache(self, inputs, decode=decode, lengths=lengths)
        valid = cache.is_valid if cache.has_padding else None
        if decode and self.reverse:
            raise _errors.runs_backward(name)
        carry = self.initial_state(inputs)
        if initial_state is not None:
            found, expected = (jax.tree.map(jnp.shape, tree) for tree in (initial_state, carry))
            if found != expected:
                raise _errors.wrong_carry(name, type(self.cell).__name__, expected, found)
            carry = jax.tree.map(
                lambda x, like: shard_like(jnp.asarray(x, like.dtype), inputs, 1),
                initial_state,
                carry,
            )
        carry = cache.recall("carry", carry)
        inputs = zero_padding(inputs, valid)
        # The carry of a loop must vary over the same axes of a mesh as all that is computed from.
        carry, _ = match_varying_axes((carry, (inputs, valid, dict(self.variables))))
        scan = nn.scan(
            _step,
            variable_broadcast=nn.DenyList("intermediates"),
            variable_axes={"intermediates": 0},
            split_rngs={"params": False, nn.DenyList("params"): True},
            in_axes=1,
            out_axes=1,
            reverse=self.reverse,
        )
        carry, outputs = scan(self.cell, carry, (inputs, valid))
        cache.keep("carry", carry)
        if not self.return_sequences:
            outputs = _take_last(outputs, lengths, self.reverse)
        return (outputs, *_flatten_tuples(carry)) if self.return_state else outputs

    @nn.nowrap
    def _cast(self, x: Array, inputs: Array) -> Array:
        """Casts a part of the carry to the dtype that a cell of linen computes in."""
        if not hasattr(self.cell, "dtype") or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return x.astype(canonicalize_dtype(inputs, x, dtype=self.cell.dtype))


def _step(cell: nn.RNNCellBase, carry: Any, step_inputs: tuple[Array, Array | None]) -> Any:
    inputs, valid = step_inputs
    after, outputs = cell(carry, inputs)
    if valid is None:
        return after, outputs

    def select(x: Array, otherwise: Array | int) -> Array:
        return jnp.where(jnp.expand_dims(valid, range(1, x.ndim)), x, otherwise)

    return jax.tree.map(select, after, carry), select(outputs, 0)


def _take_last(outputs: Array, lengths: Array | None, reverse: bool) -> Array:
    """Takes the output of the step that ran last."""
    time = outputs.shape[1]
    if isinstance(time, int) and time == 0:
        return outputs.sum(1)
    if reverse:
        return outputs[:, 0]
    if lengths is None:
        return outputs[:, -1]
    # A sum, because a gather of rows from a sharded batch would gather the batch.
    is_last = jnp.arange(time)[None, :] == jnp.asarray(lengths)[:, None] - 1
    is_last = jnp.expand_dims(is_last, range(2, outputs.ndim))
    return jnp.where(is_last, outputs, 0).sum(1, dtype=outputs.dtype)


def _get_nesting(carry: Any) -> tuple[Any, ...]:
    """Returns the grouping of a carry into items: a tuple groups, anything else is one item."""
    return tuple(map(_get_nesting, carry)) if type(carry) is tuple else ()


def _flatten_tuples(carry: Any) -> tuple[Any, ...]:
    """Flattens nested tuples, as the stack does; anything else is one item."""
    if type(carry) is not tuple:
        return (carry,)
    return tuple(item for part in carry for item in _flatten_tuples(part))
