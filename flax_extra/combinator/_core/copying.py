"""Copies of layers that know which layer they are copies of.

Two slices of a ``repeat`` may stand in one pipeline, and each has parameters of its own, so their
layers are two instances. Both know the layer that they come from, so that variables can follow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from flax_extra.combinator._core.children import is_pipeline

_COPIED_FROM = "_flax_extra_copied_from"


def get_original(module: nn.Module) -> nn.Module:
    """Returns the layer that a module is a copy of; itself, if it is none."""
    original: nn.Module = vars(module).get(_COPIED_FROM, module)
    return original


class Copier:
    """Copies modules, bound to nothing. One instance becomes one instance, at any depth."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[nn.Module, nn.Module]] = {}

    def __call__(self, module: nn.Module) -> nn.Module:
        """Returns the copy of a module."""
        if id(module) not in self._copies:
            copy = module.clone(**self._copy_parts(module))
            object.__setattr__(copy, _COPIED_FROM, get_original(module))
            self._copies[id(module)] = module, copy  # held, so that no other object gets its id
        return self._copies[id(module)][1]

    def _copy_parts(self, module: nn.Module) -> dict[str, Any]:
        """Returns the fields that hold modules, with copies of them."""
        if is_pipeline(module):
            return {"children": module.children.replace_modules(self)}
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(module):
            value = getattr(module, field.name) if field.init else None
            if field.name not in ("parent", "name") and any(map(_is_module, _list_leaves(value))):
                fields[field.name] = jax.tree.map(lambda x: self(x) if _is_module(x) else x, value)
        return fields


def _list_leaves(value: Any) -> list[Any]:
    return jax.tree_util.tree_leaves(value)


def _is_module(x: object) -> bool:
    return isinstance(x, nn.Module)
