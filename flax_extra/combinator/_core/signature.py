"""Signatures and their algebra. Nothing here needs jax.

Signatures compose in two ways, and both are associative:

    >>> f, g = Signature(1, 2), Signature(3, 1)
    >>> str(compose_in_series([f, g])), str(compose_in_parallel([f, g]))
    ('2 -> 1', '4 -> 3')
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeAlias, TypeGuard

from flax_extra.combinator._core import errors

Nesting: TypeAlias = tuple["Nesting", ...]
"""How items are grouped into arguments: ``()`` is one item, a tuple groups what it holds."""


MAX_ITEMS = 100_000
"""The largest number of items in a signature. A larger one is a mistake, and would fill memory."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """How many items a callable takes off the stack, and how many it puts there.

    Args:
        n_in: number of items it takes off the top.
        n_out: number of items it puts there instead.
        start_index: where its inputs begin, counted from the top of the stack. It is 0 except for
            the children of ``parallel``, each of which reads the next span.
        in_shape: how the items are grouped into arguments: ``()`` for an argument that is one
            item, a tuple for an argument that is itself a tuple. If left out, each item is an
            argument.

    Raises:
        SignatureError: If a number is negative, or ``in_shape`` does not hold ``n_in`` items.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.Signature(n_in=2, n_out=1)
        Signature(n_in=2, n_out=1, start_index=0, in_shape=((), ()))
        >>> cb.Signature(3, 2, in_shape=(((), ()), ())).index_bounds
        (0, 3)
    """

    n_in: int
    n_out: int
    start_index: int = 0
    in_shape: Nesting = ()

    def __post_init__(self) -> None:
        text = f"Signature({self.n_in!r}, {self.n_out!r}, {self.start_index!r}, {self.in_shape!r})"
        for name in ("n_in", "n_out", "start_index"):
            value = getattr(self, name)
            if type(value) is not int:
                raise errors.bad_signature(text, f"{name} is not an integer")
            if value < 0:
                raise errors.bad_signature(text, f"{name} is negative")
            if value > MAX_ITEMS:
                raise errors.too_many_items("Signature", name, MAX_ITEMS, value)
        if self.in_shape == ():
            object.__setattr__(self, "in_shape", ((),) * self.n_in)
        if not is_nesting(self.in_shape):
            raise errors.bad_signature(text, "in_shape is not made of tuples")
        n_items = sum(map(count_items, self.in_shape))
        if n_items != self.n_in:
            raise errors.bad_signature(
                text, f"in_shape holds {n_items} items and n_in is {self.n_in}"
            )

    @property
    def index_bounds(self) -> tuple[int, int]:
        """The span of the stack that it reads: first index, and one past the last."""
        return self.start_index, self.start_index + self.n_in

    def at(self, start_index: int) -> Signature:
        """Returns the same signature, reading from ``start_index`` on.

        Example:
            >>> Signature(2, 1).at(3).index_bounds
            (3, 5)
        """
        return dataclasses.replace(self, start_index=start_index)

    def __str__(self) -> str:
        return f"{self.n_in} -> {self.n_out}"


def compose_in_series(signatures: Iterable[Signature]) -> Signature:
    """Returns the signature of callables that run on one stack, one after the other.

    >>> f, g = Signature(1, 2), Signature(1, 1)
    >>> str(compose_in_series([f, g])), str(compose_in_series([]))
    ('1 -> 2', '0 -> 0')
    """
    n_in = n_out = 0
    for signature in signatures:
        missing = max(0, signature.n_in - n_out)
        n_in += missing
        n_out += missing - signature.n_in + signature.n_out
    return Signature(n_in, n_out)


def compose_in_parallel(signatures: Iterable[Signature]) -> Signature:
    """Returns the signature of callables that run side by side, each on the next span.

    >>> str(compose_in_parallel([Signature(1, 2), Signature(1, 1)]))
    '2 -> 3'
    """
    n_in = n_out = 0
    for signature in signatures:
        n_in += signature.n_in
        n_out += signature.n_out
    return Signature(n_in, n_out)


def count_items(nesting: Nesting) -> int:
    """Counts the items in a nesting.

    >>> count_items(()), count_items(((), ((), ())))
    (1, 3)
    """
    return sum(map(count_items, nesting)) if nesting else 1


def is_nesting(value: object) -> TypeGuard[Nesting]:
    """Whether a value is made of tuples alone."""
    return type(value) is tuple and all(map(is_nesting, value))
