"""The children of a combinator: what a callable becomes when it is an argument.

Linen opens the tuples, lists and dicts in a module's fields and names the modules inside by
position (``layers_3``). ``Children`` is a type of its own, which linen leaves closed, so that names
can follow the algebra instead: see ``binding.py``.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, TypeGuard

import jax
from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.arrays import is_array
from flax_extra.combinator._core.context import ContextKeyword
from flax_extra.combinator._core.describe import describe_item, shorten
from flax_extra.combinator._core.hints import is_nnx_module
from flax_extra.combinator._core.inference import NOTHING_FIXED, CallSpec, infer_call_spec
from flax_extra.combinator._core.naming import Named, get_name, is_combinator
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Stack


class Pipeline(Named, Protocol):
    """What the files of this folder need to know of a combinator, which is defined last."""

    children: Children
    name: str | None
    _is_visible: ClassVar[bool]

    @property
    def keywords(self) -> frozenset[str]: ...
    @property
    def _required_keywords(self) -> frozenset[str]: ...
    @property
    def _kind(self) -> str: ...
    @property
    def _expansion(self) -> Pipeline | None: ...
    @property
    def _has_own_scope(self) -> bool: ...
    @property
    def _stacks_parameters(self) -> bool: ...
    @property
    def _advice(self) -> str: ...
    @property
    def _arguments(self) -> list[tuple[str, Any]]: ...
    @property
    def _binding(self) -> Any: ...
    def _name_child(self, index: int) -> str: ...
    def _run(self, stack: Stack, steps: Any) -> Any: ...
    def clone(self, **updates: Any) -> Any: ...
    def __call__(self, *inputs: Any, **context: Any) -> Any: ...


def is_pipeline(f: object) -> TypeGuard[Pipeline]:
    """Whether ``f`` is a combinator."""
    return is_combinator(f)


@dataclasses.dataclass(frozen=True, eq=False)
class Child:
    """A callable and how it meets the stack.

    Args:
        target: the callable.
        call_spec: how it is called.
        fixed: keywords that are bound to a value.
    """

    target: Callable[..., Any]
    call_spec: CallSpec
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        return self.call_spec.signature

    @functools.cached_property
    def pipeline(self) -> Pipeline | None:
        """The target, if it is a combinator."""
        return self.target if is_pipeline(self.target) else None

    @property
    def inlined(self) -> Pipeline | None:
        """The target, if it is a combinator that adds no level to the parameter tree."""
        pipeline = self.pipeline
        return None if pipeline is None or pipeline._has_own_scope else pipeline

    @functools.cached_property
    def module(self) -> nn.Module | None:
        """The linen module whose variables it uses, if any: itself, or the owner of a method."""
        f: Any = self.target
        while isinstance(f, functools.partial):
            f = f.func
        if isinstance(f, types.MethodType):
            f = f.__self__
        return f if isinstance(f, nn.Module) else None

    def bind(self, module: nn.Module | None) -> Callable[..., Any]:
        """Returns the callable with its module replaced, by one that is bound to variables."""
        return self.target if module is self.module else _replace_module(self.target, module)

    def _get_key(self) -> tuple[Any, ...]:
        target = self.target
        if isinstance(target, types.MethodType):  # methods compare their owner by identity
            return (target.__func__, target.__self__, self.signature)
        return (target, self.signature)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Child):
            return NotImplemented
        return self._get_key() == other._get_key() and _is_same_fixed(self.fixed, other.fixed)

    def __hash__(self) -> int:
        return hash((self._get_key(), tuple(sorted(self.fixed))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Child:
        # Functions are not copied: a copy of one that jax wraps would not equal it.
        target = self.target if self.module is None else copy.deepcopy(self.target, memo)
        fixed = copy.deepcopy(self.fixed, memo)
        return dataclasses.replace(self, target=target, fixed=fixed)


class Shortcut(Child):
    """The child of a residual whose output is added to that of the body."""


def _replace_module(f: Any, module: nn.Module | None) -> Callable[..., Any]:
    if isinstance(f, functools.partial):
        return functools.partial(_replace_module(f.func, module), *f.args, **f.keywords)
    if isinstance(f, types.MethodType):
        method: Callable[..., Any] = getattr(module, f.__func__.__name__)
        return method
    return module  # type: ignore[return-value]  # f is a module, and modules here are callable


def _is_same_fixed(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] or _is_equal(a[k], b[k]) for k in a)


def _is_equal(a: object, b: object) -> bool:
    try:
        hash(a)
        return bool(a == b)
    except Exception:  # arrays are equal only if they are the same one
        return False


_is_comparing: contextvars.ContextVar[bool] = contextvars.ContextVar("is_comparing", default=False)


class Children:
    """An immutable sequence of children.

    Two are equal if their callables are, and if the same modules among them are one instance:
    ``serial(d, d)`` has one set of parameters, ``serial(d, copy_of_d)`` has two.
    """

    __slots__ = ("_in_copies", "_named", "checked_context", "items")

    def __init__(self, items: Iterable[Child] = ()) -> None:
        self.items: tuple[Child, ...] = tuple(items)
        self._in_copies: frozenset[int] = frozenset().union(*map(_find_in_copies, self.items))
        self._named: dict[str, nn.Module] = {}
        self.checked_context: set[str] = set()  # keywords whose doubts were told
        for child in self.items:
            self._add_names(_find_named(child))
        if self._in_copies:
            _check_sharing(self)

    @classmethod
    def of(cls, arguments: object) -> Children:
        """Makes children of callables and (nested) iterables of callables."""
        return cls(map(make_child, flatten_arguments(arguments)))

    def concatenate(self, other: Children) -> Children:
        """Returns these and then the others. It does not look again into what each holds."""
        both = Children.__new__(Children)
        both.items = self.items + other.items
        both._in_copies = self._in_copies | other._in_copies
        both._named = dict(self._named)
        both.checked_context = set()
        both._add_names(other._named)
        is_apart = self._in_copies.isdisjoint(other._in_copies)
        if not is_apart or self._uses(other._in_copies) or other._uses(self._in_copies):
            _check_sharing(both)
        return both

    def _uses(self, ids: frozenset[int]) -> bool:
        return bool(ids) and any(id(module) in ids for module, _ in _walk_modules(self, None))

    def _add_names(self, named: Mapping[str, nn.Module]) -> None:
        """Adds layers with names of their own. One scope cannot hold two of the same name."""
        for name, module in named.items():
            other = self._named.setdefault(name, module)
            if other is not module and not any(map(self.is_named_elsewhere, (other, module))):
                raise errors.name_taken(name, get_name(other), get_name(module))

    def is_named_elsewhere(self, module: nn.Module) -> bool:
        """Whether a module gets its place in the parameter tree from a scope that uses it first."""
        for part in self.modules():
            if part is module:
                return False
            if is_pipeline(part) and any(
                m is module for m, _ in _walk_modules(part.children, None)
            ):
                return True
        return False

    @property
    def in_copies(self) -> frozenset[int]:
        """The ids of the modules, at any depth, that have a set of parameters for each copy."""
        return self._in_copies

    @property
    def named(self) -> Mapping[str, nn.Module]:
        """The layers of the enclosing scope whose names the user gave."""
        return self._named

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Child]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Child:
        return self.items[index]

    def __treescope_repr__(self, path: str | None, subtree_renderer: Callable[..., Any]) -> Any:
        """Shows the callables as a list, for treescope, which displays modules of linen."""
        return subtree_renderer([child.target for child in self.items], path=None)

    def modules(self) -> Iterator[nn.Module]:
        """The linen modules that the enclosing scope names, in the order of the expression."""
        for child in self.items:
            inlined = child.inlined
            if inlined is not None:
                yield from inlined.children.modules()
            elif child.module is not None:
                yield child.module

    def replace_modules(self, replace: Callable[[nn.Module], nn.Module]) -> Children:
        """Returns the same children with each of :meth:`modules` replaced."""
        return Children(_replace_modules(child, replace) for child in self.items)

    def _number_modules(self) -> tuple[int, ...]:
        """Numbers the modules at any depth: one instance has one number."""
        first: dict[int, int] = {}
        every = (module for module, _ in _walk_modules(self, None))
        return tuple(first.setdefault(id(module), len(first)) for module in every)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Children):
            return NotImplemented
        if self is other:
            return True
        if _is_comparing.get():  # the outermost children compare which modules are shared
            return self.items == other.items
        token = _is_comparing.set(True)
        try:
            return self.items == other.items and self._number_modules() == other._number_modules()
        finally:
            _is_comparing.reset(token)

    def __hash__(self) -> int:
        return hash(self.items)

    def __repr__(self) -> str:
        return f"Children({', '.join(repr(child.target) for child in self.items)})"

    def __reduce__(self) -> tuple[type[Children], tuple[tuple[Child, ...]]]:
        return Children, (self.items,)


def make_child(argument: object, **declared: Any) -> Child:
    """Makes a child of an argument of a combinator, with what the user declares of it."""
    if isinstance(argument, Child):
        return argument
    if not callable(argument):
        text = describe_item(argument) if is_array(argument) else shorten(repr(argument))
        raise errors.not_callable(text, type(argument).__name__)
    if isinstance(argument, type) and issubclass(argument, nn.Module):
        raise errors.module_class(argument.__name__)
    if is_nnx_module(argument):
        raise errors.nnx_module(type(argument).__name__)
    fixed = declared.get("fixed", NOTHING_FIXED)
    if not is_pipeline(argument):
        return Child(argument, infer_call_spec(argument, **declared), fixed)
    _check_fixed(argument, fixed)
    plain = infer_call_spec(argument, **{k: v for k, v in declared.items() if k != "fixed"})
    spec = dataclasses.replace(
        plain,
        optional=(argument.keywords - argument._required_keywords).difference(fixed),
        required=argument._required_keywords.difference(fixed),
    )
    return Child(argument, spec.bind_context(fixed), fixed)


def _check_fixed(pipeline: Pipeline, fixed: Mapping[str, Any]) -> None:
    """Raises an error if a value cannot be bound for all parts of a pipeline that take it."""
    for name in fixed:
        inputs = [
            get_name(leaf.target)
            for _, leaf in walk_leaves(pipeline)
            if name in leaf.call_spec.parameters
        ]
        if inputs:
            raise errors.fixed_is_input(name, pipeline._label, list(dict.fromkeys(inputs)))
        if name not in pipeline.keywords:
            raise errors.unknown_fixed(pipeline._label, name, pipeline.keywords)


def walk_leaves(
    pipeline: Pipeline, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Child]]:
    """Yields the children at any depth that are no combinators, with their paths."""
    for index, child in enumerate(pipeline.children):
        inner = (*path, pipeline._name_child(index)) if pipeline._is_visible else path
        if child.pipeline is None:
            yield (*inner, get_name(child.target)), child
        else:
            yield from walk_leaves(child.pipeline, inner)


def find_takers(
    pipeline: Pipeline, name: str, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Child]]:
    """Yields the leaves that a context keyword reaches, with their paths."""
    for index, child in enumerate(pipeline.children):
        if name not in child.call_spec.keywords:
            continue
        inner = (*path, pipeline._name_child(index)) if pipeline._is_visible else path
        if child.pipeline is None:
            yield (*inner, get_name(child.target)), child
            continue
        # Fixed values of a combinator hide a keyword from its parts, or rename it for them.
        names = [
            k for k, v in child.fixed.items() if isinstance(v, ContextKeyword) and v.name == name
        ]
        for inner_name in names if name in child.fixed else [name, *names]:
            yield from find_takers(child.pipeline, inner_name, inner)


def flatten_arguments(argument: object) -> Iterator[object]:
    """Yields the callables in an argument. An iterable only groups; a callable is not opened."""
    if isinstance(argument, Children):
        yield from argument.items
    elif callable(argument) or isinstance(argument, str | bytes | Child) or is_array(argument):
        yield argument
    elif isinstance(argument, Iterable):
        try:
            parts = list(argument)
        except Exception:  # an object that fails to iterate is no group of callables
            yield argument
            return
        for part in parts:
            yield from flatten_arguments(part) if part is not argument else (part,)
    else:
        yield argument


def make_only_child(asked: str, f: Any) -> Children:
    """Makes the one child of a combinator that takes one."""
    children = Children.of(f)
    check_only_child(asked, children)
    return children


def check_only_child(asked: str, children: Children) -> None:
    """Raises an error if a combinator that takes one child has another number of them."""
    if len(children) != 1:
        raise errors.not_one_child(asked, len(children))


def _find_in_copies(child: Child) -> frozenset[int]:
    pipeline = child.pipeline
    if pipeline is None:
        return frozenset()
    if pipeline._stacks_parameters:
        return frozenset(id(module) for module, _ in _walk_modules(pipeline.children, None))
    return pipeline.children.in_copies


RESERVED_NAME = "params"
"""A name that linen's ``apply`` refuses, because it looks like a collection in a collection."""


