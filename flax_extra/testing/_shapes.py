"""``check_shapes``: checks a layer against the shapes in its annotations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.stack import flatten
from flax_extra.combinator._views.specs import are_satisfied, find_dimension_names, substitute_sizes
from flax_extra.testing import _errors
from flax_extra.testing._abstract import trace_call
from flax_extra.testing._annotations import Declaration, has_shapes, matches, read_declaration
from flax_extra.testing._inputs import Call, Dtypes, Options, SizeOf, draw_calls
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
    """Checks that the outputs of a layer are as annotated, whatever the sizes of the axes.

    A size is drawn for every axis name in the annotations of the inputs, one of the alternatives
    for a union, 1 or not for an axis that broadcasts, and an optional array is left out or given.
    The outputs are compared with the return annotation in number, axes and dtype. Nothing is
    computed: ``jax.eval_shape`` traces the layer, once for each combination of sizes.

    A size that a field of the layer determines is not drawn: an integer field with the name of an
    axis, or an axis in the annotation of a field that holds an array.

    Args:
        f: a linen module or a function with jaxtyping annotations, or a ``cb.typed``, whose
            declaration is then checked.
        annotations: by parameter, or ``"return"``, the annotation to use in place of its own. A
            list or tuple of annotations declares a list or tuple. ``Annotated[int, "time-1"]``
            is a number computed from sizes. Any other value is passed as it is.
        sizes: for names of axes a size, or a strategy of sizes, if the layer restricts them.
        dtypes: for names of parameters a dtype, or several to draw from, if the annotation
            allows several.
        max_size: the largest size that is drawn for an axis that ``sizes`` does not name.
        max_examples: how many calls are drawn, at most.

    Returns:
        None.

    Raises:
        AssertionError: If an output is not as annotated. It shows the smallest inputs found.
        Exception: If the layer raises one on inputs that its annotations allow; a note says so.
        InvalidArgument: If an annotation has no shape, or the annotations do not have a name.

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
    options = Options(sizes or {}, dtypes or {}, max_size)
    if isinstance(f, cb.Typed):
        search(_draw_typed(f, options), functools.partial(_check_typed, f), max_examples)
        return
    if isinstance(f, cb.Combinator) and not isinstance(f, cb.Fn):
        raise _errors.undeclared_pipeline(get_name(f))
    declaration = read_declaration(f, annotations)
    options.check(declaration)
    if not has_shapes(declaration.output):
        raise _errors.no_declared_output(declaration.name, declaration.output.text)
    seen: set[Hashable] = set()

    def check(call: Call) -> None:
        key = _key(call)
        if key not in seen:
            _check_call(declaration, call)
            seen.add(key)

    search(draw_calls(declaration.drawable(), options), check, max_examples)


def _draw_typed(f: cb.Typed, options: Options) -> st.SearchStrategy[dict[str, int]]:
    """Draws sizes for the names of dimensions in a declaration."""
    declared = cb.ShapeSignature.parse(f.declared)
    names = find_dimension_names([declared.inputs, dict(declared.context)])
    options.check_names(get_name(f), frozenset(names), frozenset())
    sizes = st.fixed_dictionaries({name: options.size_of(name) for name in names})
    return sizes.filter(functools.partial(are_satisfied, declared.constraints))


def _check_typed(f: cb.Typed, sizes: dict[str, int]) -> None:
    declared = cb.ShapeSignature.parse(f.declared)
    inputs, context, outputs = substitute_sizes(
        (declared.inputs, dict(declared.context), declared.outputs), sizes
    )
    try:
        found = flatten(trace_call(f, *inputs, **context))
    except Exception as error:
        error.add_note(_errors.raised_on(get_name(f), describe_stack(inputs), sizes))
        raise
    if describe_stack(found) != describe_stack(outputs):
        raise _errors.undeclared_output(
            get_name(f),
            describe_stack(outputs),
            describe_stack(found),
            describe_stack(inputs),
            sizes,
        )


def _check_call(declaration: Declaration, call: Call) -> None:
    inputs = _describe(call)
    try:
        found = trace_call(declaration.f, *call.arguments, **call.keywords)
    except Exception as error:
        error.add_note(_errors.raised_on(declaration.name, inputs, call.sizes))
        raise
    sizes = dict(call.sizes)
    if not matches(declaration.output, found, sizes, declaration.scope):
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
    return ", ".join([*([describe_stack(call.arguments)] if call.arguments else []), *keywords])
