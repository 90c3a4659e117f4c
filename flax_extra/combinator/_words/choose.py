"""``cond`` and ``switch``: one of several callables, chosen by the item on top of the stack.

They run linen's own lifted ``cond`` and ``switch``, so that parameters, mutable collections and
rngs behave as linen says. All branches make their variables; one of them runs.

>>> from flax_extra import combinator as cb
>>> import jax.numpy as jnp
>>> p = cb.cond(jnp.abs, jnp.square)
>>> float(p(True, -3.0)), float(p(False, -3.0))
(3.0, 9.0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_extra.combinator._core import errors, linen
from flax_extra.combinator._core.arrays import is_array, split_arrays
from flax_extra.combinator._core.children import Children
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.expression import format_short
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack, put, take

Branch: TypeAlias = Callable[..., list[Any]]
"""A function of arrays that gives arrays; one that is lifted takes its combinator first."""


class _Choice(Combinator):
    """A combinator that runs one of its children. It has a scope of its own, as a layer has."""

    _is_lifted: ClassVar[bool] = True

    @functools.cached_property
    def signature(self) -> Signature:
        branch = self.children[0].signature
        return Signature(1 + branch.n_in, branch.n_out)

    def _check(self) -> None:
        first = self.children[0].signature
        for child in self.children:
            found = child.signature
            if (found.n_in, found.n_out) != (first.n_in, first.n_out):
                listed = [(format_short(c.target), str(c.signature)) for c in self.children]
                raise errors.different_branches(self._label, listed)

    @nn.nowrap
    def _read_chooser(self, item: Any, path: tuple[str, ...], stack: Stack) -> Any:
        """Returns the item that chooses, or raises an error if it cannot."""
        raise errors.no_expansion(type(self).__name__)

    @nn.nowrap
    def _choose(
        self, chooser: Any, branches: Sequence[Branch], owner: Combinator | None, arrays: list[Any]
    ) -> list[Any]:
        """Runs the branch that is chosen, on arrays; with an owner, on the owner and arrays."""
        raise errors.no_expansion(type(self).__name__)

    @linen.static_property
    def _makes_variables(self) -> bool:
        """Whether the branches make their variables now: all of them run then."""
        if self.scope is None:
            return False
        lacks_parameters = not self.variables.get("params")
        return self.is_initializing() or (lacks_parameters and self.is_mutable_collection("params"))

    def _run(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        (item,), operands = take(taken, 1)
        chooser = self._read_chooser(item, steps.path, taken)
        arrays, merge = split_arrays(operands)
        makes_variables = self._makes_variables
        branches = _Branches(
            self, steps, taken, merge, keeps_state=self.scope is not None and not makes_variables
        )
        runs: list[Branch] = [
            functools.partial(branches.run, index) for index in range(len(self.children))
        ]
        if self.scope is None:
            alone = [functools.partial(run, self) for run in runs]
            outputs = self._choose(chooser, alone, None, arrays)
        elif makes_variables:
            made = [functools.partial(_identity, run(self, *arrays)) for run in runs]
            outputs = self._choose(chooser, made, None, [])
        else:
            outputs = self._choose(chooser, runs, self, arrays)
        return put(branches.merge_outputs(outputs), rest)


def _identity(outputs: list[Any]) -> list[Any]:
    return outputs


class _Branches:
    """The branches of one run, which must give items of the same types, and keep the same state."""

    def __init__(
        self,
        owner: _Choice,
        steps: Steps,
        stack: Stack,
        merge: Callable[..., Stack],
        keeps_state: bool,
    ) -> None:
        self.owner = owner
        self.steps = steps
        self.stack = stack
        self.merge = merge
        self.merge_outputs = merge
        self.before = _list_state(owner) if keeps_state else None
        self.outputs: Stack | None = None
        self.made: tuple[int, dict[Any, Any]] | None = None

    def run(self, index: int, combinator: Combinator, *arrays: Any) -> list[Any]:
        """Runs one branch: returns the arrays of its outputs."""
        outputs = self.steps.on(combinator)(index, self.merge(arrays))
        self._check_outputs(index, outputs)
        self._check_state(index, combinator)
        leaves, self.merge_outputs = split_arrays(outputs)
        return leaves

    def _check_outputs(self, index: int, outputs: Stack) -> None:
        if self.outputs is None:
            self.outputs = outputs
        for position, (first, item) in enumerate(zip(self.outputs, outputs, strict=True)):
            if not _has_same_type(first, item):
                raise errors.different_outputs(
                    self.steps.path,
                    position,
                    describe_item(first),
                    self.owner._name_child(index),
                    describe_item(item),
                    describe_stack(self.stack),
                )

    def _check_state(self, index: int, combinator: Combinator) -> None:
        """Raises an error if a branch makes variables, or appends to some, that another does not.

        Which branch runs is not known when it is traced, and the variables must be.
        """
        if self.before is None:
            return
        state = _list_state(combinator)
        made = {k: v for k, v in state.items() if k not in self.before or v != self.before[k]}
        first, others = self.made = self.made or (index, made)
        for branch, ours, theirs in ((first, others, made), (index, made, others)):
            for key in ours:
                if key not in theirs or theirs[key] != ours[key]:
                    collection, path = key
                    name = self.owner._name_child(branch)
                    label = self.owner._label
                    raise errors.made_in_branch(label, name, collection, "/".join(path))


def _has_same_type(a: Any, b: Any) -> bool:
    trees: list[Any] = [jax.tree_util.tree_structure(item) for item in (a, b)]
    is_same: bool = trees[0] == trees[1]
    return is_same and all(map(_is_same_kind, jax.tree.leaves(a), jax.tree.leaves(b)))


def _is_same_kind(a: Any, b: Any) -> bool:
    """Whether two leaves are arrays of one shape and dtype, or equal values that are no arrays."""
    if is_array(a) and is_array(b):
        return bool(a.shape == b.shape and a.dtype == b.dtype)
    return not is_array(a) and not is_array(b) and type(a) is type(b) and bool(a == b)


def _list_state(combinator: Combinator) -> dict[Any, Any]:
    """Lists the variables that a branch may change: collection and path, and their structure."""
    shared = [m for m in combinator._binding.modules if not linen.is_inside(m, combinator)]
    return {
        (collection, (*module.path, *path)): jax.tree_util.tree_structure(value)
        for module in (combinator, *shared)
        for collection in linen.list_mutable(module)
        for path, value in linen.read_collection(module, collection).items()
    }


class Cond(_Choice):
    """One of two callables, chosen by a boolean. See :func:`cond`."""

    def _check(self) -> None:
        if len(self.children) != 2:  # noqa: PLR2004
            raise errors.not_two_branches(len(self.children))
        super()._check()

    @nn.nowrap
    def _read_chooser(self, item: Any, path: tuple[str, ...], stack: Stack) -> Any:
        is_boolean = isinstance(item, bool) or (is_array(item) and item.dtype == jnp.bool_)
        if not is_boolean or jnp.shape(item) != ():
            raise errors.no_predicate(path, describe_item(item), describe_stack(stack))
        return item

    @nn.nowrap
    def _choose(
        self, chooser: Any, branches: Sequence[Branch], owner: Combinator | None, arrays: list[Any]
    ) -> list[Any]:
        f, g = branches
        chosen: list[Any] = (
            jax.lax.cond(chooser, f, g, *arrays)
            if owner is None
            else nn.cond(chooser, f, g, owner, *arrays)
        )
        return chosen


class Switch(_Choice):
    """One of several callables, chosen by a number. See :func:`switch`."""

    def _check(self) -> None:
        if not len(self.children):
            raise errors.no_branches()
        super()._check()

    @nn.nowrap
    def _read_chooser(self, item: Any, path: tuple[str, ...], stack: Stack) -> Any:
        is_integer = isinstance(item, int) and not isinstance(item, bool)
        if is_array(item):
            is_integer = jnp.issubdtype(item.dtype, jnp.integer)
        if not is_integer or jnp.shape(item) != ():
            raise errors.no_index(path, describe_item(item), describe_stack(stack))
        n = len(self.children)
        known = None if isinstance(item, jax.core.Tracer) else np.asarray(item).item()
        if known is not None and not 0 <= known < n:
            raise errors.no_such_branch(path, n, known)
        return item

    @nn.nowrap
    def _choose(
        self, chooser: Any, branches: Sequence[Branch], owner: Combinator | None, arrays: list[Any]
    ) -> list[Any]:
        chosen: list[Any] = (
            jax.lax.switch(chooser, branches, *arrays)
            if owner is None
            else nn.switch(chooser, branches, owner, *arrays)
        )
        return chosen


def cond(f: Callable[..., Any], g: Callable[..., Any], *, name: str | None = None) -> Cond:
    """Runs one of two callables: the first if the item on top of the stack is true.

    If ``F`` and ``G`` take a, b, then ``cond(F, G)`` takes a boolean, a, b. It gives the outputs of
    the callable that ran. Both make their variables, and initialising runs both. In a
    :func:`stream`, a branch remembers the blocks on which it ran.

    Args:
        f: a callable, which runs if the boolean is true.
        g: a callable, which runs if it is false. It takes and gives as many items as ``f``, and its
            outputs have the shapes and dtypes of those of ``f``.
        name: the name of its scope; ``Cond_0``, ``Cond_1``, ... if left out.

    Returns:
        A combinator with signature ``1 + n_in -> n_out``. To compute the boolean from the item on
        top, put the function before it: ``cb.serial(predicate, cb.cond(f, g))``.

    Raises:
        SignatureError: If the branches do not take and give the same number of items; at the call,
            if the top item is no boolean, or the outputs differ in shape or dtype.
        SharingError: If one layer is used both in a ``repeat`` and outside of it.
        TypeError: If an argument is not callable.
        ValueError: If one branch, at the call, makes variables that the other does not have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> either = cb.cond(nn.Dense(3), cb.serial(nn.Dense(8), nn.relu, nn.Dense(3)))
        >>> x = jnp.ones((2, 4))
        >>> variables = either.init(jax.random.key(0), True, x)
        >>> list(variables["params"]), either.apply(variables, False, x).shape
        (['Dense_0', 'Dense_1', 'Dense_2'], (2, 3))

    See Also:
        :func:`switch`, which chooses among any number. Under :func:`vmap` all branches run, and
        each element takes the outputs of its own.
    """
    return Cond(Children.of((f, g)), name=name)


def switch(*fs: Callable[..., Any] | Iterable[Any], name: str | None = None) -> Switch:
    """Runs one of several callables: the item on top of the stack is its number.

    If ``F``, ``G`` and ``H`` take a, b, then ``switch(F, G, H)`` takes an integer, a, b. It gives
    the outputs of the callable that ran. All make their variables, and initialising runs all. In a
    :func:`stream`, a branch remembers the blocks on which it ran.

    Args:
        fs: callables or (nested) iterables of callables: the branches, numbered from 0. They take
            and give the same number of items, and their outputs have the same shapes and dtypes.
        name: the name of its scope; ``Switch_0``, ``Switch_1``, ... if left out.

    Returns:
        A combinator with signature ``1 + n_in -> n_out``.

    Raises:
        SignatureError: If the branches do not take and give the same number of items; at the call,
            if the top item is no integer, or the outputs differ in shape or dtype.
        SharingError: If one layer is used both in a ``repeat`` and outside of it.
        TypeError: If an argument is not callable.
        ValueError: If there is no branch; at the call, if one branch makes variables that another
            does not have, or there is no branch of that number. A number that is not known before
            the program runs is clamped to the range, as ``jax.lax.switch`` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb
        >>> activation = cb.switch(jnp.tanh, jnp.abs, jnp.square)
        >>> float(activation(2, -3.0)), str(activation.signature)
        (9.0, '2 -> 1')
    """
    return Switch(Children.of(fs), name=name)
