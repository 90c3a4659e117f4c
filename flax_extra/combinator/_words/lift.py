"""What the combinators share that JAX transforms: ``repeat``, ``scan``, ``remat`` and ``vmap``.

Each opens a scope in the parameter tree, as a layer does. They run linen's own lifted
transformations, so that parameters, mutable collections and rngs behave as linen says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.children import Children, check_only_child
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import describe_item, describe_stack, shorten
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._words.loop import number_axis

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
        check_only_child(self._kind, self.children)


def choose_axis_name(name: str | None, children: Children) -> str | None:
    """Returns the name of the axis of copies, made different from the names of those inside."""
    return number_axis(name, _list_axis_names(children))


def _list_axis_names(children: Children) -> Iterator[str]:
    """Yields the names of the axes of all copies among children, at any depth."""
    for child in children:
        pipeline: Any = child.pipeline
        if pipeline is not None:
            if pipeline._stacks_parameters:
                yield from filter(None, [pipeline._axis_name])
            yield from _list_axis_names(pipeline.children)


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
