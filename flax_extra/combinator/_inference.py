"""How a callable meets the stack, read from the callable itself.

``infer_signature`` looks at ``f.signature``, then at ``f.nin`` and ``f.nout`` (ufuncs), then at the
Python signature and its type hints. What it cannot know it refuses, and names the remedy.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import typing_extensions
from flax import linen as nn

from flax_extra.combinator import _errors
from flax_extra.combinator._hints import (
    EMPTY,
    Names,
    Special,
    attribute,
    nesting_of,
    python_signature,
    text_of,
)
from flax_extra.combinator._signature import MOST_ITEMS, Nesting, Signature, count

if TYPE_CHECKING:
    from flax_extra.combinator._base import Combinator

NO_FIXED: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Contract:
    """How a callable is called from the stack.

    Args:
        signature: what it takes and gives.
        keywords: the optional keywords it takes, that context may fill.
        names: for each argument, the keyword that passes it, or None to pass it by position.
    """

    signature: Signature
    keywords: frozenset[str]
    names: tuple[str | None, ...]

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether the items are the arguments, one for one and by position."""
        return not any(self.names) and not any(self.signature.in_shape)


def infer_signature(f: Callable[..., Any]) -> Signature:
    """The signature of a callable.

    Looks, in this order, at ``f.signature`` where it is a :class:`Signature` (every combinator
    has one), at ``f.nin`` and ``f.nout`` (numpy and jax ufuncs), and at the Python signature with
    its type hints. There, the inputs are the positional parameters without a default, where one
    annotated ``tuple[A, B]`` is several items, regrouped before the call; the outputs are one,
    or as many as a ``tuple[...]`` return annotation has, or none if it is ``None``.

    Args:
        f: a function, a linen module, a combinator or any other callable.

    Returns:
        Its signature.

    Raises:
        TypeError: where ``f`` is not callable.
        SignatureError: where the number of items cannot be known; the message names the remedy.

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
    return contract(f).signature


def contract(
    f: Callable[..., Any],
    n_in: int | None = None,
    n_out: int | None = None,
    fixed: Mapping[str, Any] = NO_FIXED,
) -> Contract:
    """How a callable is called, with what the user says of it taken before what is inferred."""
    if not callable(f):
        raise _errors.not_callable(shorten(repr(f)), type(f).__name__)
    for name, value in (("n_in", n_in), ("n_out", n_out)):
        if value is not None and type(value) is not int:
            raise _errors.not_an_integer("cb.fn", name, repr(value))
        if value is not None and value < 0:
            raise _errors.too_small("cb.fn", name, 0, value)
        if value is not None and value > MOST_ITEMS:
            raise _errors.too_many_items("cb.fn", name, MOST_ITEMS, value)
    declared = _declared(f) or _ufunc(f)
    if declared is not None:
        return _declared_contract(f, declared, n_in, n_out, fixed)
    parameters = _parameters(f)
    if parameters is None:
        if n_in is None or n_out is None:
            raise _errors.no_python_signature(name_of(f))
        return Contract(Signature(n_in, n_out), frozenset(), (None,) * n_in)
    return _python_contract(f, parameters, n_in, n_out, fixed)


def name_of(f: object) -> str:
    """A short name for a callable, as errors and pictures give it.

    >>> from flax import linen as nn
    >>> name_of(nn.Dense(3)), name_of(abs), name_of(functools.partial(max, 0))
    ('Dense', 'abs', 'max')
    """
    if isinstance(f, functools.partial):
        return name_of(f.func)
    if is_combinator(f):
        return f.label
    name = None if isinstance(f, nn.Module) else attribute(f, "__name__")
    return name if isinstance(name, str) else type(f).__name__


def is_combinator(f: object) -> TypeGuard[Combinator]:
    """Whether ``f`` is a combinator. Asks its class: asking a linen module may run setup."""
    return getattr(type(f), "is_combinator", False) is True


def shorten(text: str, limit: int = 80) -> str:
    """Text on one line, cut at the limit."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _declared(f: object) -> Signature | None:
    if is_combinator(f):
        return f.signature
    declared = attribute(f, "signature")
    return declared if isinstance(declared, Signature) else None


def _ufunc(f: object) -> Signature | None:
    n_in, n_out = attribute(f, "nin"), attribute(f, "nout")
    if type(n_in) is int and type(n_out) is int and n_in >= 0 and n_out >= 0:
        return Signature(n_in, n_out)
    return None


