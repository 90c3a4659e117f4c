"""``Combinator``: a pipeline as a value that is a linen module.

A combinator holds its children and reads as an expression. Bound to a scope by linen, it binds its
layers by the laws in ``binding.py``; called, it runs as ``run.py`` says.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from flax import linen as nn
from flax.errors import SetAttributeFrozenModuleError

from flax_extra.combinator._core import errors, linen
from flax_extra.combinator._core.binding import (
    UNBOUND,
    Binding,
    bind_as_scope,
    bind_in_host,
    name_layers,
    take_back_layers,
)
from flax_extra.combinator._core.children import NO_CHILDREN, Child, Children, Pipeline
from flax_extra.combinator._core.expression import (
    Argument,
    format_expression,
    format_repr,
    list_fields,
)
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Flow, Placeholder, Steps, run_pipeline
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._core.tracebacks import api_boundary

C = TypeVar("C", bound="Combinator")

OPERATORS: dict[str, Callable[[Any, Any], Combinator]] = {}
"""What the operators build. The files that define those combinators fill it in."""

if TYPE_CHECKING:

    class ChildrenField:
        """The type of the field ``children``: it takes any callables, and gives ``Children``."""

        def __get__(self, instance: object, owner: object = None) -> Children: ...
        def __set__(
            self, instance: object, value: Children | Callable[..., Any] | Iterable[Any]
        ) -> None: ...


class _ConstructorSignature:
    """The signature of a constructor as users see it: without the field for bound layers."""

    nowrap = True

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            return inspect.signature(instance.__call__)
        constructor = inspect.signature(owner.__init__)  # type: ignore[misc]
        parameters = [p for p in constructor.parameters.values() if p.name not in HIDDEN]
        return constructor.replace(parameters=parameters)


HIDDEN = ("self", "_bound")


class Combinator(linen.Container):
    """A pipeline: callables, and how they meet the stack.

    Calling it with the items of a stack gives the items that it leaves there. It is a linen module:
    it can be initialised, applied and bound, and used as a field, in ``setup`` or in a compact
    method. A pipeline of plain functions can simply be called. A combinator is also a sequence of
    its children, immutable and hashable.

    A subclass defines :meth:`expand`, which says what it means in terms of other combinators. It
    keeps its own name in errors, summaries and pictures.

    Args:
        children: callables or (nested) iterables of callables.
        name: gives the combinator a scope of that name in the parameter tree. Without a name, a
            structural combinator adds no level to the tree.

    Raises:
        TypeError: If a child is not callable, or no child takes a context keyword.
        SignatureError: If the signature of a child cannot be inferred, or does not fit.
        SharingError: If one layer is used both in a ``repeat`` and outside of it.
        ValueError: If two layers of one scope have the same name.

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

    if TYPE_CHECKING:
        children: ChildrenField = ChildrenField()
    else:
        children: Children = NO_CHILDREN

    __signature__ = _ConstructorSignature()

    _is_combinator: ClassVar[bool] = True
    _is_lifted: ClassVar[bool] = False
    _is_visible: ClassVar[bool] = True
    __array_ufunc__: ClassVar[None] = None  # numpy then leaves the operators to us

    def __init_subclass__(cls, **options: Any) -> None:
        # Linen must not run setup for members that only read the expression.
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
    def expand(self, *children: Any, **options: Any) -> Combinator:
        """Writes this combinator with others; each child stands where it belongs.

        A subclass gives it one parameter for each child, such as ``expand(self, norm, *body)``. It
        is called with the children alone, when the combinator is built.

        Example:
            >>> from flax_extra import combinator as cb
            >>> print(cb.dip(abs).expand(abs))
            parallel(identity(), abs)
        """
        raise errors.no_expansion(type(self).__name__)

    @functools.cached_property
    def signature(self) -> Signature:
        """How many items it takes off the stack and puts there.

        Example:
            >>> from flax_extra import combinator as cb
            >>> cb.swap().signature.n_out
            2
        """
        if self._expansion is None:
            raise errors.no_expansion(type(self).__name__)
        return self._expansion.signature

    @nn.nowrap
    def _run(self, stack: Stack, steps: Steps) -> Flow | Stack:
        """Runs a primitive combinator, one that does not ``expand``: returns the stack after it.

        A combinator that runs children is a generator: see :data:`~run.Flow`.
        """
        raise errors.no_expansion(type(self).__name__)

    @static_property
    def _advice(self) -> str:
        """What to do if a step of its expansion fails. Empty if there is nothing to say."""
        return ""

    @static_property
    def _stacks_parameters(self) -> bool:
        """Whether its child has one set of parameters for each copy, stacked on a new axis."""
        return False

    # What follows from it

    @functools.cached_property
    def _expansion(self) -> Combinator | None:
        """The combinators that a derived one is written with; None for a primitive."""
        if type(self).expand is Combinator.expand:
            return None
        placeholders = [
            Placeholder(self, index, child) for index, child in enumerate(self.children)
        ]
        expansion = self.expand(*placeholders)
        for module in expansion.children.modules():
            raise errors.foreign_module(type(self).__name__, type(module).__name__)
        return expansion

    @functools.cached_property
    def keywords(self) -> frozenset[str]:
        """The context keywords that some descendant takes.

        Example:
            >>> from flax import linen as nn
            >>> from flax_extra import combinator as cb
            >>> sorted(cb.serial(nn.Dense(4), nn.Dropout(0.1)).keywords)
            ['deterministic', 'rng']
        """
        return frozenset().union(*(child.call_spec.keywords for child in self.children))

    @functools.cached_property
    def _required_keywords(self) -> frozenset[str]:
        """The context keywords that a call must give."""
        return frozenset().union(*(child.call_spec.required for child in self.children))

    @static_property
    def _label(self) -> str:
        """Its name in paths and pictures: its own, or that of its kind."""
        return self._kind if self.name is None or linen.has_numbered_name(self) else self.name

    @static_property
    def _kind(self) -> str:
        """The name of the function that builds it: ``serial`` for ``Serial``."""
        return _to_snake_case(type(self).__name__)

    @static_property
    def _has_own_scope(self) -> bool:
        """Whether it has a level of its own in the parameter tree."""
        return self._is_layer or (self.scope is not None and self._host is None)

    @static_property
    def _is_layer(self) -> bool:
        """Whether it is called as layers are: it is lifted or named, or has a call of its own."""
        has_call = type(self).__call__ is not Combinator.__call__
        return self._is_lifted or self.name is not None or has_call

    # A linen module

    _host: ClassVar[nn.Module | None] = None
    """The module in whose method it was made, if it has no scope of its own there."""

    _is_built: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self._is_built:  # linen calls it again when the combinator gets a scope
            given: object = self.children
            if not isinstance(given, Children):
                self.children = Children.of(given)
            self._check()
            object.__setattr__(self, "_is_built", True)
        parent: Any = self.parent
        if linen.is_unspecified_parent(parent):
            parent = linen.get_running_module()
        if isinstance(parent, nn.Module):
            if self._is_layer or linen.is_in_setup(parent):
                take_back_layers(self.children, parent)
            else:
                # It stands in the parent's scope, as if its layers had been called one by one.
                object.__setattr__(self, "_host", parent)
                object.__setattr__(self, "parent", parent.scope)
        super().__post_init__()

    @nn.nowrap
    def _check(self) -> None:
        """Raises an error for everything that can be known to be wrong before a call."""
        _ = self._expansion

    @nn.nowrap
    def _bind_children(self) -> None:
        if self._bound is None and self._binds_with_scope:
            self._bind()

    @static_property
    def _binds_with_scope(self) -> bool:
        """Whether the layers are bound as soon as there is a scope, or later, when it runs."""
        if self._host is not None:
            return linen.is_initialized(self)
        if not self._stacks_parameters or linen.is_in_transform(self):
            return True
        # The layers of a repeat belong to it alone, and are bound in the loop, where it runs: linen
        # would have to carry each one into it. Layers made in a method are carried: they are
        # bound themselves, not a copy of them, and only once.
        return any(module.parent is not None for module in self.children.modules())

    @static_property
    def _binding(self) -> Binding:
        """Its bound layers. It binds those of a repeat now, if they are not bound yet."""
        if self._bound is None and self._stacks_parameters and self.scope is not None:
            self._bind()
        return self._bound or UNBOUND

    def __getattr__(self, name: str) -> Any:
        if self._stacks_parameters and any(name == n for n, _ in name_layers(self.children)):
            _ = self._binding
        return super().__getattr__(name)

    @nn.nowrap
    def _bind(self) -> None:
        host = self._host
        binding = (
            bind_as_scope(self, self.children)
            if host is None
            else bind_in_host(self.children, host)
        )
        object.__setattr__(self, "_bound", binding)

    @nn.nowrap
    def _clone_children(self, clone: Callable[[nn.Module], nn.Module]) -> Children | None:
        if all(module.scope is None for module in self.children.modules()):
            return None
        return self.children.replace_modules(clone)

    @nn.nowrap
    def __getstate__(self) -> dict[str, Any]:
        # Properties that were computed from the fields are computed again after unpickling.
        computed = ("_expansion", "signature", "keywords", "_required_keywords")
        return {name: value for name, value in vars(self).items() if name not in computed}

    @nn.nowrap
    @api_boundary
    def __call__(self, *inputs: Any, **context: Any) -> Any:
        """Runs the pipeline on a stack.

        Args:
            inputs: the items of the stack, top first. The pipeline takes ``n_in`` of them; the
                others pass through.
            context: keywords for every descendant that takes a parameter of that name which is no
                input.

        Returns:
            The items left on the stack: ``()`` for none, the item itself for one, else a tuple.

        Raises:
            SignatureError: If inputs are missing, or a child gives another number of items than it
                declares.
            TypeError: If no descendant takes a context keyword, or one that a descendant needs is
                missing.
        """
        if self._host is not None:
            if self._bound is None:  # not before it is called: it may be for another scope
                self._bind()
        elif self.scope is not None:
            return self._call_bound(*inputs, **context)
        return run_pipeline(self, self._bound or UNBOUND, inputs, context)

    def _call_bound(self, *inputs: Any, **context: Any) -> Any:
        return run_pipeline(self, self._bound or UNBOUND, inputs, context)

    _call_bound.__name__ = "__call__"  # the name under which linen captures and tabulates it

    # A sequence of its children

    @static_property
    def _parts(self) -> Children:
        """The children that it is a sequence of."""
        return self.children

    @nn.nowrap
    def _replace_parts(self, parts: Children) -> Children:
        """Returns its children with other parts."""
        return parts

    @nn.nowrap
    def _name_child(self, index: int) -> str:
        """Names the place of a child, for paths."""
        return f"{self._label}[{index}]"

    @nn.nowrap
    def __len__(self) -> int:
        return len(self._parts)

    @nn.nowrap
    def __bool__(self) -> bool:
        return True  # also without children: `p or default` means p

    @nn.nowrap
    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Callable[..., Any]: ...

    @overload
    def __getitem__(self: C, index: slice) -> C: ...

    @nn.nowrap
    def __getitem__(self, index: int | slice) -> Any:
        """Returns a child, or a combinator of the same kind with some of the children.

        Those of a bound pipeline are bound.
        """
        if isinstance(index, slice):
            parts = Children(self._parts.items[index])
            if parts.items == self._parts.items:
                return self
            return self._view(self, self._replace_parts(parts))
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise errors.index_out_of_range(self._label, position, len(self))
        return self._get_part(self._parts[position])

    @nn.nowrap
    def _get_part(self, child: Child) -> Any:
        """Returns a child as users see it: bound, if this is bound."""
        if child.inlined is not None:
            return self._view(child.inlined, child.inlined.children)
        if child.module is None:
            return child.target
        return child.bind(self._binding.find(child.module))

    @nn.nowrap
    def _view(self, pipeline: Pipeline, children: Children) -> Any:
        """Returns a part of this with those children: bound, if this is bound."""
        if self.scope is not None and self._host is None:
            # With the bound layers in it, which keep their names when it is unbound.
            bound = children.replace_modules(self._binding.find)
            return pipeline.clone(children=bound, name=None, parent=self.scope)
        if children is pipeline.children:
            return pipeline
        return pipeline.clone(children=children, name=None)

    @nn.nowrap
    def _bind_parts(self, kind: type[Combinator]) -> Children:
        """Returns the children, bound, if this is a combinator of a kind; else this as a child."""
        bound = self.children.replace_modules(self._binding.find)
        return bound if type(self) is kind else Children.of(self.clone(children=bound, name=None))

    # Operators

    @nn.nowrap
    def __rshift__(self, other: Any) -> Combinator:
        """Puts two callables in series: ``f >> g`` is ``serial(f, g)``.

        One side must be a combinator: Python asks the operands what ``>>`` means, and a linen
        module does not know. ``a >> b >> c`` is ``(a >> b) >> c``, so ``a`` or ``b`` must be one.
        Wrap a layer with :func:`fn` or :func:`serial` to start: ``cb.serial(nn.Dense(4)) >> ...``.
        """
        return OPERATORS[">>"](self, other)

    @nn.nowrap
    def __rrshift__(self, other: Any) -> Combinator:
        return OPERATORS[">>"](other, self)

    @nn.nowrap
    def __matmul__(self, other: Any) -> Combinator:
        """Puts two callables side by side: ``f @ g`` is ``parallel(f, g)``. See ``>>``."""
        return OPERATORS["@"](self, other)

    @nn.nowrap
    def __rmatmul__(self, other: Any) -> Combinator:
        return OPERATORS["@"](other, self)

    @nn.nowrap
    def __and__(self, other: Any) -> Combinator:
        """Runs two callables on the same items: ``f & g`` is ``branch(f, g)``. See ``>>``."""
        return OPERATORS["&"](self, other)

    @nn.nowrap
    def __rand__(self, other: Any) -> Combinator:
        return OPERATORS["&"](other, self)

    # As text

    @static_property
    def _arguments(self) -> list[Argument]:
        """The arguments of the expression that builds it."""
        return [*(("", child.target) for child in self.children), *list_fields(self)]

    def __repr__(self) -> str:
        return format_repr(self)

    @nn.nowrap
    def __str__(self) -> str:
        return format_expression(self)


def join_operands(kind: type[C], left: Any, right: Any) -> C:
    """Builds what an operator means. It takes the children of an operand of the same kind."""
    scope = _get_common_scope(left, right)
    if scope is not None:
        parts = [part._bind_parts(kind) for part in (left, right)]
        return kind(parts[0].concatenate(parts[1]), parent=scope)
    parts = [
        part.children if type(part) is kind and not part._has_own_scope else Children.of(part)
        for part in (left, right)
    ]
    return kind(parts[0].concatenate(parts[1]))


def _get_common_scope(*operands: Any) -> Any:
    """Returns the scope of pipelines that are parts of one bound pipeline, if they are."""
    if not all(isinstance(f, Combinator) and f._host is None for f in operands):
        return None
    scopes = {id(f.scope): f.scope for f in operands}
    return next(iter(scopes.values())) if len(scopes) == 1 else None


@functools.cache
def _to_snake_case(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
