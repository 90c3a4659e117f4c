"""Shapes as text: what a stack item looks like, without the item.

A spec is written as jaxprs print an array, ``"f32[b, t, 64]"``; a name stands for every size at
once, and alone for a number of that size. JAX's own symbolic dimensions do the arithmetic.

    >>> from flax_extra.combinator._stack import describe
    >>> inputs = abstract(["f32[b, 8*t, 64]", None, "bool[b]"])
    >>> describe(inputs)
    'f32[b, 8*t, 64], None, bool[b]'
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from flax_extra.combinator import _errors
from flax_extra.combinator._stack import Stack, describe_item, flatten

_SPEC = re.compile(r"(?P<dtype>[a-z]\w*(<\w+>)?)\[(?P<dims>[^\[\]]*)\]")
_NAME = re.compile(r"[A-Za-z_]\w*(?![\w(])")
_TYPES = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (2, 4, 8, 16, 32, 64)),
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
    *(name for name in dir(jnp) if name.startswith("float8_")),
)


def abstract(specs: Iterable[Any]) -> Stack:
    """The items that specs describe: arrays become ``jax.ShapeDtypeStruct``, all else stays.

    Args:
        specs: texts, arrays, ``jax.ShapeDtypeStruct``, pytrees of these, None, and plain numbers,
            which are not traced. A plain tuple is several items, as on a stack. A dimension of
            the same name is the same in all of them.

    Raises:
        ValueError: where a text is not a spec.
    """
    items = flatten(tuple(specs))
    scope = _scope_of(items)
    return tuple(jax.tree.map(lambda leaf: _abstract_leaf(leaf, scope), item) for item in items)


def abstract_value(value: Any) -> Any:
    """A pytree with shapes for its arrays, traced ones included."""
    return jax.tree.map(lambda leaf: _abstract_leaf(leaf, None), value)


def parse_items(text: str) -> Stack:
    """The items in a list of specs such as ``"f32[b, t], None, list(i32[b], i32[b])"``."""
    scope = export.SymbolicScope()
    parts = _split(text)
    return () if parts in ([""], ["()"]) else tuple(_parse_item(part, scope) for part in parts)


def names_in(items: Iterable[Any]) -> list[str]:
    """The names of the dimensions in items, in the order in which they first occur.

    >>> names_in(abstract(["f32[b, t + s]", "f32[t, h]"]))
    ['b', 't', 's', 'h']
    """
    return list(dict.fromkeys(name for dim in _dimensions(items) for name in _names(dim)))


def with_sizes(items: Iterable[Any], sizes: Mapping[str, int | str]) -> Stack:
    """Items with numbers, or other names, for some of their dimensions.

    >>> from flax_extra.combinator._stack import describe
    >>> describe(with_sizes(abstract(["f32[b, 2*t]"]), {"t": 5}))
    'f32[b, 10]'
    """
    scope = export.SymbolicScope()

    def sized(leaf: Any) -> Any:
        if export.is_symbolic_dim(leaf):
            return export.symbolic_shape(_substituted(str(leaf), sizes), scope=scope)[0]
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        text = ", ".join(_substituted(str(dim), sizes) for dim in leaf.shape)
        return _struct(export.symbolic_shape(text, scope=scope), leaf.dtype)

    return tuple(jax.tree.map(sized, item) for item in items)


def canonical(items: Iterable[Any]) -> tuple[Any, ...]:
    """What two stacks of items have in common if they differ in the names of dimensions alone."""
    leaves, tree = jax.tree_util.tree_flatten(tuple(items))
    kinds = tuple(map(_kind, leaves))
    dims = list(_dimensions(leaves))
    return tree, kinds, min(_renamings(dims), key=str)


def _kind(leaf: Any) -> Any:
    if export.is_symbolic_dim(leaf):
        return "size"
    return (leaf.dtype, len(leaf.shape)) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _renamings(dims: list[Any]) -> Iterator[tuple[str, ...]]:
    """The dimensions as text, with names by position; where that is not unique, every way."""
    plain = dict.fromkeys(str(dim) for dim in dims if str(dim).isidentifier())
    rest = [name for name in dict.fromkeys(_all_names(dims)) if name not in plain]
    most = 5  # names that occur in expressions alone; more than these are taken as they come
    orders = itertools.permutations(rest) if len(rest) <= most else [tuple(rest)]
    for order in orders:
        new = {name: f"d{index}" for index, name in enumerate((*plain, *order))}
        text = ", ".join(_substituted(str(dim), new) for dim in dims)
        yield tuple(map(str, export.symbolic_shape(text)))


def _all_names(dims: Iterable[Any]) -> Iterator[str]:
    for dim in dims:
        yield from _names(dim)


def _dimensions(items: Iterable[Any]) -> Iterator[Any]:
    for leaf in jax.tree_util.tree_leaves(list(items)):
        yield from (leaf,) if export.is_symbolic_dim(leaf) else getattr(leaf, "shape", ())


def _names(dim: Any) -> list[str]:
    return _NAME.findall(str(dim)) if export.is_symbolic_dim(dim) else []


def _substituted(dim: str, sizes: Mapping[str, int | str]) -> str:
    return _NAME.sub(lambda name: str(sizes.get(name[0], name[0])), dim)


def _scope_of(items: Stack) -> export.SymbolicScope:
    """The scope of the symbolic dimensions among the items, which specs in text then share."""
    for dim in _dimensions(items):
        if export.is_symbolic_dim(dim):
            scope: export.SymbolicScope = dim.scope
            return scope
    return export.SymbolicScope()


def _abstract_leaf(leaf: Any, scope: export.SymbolicScope | None) -> Any:
    if isinstance(leaf, str) and scope is not None:
        return _parse_leaf(leaf.strip(), scope)
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    _check_precision(describe_item(leaf), leaf.dtype)
    return _struct(leaf.shape, leaf.dtype)


def _struct(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _check_precision(text: str, dtype: Any) -> None:
    is_wide = isinstance(dtype, np.dtype) and dtype.kind in "iufc"
    narrow = jax.dtypes.canonicalize_dtype(dtype) if is_wide else dtype
    if narrow != dtype:
        raise _errors.too_precise(text, describe_item(_struct((), narrow)))


def _parse_item(text: str, scope: export.SymbolicScope) -> Any:
    """One item of a declaration: an array, a constant, or a list or dict of items."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    if group := re.fullmatch(r"list\((.*)\)", text, re.DOTALL):
        return [_parse_item(part, scope) for part in _split(group[1]) if part]
    if group := re.fullmatch(r"dict\((.*)\)", text, re.DOTALL):
        pairs = [part.partition(":") for part in _split(group[1]) if part]
        return {key.strip("'\" "): _parse_item(item.strip(), scope) for key, _, item in pairs}
    return _parse_leaf(text, scope)


