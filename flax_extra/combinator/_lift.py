"""Combinators that JAX transforms: copies in series, recurrence over time, recomputation.

Each opens a scope in the parameter tree, as a layer does. What they run is linen's own lifted
transform, so that parameters, mutable collections and rngs behave as linen says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import CollectionFilter, DenyList, subtract_filters, union_filters
from flax.traverse_util import flatten_dict

from flax_extra.combinator import _errors
from flax_extra.combinator._base import Combinator, only_child, reading
from flax_extra.combinator._children import Child
from flax_extra.combinator._expression import Argument, expression, settings
from flax_extra.combinator._inference import shorten
from flax_extra.combinator._run import Steps
from flax_extra.combinator._shuffle import at_least, integer
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._stack import Stack, describe, describe_item, put, take

LAYERS_AXIS = "layers"
"""The logical name of the axis on which ``repeat`` stacks the parameters of its copies."""

Body: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(combinator, carry, xs) -> (carry, ys)"""

Policy: TypeAlias = Callable[..., bool]
"""Which values are kept for the backward pass: one of ``jax.checkpoint_policies``."""


class _Lifted(Combinator):
    """What the lifted combinators have in common: one child, and a scope."""

    is_lifted: ClassVar[bool] = True

    @functools.cached_property
    def signature(self) -> Signature:
        signature = self.children[0].signature
        return Signature(signature.n_in, signature.n_out)

    def _check(self) -> None:
        if len(self.children) != 1:
            raise _errors.not_one_child(self.kind, len(self.children))


