"""``hold``: state that a callable remembers from block to block of a stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from flax_extra.combinator._cache.cache import COLLECTION, Cache
from flax_extra.combinator._core import linen, stream_errors
from flax_extra.combinator._core.checks import as_integer
from flax_extra.combinator._core.children import Children
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.expression import format_short
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack, put, take
from flax_extra.combinator._words.lift import check_carry
from flax_extra.combinator._words.loop import Loop


class Hold(Combinator):
    """A callable whose first items are remembered. See :func:`hold`."""

    axis: int = 1

    _is_lifted: ClassVar[bool] = True

    @static_property
    def _n_state(self) -> int:
        """How many items it remembers."""
        return self.children[1].signature.n_out

    @functools.cached_property
    def signature(self) -> Signature:
        signature = self.children[0].signature
        return Signature(signature.n_in - self._n_state, signature.n_out - self._n_state)

    @functools.cached_property
    def keywords(self) -> frozenset[str]:
        return super().keywords | {"decode", "lengths"}

    def _check(self) -> None:
        if len(self.children) != len(("f", "initial")):
            raise stream_errors.hold_children(len(self.children))
        self.axis = as_integer("hold", "axis", self.axis)
        f, initial = self.children
        takes, gives = f.signature.n_in - self._n_state, f.signature.n_out - self._n_state
        if takes < max(1, initial.signature.n_in) or gives < 0:
            raise stream_errors.hold_arity(
                format_short(f.target),
                str(f.signature),
                format_short(initial.target),
                str(initial.signature),
            )

    def _run(self, stack: Stack, steps: Steps) -> Stack:
        inputs, rest = take(stack, self.signature.n_in)
        initial = steps(1, take(inputs, self.children[1].signature.n_in)[0])
        if not self._n_state:
            return put(steps(0, inputs), rest)
        context = steps.env.context
        lengths = context.get("lengths")
        cache = _HeldState(
            self,
            self._move_time(inputs, steps),
            decode=context.get("decode", False),
            lengths=lengths,
        )
        names = [f"state_{index}" for index in range(self._n_state)]
        state = tuple(map(cache.recall, names, initial))
        if cache.is_streaming and lengths is not None:
            state, outputs = self._run_step_by_step(state, inputs, lengths, steps)
        else:
            before = put(state, inputs)
            state, outputs = take(steps(0, before), self._n_state)
            check_carry(initial, state, self, steps, before)
        for name, item in zip(names, state, strict=True):
            cache.keep(name, item)
        return put(outputs, rest)

    def _run_step_by_step(
        self, state: Stack, inputs: Stack, lengths: Array, steps: Steps
    ) -> tuple[Stack, Stack]:
        """Runs blocks of one step, so that each row stops after its last valid step."""

        def run_step(owner: Hold, carry: Stack, xs: tuple[Array, Stack]) -> tuple[Stack, Stack]:
            index, inputs = xs
            is_valid = index < lengths
            block = jax.tree.map(lambda x: jnp.expand_dims(x, self.axis), inputs)
            before = put(carry, block)
            context = {**steps.env.context, "lengths": is_valid.astype(jnp.int32)}
            there = Steps(owner, steps.env._replace(binding=owner._binding, context=context))
            after, outputs = take(there(0, before), self._n_state)
            check_carry(carry, after, self, steps, before)
            kept = jax.tree.map(functools.partial(_choose_rows, is_valid), after, carry)
            return kept, jax.tree.map(lambda y: self._drop_time(y, steps, before), outputs)

        xs = jax.tree.map(lambda x: jnp.moveaxis(x, self.axis, 0), inputs)
        n_steps = jax.tree.leaves(xs)[0].shape[0]
        state, outputs = Loop(run_step, self, n_steps).run(state, (jnp.arange(n_steps), xs))
        return state, jax.tree.map(lambda y: jnp.moveaxis(y, 0, self.axis), outputs)

    def _move_time(self, inputs: Stack, steps: Steps) -> jax.ShapeDtypeStruct:
        """Returns the shape [batch, time] of the sequences."""
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
        for shape in shapes:
            if not -len(shape) <= self.axis < len(shape) or len(shape) == 1:
                raise stream_errors.no_time_to_hold(steps.path, self.axis, describe_stack(inputs))
        time = shapes[0][self.axis]
        batch = shapes[0][1 if self.axis in (0, -len(shapes[0])) else 0]
        return jax.ShapeDtypeStruct((batch, time), jnp.float32)  # type: ignore[no-untyped-call]

    def _drop_time(self, output: Array, steps: Steps, stack: Stack) -> Array:
        """Drops the time axis of one step's output."""
        if not -output.ndim <= self.axis < output.ndim or output.shape[self.axis] != 1:
            raise stream_errors.no_step_to_hold(
                steps.path, self.axis, describe_item(output), describe_stack(stack)
            )
        return jnp.squeeze(output, self.axis)


class _HeldState(Cache):
    """What a ``hold`` remembers. Its scope holds nothing else, so that no names can clash."""

    def _declare(self, name: str, make: Callable[[], Any]) -> Any:
        return linen.declare_variable(self._layer, COLLECTION, name, make)


def _choose_rows(rows: Array, yes: Array, no: Array) -> Array:
    return jnp.where(jnp.expand_dims(rows, tuple(range(1, yes.ndim))), yes, no)


def hold(
    f: Callable[..., Any],
    initial: Callable[..., Any],
    *,
    axis: int = 1,
    name: str | None = None,
) -> Hold:
    """Remembers the first items of a callable from call to call: how state enters a pipeline.

    ``f`` takes the state and, beneath, a block of each sequence. It gives the next state and,
    beneath, its outputs. Held, it takes and gives the sequences alone. Without the context keyword
    ``decode``, each call starts from ``initial``: it runs on whole sequences. With ``decode=True``
    it goes on from the last block, as in :func:`stream`.

    ``hold(cb.scan(cell), zeros)`` is a recurrent layer that streams; a running sum, a delay or the
    past of a causal convolution are each one function held.

    Args:
        f: a callable (state.., x..) -> (state.., y..).
        initial: a callable x.. -> state.. that gives the state at the start from the first inputs.
            It gives as many items as are remembered: arrays, or pytrees of arrays, whose first axis
            is the batch.
        axis: the axis of the sequences that holds time. With ``lengths``, ``f`` runs on one step at
            a time, and its outputs have the same axis.
        name: the name of its scope; ``Hold_0``, ``Hold_1``, ... if left out.

    Returns:
        A combinator x.. -> y.., with the context keywords ``decode`` and ``lengths``.

    Raises:
        SignatureError: If ``f`` does not take and give the state that ``initial`` gives; at the
            call, if the state changes shape or dtype, or a sequence does not have the axis.
        TypeError: If an argument is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb
        >>> def add_up(total, x) -> tuple[jnp.ndarray, jnp.ndarray]:
        ...     totals = total[:, None] + jnp.cumsum(x, axis=1)
        ...     return totals[:, -1], totals
        >>> running_sum = cb.hold(add_up, lambda x: jnp.zeros_like(x[:, 0]))
        >>> running_sum(jnp.array([[1.0, 2.0, 3.0]])).tolist()
        [[1.0, 3.0, 6.0]]
        >>> stream = cb.stream(running_sum, "f32[b, t]")
        >>> state, y = stream.step({}, stream.start(1), jnp.array([[1.0, 2.0]]))
        >>> state, z = stream.step({}, state, jnp.array([[3.0]]))
        >>> y.tolist(), z.tolist()
        ([[1.0, 3.0]], [[6.0]])
    """
    return Hold(Children.of((f, initial)), axis=axis, name=name)
