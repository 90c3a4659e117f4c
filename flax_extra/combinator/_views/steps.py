"""The steps of a pipeline, each with the parameters that it uses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
from flax import linen as nn

from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import cut
from flax_extra.combinator._core.expression import format_short
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._views.record import StepRecord
from flax_extra.combinator._words.fn import Fn
from flax_extra.combinator._words.repeat import Repeat
from flax_extra.combinator._words.vmap import Vmap
from flax_extra.combinator._words.wire import Wire

MAX_NAME_LENGTH = 44
"""How many characters of an expression are shown."""

MAX_WIRE_LENGTH = 56
"""The same for a ``wire``, whose names say what it does."""

Leaves: TypeAlias = dict[tuple[str, ...], Any]
"""The leaves of a tree of variables by their paths."""


@dataclasses.dataclass
class Step(StepRecord):
    """One step of a pipeline. See :func:`summary`.

    Args:
        position: the indices of children that lead to it from the outermost pipeline.
        path: the same for people to read, as in errors.
        target: the callable.
        signature: how many items it takes and gives.
        before: the whole stack that it finds, top first: ``jax.ShapeDtypeStruct`` for arrays.
        after: the whole stack that it leaves; None if it failed.
        modules: paths, in the parameter tree, of the modules that it uses.
        error: the exception that it raised, if it did.
        children: the steps within.
        name: its expression, or the kind of combinator.
        parameters: how many numbers its parameters hold, without those that an earlier step uses.
        bytes: how many bytes these take.
        shared: whether an earlier step uses all of its parameters.
        state: how many bytes it remembers from block to block of a stream, if it ran with
            ``decode=True``. Where the inputs have names for sizes, so has this.
    """

    name: str = ""
    parameters: int = 0
    bytes: int = 0
    shared: bool = False
    state: Any = 0


def count_variables(record: StepRecord, parameters: Leaves, state: Leaves) -> Step:
    """Returns the steps of a record, each with the variables that no earlier step uses."""
    return _count(record, _Variables(parameters), _Variables(state))


def flatten_variables(tree: Any) -> Leaves:
    """Returns the leaves of a tree of variables by their paths, without metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    return {tuple(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def measure(leaves: Iterable[Any]) -> tuple[Any, Any]:
    """Counts the numbers in arrays, and their bytes. Both have names if sizes are names."""
    sizes = [(math.prod(leaf.shape), leaf.dtype.itemsize) for leaf in leaves]
    return sum(n for n, _ in sizes), sum(n * width for n, width in sizes)


def _count(record: StepRecord, parameters: _Variables, state: _Variables) -> Step:
    """Counts the variables of each step, in the order in which steps run: each only once."""
    children = [_count(child, parameters, state) for child in record.children]
    used, (count, size) = parameters.take(record.modules)
    n_new = count
    count += sum(child.parameters for child in children)
    fields = {**vars(record), "children": children}
    return Step(
        **fields,
        name=_format_name(record.target),
        parameters=count,
        bytes=size + sum(child.bytes for child in children),
        shared=used and not n_new and not count,
        state=state.take(record.modules)[1][1] + sum(child.state for child in children),
    )


class _Variables:
    """The variables of one collection, each counted for the first step that uses it."""

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = leaves
        self._in_module: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for path in leaves:
            for length in range(len(path) + 1):
                self._in_module.setdefault(path[:length], []).append(path)
        self._counted: set[tuple[str, ...]] = set()

    def take(self, modules: Iterable[tuple[str, ...]]) -> tuple[bool, tuple[Any, Any]]:
        """Says whether modules have variables, and measures those that were not counted yet."""
        used = {path for module in modules for path in self._in_module.get(module, ())}
        new = [path for path in self._leaves if path in used - self._counted]
        self._counted |= used
        return bool(used), measure(self._leaves[path] for path in new)


def _format_name(target: Callable[..., Any]) -> str:
    if not isinstance(target, Combinator) or not len(target.children):
        return _format_leaf(target)
    if not target._is_visible:  # it only declares: the name is that of the callable it holds
        inner = target.children[0].target
        has_steps = isinstance(inner, Combinator) and len(inner.children)
        return _format_name(inner) if has_steps else _format_leaf(target)
    if isinstance(target, Repeat):
        return f"{target._label} x{target.n}{', shared' if target.shared else ''}"
    if isinstance(target, Vmap) and target.n is not None:
        return f"{target._label} x{target.n}"
    return target._label


def _format_leaf(target: Callable[..., Any]) -> str:
    """Writes the expression, or the most telling part of it if it is long."""
    text = format_short(target)
    if isinstance(target, Wire):
        return cut(text, MAX_WIRE_LENGTH)
    if len(text) <= MAX_NAME_LENGTH:
        return text
    if isinstance(target, Fn):
        return _format_leaf(target.children[0].target)
    name = getattr(target, "name", None) if isinstance(target, nn.Module) else None
    named = f"{get_name(target)}(name={name!r}, ...)"
    return named if name and len(named) <= MAX_NAME_LENGTH else f"{get_name(target)}(...)"
