"""How a callable meets the stack, read from the callable itself.

``infer_signature`` looks at ``f.signature``, then at ``f.nin`` and ``f.nout`` (ufuncs), then at the
Python signature and its type hints. If the number of items cannot be known, it raises an error that
names the remedy.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typing_extensions
from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.cells import read_cell
from flax_extra.combinator._core.checks import check_item_count
from flax_extra.combinator._core.context import list_context
from flax_extra.combinator._core.describe import shorten
from flax_extra.combinator._core.hints import (
    EMPTY,
    AnnotationScope,
    NoNesting,
    format_annotation,
    get_attribute,
    get_python_signature,
    read_nesting,
    read_optional_nesting,
)
from flax_extra.combinator._core.naming import get_name, is_combinator
from flax_extra.combinator._core.signature import Nesting, Signature, count_items, is_nesting

NOTHING_FIXED: Mapping[str, Any] = {}
NO_KEYWORDS: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """How a callable is called with items of the stack.

    Args:
        signature: how many items it takes and gives.
        optional: the context keywords that it takes and does not need.
        required: the context keywords that a call must give.
        names: for each argument, the keyword that passes it, or None to pass it by position.
        parameters: for each argument, the name of the parameter, if it has one.
        flags: the names of the parameters that take an item and are annotated ``bool``.
        takes_any: whether it accepts any keyword (``**kwargs``).
        renamed: the context keywords that reach a parameter of another name alone.
    """

    signature: Signature
    optional: frozenset[str] = NO_KEYWORDS
    required: frozenset[str] = NO_KEYWORDS
    names: tuple[str | None, ...] = ()
    parameters: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    takes_any: bool = False
    renamed: frozenset[str] = NO_KEYWORDS

    @functools.cached_property
    def keywords(self) -> frozenset[str]:
        """The context keywords that it takes."""
        return self.optional | self.required

    @functools.cached_property
    def bare(self) -> frozenset[str]:
        """The context keywords that it takes under the names of its own parameters."""
        return self.keywords - self.renamed

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether each item is one argument, passed by position."""
        return not any(self.names) and not any(self.signature.in_shape)

    def bind_context(self, fixed: Mapping[str, Any]) -> CallSpec:
        """Returns the spec with the context keywords among the fixed values."""
        bound = list_context(fixed)
        if not bound:
            return self
        return dataclasses.replace(
            self,
            renamed=frozenset(k.name for k in bound) - self.keywords,
            optional=self.optional.union(k.name for k in bound if not k.is_required),
            required=self.required.union(k.name for k in bound if k.is_required),
        )


def infer_signature(f: Callable[..., Any]) -> Signature:
    """Infers the signature of a callable.

    It looks, in this order, at ``f.signature`` if that is a :class:`Signature` (every combinator
    has one), at ``f.nin`` and ``f.nout`` (numpy and jax ufuncs), and at the Python signature with
    its type hints. In a Python signature, the inputs are the positional parameters without a
    default; a parameter annotated ``tuple[A, B]`` is several items, regrouped before the call. The
    outputs are one item, or as many as a ``tuple[...]`` return annotation has, or none if the
    return annotation is ``None``. A keyword-only parameter is context, not an input. If a field of
    a class decides how the items of a parameter are grouped, an attribute ``in_shapes`` can say it:
    it maps names of parameters to groupings, as in ``Signature.in_shape``.

    Args:
        f: a function, a linen module, a combinator or any other callable.

    Returns:
        Its signature.

    Raises:
        TypeError: If ``f`` is not callable.
        SignatureError: If the number of items cannot be known; the message names the remedy.

    Example:
        >>> import operator
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> print(cb.infer_signature(nn.Dense(4)), "and", cb.infer_signature(operator.add))
        1 -> 1 and 2 -> 1
        >>> def step(carry: tuple[float, float], x: float) -> tuple[float, float, float]: ...
        >>> cb.infer_signature(step)
        Signature(n_in=3, n_out=3, start_index=0, in_shape=(((), ()), ()))
    """
    return infer_call_spec(f).signature