def _declared_contract(
    f: Callable[..., Any],
    declared: Signature,
    n_in: int | None,
    n_out: int | None,
    fixed: Mapping[str, Any],
) -> Contract:
    for name, asked, known in (("n_in", n_in, declared.n_in), ("n_out", n_out, declared.n_out)):
        if asked is not None and asked != known:
            raise _errors.contradicted(name_of(f), name, asked, known)
    keywords: frozenset[str] = frozenset()
    if _declared(f) is not None:
        parameters = _parameters(f) or {}
        keywords = frozenset(
            name
            for name, parameter in parameters.items()
            if _takes_keyword(parameter) and parameter.default is not parameter.empty
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in fixed:
                if name not in keywords:
                    raise _errors.unknown_fixed(name_of(f), name, keywords)
    return Contract(declared, keywords.difference(fixed), (None,) * len(declared.in_shape))


def _python_contract(
    f: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    n_in: int | None,
    n_out: int | None,
    fixed: Mapping[str, Any],
) -> Contract:
    _check_fixed(f, parameters, fixed)
    positional = [p for p in parameters.values() if p.kind in _POSITIONAL and p.name not in fixed]
    variadic = [p for p in parameters.values() if p.kind is p.VAR_POSITIONAL]
    for parameter in parameters.values():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and parameter.name not in fixed
        ):
            raise _errors.required_keyword(name_of(f), parameter.name)
    scope = Names(f)
    if n_in is None:
        inputs = [p for p in positional if p.default is p.empty]
        if variadic:
            raise _errors.variable_positional(name_of(f), variadic[0].name)
        in_shape = tuple(_input_nesting(f, p, scope) for p in inputs)
    else:
        inputs, in_shape = _allot(f, positional, variadic, n_in, scope)
    signature = Signature(
        n_in=sum(map(count, in_shape)),
        n_out=_n_out(f, scope) if n_out is None else n_out,
        in_shape=in_shape,
    )
    taken = {p.name for p in inputs} | fixed.keys()
    keywords = frozenset(
        p.name
        for p in parameters.values()
        if _takes_keyword(p) and p.default is not p.empty and p.name not in taken
    )
    return Contract(signature, keywords, _passing(f, parameters, inputs, in_shape, fixed))


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
            raise _errors.unbindable(name_of(f), name)
        if name not in by_keyword and not takes_any:
            raise _errors.unknown_fixed(name_of(f), name, by_keyword)


def _passing(
    f: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    inputs: Sequence[inspect.Parameter],
    in_shape: Nesting,
    fixed: Mapping[str, Any],
) -> tuple[str | None, ...]:
    """By position up to the first parameter that is bound or skipped, by keyword after it."""
    order = [p for p in parameters.values() if p.kind in _POSITIONAL]
    names: list[str | None] = []
    for parameter, expected in zip(inputs, order, strict=False):
        if not names or names[-1] is None:
            names.append(None if parameter is expected else parameter.name)
        else:
            names.append(parameter.name)
        if names[-1] is not None and not _takes_keyword(parameter):
            raise _errors.unbindable(name_of(f), next(p.name for p in order if p.name in fixed))
    return (*names, *(None,) * (len(in_shape) - len(names)))


def _allot(
    f: Callable[..., Any],
    positional: Sequence[inspect.Parameter],
    variadic: Sequence[inspect.Parameter],
    n_in: int,
    scope: Names,
) -> tuple[list[inspect.Parameter], Nesting]:
    """Gives each parameter its items until ``n_in`` are given; an open-ended one takes the rest."""
    shapes = [nesting_of(p.annotation, scope) for p in positional]
    required = sum(p.default is p.empty for p in positional)
    least = sum(count(s) for s in shapes[:required] if isinstance(s, tuple))
    open_ended = [i for i, s in enumerate(shapes[:required]) if not isinstance(s, tuple)]
    most = None if variadic or open_ended else sum(map(_size, shapes))
    if n_in < least + len(open_ended) or len(open_ended) > 1:
        raise _errors.wrong_n_in(name_of(f), n_in, least + len(open_ended), most)
    if open_ended:
        shapes[open_ended[0]] = ((),) * (n_in - least)
    inputs: list[inspect.Parameter] = []
    in_shape: list[Nesting] = []
    left = n_in
    for parameter, shape in zip(positional, shapes, strict=True):
        if left == 0 and len(inputs) >= required:
            break
        size = _size(shape)
        if size > left:
            raise _errors.wrong_n_in(name_of(f), n_in, least, most)
        inputs.append(parameter)
        in_shape.append(shape if isinstance(shape, tuple) else ())
        left -= size
    if left and not variadic:
        raise _errors.wrong_n_in(name_of(f), n_in, least, most)
    return inputs, (*in_shape, *((),) * left)


def _size(shape: Nesting | Special) -> int:
    return count(shape) if isinstance(shape, tuple) else 1


def _input_nesting(f: Callable[..., Any], parameter: inspect.Parameter, scope: Names) -> Nesting:
    nesting = nesting_of(parameter.annotation, scope)
    if nesting is EMPTY:
        raise _errors.empty_tuple(name_of(f), parameter.name)
    if not isinstance(nesting, tuple):
        raise _errors.variable_tuple(name_of(f), parameter.name, text_of(parameter.annotation))
    return nesting


def _n_out(f: Callable[..., Any], scope: Names) -> int:
    if isinstance(f, type):
        return 1  # calling a class gives one instance, whatever __init__ is annotated with
    signature = python_signature(f)
    annotation = inspect.Signature.empty if signature is None else signature.return_annotation
    resolved = scope.resolve(annotation)
    if resolved is None or resolved is types.NoneType:
        return 0
    if resolved in (typing.NoReturn, typing_extensions.Never, getattr(typing, "Never", None)):
        raise _errors.never_returns(name_of(f))
    nesting = nesting_of(resolved, scope)
    if nesting is EMPTY:
        return 0
    if not isinstance(nesting, tuple):
        raise _errors.variable_output(name_of(f), text_of(annotation))
    return count(nesting)


def _parameters(f: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    signature = python_signature(f)
    return None if signature is None else signature.parameters
