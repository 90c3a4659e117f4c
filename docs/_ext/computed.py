"""What the library itself knows of its names: the wiring of examples, the parameters of layers.

>>> from flax_extra import combinator as cb
>>> [expression for expression, _ in draw_examples(cb.residual)]
['cb.residual(abs)', 'cb.residual(abs, operator.mul, shortcut=abs)']
>>> list_parameters("nn.Dense(3)", "f32[b, 8] -> f32[b, 3]")
[('bias', 'f32[3]'), ('kernel', 'f32[8, 3]')]
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import functools
import inspect
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._views.record import record_run
from flax_extra.combinator._views.specs import parse_call
from flax_extra.combinator._views.steps import flatten_variables

NAMESPACE = {"xn": xn, "io": xn.io, "nn": nn, "jnp": jnp, "partial": functools.partial}
"""The names in a ``Shapes:`` section."""

SHAPES = re.compile(r"\n\s*Shapes:\n\s+``(?P<layer>.+?)``:\s+``(?P<shapes>.+?)``\n", re.DOTALL)


def cut_shapes(text: str) -> tuple[str, tuple[str, str] | None]:
    """Cuts the ``Shapes:`` out of a docstring: the layer, and its shapes."""
    stated = SHAPES.search(text)
    if stated is None:
        return text, None
    layer, shapes = (" ".join(stated[part].split()) for part in ("layer", "shapes"))
    return text.replace(stated[0], "\n"), (layer, shapes)


def list_parameters(layer: str, shapes: str) -> list[tuple[str, str]]:
    """Lists the parameters of a layer, by path, each with its shape."""
    inputs = cb.ShapeSignature.parse(shapes).inputs
    run = record_run(eval(layer, NAMESPACE), parse_call(inputs, {}))
    leaves = flatten_variables(run.variables.get("params", {}))
    # The layer alone is a step of a pipeline here, in a scope of its own.
    return sorted(("/".join(path[1:]), describe_item(leaf)) for path, leaf in leaves.items())


def draw_examples(word: Callable[..., Any]) -> list[tuple[str, cb.Diagram]]:
    """Draws the pipelines that the examples of a docstring build by this word.

    Where an example also calls the pipeline, on numbers, they are on the wires.
    """
    namespace: dict[str, Any] = {}
    drawn: dict[str, cb.Diagram] = {}
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(word) or ""):
        if example.exc_msg is not None:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            exec(example.source, namespace)
        for call, arguments in _find_calls(example.source, word.__name__):
            pipeline = eval(ast.unparse(call), namespace)
            drawn.setdefault(ast.unparse(call), cb.diagram(pipeline, *arguments))
    return list(drawn.items())


def _find_calls(source: str, word: str) -> Iterator[tuple[ast.Call, list[float]]]:
    """Finds the calls of a word, each with the numbers that its result is called on."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    arguments = {call.func: call.args for call in calls if isinstance(call.func, ast.Call)}
    for call in calls:
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == f"cb.{word}":
            yield call, _read_numbers(arguments.get(call, []))


def _read_numbers(arguments: list[ast.expr]) -> list[float]:
    """Reads arguments that are all numbers; returns none otherwise."""
    try:
        values = [ast.literal_eval(argument) for argument in arguments]
    except ValueError:
        return []
    return values if all(isinstance(value, int | float) for value in values) else []