class Repeat(_Lifted):
    """Copies of a callable in series. See :func:`repeat`."""

    n: int = 1
    shared: bool = False
    remat: bool | Policy = False
    unroll: int = 1

    @reading
    def stacks(self) -> bool:
        return not self.shared

    def _check(self) -> None:
        super()._check()
        at_least("repeat", "n", 0, self.n)
        at_least("repeat", "unroll", 1, self.unroll)
        child = self.children[0]
        if child.signature.n_out > child.signature.n_in:
            raise _errors.more_out_than_in(str(child.signature), _text(child))

    def flow(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        carry, constant = take(taken, self.signature.n_out)

        def body(combinator: Repeat, carry: Stack, _: None) -> tuple[Stack, None]:
            before = put(carry, constant)
            after = steps.on(combinator)(0, before)
            _check_carry(carry, after, self, steps, before)
            return after, None

        if self.remat:
            policy = None if self.remat is True else self.remat
            body = _rematted(body, self, prevent_cse=False, policy=policy)
        carry, _ = _scanned(
            body, self, carry, None, length=self.n, stacked=not self.shared, unroll=self.unroll
        )
        return put(carry, rest)

    @reading
    def arguments(self) -> list[Argument]:
        rest = [(prefix, value) for prefix, value in settings(self) if prefix != "n="]
        return [("", self.children[0].target), ("", self.n), *rest]


class Scan(_Lifted):
    """A recurrent cell over a time axis. See :func:`scan`."""

    axis: int = 1
    reverse: bool = False
    unroll: int = 1
    n_carry: int | None = None

    @reading
    def n_carried(self) -> int:
        """How many of the cell's inputs are its carry."""
        return self.signature.n_in - 1 if self.n_carry is None else self.n_carry

    def _check(self) -> None:
        super()._check()
        at_least("scan", "unroll", 1, self.unroll)
        child = self.children[0]
        if not 0 <= self.n_carried < child.signature.n_in:
            raise _errors.no_sequence(_text(child), str(child.signature), self.n_carried)
        if child.signature.n_out < self.n_carried:
            raise _errors.scan_arity(str(child.signature), _text(child), self.n_carried)

    def flow(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        carry, xs = take(taken, self.n_carried)
        for x in xs:
            self._check_axis("input", x, 0, steps, taken)

        def body(combinator: Scan, carry: Stack, xs: Stack) -> tuple[Stack, Stack]:
            before = put(carry, xs)
            outputs = steps.on(combinator)(0, before)
            after, ys = take(outputs, self.n_carried)
            _check_carry(carry, after, self, steps, before)
            for y in ys:
                self._check_axis("output", y, 1, steps, before)
            return after, ys

        carry, ys = _scanned(
            body, self, carry, xs, axis=self.axis, reverse=self.reverse, unroll=self.unroll
        )
        return put(put(carry, ys), rest)

    def _check_axis(self, role: str, item: Any, extra: int, steps: Steps, stack: Stack) -> None:
        for leaf in jax.tree_util.tree_leaves(item):
            rank = jnp.ndim(leaf) + extra
            if not -rank <= self.axis < rank:
                text = describe_item(item)
                raise _errors.no_time_axis(steps.path, role, text, self.axis, describe(stack))


class Remat(_Lifted):
    """A callable that is recomputed in the backward pass. See :func:`remat`."""

    policy: Policy | None = None

    def flow(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        leaves, tree = jax.tree_util.tree_flatten(taken)
        traced = [_is_array(leaf) for leaf in leaves]
        static_outputs: list[Any] = []

        # Only arrays go through the transform; numbers such as sequence lengths stay what they are.
        def body(combinator: Remat, *arrays: Any) -> Any:
            remaining = iter(arrays)
            merged = [
                next(remaining) if t else leaf for t, leaf in zip(traced, leaves, strict=True)
            ]
            outputs = steps.on(combinator)(0, jax.tree.unflatten(tree, merged))
            out_leaves, out_tree = jax.tree_util.tree_flatten(outputs)
            static_outputs[:] = [
                out_tree,
                [None if _is_array(leaf) else (leaf,) for leaf in out_leaves],
            ]
            return [leaf for leaf in out_leaves if _is_array(leaf)]

        arrays = [leaf for t, leaf in zip(traced, leaves, strict=True) if t]
        computed = iter(_rematted(body, self, policy=self.policy)(self, *arrays))
        out_tree, static = static_outputs
        merged = [next(computed) if leaf is None else leaf[0] for leaf in static]
        return put(out_tree.unflatten(merged), rest)


def repeat(
    f: Callable[..., Any],
    n: int,
    *,
    shared: bool = False,
    remat: bool | Policy = False,
    unroll: int = 1,
    name: str | None = None,
) -> Repeat:
    """``n`` copies of ``f`` in series, compiled once.

    Each copy has parameters of its own; they are stacked on a new leading axis, of logical name
    ``"layers"``, and the copies run in a loop (``nn.scan``), so that the time to compile does not
    grow with ``n``. Each copy has its own rng.

    The items that ``f`` gives back, ``n_out``, are handed from copy to copy and keep shape and
    dtype. Inputs beyond those, such as a mask, are the same for every copy.

    Args:
        f: a callable from ``n_in`` items to at most as many.
        n: number of copies.
        shared: one set of parameters, used ``n`` times.
        remat: recompute each copy in the backward pass, so that memory holds one at a time; with a
            policy, one of ``jax.checkpoint_policies``, all but the values that it keeps.
        unroll: how many copies one turn of the loop runs.
        name: the name of its scope; ``Repeat_0``, ``Repeat_1``, ... without.

    Returns:
        A combinator with the signature of ``f``.

    Raises:
        SignatureError: where ``f`` gives more than it takes; at the call, where an item changes
            shape or dtype.
        SharingError: where a layer in ``f`` is also used outside of it, unless ``shared``.
        TypeError, ValueError: where an argument is not what it should be.

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> tower = cb.repeat(cb.residual(nn.Dense(4), nn.relu), 6)
        >>> variables = tower.init(jax.random.key(0), jax.numpy.ones((2, 4)))
        >>> jax.tree.map(jax.numpy.shape, variables)
        {'params': {'Dense_0': {'bias': (6, 4), 'kernel': (6, 4, 4)}}}
    """
    if not isinstance(remat, bool):
        _check_policy("repeat", "remat", remat)
    return Repeat(
        only_child("repeat", f),
        n=integer("repeat", "n", n),
        shared=shared,
        remat=remat,
        unroll=integer("repeat", "unroll", unroll),
        name=name,
    )


def scan(
    cell: Callable[..., Any],
    *,
    axis: int = 1,
    reverse: bool = False,
    unroll: int = 1,
    n_carry: int | None = None,
    name: str | None = None,
) -> Scan:
    """A recurrent cell over a time axis.

    A cell takes carry items and, beneath, one item of each sequence; it gives the carry items and,
    beneath, any number of outputs. Its scan takes the initial carry and the sequences, and gives
    the last carry and the outputs of every step, with time at the same axis. The parameters are
    the same at every step; each step has its own rng.

    Args:
        cell: a callable (carry.., x) -> (carry.., y).
        axis: the axis of the sequences, and of the outputs, that holds time.
        reverse: run from the last step to the first.
        unroll: how many steps one turn of the loop runs.
        n_carry: how many of the cell's inputs are its carry: all but the last by default.
        name: the name of its scope; ``Scan_0``, ``Scan_1``, ... without.

    Returns:
        A combinator with the signature of the cell.

    Raises:
        SignatureError: where the cell does not give back its carry; at the call, where a carry
            item changes shape or dtype, or a sequence has no such axis.
        TypeError, ValueError: where an argument is not what it should be.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb
        >>> running_sum = cb.scan(cb.add() >> cb.dup())
        >>> total, sums = running_sum(jnp.zeros(1), jnp.array([[1.0, 2.0, 3.0]]))
        >>> total.tolist(), sums.tolist()
        ([6.0], [[1.0, 3.0, 6.0]])
    """
    return Scan(
        only_child("scan", cell),
        axis=integer("scan", "axis", axis),
        reverse=reverse,
        unroll=integer("scan", "unroll", unroll),
        n_carry=None if n_carry is None else integer("scan", "n_carry", n_carry),
        name=name,
    )


def remat(
    f: Callable[..., Any],
    policy: Policy | None = None,
    *,
    name: str | None = None,
) -> Remat:
    """A callable whose intermediate values are recomputed in the backward pass, not kept.

    Args:
        f: a callable.
        policy: which values to keep all the same: one of ``jax.checkpoint_policies``.
        name: the name of its scope; ``Remat_0``, ``Remat_1``, ... without.

    Returns:
        A combinator with the signature of ``f``.

    Raises:
        TypeError: where ``f`` or ``policy`` are not callable.

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> block = cb.remat(cb.serial(nn.Dense(4), nn.relu))
        >>> variables = block.init(jax.random.key(0), jax.numpy.ones((2, 3)))
        >>> jax.tree.map(jax.numpy.shape, variables)
        {'params': {'Dense_0': {'bias': (4,), 'kernel': (3, 4)}}}
    """
    if policy is not None:
        _check_policy("remat", "policy", policy)
    return Remat(only_child("remat", f), policy=policy, name=name)


def _check_policy(asked: str, name: str, policy: object) -> None:
    if not callable(policy):
        raise _errors.not_a_policy(asked, name, shorten(repr(policy)))


def _rematted(body: Callable[..., Any], owner: Combinator, **options: Any) -> Callable[..., Any]:
    if owner.scope is not None:
        rematted: Callable[..., Any] = nn.remat(body, **options)
        return rematted

    def unbound(combinator: Combinator, *arguments: Any) -> Any:
        return jax.checkpoint(functools.partial(body, combinator), **options)(*arguments)

    return unbound


def _scanned(
    body: Body,
    owner: Combinator,
    carry: Any,
    xs: Any,
    *,
    length: int | None = None,
    axis: int = 0,
    stacked: bool = False,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[Any, Any]:
    """The body in a loop: linen's lifted scan, or ``lax.scan`` where there are no variables."""
    if owner.scope is None:
        return _plain_scan(body, owner, carry, xs, length, axis, reverse, unroll)
    if not stacked and _makes_variables(owner):
        # One turn outside of the loop makes the variables, which then are the same at every step.
        body(owner, carry, _first(xs, axis))
        _forget_sown(owner)
    variables: Any = {"variable_axes": {True: 0}, "split_rngs": {True: True}}
    if not stacked:
        variables = _one_set(owner)
    looped = nn.scan(
        body,
        **variables,
        in_axes=axis,
        out_axes=axis,
        length=length,
        reverse=reverse,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: LAYERS_AXIS},
        check_constancy_invariants=False,
    )
    result: tuple[Any, Any] = looped(owner, carry, xs)
    return result


def _makes_variables(owner: Combinator) -> bool:
    missing = owner.is_mutable_collection("params") and not owner.variables.get("params")
    return owner.is_initializing() or missing


def _forget_sown(owner: Combinator) -> None:
    """Takes back what the turn outside of the loop has sown, for the loop sows it again."""
    for collection, variables in owner.variables.items():
        values = flatten_dict(dict(variables)).values()  # type: ignore[no-untyped-call]
        if values and owner.scope is not None and all(type(value) is tuple for value in values):
            owner.scope._mutable_collection(collection).clear()


def _one_set(owner: Combinator) -> dict[str, Any]:
    """How the collections go through a loop whose steps share their variables.

    Parameters, and all that cannot change, are the same at every step. What can change (batch
    statistics) is handed from step to step. What does not exist yet (what is sown) is stacked.
    """
    changing: Sequence[str] = [
        collection
        for collection, variables in owner.variables.items()
        if variables
        and owner.is_mutable_collection(collection)
        and collection not in ("params", "intermediates")
    ]
    new: CollectionFilter = subtract_filters(_mutable(owner), ["params", *changing])
    return {
        "variable_axes": {_hashable(new): 0},
        "variable_carry": changing,
        "variable_broadcast": subtract_filters(True, union_filters(new, changing)),
        "split_rngs": {"params": False, DenyList("params"): True},
    }


def _mutable(owner: Combinator) -> CollectionFilter:
    scope = owner.scope
    return False if scope is None else scope.mutable


def _hashable(collections: CollectionFilter) -> CollectionFilter:
    if isinstance(collections, DenyList):
        return DenyList(_hashable(collections.deny))
    if isinstance(collections, bool | str):
        return collections
    return tuple(sorted(collections))


def _first(xs: Any, axis: int) -> Any:
    def first(x: Any) -> Any:
        if x.shape[axis] == 0:  # no step will run, and the variables are made all the same
            return jnp.zeros_like(x).sum(axis, dtype=x.dtype)
        return jax.lax.index_in_dim(x, 0, axis, keepdims=False)

    return jax.tree.map(first, xs)


def _plain_scan(
    body: Body,
    owner: Combinator,
    carry: Any,
    xs: Any,
    length: int | None,
    axis: int,
    reverse: bool,
    unroll: int,
) -> tuple[Any, Any]:
    carry, ys = jax.lax.scan(
        functools.partial(body, owner),
        carry,
        jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs),
        length=length,
        reverse=reverse,
        unroll=unroll,
    )
    return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, axis), ys)


def _check_carry(
    before: Stack, after: Stack, owner: Combinator, steps: Steps, stack: Stack
) -> None:
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if _avals(old) != _avals(new):
            raise _errors.changed_carry(
                (*steps.path[:-1], owner.segment(0)),
                str(owner.signature),
                index,
                describe_item(old),
                describe_item(new),
                describe(stack),
            )


def _avals(item: Any) -> Any:
    leaves, tree = jax.tree_util.tree_flatten(item)
    return tree, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _text(child: Child) -> str:
    return shorten(expression(child.target))
