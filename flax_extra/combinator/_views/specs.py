"""Specs: texts that describe the items of a stack, such as ``"f32[b, t, 64]"``.

A spec is written as jaxprs print an array. A name in it stands for every size at once; a name alone
is a number of that size. JAX's own symbolic dimensions do the arithmetic. A spec may end in
constraints on names: ``"f32[b, t] where t <= 64 and mod(b, 8) == 0"``.

    >>> from flax_extra.combinator._core.describe import describe_stack
    >>> describe_stack(parse_call(["f32[b, 8*t, 64]", None, "bool[b]"]).items)
    'f32[b, 8*t, 64], None, bool[b]'
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.arrays import get_key_shape, is_array
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._core.stack import Stack, flatten

_SPEC = re.compile(r"(?P<dtype>[a-z]\w*(<\w+>)?)\[(?P<dims>[^\[\]]*)\]")
_NAMED = re.compile(r"(?P<name>[A-Za-z_]\w*)\s*:\s*(?P<spec>.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*(?![\w(])")
_DTYPE_NAMES = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (2, 4, 8, 16, 32, 64)),
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
    *(name for name in dir(jnp) if name.startswith("float8_")),
)


@dataclasses.dataclass(frozen=True)
class CallShapes:
    """The inputs of a call, with ``jax.ShapeDtypeStruct`` for arrays.

    Args:
        items: the items of the stack, top first.
        context: the context keywords.
        constraints: what is known of named dimensions, such as ``"t <= 64"``.
    """

    items: Stack
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constraints: tuple[str, ...] = ()


def parse_call(specs: Iterable[Any], context: Mapping[str, Any] | None = None) -> CallShapes:
    """Reads the specs of the inputs of a call.

    Args:
        specs: texts, arrays, ``jax.ShapeDtypeStruct``, pytrees of these, None, and plain numbers,
            which are not traced. A plain tuple is several items, as on a stack. A dimension of
            the same name is the same in all of them.
        context: context keywords. A text that is not a spec is a value.

    Raises:
        ValueError: If an item is a text and not a spec.
    """
    items = flatten(tuple(specs))
    context = dict(context or {})
    texts = [leaf for leaf in jax.tree.leaves((items, context)) if isinstance(leaf, str)]
    constraints = tuple(dict.fromkeys(c for text in texts for c in _split_where(text)[1]))
    scope = _find_scope((items, context), constraints)
    return CallShapes(
        tuple(jax.tree.map(lambda leaf: _to_shape(leaf, scope), item) for item in items),
        {
            name: jax.tree.map(lambda leaf: _to_context(leaf, scope), value)
            for name, value in context.items()
        },
        constraints,
    )


def _to_context(leaf: Any, scope: export.SymbolicScope) -> Any:
    is_value = isinstance(leaf, str) and not _SPEC.fullmatch(_split_where(leaf)[0])
    return leaf if is_value else _to_shape(leaf, scope)


def _split_where(text: str) -> tuple[str, list[str]]:
    """Splits a spec from its constraints."""
    spec, _, constraints = text.partition(" where ")
    return spec.strip(), [part.strip() for part in constraints.split(" and ") if part.strip()]


def to_shapes(value: Any) -> Any:
    """Replaces the arrays of a pytree, also traced ones, by their shapes."""
    return jax.tree.map(lambda leaf: _to_shape(leaf, None), value)


def parse_declaration(text: str) -> tuple[CallShapes, Stack]:
    """Reads the inputs and outputs in a text such as ``"f32[b, t], lengths: i32[b] -> f32[b]"``.

    Raises:
        ValueError: If the text does not declare shapes.
    """
    if text.count("->") != 1:
        raise errors.bad_declaration(text)
    left, right = text.split("->")
    inputs, constraints = _split_where(left)
    # Both sides are read in one scope, so that a name means the same on each.
    scope = _make_scope(tuple(constraints))
    items: list[Any] = []
    context: dict[str, Any] = {}
    for part in _split_items(inputs):
        if named := _NAMED.fullmatch(part):
            context[named["name"]] = _parse_item(named["spec"], scope)
        else:
            items.append(_parse_item(part, scope))
    outputs = tuple(_parse_item(part, scope) for part in _split_items(right.strip()))
    return CallShapes(tuple(items), context, tuple(constraints)), outputs


def find_dimension_names(items: Iterable[Any]) -> list[str]:
    """Lists the names of the dimensions in items, in the order in which they first occur.

    >>> find_dimension_names(parse_call(["f32[b, t + s]", "f32[t, h]"]).items)
    ['b', 't', 's', 'h']
    """
    return list(dict.fromkeys(name for dim in _walk_dimensions(items) for name in _find_names(dim)))


def substitute_sizes(tree: Any, sizes: Mapping[str, int | str]) -> Any:
    """Puts numbers, or other names, in the place of named dimensions in a pytree of shapes.

    >>> from flax_extra.combinator._core.describe import describe_stack
    >>> describe_stack(substitute_sizes(parse_call(["f32[b, 2*t]"]).items, {"t": 5}))
    'f32[b, 10]'
    """
    scope = export.SymbolicScope()

    def substitute(leaf: Any) -> Any:
        if export.is_symbolic_dim(leaf):
            return _parse_size(_substitute(str(leaf), sizes), scope)
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        shape = (_parse_size(_substitute(str(dim), sizes), scope) for dim in leaf.shape)
        return _make_struct(tuple(shape), leaf.dtype)

    return jax.tree.map(substitute, tree)


def _parse_size(text: str, scope: export.SymbolicScope) -> Any:
    """Reads an expression of sizes: a number, or a symbolic dimension if it has names."""
    if _NAME.search(text) is None:  # JAX would leave mod(4, 2) as it is
        return _compute(text)
    return export.symbolic_shape(text, scope=scope)[0]


def _compute(text: str) -> Any:
    return eval(text, {"__builtins__": {}}, _FUNCTIONS)  # noqa: S307  # JAX wrote or parsed it


_FUNCTIONS = {"mod": operator.mod, "floordiv": operator.floordiv, "max": max, "min": min}
"""The functions that JAX's expressions of dimensions may call."""


