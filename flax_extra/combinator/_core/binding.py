"""How the layers of a pipeline get their names, scopes and parameters from linen.

These laws hold:

- An unnamed structural combinator adds no level to the parameter tree. Its layers are named as
  ``@nn.compact`` would name them, in the order of the expression.
- One instance has one set of parameters, however deep its second use.
- In a compact method, the layers of a pipeline are layers of that method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import linen as nn

from flax_extra.combinator._core import errors, linen
from flax_extra.combinator._core.children import Children, Pipeline, is_pipeline
from flax_extra.combinator._core.naming import get_name


class Binding:
    """The bound modules of a pipeline, and the originals that they stand for.

    It is a pytree of the bound modules, so that lifted transformations (``nn.remat``, ``nn.jit``)
    find the scopes of all of them, also of those that another part of the model owns.
    """

    __slots__ = ("_bound", "modules", "originals")

    def __init__(self, originals: Iterable[nn.Module], modules: Iterable[nn.Module]) -> None:
        self.originals = tuple(originals)
        self.modules = tuple(modules)
        self._bound = dict(zip(map(id, self.originals), self.modules, strict=True))

    def find(self, module: nn.Module) -> nn.Module:
        """Finds the bound module that stands for this one: itself, if it is bound."""
        return self._bound.get(id(module), module)


jax.tree_util.register_pytree_node(
    Binding,
    lambda binding: (binding.modules, binding.originals),
    Binding,
)

UNBOUND = Binding((), ())


def name_layers(children: Children) -> Iterator[tuple[str, nn.Module]]:
    """Yields each module once, with its name: its own, or ``Class_0``, ``Class_1`` in order.

    A number is left out if the user gave that name to a layer of the same scope.
    """
    seen: set[int] = set()
    counts: dict[str, int] = {}
    is_taken = _make_name_test(children)
    for module in children.modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        kind = type(module).__name__
        counts.setdefault(kind, 0)
        has_place = module.scope is not None and linen.has_numbered_name(module)
        if module.name is None:
            while is_taken(f"{kind}_{counts[kind]}"):
                counts[kind] += 1
        numbered = f"{kind}_{counts[kind]}"
        if module.name is None or has_place:
            counts[kind] += 1
        yield numbered if module.name is None else module.name, module


def _make_name_test(children: Children) -> Callable[[str], bool]:
    """Returns a function that says whether the user gave a name to a layer of this scope."""
    given = {m.name: m for m in children.modules() if m.name is not None and m.scope is None}
    return lambda name: name in given and not children.is_named_elsewhere(given[name])


def bind_as_scope(owner: nn.Module, children: Children) -> Binding:
    """Binds the layers of a combinator that has a scope of its own."""
    originals: list[nn.Module] = []
    modules: list[nn.Module] = []
    with linen.allow_layers(owner):
        for name, module in name_layers(children):
            bound = linen.adopt(owner, name, module)
            _check_copies(owner, bound)
            originals.append(module)
            modules.append(bound)
            _show_layer(owner, name, bound)
    return Binding(originals, modules)


def bind_in_host(children: Children, host: nn.Module) -> Binding:
    """Binds the layers of a structural combinator as layers of the module whose method uses it."""
    originals: list[nn.Module] = []
    modules: list[nn.Module] = []
    is_taken = _make_name_test(children)
    for _, module in name_layers(children):
        bound = linen.adopt_in_compact(host, module, is_taken)
        _check_copies(host, bound)
        originals.append(module)
        modules.append(bound)
    return Binding(originals, modules)


def _show_layer(owner: nn.Module, name: str, layer: nn.Module) -> None:
    """Makes a layer an attribute, as linen does in setup, if no other attribute has its name."""
    if not hasattr(type(owner), name) and name not in vars(owner):
        object.__setattr__(owner, name, layer)


def take_back_layers(children: Children, host: nn.Module) -> None:
    """Takes new layers back from a module, for a combinator that will have a scope.

    ``cb.repeat(nn.Dense(4), 3)`` in a compact method: Python makes the Dense first, and linen gives
    it to the module whose method runs. But it belongs to the repeat, so that the same expression
    gives the same tree everywhere. The same holds in setup for layers with a name. A layer that has
    been called, or is an attribute of the module, stays where it is, and is shared.
    """
    attributes = {id(leaf) for leaf in jax.tree_util.tree_leaves(list(vars(host).values()))}
    for module in reversed(list(children.modules())):
        if module.parent is not host or module.scope is None or id(module) in attributes:
            continue
        if linen.was_called(module):
            continue
        name = str(module.name)
        # In setup only a layer that was given a name has a scope: the name is the user's.
        _forget_place(module, keeps_name=linen.is_in_setup(host))
        linen.forget_layer(host, name, type(module).__name__)


def _forget_place(module: nn.Module, keeps_name: bool = False) -> None:
    """Puts a bound module back to the state of one that waits in setup for a name."""
    if linen.has_numbered_name(module) and not keeps_name:
        object.__setattr__(module, "name", None)
    object.__setattr__(module, "scope", None)
    binding = getattr(module, "_bound", None) if is_pipeline(module) else None
    if isinstance(binding, Binding):
        for original, inner in zip(binding.originals, binding.modules, strict=True):
            if inner.parent is module:
                _forget_place(inner)
                if inner is not original:  # the original keeps the name that the user gave
                    object.__setattr__(inner, "name", None)
        object.__setattr__(module, "_bound", None)


def _check_copies(owner: nn.Module, bound: nn.Module) -> None:
    """Raises an error if a layer is used both in copies with parameters and outside of them."""
    used_in, bound_in = _find_copies(owner), _find_copies(bound.parent)
    for copies, other in ((used_in, bound_in), (bound_in, used_in)):
        # Linen clones modules: two clones of one combinator have the same children.
        if copies is not None and (other is None or copies.children is not other.children):
            raise errors.shared_across_copies(get_name(bound), copies._label)


def _find_copies(module: Any) -> Pipeline | None:
    """Finds the innermost combinator around a module that stacks parameters."""
    while isinstance(module, nn.Module):
        if is_pipeline(module) and module._stacks_parameters:
            return module
        module = module.parent
    return None
