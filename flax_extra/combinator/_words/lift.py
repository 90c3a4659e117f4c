"""What the combinators share that JAX transforms: ``repeat``, ``scan`` and ``remat``.

Each opens a scope in the parameter tree, as a layer does. They run linen's own lifted
transformations, so that parameters, mutable collections and rngs behave as linen says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flax_extra.combinator._core import errors, linen
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import describe_item, describe_stack, shorten
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack

LAYERS_AXIS = "layers"
"""The logical name of the axis on which ``repeat`` stacks the parameters of its copies."""

LoopBody: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(combinator, carry, xs) -> (carry, ys)"""

Policy: TypeAlias = Callable[..., bool]
"""Says which values are kept for the backward pass: one of ``jax.checkpoint_policies``."""


class Lifted(Combinator):
    """A combinator with one child, and a scope of its own, that JAX transforms."""

    _is_lifted: ClassVar[bool] = True

    @functools.cached_property
    def signature(self) -> Signature:
        signature = self.children[0].signature
        return Signature(signature.n_in, signature.n_out)

    def _check(self) -> None:
        if len(self.children) != 1:
            raise errors.not_one_child(self._kind, len(self.children))


def check_policy(asked: str, name: str, policy: object) -> None:
    """Raises an error if a policy is not callable."""
    if not callable(policy):
        raise errors.not_a_policy(asked, name, shorten(repr(policy)))


def check_carry(before: Stack, after: Stack, owner: Combinator, steps: Steps, stack: Stack) -> None:
    """Raises an error if an item of the carry changes its shape, dtype or structure."""
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if _get_types(old) != _get_types(new):
            raise errors.changed_carry(
                (*steps.path[:-1], owner._name_child(0)),
                str(owner.signature),
                index,
                describe_item(old),
                describe_item(new),
                describe_stack(stack),
            )


def _get_types(item: Any) -> Any:
    leaves, tree = jax.tree_util.tree_flatten(item)
    return tree, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def rematerialize(
    body: Callable[..., Any], owner: Combinator, **options: Any
) -> Callable[..., Any]:
    """Transforms a function of (combinator, arguments..): it is recomputed in the backward pass."""
    if owner.scope is not None:
        lifted: Callable[..., Any] = nn.remat(body, **options)
        return lifted

    def run_unbound(combinator: Combinator, *arguments: Any) -> Any:
        return jax.checkpoint(functools.partial(body, combinator), **options)(*arguments)

    return run_unbound


def run_loop(
    body: LoopBody,
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
    """Runs a body in a loop: linen's lifted scan, or ``lax.scan`` if there are no variables.

    Args:
        body: one turn of the loop.
        owner: the combinator that runs, whose variables the body uses.
        carry: the carry before the first turn.
        xs: the sequences, a pytree of arrays.
        length: the number of turns, if there are no sequences.
        axis: the axis of the sequences, and of the outputs, that the loop runs over.
        stacked: whether each turn has variables of its own, stacked on a leading axis.
        reverse: whether to run from the last turn to the first.
        unroll: how many turns one iteration of the compiled loop takes.
    """
    if owner.scope is None:
        return _run_plain_loop(body, owner, carry, xs, length, axis, reverse, unroll)
    if not stacked and _makes_variables(owner):
        # One turn outside of the loop makes the variables; then all turns share them.
        body(owner, carry, _take_first(xs, axis))
        _clear_sown(owner)
    variables: Any = {"variable_axes": {True: 0}, "split_rngs": {True: True}}
    if not stacked:
        variables = _share_variables(owner)
    loop = nn.scan(
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
    result: tuple[Any, Any] = loop(owner, carry, xs)
    return result


def _makes_variables(owner: Combinator) -> bool:
    is_missing = owner.is_mutable_collection("params") and not owner.variables.get("params")
    return owner.is_initializing() or is_missing


def _clear_sown(owner: Combinator) -> None:
    """Removes what the turn outside of the loop has sown: the loop sows it again."""
    for collection, variables in owner.variables.items():
        values = flatten_dict(dict(variables)).values()  # type: ignore[no-untyped-call]
        if values and all(type(value) is tuple for value in values):
            linen.clear_collection(owner, collection)


def _share_variables(owner: Combinator) -> dict[str, Any]:
    """Says how collections go through a loop whose turns share their variables.

    Parameters, and all collections that cannot change, are the same in every turn. A collection
    that can change, such as batch statistics, is handed from turn to turn. One that does not exist
    yet, such as that of sown values, is stacked.
    """
    changing: Sequence[str] = [
        collection
        for collection, variables in owner.variables.items()
        if variables
        and owner.is_mutable_collection(collection)
        and collection not in ("params", "intermediates")
    ]
    mutable = linen.get_mutable_collections(owner)
    new = linen.subtract_filters(mutable, ["params", *changing])
    return {
        "variable_axes": {linen.make_hashable(new): 0},
        "variable_carry": changing,
        "variable_broadcast": linen.subtract_filters(True, linen.union_filters(new, changing)),
        "split_rngs": {"params": False, linen.DenyList("params"): True},
    }


def _take_first(xs: Any, axis: int) -> Any:
    """Returns the sequences at their first step, or zeros if they have no step."""

    def take_first(x: Any) -> Any:
        if x.shape[axis] == 0:
            return jnp.zeros_like(x).sum(axis, dtype=x.dtype)
        return jax.lax.index_in_dim(x, 0, axis, keepdims=False)

    return jax.tree.map(take_first, xs)


def _run_plain_loop(
    body: LoopBody,
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