def infer_call_spec(
    f: Callable[..., Any],
    n_in: int | None = None,
    n_out: int | None = None,
    fixed: Mapping[str, Any] = NOTHING_FIXED,
) -> CallSpec:
    """Infers how a callable is called. What the user declares takes precedence."""
    if not callable(f):
        raise errors.not_callable(shorten(repr(f)), type(f).__name__)
    for name, value in (("n_in", n_in), ("n_out", n_out)):
        if value is not None and type(value) is not int:
            raise errors.not_an_integer("cb.fn", name, repr(value))
        if value is not None:
            check_item_count("cb.fn", name, value)
    declared = _get_declared_signature(f) or _read_ufunc(f)
    if declared is not None:
        return _use_declared(f, declared, n_in, n_out, fixed)
    parameters = _get_parameters(f)
    if parameters is None:
        if n_in is None or n_out is None:
            raise errors.no_python_signature(get_name(f))
        return CallSpec(Signature(n_in, n_out), names=(None,) * n_in)
    return _read_python_signature(f, parameters, n_in, n_out, fixed)


def _get_declared_signature(f: object) -> Signature | None:
    if is_combinator(f):
        return f.signature
    declared = get_attribute(f, "signature")
    return declared if isinstance(declared, Signature) else None


def _read_ufunc(f: object) -> Signature | None:
    n_in, n_out = get_attribute(f, "nin"), get_attribute(f, "nout")
    if type(n_in) is int and type(n_out) is int and n_in >= 0 and n_out >= 0:
        return Signature(n_in, n_out)
    return None


def _use_declared(
    f: Callable[..., Any],
    declared: Signature,
    n_in: int | None,
    n_out: int | None,
    fixed: Mapping[str, Any],
) -> CallSpec:
    has_parameters = not is_combinator(f) and _get_declared_signature(f) is not None
    parameters = list((_get_parameters(f) or {}).values()) if has_parameters else []
    takes_more = has_parameters and n_in is not None and n_in > declared.n_in
    for name, asked, known in (("n_in", n_in, declared.n_in), ("n_out", n_out, declared.n_out)):
        if asked is not None and asked != known and not (name == "n_in" and takes_more):
            raise errors.contradicted(get_name(f), name, asked, known)
    optional = required = NO_KEYWORDS
    takes_any = False
    if has_parameters:
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        optional = frozenset(p.name for p in parameters if _takes_keyword(p) and _has_default(p))
        required = frozenset(
            p.name for p in parameters if p.kind is p.KEYWORD_ONLY and not _has_default(p)
        )
        for name in fixed:
            if name not in optional | required and not takes_any:
                raise errors.unknown_fixed(get_name(f), name, optional | required)
    more: list[inspect.Parameter] = []
    shapes: Nesting = ()
    if n_in is not None and takes_more:
        free = [p for p in parameters[len(declared.in_shape) :] if p.name not in fixed]
        more, shapes = _add_inputs(f, free, declared, n_in)
    taken = {p.name for p in more} | fixed.keys()
    return CallSpec(
        Signature(
            declared.n_in + sum(map(count_items, shapes)),
            declared.n_out,
            in_shape=(*declared.in_shape, *shapes),
        ),
        optional - taken,
        required - taken,
        (*(None,) * len(declared.in_shape), *(p.name for p in more)),
        parameters=tuple(p.name for p in more),
        takes_any=takes_any,
    ).bind_context(fixed)


def _add_inputs(
    f: Callable[..., Any], free: Sequence[inspect.Parameter], declared: Signature, n_in: int
) -> tuple[list[inspect.Parameter], Nesting]:
    """Assigns the items beyond a declared signature to the parameters that it leaves free.

    A mode, such as ``decode: bool``, is no item.
    """
    scope = AnnotationScope(f)
    candidates = [p for p in free if _takes_keyword(p) and not _is_mode(p, scope)]
    shapes = [_read_optional(f, p, scope) for p in candidates]
    most = declared.n_in + sum(map(_count_or_one, shapes))
    inputs, in_shape, left = _take_in_order(candidates, shapes, n_in - declared.n_in)
    if left:
        raise errors.wrong_n_in(get_name(f), n_in, declared.n_in, most)
    return inputs, in_shape


