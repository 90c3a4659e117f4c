"""How the layers of a pipeline get their names, scopes and parameters from linen.

The laws this file keeps:

- an unnamed structural combinator adds no level: its layers are named as ``@nn.compact`` would
  name them, in the order of the expression;
- one instance has one set of parameters, however deep its second use;
- in a compact method, the layers of a pipeline are layers of that method.

All that touches linen's private state is here. It was written against flax's ``linen/module.py``;
``tests/combinator/test_linen.py`` fails if a release changes what is relied on.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn
from flax.linen import module as linen_module

from flax_extra.combinator import _errors
from flax_extra.combinator._children import Children
from flax_extra.combinator._inference import is_combinator, name_of

if TYPE_CHECKING:
    from flax_extra.combinator._base import Combinator


class Binding:
    """The bound modules of a pipeline, and the originals that they stand for.

    A pytree of the bound modules, so that lifted transforms (``nn.remat``, ``nn.jit``, ...) find
    their scopes, also of those that are shared with another part of the model.
    """

    __slots__ = ("_bound", "modules", "originals")

    def __init__(self, originals: tuple[nn.Module, ...], modules: tuple[nn.Module, ...]) -> None:
        self.originals = originals
        self.modules = modules
        self._bound = dict(zip(map(id, originals), modules, strict=True))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    def find(self, module: nn.Module) -> nn.Module:
        """The bound module that stands for this one: itself, if it is bound already."""
        return self._bound.get(id(module), module)


jax.tree_util.register_pytree_node(
    Binding,
    lambda binding: (binding.modules, binding.originals),
    lambda originals, modules: Binding(originals, tuple(modules)),
)

UNBOUND = Binding((), ())


def layout(children: Children) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, with its name: its own, or ``Class_0``, ``Class_1``, ... in order."""
    seen: set[int] = set()
    counts: dict[str, int] = {}
    for module in children.modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        kind = type(module).__name__
        numbered = f"{kind}_{counts.setdefault(kind, 0)}"
        if module.name is None or (module.scope is not None and has_numbered_name(module)):
            counts[kind] += 1
        yield module.name or numbered, module


def has_numbered_name(module: nn.Module) -> bool:
    """Whether a module has the kind of name that is given to one without: ``Dense_0``."""
    return re.fullmatch(rf"{type(module).__name__}_\d+", str(module.name)) is not None


def bind_as_scope(owner: Combinator) -> Binding:
    """Binds the layers of a combinator that has a scope of its own."""
    originals: list[nn.Module] = []
    modules: list[nn.Module] = []
    with _open_to_layers(owner):
        for name, module in layout(owner.children):
            bound = _adopt(owner, name, module)
            _check_stack(owner, bound)
            originals.append(module)
            modules.append(bound)
            if not hasattr(type(owner), name):
                object.__setattr__(owner, name, bound)  # as linen does for those made in setup
    return Binding(tuple(originals), tuple(modules))


@contextlib.contextmanager
def _open_to_layers(owner: Combinator) -> Iterator[None]:
    """Lets a module have layers when linen no longer would: they may have run, in a loop."""
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


def bind_in_host(owner: Combinator, host: nn.Module) -> Binding:
    """Binds the layers of a structural combinator as layers of the module it is used in."""
    originals: list[nn.Module] = []
    modules: list[nn.Module] = []
    for _, module in layout(owner.children):
        bound = _adopt_in_compact(host, module)
        _check_stack(host, bound)
        originals.append(module)
        modules.append(bound)
    return Binding(tuple(originals), tuple(modules))


def current_module() -> nn.Module | None:
    """The module whose method is running, the parent of modules created now."""
    module: nn.Module | None = linen_module._context.module_stack[-1]
    return module


def is_unspecified(parent: Any) -> bool:
    """Whether ``parent`` was left out, so that it is the module whose method is running."""
    return parent is linen_module._unspecified_parent


def in_setup(module: nn.Module) -> bool:
    """Whether a module is in its setup, where modules wait for a name."""
    return module._state.in_setup


