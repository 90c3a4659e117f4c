"""Why a dimension must be a number: found out by trying numbers.

A pipeline that runs on symbolic dimensions may fail where it would run on numbers. Then each name
is tried with two sizes, and the error says which name to make a number, and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._views.record import record_run
from flax_extra.combinator._views.specs import (
    CallShapes,
    find_dimension_names,
    substitute_sizes,
)

TRIAL_SIZES = ((48, 96), (64, 128), (7, 11))
"""The pairs of sizes that a dimension is tried with."""


def explain_error(f: Callable[..., Any], call: CallShapes, error: Exception) -> Exception:
    """Returns the error, or one that says which names must be numbers, if that would mend it."""
    names = find_dimension_names([call.items, call.context])
    if not names or isinstance(error, errors.SignatureError):
        return error
    trials = {name: _try_sizes(f, call, [name]) for name in names}
    helpful = [name for name, trial in trials.items() if trial is not None]
    if not helpful and _try_sizes(f, call, names) is None:
        # By its name, because jax.errors has the class only in newer releases.
        is_undecided = type(error).__name__ == "InconclusiveDimensionOperation"
        return errors.undecidable(*_summarize(error), names) if is_undecided else error
    for name in helpful:
        if sized := trials[name]:
            return errors.symbolic_parameter(*sized, [name])
    return errors.undecidable(*_summarize(error), helpful or names)


def find_symbolic_parameters(variables: Any) -> Iterator[tuple[str, str, list[str]]]:
    """Yields the parameters that have a named dimension: path, shape and names."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(variables)):
        if names := find_dimension_names([leaf]):
            yield _format_path(path), describe_item(leaf), names


def _try_sizes(
    f: Callable[..., Any], call: CallShapes, names: list[str]
) -> tuple[str, str] | tuple[()] | None:
    """Runs with numbers for names. Returns None if it fails, or a parameter that they size."""
    for sizes in TRIAL_SIZES:
        runs = [
            record_run(f, _with_sizes(call, {n: size + 12 * i for i, n in enumerate(names)}))
            for size in sizes
        ]
        if all(run.error is None for run in runs):
            first, second = (_list_parameters(run.variables.get("params", {})) for run in runs)
            for parameter, leaf in first.items():
                other = second.get(parameter)
                if other is None or describe_item(leaf) != describe_item(other):
                    return parameter, _describe_sized(leaf, other, names[0], sizes)
            return ()
    return None


def _with_sizes(call: CallShapes, sizes: Mapping[str, int]) -> CallShapes:
    items, context = substitute_sizes((call.items, dict(call.context)), sizes)
    return CallShapes(items, context)


def _describe_sized(leaf: Any, other: Any, name: str, sizes: tuple[int, int]) -> str:
    """Writes the shape of a parameter with the name that sizes it, or for one number."""
    (dimension,) = jax.export.symbolic_shape(name)
    known = {**{(size, size): size for size in leaf.shape}, sizes: dimension}
    pairs = list(itertools.zip_longest(leaf.shape, getattr(other, "shape", ())))
    if sizes in pairs and known.keys() >= set(pairs):
        shape = tuple(known[pair] for pair in pairs)
        return describe_item(jax.ShapeDtypeStruct(shape, leaf.dtype))  # type: ignore[no-untyped-call]
    return f"{describe_item(leaf)} for {name} = {sizes[0]}"


def _list_parameters(variables: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(variables))
    return {_format_path(path): leaf for path, leaf in leaves}


def _format_path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _summarize(error: Exception) -> tuple[str, str]:
    """Returns the first line of an error, and where it was raised, as our note says."""
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith(errors.NOTE_PREFIX)]
    facts = notes[0].removeprefix(errors.NOTE_PREFIX).splitlines()[:3] if notes else []
    return str(error).partition("\n")[0], "\n".join(["  " + facts[0], *facts[1:]] if facts else [])
