"""Runs a module on shapes in decode mode, and records the calls of the layers in it.

Two runs that differ in one size show, by comparison, which axes have that size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from flax_extra.combinator._cache.cache import COLLECTION
from flax_extra.combinator._core.arrays import get_key_shape, split_arrays
from flax_extra.combinator._core.environment import call_site, format_path
from flax_extra.combinator._core.linen import unfreeze
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._views.specs import CallShapes, to_shapes


@dataclasses.dataclass(eq=False)
class LayerCall:
    """One call of a layer.

    Args:
        layer: the layer, bound.
        site: where in the pipeline it was called, or the layer that holds it.
        arguments: its arguments by their names, with shapes for arrays.
        around: the calls within which it was called, the outermost first.
        given: the names of the arguments that are inputs of the whole, as they were given.
        state: the names of its own variables in ``"cache"``, after the call.
    """

    layer: nn.Module
    site: tuple[str, ...]
    arguments: Mapping[str, Any]
    around: tuple[LayerCall, ...]
    given: frozenset[str]
    state: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Where it is, for messages: the place in the pipeline and in a layer of the user's."""
        holder = next((call for call in self.around if call.site == self.site), self)
        n_above = len(holder.layer.path)
        inside = tuple(map(str, self.layer.path[n_above:]))
        return " -> ".join([*(self.site or (get_name(holder.layer),)), *inside])


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on shapes.

    Args:
        state: what it remembers: the collection ``"cache"``.
        outputs: what it gives.
        variables: all other variables.
        calls: the calls of layers, in their order.
    """

    state: Any
    outputs: Any
    variables: Any
    calls: tuple[LayerCall, ...]


def run_init(module: nn.Module, call: CallShapes, context: Mapping[str, Any]) -> Run:
    """Initializes a module on shapes."""

    def run(key: Any, *items: Any, **keywords: Any) -> Any:
        return module.init_with_output(key, *items, **keywords)

    return _run(run, call.items, {**call.context, **context})


def run_step(
    module: nn.Module, variables: Any, state: Any, call: CallShapes, context: Mapping[str, Any]
) -> Run:
    """Runs one block on shapes."""

    def run(key: Any, variables: Any, *items: Any, **keywords: Any) -> Any:
        mutable = [COLLECTION]
        return module.apply(variables, *items, rngs=key, mutable=mutable, **keywords)

    return _run(run, ({**variables, COLLECTION: state}, *call.items), {**call.context, **context})


def _run(run: Callable[..., Any], items: Stack, context: Mapping[str, Any]) -> Run:
    shapes, merge = split_arrays((items, context))
    calls: list[LayerCall] = []

    def trace(key: Any, arrays: list[Any]) -> Any:
        items, context = merge(arrays)
        with _record_calls(calls, {id(leaf) for leaf in arrays}):
            outputs, variables = run(key, *items, **context)
        return outputs, variables

    outputs, variables = jax.eval_shape(trace, get_key_shape(), shapes)
    variables = nn.meta.unbox(unfreeze(variables))
    state = variables.pop(COLLECTION, {})
    return Run(state, outputs, variables, tuple(calls))


@contextlib.contextmanager
def _record_calls(calls: list[LayerCall], inputs: set[int]) -> Iterator[None]:
    running: list[LayerCall] = []

    def record(call_next: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call_next(*args, **kwargs)
        arguments = _bind(context.orig_method, args, kwargs)
        call = LayerCall(
            context.module,
            format_path(call_site.get().path),
            {name: to_shapes(value) for name, value in arguments.items()},
            tuple(running),
            frozenset(
                name
                for name, value in arguments.items()
                if all(id(leaf) in inputs for leaf in jax.tree.leaves(value))
            ),
        )
        calls.append(call)
        running.append(call)
        try:
            outputs = call_next(*args, **kwargs)
        finally:
            running.pop()
        own = context.module.variables.get(COLLECTION, {})
        call.state = tuple(name for name, value in own.items() if not isinstance(value, Mapping))
        return outputs

    with nn.intercept_methods(record):
        yield


def _bind(method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call by their names; those of ``*args`` by number."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            named.update({str(i): value for i, value in enumerate(named.pop(name, ()))})
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named
