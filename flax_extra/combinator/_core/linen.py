"""The internals of flax linen that this library relies on, and what for. All uses are here.

Linen decides on its own how the layers in a module's fields are named and bound. A pipeline has
other rules (see ``binding.py``), and linen offers no public way to set them. It relies on:

- ``Module._register_submodules``: linen calls it for each field when a module gets its scope.
  Pipelines bind their layers then, and adopt each layer by calling it with a name of their own.
- ``Module._state`` and ``SetupState``: whether a module may get layers, runs in a transformation
  or was called.
- ``Module._name_taken``, ``_state.children``, ``_state.autoname_cursor``, ``Scope.reservations``:
  which names a module has given to its layers.
- ``Module._id``, ``clone(_deep_clone=...)``: how linen copies a module without its scope.
- ``module._context.module_stack`` and ``_unspecified_parent``: the module whose method is running.
- ``Scope._mutable_collection`` and the filters of ``flax.core.scope``: which collections a loop
  may change.
- The ``nowrap`` attribute: which methods and properties linen leaves as they are.

This was written for flax 0.12. ``tests/combinator/test_linen_internals.py`` fails if a release
changes one of these, or if another file uses one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import jax
from flax import linen as nn
from flax.core import FrozenDict, freeze
from flax.core import scope as flax_scope
from flax.core import unfreeze as flax_unfreeze
from flax.linen import module as linen_module
from flax.traverse_util import flatten_dict

CollectionFilter: TypeAlias = flax_scope.CollectionFilter
DenyList = flax_scope.DenyList
subtract_filters = flax_scope.subtract_filters
union_filters = flax_scope.union_filters

Clones: TypeAlias = "weakref.WeakValueDictionary[Any, nn.Module]"
"""The clones of modules by the identity of the original, while linen copies a module."""

if TYPE_CHECKING:
    static_property = property
else:

    class static_property(property):
        """A property of the expression. Linen does not run setup for it."""

        nowrap = True


class Container(nn.Module):
    """A linen module that decides itself how the modules in ``children`` are named and bound.

    Subclasses define ``_bind_children`` and ``_clone_children``.
    """

    # Linen's transformations look for bound modules in fields that __init__ takes.
    if TYPE_CHECKING:
        _bound: ClassVar[Any]
    else:
        _bound: Any = dataclasses.field(
            default=None, kw_only=True, repr=False, compare=False, hash=False
        )

    @nn.nowrap
    def _bind_children(self) -> None:
        """Binds the children, now that the module has a scope."""

    @nn.nowrap
    def _clone_children(self, clone: Callable[[nn.Module], nn.Module]) -> Any:
        """Returns the children with each bound module cloned; None if there is nothing to clone."""

    @nn.nowrap
    def _register_submodules(self, name: str, val: Any) -> None:
        if name == "children":
            self._bind_children()
        elif name != "_bound":
            super()._register_submodules(name, val)  # type: ignore[no-untyped-call]

    @nn.nowrap
    def clone(
        self,
        *,
        parent: Any = None,
        _deep_clone: bool | Clones = False,
        _reset_names: bool = False,
        **updates: Any,
    ) -> Self:
        """Copies the module, with other fields. See ``flax.linen.Module.clone``."""
        updates.setdefault("_bound", None)
        if _deep_clone is not False and "children" not in updates:
            # Linen's own deep clone would miss the modules in `children`.
            clones: Clones = weakref.WeakValueDictionary() if _deep_clone is True else _deep_clone

            def clone_once(module: nn.Module) -> nn.Module:
                known = clones.get(module._id)
                if known is None:  # the dictionary is weak: hold on to what goes in
                    known = clones[module._id] = module.clone(_deep_clone=clones)
                return known

            children = self._clone_children(clone_once)
            if children is not None:
                updates["children"] = children
        return super().clone(
            parent=parent, _deep_clone=_deep_clone, _reset_names=_reset_names, **updates
        )


def clone_without_scope(module: nn.Module) -> nn.Module:
    """Copies a module and the modules in its fields, bound to nothing."""
    return module.clone(parent=None, _deep_clone=True)


# Where a module stands


def get_running_module() -> nn.Module | None:
    """Returns the module whose method is running: the parent of modules created now."""
    module: nn.Module | None = linen_module._context.module_stack[-1]
    return module


def is_unspecified_parent(parent: Any) -> bool:
    """Whether ``parent`` was left out, so that it is the module whose method is running."""
    return parent is linen_module._unspecified_parent


def is_in_setup(module: nn.Module) -> bool:
    """Whether a module runs its setup, in which new modules wait for a name."""
    return module._state.in_setup


def is_initialized(module: nn.Module) -> bool:
    """Whether the constructor of a module has run to its end."""
    return module._state.is_initialized


def is_in_transform(module: nn.Module) -> bool:
    """Whether it is the clone of a module that runs in a lifted transformation."""
    return module._state.setup_called is linen_module.SetupState.TRANSFORMED


def was_called(module: nn.Module) -> bool:
    """Whether a method of a module has run since the module was bound."""
    return module._state.setup_called != linen_module.SetupState.NEW


def has_numbered_name(module: nn.Module) -> bool:
    """Whether a module has the kind of name that linen gives to one without: ``Dense_0``."""
    return re.fullmatch(rf"{type(module).__name__}_\d+", str(module.name)) is not None


# How a module gets layers


class _Attribute(str):
    """The attribute in which linen puts a layer that it adopts.

    Linen names the layer after the attribute, by formatting it. This one formats as the name of the
    layer, and is itself an attribute that nothing else uses: a layer may be called ``path``.
    """

    __slots__ = ("layer_name",)

    layer_name: str

    def __format__(self, spec: str) -> str:
        return format(self.layer_name, spec)


def adopt(owner: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Binds a module as a layer of ``owner`` with that name, if it has no scope yet.

    Linen does it as for a module in a field: it clones one that was made outside, and knows it
    again when another module adopts it, too.
    """
    if module.scope is not None:
        return module
    if module.parent is not None:  # it was made in a setup, and waits for a name
        object.__setattr__(module, "name", None)
    attribute = _Attribute("_flax_extra_adopted")
    attribute.layer_name = name
    nn.Module._register_submodules(owner, attribute, module)  # type: ignore[no-untyped-call]
    adopted: nn.Module = vars(owner).pop(attribute)
    return adopted


