"""``scan``: a recurrent cell over a time axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.checks import as_integer, check_at_least
from flax_extra.combinator._core.children import make_only_child
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.expression import format_short
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.stack import Stack, put, take
from flax_extra.combinator._words.lift import Lifted, check_carry
from flax_extra.combinator._words.loop import Loop


class Scan(Lifted):
    """A recurrent cell over a time axis. See :func:`scan`."""

    axis: int = 1
    reverse: bool = False
    unroll: int = 1
    n_carry: int | None = None

    @static_property
    def _n_carry(self) -> int:
        """How many of the cell's inputs are its carry."""
        return self.signature.n_in - 1 if self.n_carry is None else self.n_carry

    def _check(self) -> None:
        super()._check()
        self.axis = as_integer("scan", "axis", self.axis)
        self.unroll = as_integer("scan", "unroll", self.unroll)
        if self.n_carry is not None:
            self.n_carry = as_integer("scan", "n_carry", self.n_carry)
        check_at_least("scan", "unroll", 1, self.unroll)
        child = self.children[0]
        if not 0 <= self._n_carry < child.signature.n_in:
            text = format_short(child.target)
            raise errors.no_sequence(text, str(child.signature), self._n_carry)
        if child.signature.n_out < self._n_carry:
            text = format_short(child.target)
            raise errors.scan_arity(str(child.signature), text, self._n_carry)

    def _run(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        carry, xs = take(taken, self._n_carry)
        for x in xs:
            self._check_axis("input", x, 0, steps, taken)

        def run_step(combinator: Scan, carry: Stack, xs: Stack) -> tuple[Stack, Stack]:
            before = put(carry, xs)
            outputs = steps.on(combinator)(0, before)
            after, ys = take(outputs, self._n_carry)
            check_carry(carry, after, self, steps, before)
            for y in ys:
                self._check_axis("output", y, 1, steps, before)
            return after, ys

        length = self._find_length(xs, steps, taken)
        loop = Loop(
            run_step, self, length, axis=self.axis, reverse=self.reverse, unroll=self.unroll
        )
        carry, ys = loop.run(carry, xs)
        return put(put(carry, ys), rest)

    def _find_length(self, xs: Stack, steps: Steps, stack: Stack) -> int:
        """Returns the number of steps, which all sequences have."""
        lengths = [jnp.shape(leaf)[self.axis] for leaf in jax.tree_util.tree_leaves(xs)]
        if not lengths:
            raise errors.no_steps(steps.path, describe_stack(stack))
        if any(length != lengths[0] for length in lengths):
            raise errors.unequal_lengths(steps.path, self.axis, lengths, describe_stack(stack))
        length: int = lengths[0]
        return length

    def _check_axis(self, role: str, item: Any, extra: int, steps: Steps, stack: Stack) -> None:
        """Raises an error if an item, with ``extra`` axes more, does not have the time axis."""
        for leaf in jax.tree_util.tree_leaves(item):
            rank = jnp.ndim(leaf) + extra
            if not -rank <= self.axis < rank:
                text = describe_item(item)
                raise errors.no_time_axis(steps.path, role, text, self.axis, describe_stack(stack))


def scan(
    cell: Callable[..., Any],
    *,
    axis: int = 1,
    reverse: bool = False,
    unroll: int = 1,
    n_carry: int | None = None,
    name: str | None = None,
) -> Scan:
    """Runs a recurrent cell over a time axis.

    A cell takes the items of the carry and, beneath, one step of each sequence. It gives the items
    of the carry and, beneath, any number of outputs. Its scan takes the initial carry and the
    sequences, and gives the last carry and the outputs of every step, with time at the same axis.
    The parameters are the same at every step; each step has its own rng.

    Args:
        cell: a callable (carry.., x) -> (carry.., y).
        axis: the axis of the sequences, and of the outputs, that holds time.
        reverse: whether to run from the last step to the first.
        unroll: how many steps one iteration of the compiled loop runs.
        n_carry: how many of the cell's inputs are its carry: all but the last by default.
        name: the name of its scope; ``Scan_0``, ``Scan_1``, ... if left out.

    Returns:
        A combinator with the signature of the cell.

    Raises:
        SignatureError: If the cell does not give back its carry; at the call, if an item of the
            carry changes shape or dtype, or a sequence does not have the axis.
        TypeError: If an argument has the wrong type.
        ValueError: If a number is too small.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb
        >>> running_sum = cb.scan(cb.add() >> cb.dup())
        >>> total, sums = running_sum(jnp.zeros(1), jnp.array([[1.0, 2.0, 3.0]]))
        >>> total.tolist(), sums.tolist()
        ([6.0], [[1.0, 3.0, 6.0]])
    """
    return Scan(
        make_only_child("scan", cell),
        axis=axis,
        reverse=reverse,
        unroll=unroll,
        n_carry=n_carry,
        name=name,
    )
