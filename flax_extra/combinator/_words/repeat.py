"""``repeat``: copies of a callable in series, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_extra.combinator._cache.cache import COLLECTION
from flax_extra.combinator._core import errors, surgery_errors
from flax_extra.combinator._core.checks import as_integer, check_at_least
from flax_extra.combinator._core.children import make_only_child
from flax_extra.combinator._core.copying import Copier
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.expression import Argument, format_short, list_fields
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.stack import Stack, put, take
from flax_extra.combinator._words.lift import (
    Lifted,
    Policy,
    check_carry,
    check_policy,
    choose_axis_name,
    rematerialize,
)
from flax_extra.combinator._words.loop import LAYERS_AXIS, Loop

PER_COPY = (COLLECTION, "intermediates")
"""The collections of which each copy has its own even if all share their parameters."""


class Repeat(Lifted):
    """Copies of a callable in series. See :func:`repeat`."""

    n: int = 1
    shared: bool = False
    remat: bool | Policy = False
    unroll: int = 1
    axis_name: str | None = LAYERS_AXIS
    n_carry: int | None = None
    copies: tuple[int, ...] | None = None

    @static_property
    def _copies(self) -> tuple[int, ...]:
        """The numbers of its copies. Those of a slice are the numbers in the whole."""
        return tuple(range(self.n)) if self.copies is None else self.copies

    @static_property
    def _n_carry(self) -> int:
        """How many items are handed from copy to copy."""
        return self.signature.n_out if self.n_carry is None else self.n_carry

    @static_property
    def _axis_name(self) -> str | None:
        """The name of its axis, made different from those of the repeats in it."""
        return choose_axis_name(self.axis_name, self.children)

    @static_property
    def _stacks_parameters(self) -> bool:
        return not self.shared

    def _check(self) -> None:
        super()._check()
        self.n = as_integer("repeat", "n", self.n)
        self.unroll = as_integer("repeat", "unroll", self.unroll)
        if not isinstance(self.remat, bool):
            check_policy("repeat", "remat", self.remat)
        check_at_least("repeat", "n", 0, self.n)
        check_at_least("repeat", "unroll", 1, self.unroll)
        if self.copies is not None:
            numbers = tuple(as_integer("repeat", "copies", number) for number in self.copies)
            if len(numbers) != self.n:
                raise surgery_errors.copies_without_number(self.n, len(numbers))
            self.copies = None if numbers == tuple(range(self.n)) else numbers
        signature, text = self.children[0].signature, format_short(self.children[0].target)
        if self.n_carry is not None:
            self.n_carry = as_integer("repeat", "n_carry", self.n_carry)
            check_at_least("repeat", "n_carry", 0, self.n_carry)
            if self.n_carry > min(signature.n_in, signature.n_out):
                raise errors.repeat_arity(str(signature), text, self.n_carry)
        elif signature.n_out > signature.n_in:
            raise errors.more_out_than_in(str(signature), text)

    def _run(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        carry, others = take(taken, self._n_carry)
        # Without n_carry, all copies see the same items beneath the carry.
        constant, xs = (others, ()) if self.n_carry is None else ((), others)
        self._check_copies_of(xs, steps, taken)

        def run_copy(combinator: Repeat, carry: Stack, xs: Stack) -> tuple[Stack, Stack]:
            before = put(carry, put(xs, constant))
            after, ys = take(steps.on(combinator)(0, before), self._n_carry)
            check_carry(carry, after, self, steps, before)
            return after, ys

        if self.remat:
            policy = None if self.remat is True else self.remat
            run_copy = rematerialize(run_copy, self, prevent_cse=False, policy=policy)
        loop = Loop(
            run_copy,
            self,
            length=self.n,
            unroll=self.unroll,
            has_copies=not self.shared,
            axis_name=self._axis_name,
            per_turn=(COLLECTION,),
        )
        carry, ys = loop.run(carry, xs)
        return put(put(carry, ys), rest)

    @nn.nowrap
    def _check_copies_of(self, xs: Stack, steps: Steps, stack: Stack) -> None:
        """Raises an error if an item does not have one entry for each copy."""
        for index, item in enumerate(xs, self._n_carry):
            for leaf in jax.tree_util.tree_leaves(item):
                if jnp.shape(leaf)[:1] != (self.n,):
                    text = describe_item(item)
                    raise errors.not_for_each_copy(
                        steps.path, self.n, index, text, describe_stack(stack)
                    )

    @nn.nowrap
    def __getitem__(self, index: Any) -> Any:
        """Returns the body for the index 0, or a repeat with some of the copies.

        A slice or a sequence of numbers selects copies. They know their numbers, so that
        :func:`transfer` gives each the variables that it had. The copies of a bound repeat are
        bound to theirs.
        """
        if isinstance(index, slice):
            positions = tuple(range(self.n))[index]
        elif isinstance(index, Iterable):
            positions = tuple(self._find_position(as_integer("repeat", "i", i)) for i in index)
        else:
            return super().__getitem__(index)
        return self if positions == tuple(range(self.n)) else self._take_copies(positions)

    @nn.nowrap
    def _find_position(self, index: int) -> int:
        if not -self.n <= index < self.n:
            raise surgery_errors.no_such_copy(self._label, index, self.n)
        return index % self.n

    @nn.nowrap
    def _take_copies(self, positions: tuple[int, ...]) -> Repeat:
        """Returns a repeat with the copies at some positions: bound, if this is bound."""
        numbers = tuple(self._copies[i] for i in positions)
        if self.scope is None:
            # Two slices of one repeat may stand in one pipeline: each has parameters of its own.
            children = self.children if self.shared else self.children.replace_modules(Copier())
            return self.clone(n=len(numbers), copies=numbers, children=children)
        if self.is_initializing():
            raise surgery_errors.slice_while_initializing(self._label)
        if self.shared and not any(map(self._has_entries, self.variables)):
            bound = self.children.replace_modules(self._binding.find)
            return self.clone(
                n=len(numbers), copies=numbers, children=bound, name=None, parent=self.scope
            )
        at = np.array(positions, int)
        variables = {
            collection: jax.tree.map(lambda x: x[at], tree)
            if self._has_entries(collection)
            else tree
            for collection, tree in self.variables.items()
        }
        rngs = {name: rng.as_jax_rng() for name, rng in self.scope.rngs.items()}
        free = self.children.replace_modules(Copier())
        some = self.clone(n=len(numbers), copies=numbers, children=free, name=None)
        return some.bind(variables, rngs=rngs)

    @nn.nowrap
    def _has_entries(self, collection: str) -> bool:
        """Whether the variables of a collection have an entry for each copy."""
        return not self.shared or collection in PER_COPY

    @static_property
    def _arguments(self) -> list[Argument]:
        others = [(prefix, value) for prefix, value in list_fields(self) if prefix != "n="]
        return [("", self.children[0].target), ("", self.n), *others]


def repeat(
    f: Callable[..., Any],
    n: int,
    *,
    shared: bool = False,
    remat: bool | Policy = False,
    unroll: int = 1,
    axis_name: str | None = LAYERS_AXIS,
    n_carry: int | None = None,
    name: str | None = None,
) -> Repeat:
    """Puts ``n`` copies of ``f`` in series, compiled once.

    Each copy has parameters of its own. They are stacked on a new leading axis, and the copies run
    in a loop (``nn.scan``), so that the compile time does not grow with ``n``. Each copy has its
    own rng.

    The items that ``f`` gives, ``n_out`` of them, are handed from copy to copy and must keep shape
    and dtype. The inputs beyond those, such as a mask, are the same for every copy.

    Args:
        f: a callable that takes ``n_in`` items and gives at most as many.
        n: number of copies.
        shared: whether all copies use one set of parameters. Other variables, such as batch
            statistics, go on from copy to copy then, as if the copies were written one by one; each
            copy has its own ``"cache"``, the state of a stream.
        remat: whether to recompute each copy in the backward pass, so that memory holds the
            intermediate values of one copy at a time. A policy, one of
            ``jax.checkpoint_policies``, says which values are kept all the same.
        unroll: how many copies one iteration of the compiled loop runs.
        axis_name: the name of the leading axis in partitioning metadata, such as that of
            ``nn.with_logical_partitioning``. None for no name, as physical axes of a mesh need. A
            repeat around another of the same name adds a number: ``"layers_1"``.
        n_carry: how many items are handed from copy to copy. The inputs beyond them have a leading
            axis of size ``n``, one entry for each copy, and so have the outputs beyond them. An
            item without arrays, such as None, is the same for every copy.
        name: the name of its scope; ``Repeat_0``, ``Repeat_1``, ... if left out.

    Returns:
        A combinator with the signature of ``f``. A slice of it has some of the copies:
        ``repeat(f, 6)[:3]`` is the first three, and those of a bound one have their variables.

    Raises:
        SignatureError: If ``f`` gives more items than it takes, or does not take and give
            ``n_carry``; at the call, if an item changes shape or dtype, or has no entry for each
            copy.
        SharingError: If a layer in ``f`` is also used outside of it and not ``shared``.
        TypeError: If an argument has the wrong type.
        ValueError: If a number is too small.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> tower = cb.repeat(cb.residual(nn.Dense(4), nn.relu), 6)
        >>> variables = tower.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'Dense_0': {'bias': (6, 4), 'kernel': (6, 4, 4)}}}

        The hidden states of all layers, and a temperature for each:

        >>> layer = cb.fn(lambda x, temperature: jnp.tanh(x / temperature)) >> cb.dup()
        >>> last, states = cb.repeat(layer, 6, n_carry=1)(jnp.ones((2, 4)), jnp.arange(1.0, 7.0))
        >>> last.shape, states.shape
        ((2, 4), (6, 2, 4))
    """
    return Repeat(
        make_only_child("repeat", f),
        n=n,
        shared=shared,
        remat=remat,
        unroll=unroll,
        axis_name=axis_name,
        n_carry=n_carry,
        name=name,
    )