def _parse_leaf(text: str, scope: export.SymbolicScope) -> Any:
    """An array, or a size."""
    match = _SPEC.fullmatch(text)
    if match is None and ("[" in text or not text):
        raise _errors.bad_spec(text)
    if match is None:
        sizes = _dimensions_of(text, text, scope)
        if len(sizes) != 1:
            raise _errors.bad_spec(text)
        return sizes[0]
    dtype = _dtypes().get(match["dtype"])
    if dtype is None:
        raise _errors.unknown_dtype(text, match["dtype"], _dtypes())
    _check_precision(text, dtype)
    return _struct(_dimensions_of(text, match["dims"], scope), dtype)


def _dimensions_of(text: str, dims: str, scope: export.SymbolicScope) -> tuple[Any, ...]:
    try:
        shape = tuple(export.symbolic_shape(dims, scope=scope))
    except Exception as error:
        raise _errors.bad_dimensions(text, str(error).partition("\n")[0]) from error
    for dim in shape:
        if not export.is_symbolic_dim(dim) and dim < 0:
            raise _errors.bad_dimensions(text, f"{dim} is below zero")
    return shape


def _split(text: str) -> list[str]:
    """The parts between commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


@functools.cache
def _dtypes() -> Mapping[str, Any]:
    """The types of numbers under their short names, as jaxprs print them."""
    numbers = (getattr(jnp, name, None) for name in _TYPES)
    known = [jnp.dtype(scalar) for scalar in numbers if scalar is not None]
    known.append(jax.eval_shape(lambda: jax.random.key(0)).dtype)
    scalars = (_struct((), dtype) for dtype in known)
    return {describe_item(scalar).removesuffix("[]"): scalar.dtype for scalar in scalars}
