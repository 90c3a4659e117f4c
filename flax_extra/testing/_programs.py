"""``assert_same_program``: compares two callables by their jaxprs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._core.naming import get_name
from flax_extra.testing import _errors

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""The address of a function, which differs between two runs of one program."""


def assert_same_program(
    f: Callable[..., Any],
    g: Callable[..., Any],
    *inputs: Any,
    variables: Any = None,
    rngs: Sequence[str] = (),
    **context: Any,
) -> None:
    """Asserts that two callables trace to the same jaxpr, up to the names in it.

    Linen modules are compared by their ``apply``, on the same variables. Nothing is computed.

    Args:
        f: a function, a linen module or a combinator.
        g: another.
        inputs: the positional arguments of a call: arrays, or ``jax.ShapeDtypeStruct`` in their
            place.
        variables: the variables that the modules are applied to. By default each module makes
            its own, and these must agree in structure, shapes and dtypes.
        rngs: the names of the rng streams that a call needs, other than ``params``.
        context: keyword arguments of the call, the same for both. They are not traced.

    Returns:
        None.

    Raises:
        AssertionError: If the programs differ. It shows the first equation that differs, as each
            of them has it, or the variables if those differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb, testing
        >>> g = lambda x: jnp.tanh(x) + x
        >>> testing.assert_same_program(cb.residual(jnp.tanh), g, jnp.ones(3))
        >>> testing.assert_same_program(cb.residual(jnp.sin), g, jnp.ones(3))
        Traceback (most recent call last):
            ...
        AssertionError: residual and <lambda> are two programs, which part at equation 1.
          residual: v1:f32[3] = sin[accuracy=None] v0
          <lambda>: v1:f32[3] = tanh[accuracy=None] v0
    """
    ours, ours_made = _trace_program(f, inputs, variables, rngs, context)
    theirs, theirs_made = _trace_program(g, inputs, variables, rngs, context)
    names = get_name(f), get_name(g)
    if None not in (ours_made, theirs_made) and ours_made != theirs_made:
        raise _errors.different_parameters(
            *names, _describe_variables(ours_made), _describe_variables(theirs_made)
        )
    texts = _list_equations(ours.jaxpr, _Names()), _list_equations(theirs.jaxpr, _Names())
    for index, (a, b) in enumerate(itertools.zip_longest(*texts, fillvalue="nothing more")):
        if a != b:
            raise _errors.different_programs(*names, index, a, b)
    for index, (c, d) in enumerate(zip(ours.consts, theirs.consts, strict=True)):
        if not np.array_equal(_get_numbers(c), _get_numbers(d)):
            raise _errors.different_constants(*names, index, describe_item(c), describe_item(d))


def _trace_program(
    f: Callable[..., Any], inputs: tuple[Any, ...], given: Any, rngs: Sequence[str], context: Any
) -> tuple[ClosedJaxpr, Any]:
    """Traces a call. Returns its jaxpr, and the variables that it made, or None."""
    if not isinstance(f, nn.Module):
        return jax.make_jaxpr(lambda *items: f(*items, **context))(*inputs), None
    module = f
    streams = {name: jax.random.key(seed) for seed, name in enumerate(("params", *rngs))}

    def make(streams: Any, *items: Any) -> Any:
        return module.init(streams, *items, **context)

    def apply(variables: Any, streams: Any, *items: Any) -> Any:
        return module.apply(variables, *items, rngs=streams, **context)

    made = jax.eval_shape(make, streams, *inputs) if given is None else given
    del streams["params"]
    return jax.make_jaxpr(apply)(made, streams, *inputs), None if given is not None else made


class _Names(dict[Any, str]):
    """The variables of a jaxpr, named in the order in which they are met."""

    def __missing__(self, variable: Any) -> str:
        self[variable] = f"v{len(self)}"
        return self[variable]

    def typed(self, variables: Sequence[Any]) -> str:
        """Writes variables with their types, at the place that defines them."""
        return " ".join(f"{self[v]}:{v.aval.str_short(short_dtypes=True)}" for v in variables)

    def used(self, atoms: Sequence[Any]) -> str:
        """Writes variables and literals, at the place that reads them."""
        return " ".join(str(a) if isinstance(a, Literal) else self[a] for a in atoms)


def _list_equations(jaxpr: Jaxpr, names: _Names) -> Iterator[str]:
    """Writes each equation. Those of an inner jaxpr follow the equation that holds it."""
    yield f"takes {names.typed([*jaxpr.constvars, *jaxpr.invars])}"
    for equation in jaxpr.eqns:
        inner: list[Jaxpr] = []
        parameters = [
            f"{name}={_ADDRESS.sub('', str(_replace_jaxprs(value, inner)))}"
            for name, value in equation.params.items()
            if name != "name"
        ]
        settings = f"[{' '.join(parameters)}]" if parameters else ""
        atoms = names.used(equation.invars)
        yield f"{names.typed(equation.outvars)} = {equation.primitive}{settings} {atoms}"
        for body in inner:
            yield from _list_equations(body, names)
    yield f"gives {names.used(jaxpr.outvars)}"


def _replace_jaxprs(value: Any, found: list[Jaxpr]) -> Any:
    """Replaces the jaxprs in a parameter by a mark, and appends them to ``found``."""
    if isinstance(value, ClosedJaxpr):
        value = value.jaxpr
    if isinstance(value, Jaxpr):
        found.append(value)
        return "{...}"
    if isinstance(value, tuple | list):
        return [_replace_jaxprs(part, found) for part in value]
    return value


def _get_numbers(constant: Any) -> Any:
    is_key = jnp.issubdtype(constant.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(constant) if is_key else constant


def _describe_variables(variables: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    named = [
        f"{jax.tree_util.keystr(p, simple=True, separator='/')}: {describe_item(x)}"
        for p, x in leaves
    ]
    return ", ".join(named) or "none"
