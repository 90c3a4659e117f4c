"""``assert_same_program``: two callables against each other, as the jaxprs that they become."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.extend.core import ClosedJaxpr

from flax_extra.combinator._inference import name_of
from flax_extra.combinator._stack import describe_item
from flax_extra.testing import _errors

_NAMES = re.compile(r"name=\S+| at 0x[0-9a-f]+")
"""The names of traced functions, and where they lie in memory: no part of what is computed."""


def assert_same_program(
    f: Callable[..., Any],
    g: Callable[..., Any],
    *inputs: Any,
    rngs: Sequence[str] = (),
    **context: Any,
) -> None:
    """Asserts that two callables trace to the same jaxpr, up to the names in it.

    Linen modules are compared by their ``apply``, and must have the same variables. Nothing is
    computed.

    Args:
        f: a function, a linen module or a combinator.
        g: another.
        inputs: the positional arguments of a call: arrays, or ``jax.ShapeDtypeStruct`` in their
            place.
        rngs: the names of the rng streams that a call needs, other than ``params``.
        context: keyword arguments of the call, the same for both. They are not traced.

    Returns:
        Nothing, where both are one program.

    Raises:
        AssertionError: where they are not; it shows the first equation that differs, as each of
            them has it, or the variables where those differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb, testing
        >>> g = lambda x: jnp.tanh(x) + x
        >>> testing.assert_same_program(cb.residual(jnp.tanh), g, jnp.ones(3))
        >>> testing.assert_same_program(cb.residual(jnp.sin), g, jnp.ones(3))
        Traceback (most recent call last):
            ...
        AssertionError: residual and <lambda> are two programs, which part at line 1 of their \
jaxprs.
          residual: b:f32[3] = sin[accuracy=None] a
          <lambda>: b:f32[3] = tanh[accuracy=None] a
    """
    ours, ours_made = _program(f, inputs, rngs, context)
    theirs, theirs_made = _program(g, inputs, rngs, context)
    names = name_of(f), name_of(g)
    if ours_made != theirs_made:
        raise _errors.different_parameters(*names, _described(ours_made), _described(theirs_made))
    pairs = itertools.zip_longest(_lines(ours), _lines(theirs), fillvalue="nothing more")
    for index, (a, b) in enumerate(pairs):
        if a != b:
            raise _errors.different_programs(*names, index, a, b)
    for index, (c, d) in enumerate(zip(ours.consts, theirs.consts, strict=True)):
        if not np.array_equal(c, d):
            raise _errors.different_constants(*names, index, describe_item(c), describe_item(d))


def _program(
    f: Callable[..., Any], inputs: tuple[Any, ...], rngs: Sequence[str], context: Any
) -> tuple[ClosedJaxpr, Any]:
    """The jaxpr of a call, and the variables it takes, as shapes; None for a plain function."""
    if not isinstance(f, nn.Module):
        return jax.make_jaxpr(lambda *items: f(*items, **context))(*inputs), None
    module = f
    streams = {name: jax.random.key(seed) for seed, name in enumerate(("params", *rngs))}
    made = jax.eval_shape(
        lambda keys, *items: module.init(keys, *items, **context), streams, *inputs
    )

    def apply(variables: Any, streams: Any, *items: Any) -> Any:
        return module.apply(variables, *items, rngs=streams, **context)

    del streams["params"]
    return jax.make_jaxpr(apply)(made, streams, *inputs), made or None


def _lines(jaxpr: ClosedJaxpr) -> list[str]:
    """The jaxpr as text; variables in it are named in order already."""
    return [_NAMES.sub("", line).strip() for line in str(jaxpr).splitlines()]


def _described(variables: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    named = [
        f"{jax.tree_util.keystr(p, simple=True, separator='/')}: {describe_item(x)}"
        for p, x in leaves
    ]
    return ", ".join(named) or "none"
