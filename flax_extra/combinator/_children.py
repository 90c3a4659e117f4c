"""The children of a combinator: what a callable becomes when it is an argument.

Linen opens the tuples, lists and dicts it finds in a module's fields and names the modules inside
by position (``layers_3``). ``Children`` is a type of its own, which linen leaves closed, so that
names can follow the algebra instead: see ``_binding.py``.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn

from flax_extra.combinator import _errors
from flax_extra.combinator._inference import (
    NO_FIXED,
    Contract,
    contract,
    is_combinator,
    name_of,
    shorten,
)
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._stack import describe_item

if TYPE_CHECKING:
    from flax_extra.combinator._base import Combinator


@dataclasses.dataclass(frozen=True, eq=False)
class Child:
    """A callable and how it meets the stack."""

    target: Callable[..., Any]
    contract: Contract
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        return self.contract.signature

    @property
    def structure(self) -> Combinator | None:
        """The combinator that this is, where its children are named by the scope outside."""
        combinator = self.combinator
        return None if combinator is None or combinator.opens_scope else combinator

    @functools.cached_property
    def combinator(self) -> Combinator | None:
        """The target, if it is a combinator."""
        return self.target if is_combinator(self.target) else None

    @functools.cached_property
    def module(self) -> nn.Module | None:
        """The linen module whose variables it uses, if any: itself, or a method's owner."""
        f: Any = self.target
        while isinstance(f, functools.partial):
            f = f.func
        if isinstance(f, types.MethodType):
            f = f.__self__
        return f if isinstance(f, nn.Module) else None

    def on(self, module: nn.Module | None) -> Callable[..., Any]:
        """The callable, with the module it uses replaced by one that is bound to variables."""
        return self.target if module is self.module else _transplant(self.target, module)

    def _key(self) -> tuple[Any, ...]:
        target = self.target
        if isinstance(target, types.MethodType):  # methods compare their owner by identity
            return (target.__func__, target.__self__, self.signature)
        return (target, self.signature)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Child):
            return NotImplemented
        return self._key() == other._key() and _same_fixed(self.fixed, other.fixed)

    def __hash__(self) -> int:
        return hash((self._key(), tuple(sorted(self.fixed))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Child:
        # Functions are what they are; some that jax wraps would not equal their copy.
        target = self.target if self.module is None else copy.deepcopy(self.target, memo)
        return Child(target, self.contract, copy.deepcopy(self.fixed, memo))


def _transplant(f: Any, module: nn.Module | None) -> Callable[..., Any]:
    if isinstance(f, functools.partial):
        return functools.partial(_transplant(f.func, module), *f.args, **f.keywords)
    if isinstance(f, types.MethodType):
        moved: Callable[..., Any] = getattr(module, f.__func__.__name__)
        return moved
    return module  # type: ignore[return-value]  # a module is callable, and f is one


def _same_fixed(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] or _hashable_equal(a[k], b[k]) for k in a)


def _hashable_equal(a: object, b: object) -> bool:
    try:
        hash(a)
        return bool(a == b)
    except Exception:  # arrays: equal only if they are the same one
        return False


_comparing: contextvars.ContextVar[bool] = contextvars.ContextVar("comparing", default=False)


class Children:
    """An immutable sequence of children.

    Two are equal when their callables are, and when the same modules among them are one instance:
    ``serial(d, d)`` has one set of parameters, ``serial(d, copy_of_d)`` two.
    """

    __slots__ = ("_stacked", "items")

    def __init__(self, items: Iterable[Child] = ()) -> None:
        self.items: tuple[Child, ...] = tuple(items)
        self._stacked: frozenset[int] = frozenset().union(*map(_stacked, self.items))
        if self._stacked:
            _check_sharing(self)

    @classmethod
    def of(cls, arguments: object) -> Children:
        """Children from callables and (nested) iterables of callables."""
        return cls(map(child_of, flatten_arguments(arguments)))

    def joined(self, other: Children) -> Children:
        """These and then the others, without looking again into what each holds."""
        joined = Children.__new__(Children)
        joined.items = self.items + other.items
        joined._stacked = self._stacked | other._stacked
        if self._meets(other) or other._meets(self) or not self._stacked.isdisjoint(other._stacked):
            _check_sharing(joined)
        return joined

    def _meets(self, other: Children) -> bool:
        within = other._stacked
        return bool(within) and any(id(m) in within for m, _ in _scoped_modules(self, None))

    @property
    def stacked(self) -> frozenset[int]:
        """The identities of the modules that lie inside a stack of parameters, at any depth."""
        return self._stacked

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Child]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Child:
        return self.items[index]

    def modules(self) -> Iterator[nn.Module]:
        """The linen modules named by the enclosing scope, in the order of the expression."""
        for child in self.items:
            structure = child.structure
            if structure is not None:
                yield from structure.children.modules()
            elif child.module is not None:
                yield child.module

    def with_modules(self, replace: Callable[[nn.Module], nn.Module]) -> Children:
        """The same children, each module among them replaced."""
        return Children(_with_modules(child, replace) for child in self.items)

    def _sharing(self) -> tuple[int, ...]:
        first: dict[int, int] = {}
        every = (module for module, _ in _scoped_modules(self, None))
        return tuple(first.setdefault(id(module), len(first)) for module in every)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Children):
            return NotImplemented
        if self is other:
            return True
        if _comparing.get():  # parts of what is compared, whose sharing it knows
            return self.items == other.items
        token = _comparing.set(True)
        try:
            return self.items == other.items and self._sharing() == other._sharing()
        finally:
            _comparing.reset(token)

    def __hash__(self) -> int:
        return hash(self.items)

    def __repr__(self) -> str:
        return f"Children({', '.join(repr(child.target) for child in self.items)})"

    def __reduce__(self) -> tuple[type[Children], tuple[tuple[Child, ...]]]:
        return Children, (self.items,)


