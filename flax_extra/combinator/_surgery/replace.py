"""``replace``: a pipeline with other layers in the places of some."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from flax import linen as nn

from flax_extra.combinator._core import surgery_errors
from flax_extra.combinator._core.children import (
    Child,
    Children,
    Pipeline,
    is_pipeline,
    make_child,
)
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.describe import shorten
from flax_extra.combinator._core.errors import SignatureError
from flax_extra.combinator._core.expression import format_short
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._surgery.places import Place, find_places, format_path
from flax_extra.combinator._views.typed import Typed, typed
from flax_extra.combinator._words.compose import serial

P = TypeVar("P", bound=Combinator)


def replace(
    f: P,
    which: type[Any] | tuple[type[Any], ...] | str | Callable[[Any], bool],
    by: Callable[[Any], Callable[..., Any]],
) -> P:
    r"""Puts other layers in the places of some, at any depth.

    The layers that stay are the same instances, and keep the names of their parameters. What
    replaces a layer takes its name: a layer is given the name, and a pipeline or a function a scope
    of that name, so that ``by`` may put a layer beside the old one. A layer that is used in several
    places is replaced once, and the new one is used in all of them. :func:`transfer` gives the new
    pipeline the variables of the old one.

    Args:
        f: a pipeline, not bound to variables.
        which: the layers to replace: a type, or a tuple of types; a predicate on linen modules; or
            the path of one in the parameter tree, such as ``"Repeat_0/Dense_0"``, as
            :func:`layers` lists it. Combinators that have a scope, such as a ``repeat``, can be
            selected by type or path.
        by: a function of the old layer that gives the new one: a layer, a pipeline or a function.
            If it gives the old layer itself, nothing changes. Where the pipeline binds keywords of
            the old layer or says how many items it takes, that holds for the new one, and for the
            old one in a new pipeline.

    Returns:
        The new pipeline; ``f`` itself if nothing changes.

    Raises:
        ShapeError: If the new pipeline does not have the shapes that :func:`typed` declares.
        SignatureError: If a new layer takes or gives another number of items than the old one.
        TypeError: If ``f`` is no pipeline, is bound to variables or was made in a method of a
            module, or ``which`` selects a combinator that has no place in the parameter tree.
        ValueError: If there is no layer at a path.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> block = cb.residual(nn.LayerNorm(), nn.Dense(8), nn.gelu)
        >>> encoder = cb.serial(nn.Dense(8), cb.repeat(block, 6), nn.Dense(8))
        >>> other = cb.replace(encoder, nn.LayerNorm, lambda norm: nn.RMSNorm())
        >>> print(*cb.layers(other), sep="\n")
        Dense_0: Dense 1 -> 1
        Repeat_0/LayerNorm_0: RMSNorm 1 -> 1, 1 stacked
        Repeat_0/Dense_0: Dense 1 -> 1, 1 stacked
        Dense_1: Dense 1 -> 1

        An adapter beside each Dense:

        >>> def adapt(dense):
        ...     adapter = cb.serial(nn.Dense(2), nn.Dense(dense.features), name="adapter")
        ...     return cb.branch(dense, adapter) >> cb.add()
        >>> print(*cb.layers(cb.replace(encoder[:1], nn.Dense, adapt)), sep="\n")
        Dense_0/Dense_0: Dense 1 -> 1
        Dense_0/adapter/Dense_0: Dense 1 -> 1
        Dense_0/adapter/Dense_1: Dense 1 -> 1
    """
    if not is_pipeline(f):
        raise surgery_errors.not_a_pipeline("replace", shorten(repr(f)))
    places = {id(place.module): place for place in find_places("replace", f) if place.path}
    changed: P = _Replacement(places, _read_selection(which, places), by).rebuild(f)
    return changed


Selection = Callable[[Any, Place | None], bool]
"""Whether a module, at a place or at none, is selected."""


def _read_selection(which: Any, places: dict[int, Place]) -> Selection:
    if isinstance(which, str):
        known = {format_path(place.path) for place in places.values() if not place.is_field}
        if which not in known:
            raise surgery_errors.no_such_layer(which, sorted(known))
        return lambda _, place: place is not None and format_path(place.path) == which
    types = which if isinstance(which, tuple) else (which,)
    if all(isinstance(kind, type) for kind in types):
        combinators = tuple(kind for kind in types if issubclass(kind, Combinator))
        return lambda module, _: isinstance(module, combinators if is_pipeline(module) else types)
    if not callable(which):
        raise surgery_errors.not_a_selection(shorten(repr(which)))
    return lambda module, _: not is_pipeline(module) and bool(which(module))


@dataclasses.dataclass(eq=False)
class _Replacement:
    """One walk over a pipeline, in which the same instance becomes the same instance."""

    places: dict[int, Place]
    is_selected: Selection
    by: Callable[[Any], Callable[..., Any]]
    rebuilt: dict[int, Any] = dataclasses.field(default_factory=dict)
    made: dict[int, Any] = dataclasses.field(default_factory=dict)
    named: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def rebuild(self, pipeline: Any) -> Any:
        """Returns a pipeline with the layers in it replaced; itself if none is."""
        if id(pipeline) not in self.rebuilt:
            items = tuple(map(self.rebuild_child, pipeline.children))
            is_same = all(a is b for a, b in zip(items, pipeline.children, strict=True))
            new = pipeline if is_same else _rebuild(pipeline, items)
            self.rebuilt[id(pipeline)] = new
        return self.rebuilt[id(pipeline)]

    def rebuild_child(self, child: Child) -> Child:
        module: Any = child.module if child.pipeline is None else child.pipeline
        if module is None:
            return child
        place = self.places.get(id(module))
        if not self.is_selected(module, place):
            new = self.rebuild(module) if is_pipeline(module) else module
        elif place is None or (is_pipeline(module) and child.inlined is not None):
            raise surgery_errors.selected_without_scope(get_name(module))
        else:
            new = self.make(module, place)
        if new is module:
            return child
        changed = self.put(child, module, new)
        if place is not None:
            self.check_signature(child, changed, place)
        return changed

    def make(self, module: Any, place: Place) -> Any:
        """Returns what replaces a module, with the name of the module."""
        if id(module) not in self.made:
            new = self.by(module)
            self.made[id(module)] = new if new is module else self.give_name(new, place.path[-1])
        return self.made[id(module)]

    def give_name(self, new: Any, name: str) -> Any:
        """Returns a callable under a name, unless it has one; in a scope, if it is no layer."""
        if id(new) not in self.named:
            make_child(new)  # it raises an error if this is no callable
            if not isinstance(new, nn.Module):
                named: Any = serial(new, name=name)
            else:
                named = new if new.name is not None else new.clone(name=name)
            self.named[id(new)] = new, named  # held, so that no other object gets its id
        return self.named[id(new)][1]

    def put(self, child: Child, module: nn.Module, new: Any) -> Child:
        """Returns a child with another module, or a pipeline in which the old child may stand."""
        if is_pipeline(new) and not is_pipeline(module):
            around = _put_child(new, module, child)
            if around is not new:
                return _like(child, make_child(around))
        declared: dict[str, Any] = {}
        if child.pipeline is None and not is_pipeline(new):
            declared = _list_declared(child)
            _check_method(child, self.places[id(module)], new)
        return _like(child, make_child(child.bind(new), fixed=child.fixed, **declared))

    def check_signature(self, old: Child, new: Child, place: Place) -> None:
        """Raises an error if a new layer would shift the items of the others."""
        found, expected = new.signature, old.signature
        if (found.n_in, found.n_out) != (expected.n_in, expected.n_out):
            raise surgery_errors.other_signature(
                format_path(place.path),
                str(expected),
                format_short(old.target),
                str(found),
                format_short(new.target),
            )


def _check_method(child: Child, place: Place, new: Any) -> None:
    """Raises an error if the pipeline calls a method that the new layer does not have."""
    method = getattr(child.target, "__func__", None)
    if method is not None and not hasattr(type(new), method.__name__):
        path, found = format_path(place.path), type(new).__name__
        raise surgery_errors.no_method(path, method.__name__, found)


def _like(old: Child, new: Child) -> Child:
    """Returns a child of the same kind as another, such as the shortcut of a residual."""
    return type(old)(new.target, new.call_spec, new.fixed)


def _list_declared(child: Child) -> dict[str, int]:
    """Lists what the user declared of a child's signature."""
    try:
        inferred: Signature | None = make_child(child.target, fixed=child.fixed).signature
    except SignatureError:
        inferred = None
    return {
        name: getattr(child.signature, name)
        for name in ("n_in", "n_out")
        if inferred is None or getattr(inferred, name) != getattr(child.signature, name)
    }


def _put_child(pipeline: Pipeline, module: nn.Module, child: Child) -> Any:
    """Returns a pipeline in which a layer stands as a child says; itself if it is not in there."""

    def put(part: Child) -> Child:
        if part.pipeline is not None:
            target = _put_child(part.pipeline, module, child)
            return part if target is part.pipeline else _like(part, make_child(target))
        if part.target is not module or part.fixed:
            return part
        is_same = part.call_spec == child.call_spec and not child.fixed
        return part if is_same and child.target is module else _like(part, child)

    items = tuple(map(put, pipeline.children))
    if all(a is b for a, b in zip(items, pipeline.children, strict=True)):
        return pipeline
    return _rebuild(pipeline, items)


def _rebuild(pipeline: Any, items: Iterable[Child]) -> Any:
    """Returns a combinator with other children. Declared shapes are checked again."""
    children = Children(items)
    if isinstance(pipeline, Typed):
        return typed(children[0].target, pipeline.declared, **dict(pipeline.context))
    return pipeline.clone(children=children)
