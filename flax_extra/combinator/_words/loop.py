"""Loops over copies and steps, and what becomes of variables and rngs in them.

The reference is the model unrolled by hand. If each turn has variables of its own, they are stacked
on a leading axis. If all turns share their variables, then in a loop

- parameters, and collections that may not change, are the same in every turn;
- a value that a turn changes, such as batch statistics or a counter, goes on from turn to turn;
- values that turns append, as ``sow`` does by default, are stacked on a leading axis;
- each turn has random numbers of its own, whichever way the rng was given.

What copies remember in a stream is stacked, and the loop carries it whole: each turn reads and
writes its entry in place.

A value that does not exist yet has no place in the carry of a loop. So the first turn then runs
outside of it, makes the value, and the loop runs the other turns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_extra.combinator._cache.cache import COLLECTION
from flax_extra.combinator._cache.entry import CacheEntry, Copy
from flax_extra.combinator._core import errors, linen
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import describe_item

LAYERS_AXIS = "layers"
"""The logical name of the axis on which ``repeat`` stacks the parameters of its copies."""

Body: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""One turn of a loop: (combinator, carry, xs) -> (carry, ys)."""

Key: TypeAlias = tuple[int, str, tuple[str, ...]]
"""Where a value is: which module holds it, the collection, and the path in it."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over copies or steps.

    Args:
        body: one turn.
        owner: the combinator that runs, whose variables the body uses.
        length: the number of turns.
        axis: the axis of the sequences, and of the outputs, that the loop runs over.
        reverse: whether to run from the last turn to the first.
        unroll: how many turns one iteration of the compiled loop takes.
        has_copies: whether each turn has variables of its own, stacked on a leading axis.
        axis_name: how partitioning metadata names the axis of the copies.
        per_turn: collections of which each turn has its own even if all share their variables.
    """

    body: Body
    owner: Combinator
    length: int
    axis: int = 0
    reverse: bool = False
    unroll: int = 1
    has_copies: bool = False
    axis_name: str | None = LAYERS_AXIS
    per_turn: tuple[str, ...] = ()

    def run(self, carry: Any, xs: Any) -> tuple[Any, Any]:
        """Runs the loop: returns the last carry, and the outputs of all turns."""
        if self.owner.scope is None:
            return self._run_plain(carry, xs)
        if self.has_copies:
            self._check_copies(self.owner.variables)
            return self._run_copies(carry, xs)
        state = _State(self.owner)
        if self._makes_values(state):
            return self._run_and_make(carry, xs, state)
        return self._run_lifted(carry, xs, self._share_variables(state, ["intermediates"]))

    @property
    def _is_empty(self) -> bool:
        return _is_number(self.length, 0)

    def _run_plain(self, carry: Any, xs: Any) -> tuple[Any, Any]:
        """Runs without variables."""
        carry, ys = jax.lax.scan(
            functools.partial(self.body, self.owner),
            carry,
            jax.tree.map(lambda x: jnp.moveaxis(x, self.axis, 0), xs),
            length=None if jax.tree.leaves(xs) else self.length,  # a symbolic length is that of xs
            reverse=self.reverse,
            unroll=self.unroll,
        )
        return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, self.axis), ys)

    def _run_lifted(self, carry: Any, xs: Any, variables: Mapping[str, Any]) -> tuple[Any, Any]:
        """Runs linen's lifted scan."""
        body: Any = self.body
        in_axes: Any = self.axis
        if self._carries_state:
            body, in_axes = self._run_in_place, ((0, self.axis),)
            xs = jnp.arange(self.length), xs
        scan = nn.scan(
            body,
            **variables,
            in_axes=in_axes,
            out_axes=self.axis,
            length=None if jax.tree.leaves(xs) else self.length,  # a symbolic length is that of xs
            reverse=self.reverse,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: self.axis_name},
            check_constancy_invariants=False,
        )
        result: tuple[Any, Any] = scan(self.owner, carry, xs)
        return result

    def _run_copies(self, carry: Any, xs: Any) -> tuple[Any, Any]:
        """Runs turns that each have variables of their own."""
        own: Any = linen.subtract_filters(True, COLLECTION) if self._carries_state else True
        return self._run_lifted(
            carry,
            xs,
            {
                "variable_axes": {linen.make_hashable(own): 0},
                "variable_carry": [COLLECTION] if self._carries_state else False,
                "split_rngs": {True: True},
            },
        )

    @property
    def _carries_state(self) -> bool:
        """Whether turns read and write the state of a stream, each its own entry of it."""
        return (
            (self.has_copies or COLLECTION in self.per_turn)
            and not self.owner.is_initializing()
            and self.owner.is_mutable_collection(COLLECTION)
            and any(COLLECTION in module.variables for module in self._list_modules())
        )

    def _list_modules(self) -> list[nn.Module]:
        # Layers of copies are bound in the loop.
        return [self.owner] if self.has_copies else _list_modules(self.owner)

    def _run_in_place(
        self, owner: Combinator, carry: Any, turn: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        """Runs one turn on its entry of the state of a stream."""
        index, xs = turn
        copy = Copy(index)
        run = nn.map_variables(
            self.body,
            COLLECTION,
            trans_in_fn=copy.enter,
            trans_out_fn=copy.leave,
            mutable=True,
        )
        result: tuple[Any, Any] = run(owner, carry, xs)
        return result

    def _check_copies(self, variables: Mapping[str, Any]) -> None:
        """Raises an error if the variables are those of another number of copies."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(dict(variables))):
            if jnp.shape(leaf)[:1] != (self.length,):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise errors.other_copies(self.owner._label, self.length, name, describe_item(leaf))

    # Turns that share their variables

    def _makes_values(self, state: _State) -> bool:
        """Whether a turn may make values, or append to some, other than intermediates."""
        if self.owner.is_initializing():
            return True
        mutable = linen.get_mutable_collections(self.owner)
        if isinstance(mutable, bool | linen.DenyList):
            return mutable is not False
        names = {mutable} if isinstance(mutable, str) else set(mutable)
        values = state.read()
        known = {key[1] for key in values} | {"intermediates"}
        if self.owner.variables.get("params"):
            known.add("params")
        return bool(names - known) or any(type(value) is tuple for value in values.values())

    def _share_variables(self, state: _State, stacked: Iterable[str]) -> dict[str, Any]:
        """Says how collections and rngs go through the loop."""
        per_turn = {*self.per_turn}.difference([COLLECTION] if self._carries_state else [])
        carried = sorted({key[1] for key in state.read()} - {*stacked, *per_turn})
        mutable = linen.get_mutable_collections(self.owner)
        new = linen.subtract_filters(mutable, ["params", *carried])
        axes = linen.union_filters(new, sorted(per_turn))
        return {
            "variable_axes": {linen.make_hashable(axes): 0},
            "variable_carry": carried,
            "variable_broadcast": linen.subtract_filters(True, linen.union_filters(axes, carried)),
            "split_rngs": {True: True},
        }

    def _run_and_make(self, carry: Any, xs: Any, state: _State) -> tuple[Any, Any]:
        """Runs a loop whose turns make values.

        Turns outside of the loop show which values those are. If no state is made, they have no
        effect, and the compiler removes them.
        """
        first = self.length - 1 if self.reverse else 0
        before = state.read()
        own = {key: value for key, value in before.items() if key[1] in self.per_turn}
        for key, value in own.items():
            state.write(key, jax.tree.map(lambda x: x[first], value))
        x = _take_turn(xs, self.axis, None if self._is_empty else first)
        after_first, ys = self.body(self.owner, carry, x)
        made = state.read()
        appended = self._find_appended(before, made, after_first, x, state)
        self._check_kinds(appended, made)
        makes_state = any(key not in before and key not in appended for key in made)
        if makes_state and not self._is_empty:
            return self._run_others(after_first, xs, ys, state, before, appended)
        if self._is_empty:
            state.reset(before)
            no_steps = jax.tree.map(lambda y: jnp.expand_dims(y, self.axis), ys)
            return carry, jax.tree.map(lambda y: _take_none(y, self.axis), no_steps)
        state.reset({key: value for key, value in before.items() if key not in appended})
        variables = self._share_variables(state, {key[1] for key in appended})
        result = self._run_lifted(carry, xs, variables)
        for key in appended:
            state.write(key, (*before.get(key, ()), *state.read()[key]))
        return result

    def _run_others(
        self,
        carry: Any,
        xs: Any,
        first_ys: Any,
        state: _State,
        before: Mapping[Key, Any],
        appended: Mapping[Key, Any],
    ) -> tuple[Any, Any]:
        """Runs the turns after the first, which has made values."""
        first = self.length - 1 if self.reverse else 0
        made = state.read()
        stacked = {**{key: made[key] for key in made if key[1] in self.per_turn}, **appended}
        for key in stacked:
            state.remove(key)
        ys = jax.tree.map(lambda y: jnp.expand_dims(y, self.axis), first_ys)
        found: Mapping[Key, Any] = {}
        if not _is_number(self.length, 1):
            for key in before:
                if key[1] in self.per_turn:
                    state.write(key, jax.tree.map(functools.partial(_drop, first), before[key]))
            variables = self._share_variables(state, {key[1] for key in appended})
            others = jax.tree.map(functools.partial(_drop, first, axis=self.axis), xs)
            rest = dataclasses.replace(self, length=self.length - 1)
            carry, rest_ys = rest._run_lifted(carry, others, variables)
            ys = jax.tree.map(functools.partial(self._join, axis=self.axis), ys, rest_ys)
            found = state.read()
        for key, value in stacked.items():
            entries = jax.tree.map(lambda x: jnp.expand_dims(x, 0), value)
            if key in found:
                entries = jax.tree.map(self._join, entries, found[key])
            state.write(key, (*before.get(key, ()), *entries) if key in appended else entries)
        return carry, ys

    def _join(self, first: Any, others: Any, axis: int = 0) -> Any:
        """Puts the results of the first turn, on an axis of size 1, with those of the others."""
        parts = [first, others]
        return jnp.concatenate(parts[::-1] if self.reverse else parts, axis)

    def _find_appended(
        self, before: Mapping[Key, Any], made: Mapping[Key, Any], carry: Any, x: Any, state: _State
    ) -> dict[Key, Any]:
        """Finds the entries that a turn appends to tuples, as ``sow`` does.

        A new tuple may also be a value that stays as it is. A second turn shows which it is.
        """
        grown = {key for key in made if _count_entries(made, key) > _count_entries(before, key)}
        if any(key not in before for key in grown):
            self.body(self.owner, carry, x)
            second = state.read()
            state.reset(made)
            grown = {key for key in grown if _count_entries(second, key) > len(made[key])}
        return {key: made[key][_count_entries(before, key) :] for key in grown}

    def _check_kinds(self, appended: Mapping[Key, Any], made: Mapping[Key, Any]) -> None:
        """Raises an error if a collection holds both appended values and others."""
        for name in {key[1] for key in appended}:
            others = [key for key in made if key[1] == name and key not in appended]
            if others:
                path = next(key[2] for key in appended if key[1] == name)
                raise errors.mixed_collection(
                    self.owner._label, name, "/".join(path), "/".join(others[0][2])
                )


class _State:
    """The collections that a loop may change, other than parameters.

    They are those of the combinator that runs, and of layers in it that belong to another scope.
    """

    def __init__(self, owner: Combinator) -> None:
        self._modules = _list_modules(owner)

    def read(self) -> dict[Key, Any]:
        """Reads all values."""
        return {
            (index, collection, path): value.unbox() if isinstance(value, CacheEntry) else value
            for index, module in enumerate(self._modules)
            for collection in linen.list_mutable(module)
            if collection != "params"
            for path, value in linen.read_collection(module, collection).items()
        }

    def write(self, key: Key, value: Any) -> None:
        """Writes one value."""
        linen.write_variable(self._modules[key[0]], key[1], key[2], value)

    def remove(self, key: Key) -> None:
        """Removes one value."""
        linen.remove_variable(self._modules[key[0]], key[1], key[2])

    def reset(self, values: Mapping[Key, Any]) -> None:
        """Puts everything back to the values that :meth:`read` gave."""
        for key in self.read():
            if key not in values:
                self.remove(key)
        for key, value in values.items():
            self.write(key, value)


def _list_modules(owner: Combinator) -> list[nn.Module]:
    """Lists a combinator, and the layers in it that belong to another scope."""
    return [owner, *(m for m in owner._binding.modules if not linen.is_inside(m, owner))]


def _count_entries(values: Mapping[Key, Any], key: Key) -> int:
    value = values.get(key, ())
    return len(value) if type(value) is tuple else 0


def _is_number(length: Any, number: int) -> bool:
    """Whether a length is a number. One that is symbolic stands for all sizes above 1."""
    return isinstance(length, int) and length == number


def _take_turn(xs: Any, axis: int, index: int | None) -> Any:
    """Takes one turn of the sequences; zeros if they have none."""

    def take(x: Any) -> Any:
        if index is None:
            return jnp.zeros_like(x).sum(axis, dtype=x.dtype)
        return jax.lax.index_in_dim(x, index, axis, keepdims=False)

    return jax.tree.map(take, xs)


def _take_none(y: Any, axis: int) -> Any:
    return jax.lax.slice_in_dim(y, 0, 0, axis=axis)


def _drop(index: int, x: Any, axis: int = 0) -> Any:
    """Drops the first or the last entry of an axis."""
    start = 1 if index == 0 else 0
    return jax.lax.slice_in_dim(x, start, start + x.shape[axis] - 1, axis=axis)


def number_axis(name: str | None, taken: Iterable[str]) -> str | None:
    """Makes the name of an axis different from those of the axes that it is stacked upon."""
    others = set(taken)
    if name is None or name not in others:
        return name
    return next(f"{name}_{i}" for i in range(1, len(others) + 1) if f"{name}_{i}" not in others)
