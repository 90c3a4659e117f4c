"""Where the layers of a pipeline have their variables.

Layers are told apart as instances: one instance has one place in the parameter tree, however often
it is used. The places are those that linen gives when it binds the pipeline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from flax import linen as nn

from flax_extra.combinator._core import linen, surgery_errors
from flax_extra.combinator._core.children import (
    Pipeline,
    is_pipeline,
    make_child,
    walk_modules,
)
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.copying import get_original
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._words.hold import Hold
from flax_extra.combinator._words.repeat import PER_COPY, Repeat
from flax_extra.combinator._words.vmap import Vmap

Path: TypeAlias = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a module has its variables.

    Args:
        module: the module, as the pipeline holds it.
        path: the names of the scopes that lead to it.
        around: the combinators around it that run several copies or members, the outermost first.
        is_field: whether it is held in a field of a layer, and no layer of the pipeline itself.
    """

    module: nn.Module
    path: Path
    around: tuple[Pipeline, ...] = ()
    is_field: bool = False

    @property
    def original(self) -> int:
        """The identity of the layer, which the copies of it in slices of a ``repeat`` share."""
        return id(get_original(self.module))

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer of the pipeline: no combinator, and no part of another layer."""
        return not self.is_field and not is_pipeline(self.module)

    @property
    def has_variables_itself(self) -> bool:
        """Whether there may be variables of its own, not of modules in it."""
        module = self.module
        has_call = type(module).__call__ is not Combinator.__call__
        return not is_pipeline(module) or isinstance(module, Hold) or has_call

    def list_stacks(self, collection: str) -> list[Pipeline]:
        """Lists the combinators whose copies have an entry each, on leading axes, in order."""
        return [owner for owner in self.around if _is_stacked(owner, collection)]


def _is_stacked(owner: Pipeline, collection: str) -> bool:
    if owner._stacks_parameters:
        return True
    if isinstance(owner, Vmap):
        return collection != "params"
    return collection in PER_COPY


def number_copies(owner: Pipeline) -> tuple[int, ...] | None:
    """Returns the numbers of the copies or members; None if they are not known."""
    if isinstance(owner, Repeat):
        return owner._copies
    n = owner.n if isinstance(owner, Vmap) else None
    return None if n is None else tuple(range(n))


def find_places(asked: str, f: Any) -> list[Place]:
    """Finds the places of all modules of a pipeline, or of a layer.

    Args:
        asked: the function that asks, for messages.
        f: a pipeline, a linen module, or another callable, which has none.

    Raises:
        TypeError: If it is bound to variables, or was made in a method of a module.
    """
    module = make_child(f).module
    if module is None:
        return []
    if module.scope is not None:
        label = module._label if is_pipeline(module) else type(module).__name__
        raise surgery_errors.bound_pipeline(asked, label)
    for part in walk_modules(module):
        if part.parent is not None:  # linen would bind it, and not a copy of it
            raise surgery_errors.made_in_method(asked, get_name(part))
    return list(_walk(module, module.bind({}), (), set(), is_field=False))


def _walk(
    module: nn.Module,
    bound: nn.Module,
    around: tuple[Pipeline, ...],
    seen: set[int],
    is_field: bool,
) -> Iterator[Place]:
    seen.add(id(module))
    yield Place(module, tuple(map(str, bound.path)), around, is_field)
    if is_pipeline(module):
        bound_pipeline: Any = bound
        binding = bound_pipeline._binding
        parts = zip(binding.originals, binding.modules, strict=True)
        if module._stacks_parameters or isinstance(module, Repeat | Vmap):
            around = (*around, module)
    else:
        parts = zip(*map(linen.list_fields, (module, bound)), strict=True)
        is_field = True
    for part, there in parts:
        # A layer that a scope further on uses, too, may have its place there.
        is_here = there.scope is not None and linen.is_inside(there, bound)
        if id(part) not in seen and is_here:
            yield from _walk(part, there, around, seen, is_field)


def find_owner(places: Sequence[Place], path: Path) -> Place | None:
    """Finds the place that a variable belongs to: the innermost scope around it."""
    around = [place for place in places if path[: len(place.path)] == place.path]
    return max(around, key=lambda place: len(place.path), default=None)


def format_path(path: Path) -> str:
    """Writes a path as names with slashes between them."""
    return "/".join(path)