def _find_named(child: Child) -> Mapping[str, nn.Module]:
    if child.inlined is not None:
        return child.inlined.children.named
    module = child.module
    # A module with a parent has its place already, or gets it from a method that runs.
    if module is None or module.name is None or module.parent is not None:
        return {}
    if not isinstance(module.name, str):
        raise errors.not_a_name(get_name(module), repr(module.name))
    if module.name == RESERVED_NAME:
        raise errors.reserved_name(get_name(module), module.name)
    return {module.name: module}


def walk_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a module, and all modules in it, if it is a pipeline."""
    yield module
    if is_pipeline(module):
        yield from (part for part, _ in _walk_modules(module.children, None))


def _walk_modules(
    children: Children, copies: Pipeline | None
) -> Iterator[tuple[nn.Module, Pipeline | None]]:
    """Yields each module, in scopes too, and the innermost combinator that stacks parameters."""
    opened: set[int] = set()
    for module in children.modules():
        for part in _walk_fields(module):
            yield part, copies
            if is_pipeline(part) and id(part) not in opened:
                opened.add(id(part))
                inner = part if part._stacks_parameters else copies
                yield from _walk_modules(part.children, inner)


def _walk_fields(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a module and those in its fields, which linen lifts together with it."""
    yield module
    if is_pipeline(module):
        return
    values = [getattr(module, f.name) for f in dataclasses.fields(module) if f.name != "parent"]
    for leaf in jax.tree_util.tree_leaves(values):
        if isinstance(leaf, nn.Module):
            yield from _walk_fields(leaf)


def _check_sharing(children: Children) -> None:
    """Raises an error if one instance is used both in a ``repeat`` and outside of it."""
    owners: dict[int, Pipeline | None] = {}
    for module, copies in _walk_modules(children, None):
        owner = owners.setdefault(id(module), copies)
        if owner is not copies:
            raise errors.shared_across_copies(get_name(module), (copies or owner)._label)  # type: ignore[union-attr]


def _replace_modules(child: Child, replace: Callable[[nn.Module], nn.Module]) -> Child:
    inlined = child.inlined
    if inlined is not None:
        target: Any = inlined.clone(children=inlined.children.replace_modules(replace))
        return dataclasses.replace(child, target=target)
    if child.module is None:
        return child
    return dataclasses.replace(child, target=child.bind(replace(child.module)))


NO_CHILDREN = Children()
