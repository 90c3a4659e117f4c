"""``check_signature``: checks a callable against its signature, inferred or declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_extra import combinator as cb
from flax_extra.combinator._core.describe import describe_stack
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.stack import flatten, regroup
from flax_extra.testing import _errors
from flax_extra.testing._abstract import trace_call


def check_signature(f: Callable[..., Any], *inputs: Any) -> None:
    """Checks that a callable gives as many items as its signature says.

    Args:
        f: a function, a linen module, a combinator or any other callable.
        inputs: one item for each that it takes: arrays, or ``jax.ShapeDtypeStruct`` in their
            place. Nothing is computed.

    Returns:
        None.

    Raises:
        AssertionError: If it gives another number of items, or ``inputs`` are of another number.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import testing
        >>> def halves(x) -> tuple[jnp.ndarray, jnp.ndarray]:
        ...     return jnp.split(x, 2)
        >>> testing.check_signature(halves, jnp.ones(4))
        Traceback (most recent call last):
            ...
        AssertionError: halves has signature 1 -> 2, and gave 1: list(f32[2], f32[2]). \
Correct its return annotation, or say how many: cb.fn(f, n_out=1).
    """
    signature = cb.infer_signature(f)
    if len(inputs) != signature.n_in:
        raise _errors.wrong_n_in(get_name(f), str(signature), len(inputs))
    is_pipeline = isinstance(f, cb.Combinator)
    arguments = inputs if is_pipeline else regroup(inputs, signature.in_shape)
    given = flatten(trace_call(f, *arguments))
    if len(given) != signature.n_out:
        raise _errors.wrong_n_out(get_name(f), str(signature), len(given), describe_stack(given))
