"""What callables are called."""

from __future__ import annotations

import functools
from typing import ClassVar, Protocol, TypeGuard

from flax import linen as nn

from flax_extra.combinator._core.hints import get_attribute
from flax_extra.combinator._core.signature import Signature


class Named(Protocol):
    """What signatures and errors need to know of a combinator."""

    _is_combinator: ClassVar[bool]

    @property
    def signature(self) -> Signature: ...
    @property
    def _label(self) -> str: ...


def is_combinator(f: object) -> TypeGuard[Named]:
    """Whether ``f`` is a combinator. It asks the class: asking a linen module may run its setup."""
    return getattr(type(f), "_is_combinator", False) is True


def get_name(f: object) -> str:
    """Returns a short name of a callable, as errors and pictures show it.

    >>> get_name(nn.Dense(3)), get_name(abs), get_name(functools.partial(max, 0))
    ('Dense', 'abs', 'max')
    """
    if isinstance(f, functools.partial):
        return get_name(f.func)
    if is_combinator(f):
        return f._label
    name = None if isinstance(f, nn.Module) else get_attribute(f, "__name__")
    return name if isinstance(name, str) else type(f).__name__