def _read_python_signature(
    f: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    n_in: int | None,
    n_out: int | None,
    fixed: Mapping[str, Any],
) -> CallSpec:
    _check_fixed(f, parameters, fixed)
    scope = AnnotationScope(f)
    if n_in is None:
        inputs, in_shape = _find_inputs(f, parameters, fixed, scope)
    else:
        inputs, in_shape = _assign_items(f, parameters, fixed, n_in, scope)
    signature = Signature(
        n_in=sum(map(count_items, in_shape)),
        n_out=_count_outputs(f, scope) if n_out is None else n_out,
        in_shape=in_shape,
    )
    taken = {p.name for p in inputs} | fixed.keys()
    context = [p for p in parameters.values() if _takes_keyword(p) and p.name not in taken]
    return CallSpec(
        signature,
        frozenset(p.name for p in context if _has_default(p)),
        frozenset(p.name for p in context if not _has_default(p) and p.kind is p.KEYWORD_ONLY),
        _choose_names(f, parameters, inputs, in_shape, fixed),
        parameters=tuple(p.name for p in inputs),
        flags=tuple(p.name for p in inputs if scope.resolve(p.annotation) is bool),
        takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters.values()),
    ).bind_context(fixed)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _takes_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind in _KEYWORD


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty


