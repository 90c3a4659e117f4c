"""``check_shapes``: a layer against the shapes that its annotations declare."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from flax_extra.combinator._stack import describe, describe_item
from flax_extra.testing import _errors
from flax_extra.testing._abstract import abstract_call
from flax_extra.testing._annotations import Declaration, declaration_of, holds, says_shapes
from flax_extra.testing._inputs import Call, Dtypes, Options, SizeOf, calls
from flax_extra.testing._search import search


def check_shapes(
    f: Callable[..., Any],
    *,
    annotations: Mapping[str, Any] | None = None,
    sizes: Mapping[str, SizeOf] | None = None,
    dtypes: Mapping[str, Dtypes] | None = None,
    max_size: int = 5,
    max_examples: int = 1000,
) -> None:
    """Checks that a layer gives what its annotations declare, whatever the sizes of the axes.

    A size is drawn for every axis name in the annotations of the inputs, one of the alternatives
    for a union, 1 or not for an axis that broadcasts, and an optional array is left out or given.
    The outputs are compared with what is declared, in number, axes and dtype. Nothing is computed:
    the layer is traced by ``jax.eval_shape``, once for each combination of sizes.

    A size that a field of the layer fixes is not drawn: an integer field that is named as an axis
    is, or an axis in the annotation of a field that holds an array.

    Args:
        f: a linen module or a function, with jaxtyping annotations.
        annotations: by parameter, or ``"return"``, what to read in place of its own annotation. A
            list or tuple of annotations stands for one; ``Annotated[int, "time-1"]`` is a number
            that sizes give; what is no annotation is a value, passed as it is.
        sizes: for names of axes a size, or a strategy of sizes, where the layer restricts them.
        dtypes: for names of parameters a dtype, or several to draw from, where the annotation
            leaves it open.
        max_size: the largest size that is drawn for an axis of which nothing is said.
        max_examples: how many calls are drawn; fewer where there are fewer.

    Returns:
        Nothing, where all is as declared.

    Raises:
        AssertionError: where an output is not; it shows the smallest inputs that were found.
        Exception: what the layer raises on inputs that its annotations allow, with a note.
        InvalidArgument: where an annotation says no shape, or a name is not among them.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import layer as xn, testing
        >>> testing.check_shapes(xn.FeedForward(4), max_examples=20)
        >>> from jax import Array
        >>> from jaxtyping import Float
        >>> def halves(x: Float[Array, "batch time"]) -> Float[Array, "batch (time+1)//2"]:
        ...     return x[:, : x.shape[1] // 2]
        >>> testing.check_shapes(halves)
        Traceback (most recent call last):
            ...
        AssertionError: halves declares that it gives Float[batch (time+1)//2], and gave f32[1, 0].
          inputs: f32[1, 1]
          sizes: batch=1, time=1
    """
    declaration = declaration_of(f, annotations)
    options = Options(sizes or {}, dtypes or {}, max_size)
    options.check(declaration)
    if not says_shapes(declaration.output):
        raise _errors.no_declared_output(declaration.name, declaration.output.text)
    seen: set[Hashable] = set()

    def check(call: Call) -> None:
        key = _key(call)
        if key not in seen:
            _check_call(declaration, call)
            seen.add(key)

    search(calls(declaration.drawable(), options), check, max_examples)


def _check_call(declaration: Declaration, call: Call) -> None:
    inputs = _describe(call)
    try:
        found = abstract_call(declaration.f, *call.arguments, **call.keywords)
    except Exception as error:
        error.add_note(_errors.raised_on(declaration.name, inputs, call.sizes))
        raise
    sizes = dict(call.sizes)
    if not holds(declaration.output, found, sizes, declaration.scope):
        text = (
            ", ".join(map(describe_item, found)) if type(found) is tuple else describe_item(found)
        )
        raise _errors.undeclared_output(
            declaration.name, declaration.output.text, text, inputs, call.sizes
        )


def _key(call: Call) -> Hashable:
    leaves, tree = jax.tree.flatten((call.arguments, call.keywords))
    return tree, tuple(leaf if isinstance(leaf, Hashable) else id(leaf) for leaf in leaves)


def _describe(call: Call) -> str:
    keywords = [f"{name}={describe_item(value)}" for name, value in call.keywords.items()]
    return ", ".join([*([describe(call.arguments)] if call.arguments else []), *keywords])
