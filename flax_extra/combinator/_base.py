"""``Combinator``: a pipeline as a value that is a linen module.

A combinator holds its children and reads as an expression. Bound to a scope by linen, it binds its
layers by the laws in ``_binding.py``; called, it runs as ``_run.py`` says.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, overload

from flax import linen as nn
from flax.errors import SetAttributeFrozenModuleError

from flax_extra.combinator import _errors
from flax_extra.combinator._binding import (
    UNBOUND,
    Binding,
    bind_as_scope,
    bind_in_host,
    current_module,
    has_numbered_name,
    in_setup,
    is_in_transform,
    is_unspecified,
    layout,
    release,
)
from flax_extra.combinator._children import NO_CHILDREN, Child, Children
from flax_extra.combinator._expression import Argument, expression, representation, settings
from flax_extra.combinator._run import Flow, Slot, Steps, run
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._stack import Stack

C = TypeVar("C", bound="Combinator")

if TYPE_CHECKING:
    reading = property
else:

    class reading(property):
        """A property that linen leaves alone: it reads the expression, and needs no variables."""

        nowrap = True


OPERATORS: dict[str, Callable[[Any, Any], Combinator]] = {}
"""What the operators build; ``_flow.py`` and ``_derived.py``, which define it, fill this in."""


class Combinator(nn.Module):
    """A pipeline: callables, and how they meet the stack.

    Calling it with the items of a stack gives the items it leaves there. It is a linen module, to
    be initialised, applied, bound, used as a field, in ``setup`` or in a compact method; one made
    of plain functions is simply called. It is a sequence of its children, immutable and hashable.

    A subclass says what it means with :meth:`expand`, in terms of other combinators, and keeps its
    own name in errors, summaries and pictures.

    Args:
        children: callables or (nested) iterables of callables.
        name: gives the combinator a scope of that name in the parameter tree. Without, a
            structural combinator adds no level to it.

    Raises:
        TypeError: where a child is not callable, or a context keyword is taken by none.
        SignatureError: where a child's signature cannot be inferred, or does not fit.
        SharingError: where one layer is used both in and outside of a ``repeat``.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> class PreNorm(cb.Combinator):
        ...     def expand(self, norm, *body):
        ...         return cb.residual(norm, *body)
        >>> block = PreNorm([nn.LayerNorm(), nn.Dense(4)])
        >>> print(block, "has signature", block.signature)
        pre_norm(LayerNorm(), Dense(features=4)) has signature 1 -> 1
    """

    children: Children = NO_CHILDREN
    bound: Binding | None = dataclasses.field(
        default=None, kw_only=True, repr=False, compare=False, hash=False
    )

    is_combinator: ClassVar[bool] = True
    is_lifted: ClassVar[bool] = False
    is_visible: ClassVar[bool] = True
    __array_ufunc__: ClassVar[None] = None  # so that numpy leaves the operators to us

    def __init_subclass__(cls, **options: Any) -> None:
        # What reads a pipeline needs no variables, and linen is not to set it up for that.
        for name, member in vars(cls).items():
            if hasattr(getattr(Combinator, name, None), "nowrap"):
                nn.nowrap(member)
        super().__init_subclass__(**options)

    @nn.nowrap
    def __setattr__(self, name: str, val: Any) -> None:
        if self._is_built and name in self.__dataclass_fields__ and name not in ("name", "parent"):
            error: Callable[..., Exception] = SetAttributeFrozenModuleError
            raise error(type(self).__name__, name, val)
        super().__setattr__(name, val)

    # What a subclass says of itself

    @nn.nowrap
    def expand(self, *children: Callable[..., Any]) -> Combinator:
        """What this combinator means, written with others; each child stands where it belongs.

        A combinator that defines none says how it runs instead, with ``signature`` and ``flow``.

        Example:
            >>> from flax_extra import combinator as cb
            >>> print(cb.dip(abs).expand(abs))
            parallel(identity(), abs)
        """
        raise _errors.no_meaning(type(self).__name__)

    @functools.cached_property
    def signature(self) -> Signature:
        """How many items it takes off the stack and puts there.

        Example:
            >>> from flax_extra import combinator as cb
            >>> cb.swap().signature.n_out
            2
        """
        if self.meaning is None:
            raise _errors.no_meaning(type(self).__name__)
        return self.meaning.signature

    @nn.nowrap
    def flow(self, stack: Stack, steps: Steps) -> Flow | Stack:
        """Runs a primitive combinator: the stack after it. For those that do not ``expand``.

        Where it runs children it is a generator: it yields the index of one with the stack for it,
        and is sent the stack after.
        """
        raise _errors.no_meaning(type(self).__name__)

    @reading
    def advice(self) -> str:
        """What to do where its wiring fails, if there is something to say."""
        return ""

    @reading
    def stacks(self) -> bool:
        """Whether each of its copies has parameters of its own, stacked on a new axis."""
        return False

    # What follows from it

    @functools.cached_property
    def meaning(self) -> Combinator | None:
        """What a derived combinator stands for; None for a primitive."""
        if type(self).expand is Combinator.expand:
            return None
        slots = [Slot(self, index, child) for index, child in enumerate(self.children)]
        meaning = self.expand(*slots)
        for module in meaning.children.modules():
            raise _errors.foreign_modules(type(self).__name__, type(module).__name__)
        return meaning

    @functools.cached_property
    def keywords(self) -> frozenset[str]:
        """The context keywords that some descendant takes.

        Example:
            >>> from flax import linen as nn
            >>> from flax_extra import combinator as cb
            >>> sorted(cb.serial(nn.Dense(4), nn.Dropout(0.1)).keywords)
            ['deterministic', 'rng']
        """
        return frozenset().union(*(child.contract.keywords for child in self.children))

    @reading
    def label(self) -> str:
        """Its name in paths and pictures: its own, or that of its kind.

        Example:
            >>> from flax_extra import combinator as cb
            >>> cb.serial(name="encoder").label, cb.serial().label
            ('encoder', 'serial')
        """
        return self.kind if self.name is None or has_numbered_name(self) else self.name

    @reading
    def kind(self) -> str:
        """The name of what builds it: ``serial`` for ``Serial``."""
        return _snake_case(type(self).__name__)

    @reading
    def opens_scope(self) -> bool:
        """Whether it has a level of its own in the parameter tree."""
        return self._is_layer or (self.scope is not None and self._host is None)

    @reading
    def _is_layer(self) -> bool:
        """Whether it is called as layers are, not read: lifted, named, or with its own call."""
        called = type(self).__call__ is not Combinator.__call__
        return self.is_lifted or self.name is not None or called

    # A linen module

    _host: ClassVar[nn.Module | None] = None
    _is_built: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given: object = self.children
        if not isinstance(given, Children):
            self.children = Children.of(given)
        self._check()
        object.__setattr__(self, "_is_built", True)
        parent: Any = self.parent
        if is_unspecified(parent):
            parent = current_module()
        if isinstance(parent, nn.Module):
            if self._is_layer or in_setup(parent):
                release(self, parent)
            else:
                # It stands in the parent's scope, as if its layers had been called one by one.
                object.__setattr__(self, "_host", parent)
                object.__setattr__(self, "parent", parent.scope)
        super().__post_init__()

    @nn.nowrap
    def _check(self) -> None:
        """Raises what can be known to be wrong when the combinator is built."""
        _ = self.meaning

    @nn.nowrap
    def _register_submodules(self, name: str, val: Any) -> None:
        # Linen calls this for each field of a module that it binds, to adopt the modules inside.
        if name != "children":
            if name != "bound":
                super()._register_submodules(name, val)  # type: ignore[no-untyped-call]
        elif self.bound is None and self._binds_now:
            self._bind()

    @reading
    def _binds_now(self) -> bool:
        if self._host is not None:
            return self._state.is_initialized
        if not self.stacks or is_in_transform(self):
            return True
        # What is in a stack is in it alone, and is bound inside of the loop, where it runs: linen
        # would have to carry each layer into it. Layers made in a method are carried: they are
        # bound themselves, not a copy, and that once.
        return any(module.parent is not None for module in self.children.modules())

    @reading
    def binding(self) -> Binding:
        """Its bound layers; those of a stack are bound now, if they are not yet."""
        if self.bound is None and self.stacks and self.scope is not None:
            self._bind()
        return self.bound or UNBOUND

    def __getattr__(self, name: str) -> Any:
        if self.stacks and any(name == layer for layer, _ in layout(self.children)):
            _ = self.binding
        return super().__getattr__(name)

    @nn.nowrap
    def _bind(self) -> None:
        host = self._host
        bound = bind_as_scope(self) if host is None else bind_in_host(self, host)
        object.__setattr__(self, "bound", bound)

    @nn.nowrap
    def clone(
        self,
        *,
        parent: Any = None,
        _deep_clone: bool | weakref.WeakValueDictionary[Any, nn.Module] = False,
        _reset_names: bool = False,
        **updates: Any,
    ) -> Self:
        """A copy with other fields; see ``flax.linen.Module.clone``."""
        updates.setdefault("bound", None)
        if _deep_clone is not False and "children" not in updates:
            cache = weakref.WeakValueDictionary() if _deep_clone is True else _deep_clone
            updates["children"] = _deep_cloned(self.children, cache)
        return super().clone(
            parent=parent, _deep_clone=_deep_clone, _reset_names=_reset_names, **updates
        )

    @nn.nowrap
    def __getstate__(self) -> dict[str, Any]:
        # What is derived from the fields is derived again after unpickling.
        derived = ("meaning", "signature", "keywords")
        return {name: value for name, value in vars(self).items() if name not in derived}

    @nn.nowrap
    def __call__(self, *inputs: Any, **context: Any) -> Any:
        """Runs the pipeline on a stack.

        Args:
            inputs: the items of the stack, top first; ``n_in`` of them are taken, the rest pass
                through.
            context: keywords for every descendant that takes them as an optional parameter.

        Returns:
            The items left on the stack: ``()`` for none, the item itself for one, else a tuple.

        Raises:
            SignatureError: where inputs are missing, or a child gives other than it declares.
            TypeError: where a context keyword is taken by no descendant.
        """
        if self.scope is None:
            return run(self, inputs, context)
        if self._host is not None:
            if self.bound is None:  # not before it is called: it may be for another scope
                self._bind()
            return run(self, inputs, context)
        return self._call_bound(*inputs, **context)

    def _call_bound(self, *inputs: Any, **context: Any) -> Any:
        return run(self, inputs, context)

    _call_bound.__name__ = "__call__"  # the name under which linen captures and tabulates it

    # A sequence of its children

    @reading
    def parts(self) -> Children:
        """The children that it is a sequence of."""
        return self.children

    @nn.nowrap
    def with_parts(self, parts: Children) -> Children:
        """Its children, with other parts."""
        return parts

    @nn.nowrap
    def segment(self, index: int) -> str:
        """A child's place, as paths give it."""
        return f"{self.label}[{index}]"

    @nn.nowrap
    def __len__(self) -> int:
        return len(self.parts)

    @nn.nowrap
    def __bool__(self) -> bool:
        return True  # a pipeline without children is a pipeline: `p or default` means p

    @nn.nowrap
    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Callable[..., Any]: ...

    @overload
    def __getitem__(self: C, index: slice) -> C: ...

    @nn.nowrap
    def __getitem__(self, index: int | slice) -> Any:
        """A child, or the combinator of the same kind of some of them.

        Of a bound pipeline, these are bound.
        """
        if isinstance(index, slice):
            parts = Children(self.parts.items[index])
            return (
                self
                if parts.items == self.parts.items
                else self._view(self, self.with_parts(parts))
            )
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise _errors.index_out_of_range(self.label, position, len(self))
        return self._part(self.parts[position])

    @nn.nowrap
    def _part(self, child: Child) -> Any:
        """What a child is from outside: where this is bound, it is bound too."""
        if child.structure is not None:
            return self._view(child.structure, child.structure.children)
        if child.module is None:
            return child.target
        return child.on(self.binding.find(child.module))

    @nn.nowrap
    def _view(self, combinator: Combinator, children: Children) -> Combinator:
        if self.scope is not None and self._host is None:
            # With the bound layers in it, which keep their names when it is unbound.
            bound = children.with_modules(self.binding.find)
            return combinator.clone(children=bound, name=None, parent=self.scope)
        if children is combinator.children:
            return combinator
        return combinator.clone(children=children, name=None)

    # Operators

    @nn.nowrap
    def __rshift__(self, other: Any) -> Combinator:
        return OPERATORS[">>"](self, other)

    @nn.nowrap
    def __rrshift__(self, other: Any) -> Combinator:
        return OPERATORS[">>"](other, self)

    @nn.nowrap
    def __matmul__(self, other: Any) -> Combinator:
        return OPERATORS["@"](self, other)

    @nn.nowrap
    def __rmatmul__(self, other: Any) -> Combinator:
        return OPERATORS["@"](other, self)

    @nn.nowrap
    def __and__(self, other: Any) -> Combinator:
        return OPERATORS["&"](self, other)

    @nn.nowrap
    def __rand__(self, other: Any) -> Combinator:
        return OPERATORS["&"](other, self)

    # As text

    @reading
    def arguments(self) -> list[Argument]:
        """The arguments of the expression that builds it."""
        return [*(("", child.target) for child in self.children), *settings(self)]

    def __repr__(self) -> str:
        return representation(self)

    @nn.nowrap
    def __str__(self) -> str:
        return expression(self)


def join(kind: type[C], left: Any, right: Any) -> C:
    """Two arguments of an operator in one combinator: of those of the same kind, the children."""
    parts = [
        part.children if type(part) is kind and not part.opens_scope else Children.of(part)
        for part in (left, right)
    ]
    return kind(parts[0].joined(parts[1]))


def _deep_cloned(
    children: Children, cache: weakref.WeakValueDictionary[Any, nn.Module]
) -> Children:
    """Children without the modules that are bound, which linen's deep clone would miss in here."""
    if all(module.scope is None for module in children.modules()):
        return children

    def clone(module: nn.Module) -> nn.Module:
        known = cache.get(module._id)
        if known is None:  # the cache is weak, so hold on to what goes in
            known = cache[module._id] = module.clone(_deep_clone=cache)
        return known

    return children.with_modules(clone)


def only_child(asked: str, f: Any) -> Children:
    """The one child of a combinator that takes one."""
    children = Children.of(f)
    if len(children) != 1:
        raise _errors.not_one_child(asked, len(children))
    return children


@functools.cache
def _snake_case(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
