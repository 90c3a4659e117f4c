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

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.checks import check_item_count
from flax_extra.combinator._core.describe import shorten
from flax_extra.combinator._core.hints import (
    EMPTY,
    AnnotationScope,
    NoNesting,
    format_annotation,
    get_attribute,
    get_python_signature,
    read_nesting,
)
from flax_extra.combinator._core.naming import get_name, is_combinator
from flax_extra.combinator._core.signature import Nesting, Signature, count_items

NOTHING_FIXED: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """How a callable is called with items of the stack.

    Args:
        signature: how many items it takes and gives.
        keywords: the optional keywords that it takes, which context may fill.
        names: for each argument, the keyword that passes it, or None to pass it by position.
    """

    signature: Signature
    keywords: frozenset[str]
    names: tuple[str | None, ...]

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether each item is one argument, passed by position."""
        return not any(self.names) and not any(self.signature.in_shape)


def infer_signature(f: Callable[..., Any]) -> Signature:
    """Infers the signature of a callable.

    It looks, in this order, at ``f.signature`` if that is a :class:`Signature` (every combinator
    has one), at ``f.nin`` and ``f.nout`` (numpy and jax ufuncs), and at the Python signature with
    its type hints. In a Python signature, the inputs are the positional parameters without a
    default; a parameter annotated ``tuple[A, B]`` is several items, regrouped before the call. The
    outputs are one item, or as many as a ``tuple[...]`` return annotation has, or none if the
    return annotation is ``None``.

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
        return CallSpec(Signature(n_in, n_out), frozenset(), (None,) * n_in)
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
    for name, asked, known in (("n_in", n_in, declared.n_in), ("n_out", n_out, declared.n_out)):
        if asked is not None and asked != known:
            raise errors.contradicted(get_name(f), name, asked, known)
    keywords: frozenset[str] = frozenset()
    if _get_declared_signature(f) is not None:
        parameters = _get_parameters(f) or {}
        keywords = frozenset(
            name
            for name, parameter in parameters.items()
            if _takes_keyword(parameter) and parameter.default is not parameter.empty
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in fixed:
                if name not in keywords:
                    raise errors.unknown_fixed(get_name(f), name, keywords)
    return CallSpec(declared, keywords.difference(fixed), (None,) * len(declared.in_shape))


def _read_python_signature(
    f: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    n_in: int | None,
    n_out: int | None,
    fixed: Mapping[str, Any],
) -> CallSpec:
    _check_fixed(f, parameters, fixed)
    positional = [p for p in parameters.values() if p.kind in _POSITIONAL and p.name not in fixed]
    variadic = [p for p in parameters.values() if p.kind is p.VAR_POSITIONAL]
    for parameter in parameters.values():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and parameter.name not in fixed
        ):
            raise errors.required_keyword(get_name(f), parameter.name)
    scope = AnnotationScope(f)
    if n_in is None:
        inputs = [p for p in positional if p.default is p.empty]
        if variadic:
            raise errors.variable_positional(get_name(f), variadic[0].name)
        in_shape = tuple(_read_input_nesting(f, p, scope) for p in inputs)
    else:
        inputs, in_shape = _assign_items(f, positional, variadic, n_in, scope)
    signature = Signature(
        n_in=sum(map(count_items, in_shape)),
        n_out=_count_outputs(f, scope) if n_out is None else n_out,
        in_shape=in_shape,
    )
    taken = {p.name for p in inputs} | fixed.keys()
    keywords = frozenset(
        p.name
        for p in parameters.values()
        if _takes_keyword(p) and p.default is not p.empty and p.name not in taken
    )
    return CallSpec(signature, keywords, _choose_names(f, parameters, inputs, in_shape, fixed))


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _takes_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind in _KEYWORD


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
    for parameter, expected in zip(inputs, order, strict=False):
        if not names or names[-1] is None:
            names.append(None if parameter is expected else parameter.name)
        else:
            names.append(parameter.name)
        if names[-1] is not None and not _takes_keyword(parameter):
            raise errors.unbindable(get_name(f), next(p.name for p in order if p.name in fixed))
    return (*names, *(None,) * (len(in_shape) - len(names)))


def _assign_items(
    f: Callable[..., Any],
    positional: Sequence[inspect.Parameter],
    variadic: Sequence[inspect.Parameter],
    n_in: int,
    scope: AnnotationScope,
) -> tuple[list[inspect.Parameter], Nesting]:
    """Assigns ``n_in`` items to the parameters in order; a variadic one takes the rest."""
    shapes = [read_nesting(p.annotation, scope) for p in positional]
    required = sum(p.default is p.empty for p in positional)
    least = sum(count_items(s) for s in shapes[:required] if isinstance(s, tuple))
    of_any_length = [i for i, s in enumerate(shapes[:required]) if not isinstance(s, tuple)]
    most = None if variadic or of_any_length else sum(map(_count_or_one, shapes))
    if n_in < least + len(of_any_length) or len(of_any_length) > 1:
        raise errors.wrong_n_in(get_name(f), n_in, least + len(of_any_length), most)
    if of_any_length:
        shapes[of_any_length[0]] = ((),) * (n_in - least)
    inputs: list[inspect.Parameter] = []
    in_shape: list[Nesting] = []
    left = n_in
    for parameter, shape in zip(positional, shapes, strict=True):
        if left == 0 and len(inputs) >= required:
            break
        size = _count_or_one(shape)
        if size > left:
            raise errors.wrong_n_in(get_name(f), n_in, least, most)
        inputs.append(parameter)
        in_shape.append(shape if isinstance(shape, tuple) else ())
        left -= size
    if left and not variadic:
        raise errors.wrong_n_in(get_name(f), n_in, least, most)
    return inputs, (*in_shape, *((),) * left)


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