def child_of(argument: object, **declared: Any) -> Child:
    """What a callable becomes when it is an argument of a combinator."""
    if isinstance(argument, Child):
        return argument
    if not callable(argument):
        text = describe_item(argument) if _is_array(argument) else shorten(repr(argument))
        raise _errors.not_callable(text, type(argument).__name__)
    if isinstance(argument, type) and issubclass(argument, nn.Module):
        raise _errors.module_class(argument.__name__)
    fixed = declared.get("fixed", NO_FIXED)
    if not is_combinator(argument):
        return Child(argument, contract(argument, **declared), fixed)
    for name in fixed:
        if name not in argument.keywords:
            raise _errors.unknown_fixed(argument.label, name, argument.keywords)
    plain = contract(argument, **{k: v for k, v in declared.items() if k != "fixed"})
    keywords = argument.keywords.difference(fixed)
    return Child(argument, dataclasses.replace(plain, keywords=keywords), fixed)


def flatten_arguments(argument: object) -> Iterator[object]:
    """The callables in an argument: an iterable only groups. What is callable is not opened."""
    if isinstance(argument, Children):
        yield from argument.items
    elif callable(argument) or isinstance(argument, str | bytes | Child) or _is_array(argument):
        yield argument
    elif isinstance(argument, Iterable):
        try:
            parts = list(argument)
        except Exception:  # an object whose iterator fails is no group of callables
            yield argument
            return
        for part in parts:
            yield from flatten_arguments(part) if part is not argument else (part,)
    else:
        yield argument


def _is_array(argument: object) -> bool:
    return hasattr(argument, "shape") and hasattr(argument, "dtype")


def _stacked(child: Child) -> frozenset[int]:
    combinator = child.combinator
    if combinator is None:
        return frozenset()
    if combinator.stacks:
        return frozenset(id(module) for module, _ in _scoped_modules(combinator.children, None))
    return combinator.children.stacked


def _scoped_modules(
    children: Children, stack: Combinator | None
) -> Iterator[tuple[nn.Module, Combinator | None]]:
    """Every module, inside scopes too, with the innermost combinator that stacks its parameters."""
    opened: set[int] = set()
    for module in children.modules():
        for part in _with_fields(module):
            yield part, stack
            if is_combinator(part) and id(part) not in opened:
                opened.add(id(part))
                yield from _scoped_modules(part.children, part if part.stacks else stack)


def _with_fields(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and those in its fields, which linen lifts together with it."""
    yield module
    if is_combinator(module):
        return
    values = [getattr(module, f.name) for f in dataclasses.fields(module) if f.name != "parent"]
    for leaf in jax.tree_util.tree_leaves(values):
        if isinstance(leaf, nn.Module):
            yield from _with_fields(leaf)


def _check_sharing(children: Children) -> None:
    """Refuses an instance whose uses lie on two sides of a stack of parameters."""
    owners: dict[int, Combinator | None] = {}
    for module, stack in _scoped_modules(children, None):
        owner = owners.setdefault(id(module), stack)
        if owner is not stack:
            raise _errors.shared_across_stack(name_of(module), (stack or owner).label)  # type: ignore[union-attr]


def _with_modules(child: Child, replace: Callable[[nn.Module], nn.Module]) -> Child:
    structure = child.structure
    if structure is not None:
        target: Any = structure.clone(children=structure.children.with_modules(replace))
        return dataclasses.replace(child, target=target)
    if child.module is None:
        return child
    return dataclasses.replace(child, target=child.on(replace(child.module)))


NO_CHILDREN = Children()
