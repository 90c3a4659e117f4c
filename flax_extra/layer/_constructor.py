"""Constructors: what a layer is given to make its parts from.

A layer that holds others takes constructors, not modules: each call makes parts of its own, as in
``Encoding(preprocessing=functools.partial(nn.Embed, 256, 32))``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from flax import linen as nn

from flax_extra.layer import _errors

Constructor: TypeAlias = Callable[..., Callable[..., Any]]
"""Called without arguments, it gives a linen module, or any function, to be called on arrays."""


def check_constructor(layer: str, name: str, given: object) -> None:
    """Refuses what makes nothing, above all a module that is made already."""
    if isinstance(given, nn.Module) or not callable(given):
        raise _errors.not_a_constructor(layer, name, type(given).__name__)