def adopt_in_compact(
    host: nn.Module, module: nn.Module, is_taken: Callable[[str], bool]
) -> nn.Module:
    """Binds a module as a layer of a compact method, named in the order of calls.

    ``is_taken`` says whether the user gave a name to another layer of the same pipeline.
    """
    if module.scope is not None:
        return module
    kind, cursor = type(module).__name__, host._state.autoname_cursor
    number = cursor.get(kind, 0)
    while module.name is None and is_taken(f"{kind}_{number}"):
        number += 1
    name = f"{kind}_{number}" if module.name is None else module.name
    was_taken = host._name_taken(name)
    bound = adopt(host, name, module)
    if bound.parent is not host:
        return bound
    if not host._name_taken(str(bound.name)):
        # An earlier call of the method bound it: each call names its layers anew.
        bound.__post_init__()
    elif was_taken or bound.name != name:
        return bound
    if module.name is None:
        cursor[kind] = number + 1
    return bound


@contextlib.contextmanager
def allow_layers(owner: nn.Module) -> Iterator[None]:
    """Lets a module get layers after its constructor. In a loop, they may have run before."""
    state = owner._state
    if not state.is_initialized:
        yield
        return
    before = state.in_setup, state.setup_called
    state.in_setup, state.setup_called = True, linen_module.SetupState.TRANSFORMED
    try:
        yield
    finally:
        state.in_setup, state.setup_called = before


def list_fields(module: nn.Module) -> list[nn.Module]:
    """Lists the modules in the fields of a module, bound if it is bound."""
    if module.scope is not None:
        module._try_setup(shallow=True)
    values = [
        getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    ]
    leaves = jax.tree_util.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, nn.Module)]


def forget_layer(host: nn.Module, name: str, kind: str) -> None:
    """Makes a module forget a layer, so that its name can be given again."""
    host._state.children.pop(name, None)
    if host.scope is not None:
        host.scope.reservations.pop(name, None)
    cursor = host._state.autoname_cursor
    if name == f"{kind}_{cursor.get(kind, 0) - 1}":
        cursor[kind] -= 1


# Collections of variables


def get_mutable_collections(module: nn.Module) -> CollectionFilter:
    """Returns which collections a module may change."""
    return False if module.scope is None else module.scope.mutable


def list_mutable(module: nn.Module) -> list[str]:
    """Lists the collections that hold variables of a module, and that it may change."""
    return [c for c in module.variables if module.is_mutable_collection(c)]


def read_collection(module: nn.Module, collection: str) -> dict[tuple[str, ...], Any]:
    """Returns the variables of a module, and of those in it, by their paths."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(module.variables[collection])  # type: ignore[no-untyped-call]
    return flat


def is_inside(module: nn.Module, owner: nn.Module) -> bool:
    """Whether the variables of a module are among those of another.

    A lifted transformation clones modules, so their parents do not say it.
    """
    return bool(module.path[: len(owner.path)] == owner.path)


def unfreeze(variables: Any) -> dict[str, Any]:
    """Returns variables as dictionaries that can be changed. Linen may give frozen ones."""
    unfrozen: dict[str, Any] = flax_unfreeze(variables)
    return unfrozen


def freeze_like(variables: dict[str, Any], like: Any) -> Any:
    """Returns variables as frozen dictionaries, if others are."""
    return freeze(variables) if isinstance(like, FrozenDict) else variables


def declare_variable(
    module: nn.Module, collection: str, name: str, make: Callable[[], Any]
) -> flax_scope.Variable[Any]:
    """Returns a variable of a module, and makes it if there is none. Its call is not compact."""
    scope: Any = module.scope
    if not scope.has_variable(collection, name):
        scope.put_variable(collection, name, make())
    return flax_scope.Variable(scope, collection, name, unbox=True)


def write_variable(module: nn.Module, collection: str, path: tuple[str, ...], value: Any) -> None:
    """Writes a variable of a module, or of one in it. Scopes keep their dictionaries."""
    if module.scope is not None:
        variables: Any = module.scope._mutable_collection(collection)
        for name in path[:-1]:
            variables = variables.setdefault(name, {})
        variables[path[-1]] = value


def remove_variable(module: nn.Module, collection: str, path: tuple[str, ...]) -> None:
    """Removes a variable of a module, or of one in it. Scopes keep their dictionaries."""
    if module.scope is not None:
        variables: Any = module.scope._mutable_collection(collection)
        for name in path[:-1]:
            variables = variables[name]
        del variables[path[-1]]


def make_hashable(collections: CollectionFilter) -> CollectionFilter:
    """Returns a filter that can be the key of a dictionary."""
    if isinstance(collections, DenyList):
        return DenyList(make_hashable(collections.deny))
    if isinstance(collections, bool | str):
        return collections
    return tuple(sorted(collections))
