"""Which sizes the names in specs have in given arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import export

from flax_extra.combinator._core import stream_errors
from flax_extra.combinator._core.arrays import is_array
from flax_extra.combinator._core.describe import describe_stack
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._views.specs import find_dimension_names, substitute_sizes


def read_sizes(specs: Stack, inputs: Stack) -> dict[str, Any]:
    """Reads the sizes of the names in specs from arrays.

    An item that is None, or no array, has no sizes.

    Raises:
        ValueError: If the arrays are not such as the specs say.
    """
    sizes: dict[str, Any] = {}
    if len(specs) != len(inputs):
        raise stream_errors.wrong_inputs(describe_stack(specs), describe_stack(inputs))
    pairs = list(_pair_dimensions(specs, inputs))
    for dim, size in pairs:
        if str(dim).isidentifier():
            sizes.setdefault(str(dim), size)
    for dim, size in pairs:
        unknown = [name for name in _list_names(dim) if name not in sizes]
        if len(unknown) == 1:
            sizes[unknown[0]] = _solve(dim, unknown[0], sizes, size)
    for dim, size in pairs:
        if set(_list_names(dim)) <= sizes.keys() and _compute(dim, sizes) != size:
            raise stream_errors.wrong_inputs(describe_stack(specs), describe_stack(inputs))
    return sizes


def _pair_dimensions(specs: Stack, inputs: Stack) -> Iterator[tuple[Any, Any]]:
    for spec, given in zip(specs, inputs, strict=True):
        if given is None:
            continue
        leaves, found = jax.tree.leaves(spec), jax.tree.leaves(given)
        shapes = [leaf.shape for leaf in leaves if is_array(leaf)]
        others = [leaf.shape for leaf in found if is_array(leaf)]
        if list(map(len, shapes)) != list(map(len, others)):
            raise stream_errors.wrong_inputs(describe_stack(specs), describe_stack(inputs))
        for shape, other in zip(shapes, others, strict=True):
            yield from zip(shape, other, strict=True)


def _list_names(dim: Any) -> list[str]:
    return find_dimension_names([dim]) if export.is_symbolic_dim(dim) else []


def _compute(dim: Any, sizes: Mapping[str, Any]) -> Any:
    if not export.is_symbolic_dim(dim):
        return dim
    if str(dim).isidentifier():
        return sizes[str(dim)]
    return substitute_sizes(dim, {name: sizes[name] for name in _list_names(dim)})


def _solve(dim: Any, name: str, sizes: Mapping[str, Any], size: Any) -> Any:
    """Finds the size of a name in an expression that is linear in it."""
    one, two = (_compute(dim, {**sizes, name: value}) for value in (1, 2))
    return (size - one) // (two - one) + 1 if two != one else 1
