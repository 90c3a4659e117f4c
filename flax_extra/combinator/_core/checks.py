"""Checks of the numbers that combinators take."""

from __future__ import annotations

import operator
from typing import Any

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.signature import MAX_ITEMS


def as_integer(asked: str, name: str, value: Any) -> int:
    """Returns a value as a Python integer.

    Raises:
        TypeError: If it is not an integer. ``asked`` is what was called, ``name`` the argument.
    """
    try:
        return operator.index(value)
    except Exception as error:  # __index__ of an arbitrary object may raise anything
        raise errors.not_an_integer(asked, name, repr(value)) from error


def check_at_least(asked: str, name: str, least: int, value: int) -> None:
    """Raises an error if a number is too small."""
    if value < least:
        raise errors.too_small(asked, name, least, value)


def check_item_count(asked: str, name: str, value: int, least: int = 0) -> None:
    """Raises an error if a number cannot be the number of items of a stack."""
    check_at_least(asked, name, least, value)
    if value > MAX_ITEMS:
        raise errors.too_many_items(asked, name, MAX_ITEMS, value)