def are_satisfied(constraints: Iterable[str], sizes: Mapping[str, int]) -> bool:
    """Whether sizes of named dimensions satisfy all constraints.

    >>> are_satisfied(["t <= 64", "mod(t, 8) == 0"], {"t": 16})
    True
    """
    return all(_compute(_substitute(constraint, sizes)) for constraint in constraints)


def canonicalize_dimensions(tree: Any, constraints: Iterable[str] = ()) -> tuple[Any, ...]:
    """Returns a key that is equal for shapes that differ only in the names of dimensions."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    kinds = tuple(map(_get_kind, leaves))
    dims = list(_walk_dimensions(leaves))
    return structure, kinds, min(_rename(dims, tuple(constraints)), key=str)


def _get_kind(leaf: Any) -> Any:
    if export.is_symbolic_dim(leaf):
        return "size"
    return (leaf.dtype, len(leaf.shape)) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _rename(dims: list[Any], constraints: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields dimensions and constraints as text, names numbered in every order that is possible."""
    plain = dict.fromkeys(str(dim) for dim in dims if str(dim).isidentifier())
    rest = [name for dim in dims for name in _find_names(dim) if name not in plain]
    rest = list(dict.fromkeys(rest))
    orders = itertools.permutations(rest) if len(rest) <= MAX_PERMUTED else [tuple(rest)]
    for order in orders:
        new = {name: f"d{index}" for index, name in enumerate((*plain, *order))}
        text = ", ".join(_substitute(str(dim), new) for dim in dims)
        known = sorted(_substitute(constraint, new) for constraint in constraints)
        yield (*map(str, export.symbolic_shape(text)), *known)


MAX_PERMUTED = 5
"""How many names that occur only within expressions are tried in every order."""


def _walk_dimensions(items: Iterable[Any]) -> Iterator[Any]:
    for leaf in jax.tree_util.tree_leaves(list(items)):
        yield from (leaf,) if export.is_symbolic_dim(leaf) else getattr(leaf, "shape", ())