def _check_fixed(
    f: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], fixed: Mapping[str, Any]
) -> None:
    by_keyword = {name for name, p in parameters.items() if _takes_keyword(p)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in fixed:
        if name in parameters and parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
            raise errors.unbindable(get_name(f), name)
        if name not in by_keyword and not takes_any:
            raise errors.unknown_fixed(get_name(f), name, by_keyword)


def _find_inputs(
    f: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    fixed: Mapping[str, Any],
    scope: AnnotationScope,
) -> tuple[list[inspect.Parameter], Nesting]:
    """Finds the parameters that take items, if the user does not say how many there are."""
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise errors.variable_positional(get_name(f), parameter.name)
    inputs = [
        p
        for p in parameters.values()
        if p.kind in _POSITIONAL and p.name not in fixed and not _has_default(p)
    ]
    cell = read_cell(f) if isinstance(f, nn.RNNCellBase) else None
    if cell is not None and len(inputs) == len(cell.in_shape):
        is_annotated = any(p.annotation is not p.empty for p in inputs)
        if not is_annotated:
            return inputs, cell.in_shape
    return inputs, tuple(_read_input_nesting(f, p, scope) for p in inputs)


def _choose_names(
    f: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    inputs: Sequence[inspect.Parameter],
    in_shape: Nesting,
    fixed: Mapping[str, Any],
) -> tuple[str | None, ...]:
    """Passes by position up to the first parameter that is bound or skipped, by keyword after."""
    order = [p for p in parameters.values() if p.kind in _POSITIONAL]
    names: list[str | None] = []
    for index, parameter in enumerate(inputs):
        expected = order[index] if index < len(order) else None
        is_next = parameter is expected and (not names or names[-1] is None)
        names.append(None if is_next else parameter.name)
        if names[-1] is not None and not _takes_keyword(parameter):
            raise errors.unbindable(get_name(f), next(p.name for p in order if p.name in fixed))
    return (*names, *(None,) * (len(in_shape) - len(names)))


def _assign_items(
    f: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    fixed: Mapping[str, Any],
    n_in: int,
    scope: AnnotationScope,
) -> tuple[list[inspect.Parameter], Nesting]:
    """Assigns ``n_in`` items to the parameters in order, keyword-only ones after the others.

    A variadic parameter takes the rest. A mode, such as ``deterministic: bool``, is no item.
    """
    free = [p for p in parameters.values() if p.name not in fixed]
    is_variadic = any(p.kind is p.VAR_POSITIONAL for p in free)
    positional = [p for p in free if p.kind in _POSITIONAL]
    # Items for *args come before keyword-only parameters, and take all that is left.
    by_keyword = [p for p in free if p.kind is p.KEYWORD_ONLY and not is_variadic]
    by_keyword = [p for p in by_keyword if not _is_mode(p, scope)]
    candidates = [*positional, *by_keyword]
    n_required = sum(not _has_default(p) for p in positional)
    shapes = [
        read_nesting(p.annotation, scope) if index < n_required else _read_optional(f, p, scope)
        for index, p in enumerate(candidates)
    ]
    least = sum(count_items(s) for s in shapes[:n_required] if isinstance(s, tuple))
    of_any_length = [i for i, s in enumerate(shapes[:n_required]) if not isinstance(s, tuple)]
    most = None if is_variadic or of_any_length else sum(map(_count_or_one, shapes))
    if n_in < least + len(of_any_length) or len(of_any_length) > 1:
        raise errors.wrong_n_in(get_name(f), n_in, least + len(of_any_length), most)
    if of_any_length:
        shapes[of_any_length[0]] = ((),) * (n_in - least)
    inputs, in_shape, left = _take_in_order(candidates, shapes, n_in, n_required)
    # What is left goes to *args, which come after all positional parameters.
    is_short = len(inputs) < (len(candidates) if left and is_variadic else n_required)
    if is_short or (left and not is_variadic):
        raise errors.wrong_n_in(get_name(f), n_in, least, most)
    return inputs, (*in_shape, *((),) * left)


def _is_mode(parameter: inspect.Parameter, scope: AnnotationScope) -> bool:
    annotation = scope.resolve(parameter.annotation)
    return annotation is bool or set(typing.get_args(annotation)) == {bool, types.NoneType}


def _take_in_order(
    candidates: Sequence[inspect.Parameter],
    shapes: Sequence[Nesting | NoNesting],
    n_items: int,
    n_required: int = 0,
) -> tuple[list[inspect.Parameter], Nesting, int]:
    """Gives items to parameters in order, as long as they suffice.

    Returns the parameters, the nesting of their items, and how many items are left.
    """
    inputs: list[inspect.Parameter] = []
    in_shape: list[Nesting] = []
    for parameter, shape in zip(candidates, shapes, strict=True):
        size = _count_or_one(shape)
        if size > n_items or (n_items == 0 and len(inputs) >= n_required):
            break
        inputs.append(parameter)
        in_shape.append(shape if isinstance(shape, tuple) else ())
        n_items -= size
    return inputs, tuple(in_shape), n_items


def _read_optional(
    f: Callable[..., Any], parameter: inspect.Parameter, scope: AnnotationScope
) -> Nesting | NoNesting:
    """Reads the nesting of an optional parameter that becomes an input.

    A layer whose annotations cannot say it, because a field decides, has a mapping ``in_shapes``.
    """
    declared = get_attribute(f, "in_shapes")
    nesting = declared.get(parameter.name) if isinstance(declared, Mapping) else None
    if nesting is not None and is_nesting(nesting):
        return nesting
    return read_optional_nesting(parameter.annotation, scope)


def _count_or_one(shape: Nesting | NoNesting) -> int:
    return count_items(shape) if isinstance(shape, tuple) else 1


def _read_input_nesting(
    f: Callable[..., Any], parameter: inspect.Parameter, scope: AnnotationScope
) -> Nesting:
    nesting = read_nesting(parameter.annotation, scope)
    if nesting is EMPTY:
        raise errors.empty_tuple(get_name(f), parameter.name)
    if not isinstance(nesting, tuple):
        annotation = format_annotation(parameter.annotation)
        raise errors.variable_tuple(get_name(f), parameter.name, annotation)
    return nesting


def _count_outputs(f: Callable[..., Any], scope: AnnotationScope) -> int:
    if isinstance(f, type):
        return 1  # calling a class gives one instance, whatever __init__ is annotated with
    signature = get_python_signature(f)
    annotation = inspect.Signature.empty if signature is None else signature.return_annotation
    if annotation is inspect.Signature.empty and isinstance(f, nn.RNNCellBase):
        cell = read_cell(f)
        if cell is not None:
            return cell.n_out
    resolved = scope.resolve(annotation)
    if resolved is None or resolved is types.NoneType:
        return 0
    if resolved in (typing.NoReturn, typing_extensions.Never, getattr(typing, "Never", None)):
        raise errors.never_returns(get_name(f))
    nesting = read_nesting(resolved, scope)
    if nesting is EMPTY:
        return 0
    if not isinstance(nesting, tuple):
        raise errors.variable_output(get_name(f), format_annotation(annotation))
    return count_items(nesting)


def _get_parameters(f: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    signature = get_python_signature(f)
    return None if signature is None else signature.parameters