def is_in_transform(module: nn.Module) -> bool:
    """Whether it is the clone of a module that runs inside of a lifted transform."""
    return module._state.setup_called is linen_module.SetupState.TRANSFORMED


def release(owner: Combinator, host: nn.Module) -> None:
    """Takes back from a module the fresh layers of a combinator that will have a scope.

    ``cb.repeat(nn.Dense(4), 3)`` in a compact method: Python makes the Dense first, and linen gives
    it to the module. It belongs to the repeat, so that the same expression gives the same tree.
    In setup the same goes for layers with a name. A layer that has been called, or is an attribute,
    stays where it is, and is shared.
    """
    kept = {id(leaf) for leaf in jax.tree_util.tree_leaves(list(vars(host).values()))}
    for module in reversed(list(owner.children.modules())):
        if module.parent is host and module.scope is not None and id(module) not in kept:
            if not _is_fresh(module):
                continue
            name = str(module.name)
            _forget_place(module)
            host._state.children.pop(name, None)
            if host.scope is not None:
                host.scope.reservations.pop(name, None)
            kind = type(module).__name__
            cursor = host._state.autoname_cursor
            if name == f"{kind}_{cursor.get(kind, 0) - 1}":
                cursor[kind] -= 1


def _forget_place(module: nn.Module) -> None:
    """Puts a bound module back to the state of one that waits in setup for a name."""
    if has_numbered_name(module):
        object.__setattr__(module, "name", None)
    object.__setattr__(module, "scope", None)
    if is_combinator(module) and module.bound is not None:
        for original, inner in zip(module.bound.originals, module.bound.modules, strict=True):
            if inner.parent is module:
                _forget_place(inner)
                if inner is not original:  # its name is that of the original, which keeps it
                    object.__setattr__(inner, "name", None)
        object.__setattr__(module, "bound", None)


def _check_stack(owner: nn.Module, bound: nn.Module) -> None:
    mine, its = _innermost_stack(owner), _innermost_stack(bound.parent)
    for stack, other in ((mine, its), (its, mine)):
        # Linen clones a module now and then: two clones have one and the same children.
        if stack is not None and (other is None or stack.children is not other.children):
            raise _errors.shared_across_stack(name_of(bound), stack.label)


def _innermost_stack(module: Any) -> Combinator | None:
    while isinstance(module, nn.Module):
        if is_combinator(module) and module.stacks:
            return module
        module = module.parent
    return None


def _adopt(owner: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The module, bound in the owner's scope under a name, unless it has a scope already."""
    if module.scope is not None:
        return module
    if module.parent is not None:  # it waits for a name, which may be its own
        object.__setattr__(module, "name", None)
    # Linen's own way of adopting what is in a field, which knows what is adopted elsewhere: where
    # it keeps that has changed from one release to another. It leaves the module in an attribute
    # of that name, where something else may be.
    attributes = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    nn.Module._register_submodules(owner, name, module)  # type: ignore[no-untyped-call]
    bound: nn.Module = attributes.pop(name)
    attributes.update(before)
    return bound


def _adopt_in_compact(host: nn.Module, module: nn.Module) -> nn.Module:
    """The module as a layer of a compact method, named in the order of its calls."""
    if module.scope is not None:
        return module
    kind, cursor = type(module).__name__, host._state.autoname_cursor
    name = module.name or f"{kind}_{cursor.get(kind, 0)}"
    was_taken = host._name_taken(name)
    bound = _adopt(host, name, module)
    if bound.parent is not host:
        return bound
    if not host._name_taken(str(bound.name)):
        # Bound in an earlier call of the method: each call names its layers anew.
        bound.__post_init__()
    elif was_taken or bound.name != name:
        return bound
    if has_numbered_name(bound):
        cursor[kind] = cursor.get(kind, 0) + 1
    return bound


def _is_fresh(module: nn.Module) -> bool:
    """Whether no method of it has been called since it was bound."""
    return module._state.setup_called == linen_module.SetupState.NEW