def _find_names(dim: Any) -> list[str]:
    return _NAME.findall(str(dim)) if export.is_symbolic_dim(dim) else []


def _substitute(dim: str, sizes: Mapping[str, int | str]) -> str:
    return _NAME.sub(lambda name: str(sizes.get(name[0], name[0])), dim)


def _find_scope(tree: Any, constraints: tuple[str, ...]) -> export.SymbolicScope:
    """Returns the scope of the symbolic dimensions in a pytree, for specs that are texts."""
    for dim in _walk_dimensions(jax.tree.leaves(tree)):
        if export.is_symbolic_dim(dim):
            scope: export.SymbolicScope = dim.scope
            return scope
    return _make_scope(constraints)


def _make_scope(constraints: tuple[str, ...]) -> export.SymbolicScope:
    try:
        return export.SymbolicScope(constraints)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise errors.bad_constraints(" and ".join(constraints), reason) from error


def _to_shape(leaf: Any, scope: export.SymbolicScope | None) -> Any:
    if isinstance(leaf, str) and scope is not None:
        return _parse_leaf(_split_where(leaf)[0], scope)
    if not is_array(leaf):
        return leaf
    _check_precision(describe_item(leaf), leaf.dtype)
    return _make_struct(leaf.shape, leaf.dtype)


def _make_struct(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _check_precision(text: str, dtype: Any) -> None:
    is_wide = isinstance(dtype, np.dtype) and dtype.kind in "iufc"
    narrow = jax.dtypes.canonicalize_dtype(dtype) if is_wide else dtype
    if narrow != dtype:
        raise errors.too_precise(text, describe_item(_make_struct((), narrow)))


def _parse_item(text: str, scope: export.SymbolicScope) -> Any:
    """Reads one item of a declaration: an array, a constant, or a list or dict of items."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    if group := re.fullmatch(r"list\((.*)\)", text, re.DOTALL):
        return [_parse_item(part, scope) for part in _split_items(group[1]) if part]
    if group := re.fullmatch(r"dict\((.*)\)", text, re.DOTALL):
        pairs = [part.partition(":") for part in _split_items(group[1]) if part]
        return {key.strip("'\" "): _parse_item(item.strip(), scope) for key, _, item in pairs}
    return _parse_leaf(text, scope)


def _parse_leaf(text: str, scope: export.SymbolicScope) -> Any:
    """Reads an array, or a size."""
    match = _SPEC.fullmatch(text)
    if match is None and ("[" in text or not text):
        raise errors.bad_spec(text)
    if match is None:
        sizes = _parse_dimensions(text, text, scope)
        if len(sizes) != 1:
            raise errors.bad_spec(text)
        return sizes[0]
    dtype = _list_dtypes().get(match["dtype"])
    if dtype is None:
        raise errors.unknown_dtype(text, match["dtype"], _list_dtypes())
    _check_precision(text, dtype)
    return _make_struct(_parse_dimensions(text, match["dims"], scope), dtype)


def _parse_dimensions(text: str, dims: str, scope: export.SymbolicScope) -> tuple[Any, ...]:
    try:
        shape = tuple(export.symbolic_shape(dims, scope=scope))
    except Exception as error:
        raise errors.bad_dimensions(text, str(error).partition("\n")[0]) from error
    for dim in shape:
        if not export.is_symbolic_dim(dim) and dim < 0:
            raise errors.bad_dimensions(text, f"{dim} is below zero")
    return shape


def _split_items(text: str) -> list[str]:
    """Splits a text at the commas that are outside of brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    parts = [*parts, text[start:].strip()]
    return [] if parts in ([""], ["()"]) else parts


@functools.cache
def _list_dtypes() -> Mapping[str, Any]:
    """Maps the short names of dtypes, as jaxprs print them, to the dtypes."""
    numbers = (getattr(jnp, name, None) for name in _DTYPE_NAMES)
    known = [jnp.dtype(scalar) for scalar in numbers if scalar is not None]
    known.append(get_key_shape().dtype)
    scalars = (_make_struct((), dtype) for dtype in known)
    return {describe_item(scalar).removesuffix("[]"): scalar.dtype for scalar in scalars}
