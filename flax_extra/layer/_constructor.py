"""Constructors, by which a layer makes its sub-layers.

A layer that holds others takes constructors, not modules: it calls each of them to make a sub-layer
of its own, as in ``Encoding(preprocessing=functools.partial(nn.Embed, 256, 32))``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra.layer import _errors

Constructor: TypeAlias = Callable[..., Callable[..., Any]]
"""Called without arguments, it makes a linen module or a function, to be called on arrays."""


def make_identity() -> Callable[[Any], Any]:
    """Makes a function that returns its argument, for a layer that leaves out a step."""
    return _return_argument


def check_constructor(layer: str, name: str, given: object) -> None:
    """Raises an error if an object is no constructor, above all if it is a module."""
    if isinstance(given, nn.Module) or not callable(given):
        raise _errors.not_a_constructor(layer, name, type(given).__name__)


def select_keywords(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Selects the keywords that a function, a module or a pipeline takes."""
    try:
        names = (
            function.keywords
            if isinstance(function, cb.Combinator)
            else inspect.signature(function).parameters
        )
    except ValueError:  # a function written in C
        return {}
    return {name: value for name, value in keywords.items() if name in names}


def make_named(constructor: Constructor, name: str) -> Callable[..., Any]:
    """Makes a sub-layer with a name, if the constructor takes one, in a compact call."""
    made: Callable[..., Any] = constructor(**select_keywords(constructor, name=name))
    return made


def _return_argument(x: Any) -> Any:
    return x
