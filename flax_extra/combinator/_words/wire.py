"""``wire``: a selection of items that have names, for stacks in which counting gets hard.

>>> from flax_extra import combinator as cb
>>> cb.wire("a b c -> c a")("x", "y", "z") == cb.select((2, 0), n_in=3)("x", "y", "z")
True
"""

from __future__ import annotations

from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.expression import Argument
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._words.select import select

ARROW = "->"


class Wire(Combinator):
    """Items of the stack by names. See :func:`wire`."""

    names: str = ""

    def expand(self) -> Combinator:
        inputs, outputs = self._read_names()
        return select(map(inputs.index, outputs), n_in=len(inputs))

    def _check(self) -> None:
        inputs, outputs = self._read_names()
        self.names = " ".join([*inputs, ARROW, *outputs])
        super()._check()

    @static_property
    def input_names(self) -> tuple[str, ...]:
        """The names of the items that it takes, top first.

        Example:
            >>> from flax_extra import combinator as cb
            >>> cb.wire("x mask -> x").input_names
            ('x', 'mask')
        """
        return tuple(self._read_names()[0])

    @static_property
    def _label(self) -> str:
        return f"wire({self.names!r})" if self.name is None else super()._label

    @static_property
    def _arguments(self) -> list[Argument]:
        named = [] if self.name is None else [("name=", self.name)]
        return [("", self.names), *named]

    @nn.nowrap
    def _read_names(self) -> tuple[list[str], list[str]]:
        """Reads the names of the items before and after."""
        if not isinstance(self.names, str):
            raise errors.no_wiring_text(repr(self.names))
        if self.names.count(ARROW) != 1:
            raise errors.no_arrow(self.names)
        inputs, outputs = (side.split() for side in self.names.split(ARROW))
        for name in (*inputs, *outputs):
            if not name.isidentifier():
                raise errors.not_a_wire(self.names, name)
        for index, name in enumerate(inputs):
            if name in inputs[:index]:
                raise errors.wire_twice(self.names, name)
        for name in outputs:
            if name not in inputs:
                raise errors.no_such_wire(self.names, name, inputs)
        return inputs, outputs


def wire(names: str) -> Wire:
    """Moves items by name: the names before the arrow are those on the stack, top first.

    Args:
        names: the items that it takes, an arrow, and the items that it gives, such as
            ``"x memory mask -> memory x mask"``. A name that is left out after the arrow is
            dropped, and one that is given twice is copied. Names are words of the user's choice,
            with spaces between them.

    Returns:
        A combinator; the same as ``select`` with the indices of the names.

    Raises:
        TypeError: If ``names`` is not a string.
        ValueError: If there is not one arrow, a name is no identifier, two items before the arrow
            have one name, or a name after it is not before it.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.wire("x memory mask -> memory x mask memory")("X", "M", "K", "beneath")
        ('M', 'X', 'K', 'M', 'beneath')
        >>> print(cb.wire("x mask -> x").signature)
        2 -> 1

    See Also:
        :func:`select`, by index. Summaries and diagrams show the names.
    """
    return Wire(names=names)
