"""Where the walk through a pipeline stands: the way there, the keywords, and who watches.

Errors take their paths from here, and what looks at each step (summaries, shapes) gets its view.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from flax import linen as nn

from flax_extra.combinator._binding import Binding
from flax_extra.combinator._children import Child
from flax_extra.combinator._inference import name_of
from flax_extra.combinator._stack import Stack

if TYPE_CHECKING:
    from flax_extra.combinator._base import Combinator


@dataclasses.dataclass(frozen=True)
class Visit:
    """A child that is about to run.

    Args:
        position: the indices of children that lead from the outermost pipeline to it.
        path: the same for people to read.
        child: the callable, and how it meets the stack.
        module: the bound module whose variables it uses, if any.
        stack: the whole stack it finds.
        is_wiring: whether it is no child of the expression, but part of what a derived combinator
            means, such as the ``add`` of a residual.
    """

    position: tuple[int, ...]
    path: tuple[str, ...]
    child: Child
    module: nn.Module | None
    stack: Stack
    is_wiring: bool


Watch: TypeAlias = Callable[[Visit, Callable[[], Stack]], Stack]
"""Called in place of each step, with the step itself to call: it sees what goes in and out."""


Path: TypeAlias = tuple[str | Callable[[], str], ...]
"""The way from the outermost pipeline, whose segments are written when somebody reads them."""


class Place(NamedTuple):
    """Where in the enclosing pipelines one runs, and who watches it."""

    path: Path = ()
    position: tuple[int, ...] = ()
    watch: Watch | None = None


place: contextvars.ContextVar[Place] = contextvars.ContextVar("place", default=Place())  # noqa: B039
"""Where the innermost pipeline that is running was called."""


def watched(watch: Watch, f: Callable[[], Any]) -> Any:
    """Calls ``f``; each step of the pipeline that it runs goes through ``watch``."""
    token = place.set(Place(watch=watch))
    try:
        return f()
    finally:
        place.reset(token)


class Frame(NamedTuple):
    """What the walk knows where it stands.

    Args:
        binding: which bound module stands for which child.
        context: the keywords handed to every descendant that takes them.
        n_in: how many inputs the pipeline takes, for errors.
        given: how many it was given.
        watch: who looks at each step, if anyone does.
        path: the segments from the outermost pipeline to here.
        position: the indices of children that lead here.
        derived: the derived combinator whose meaning is being run, if one is. Its wiring adds
            nothing to the path.
        operation: the childless combinator that is being run, if one is.
    """

    binding: Binding
    context: Mapping[str, Any]
    n_in: int
    given: int
    watch: Watch | None
    path: Path
    position: tuple[int, ...]
    derived: Combinator | None = None
    operation: str | None = None

    def into(self, owner: Combinator, index: int) -> Frame:
        path = self.path
        if owner.is_visible:
            segment = functools.partial(owner.segment, index)
            path = (*path, segment if self.watch is None else segment())
        return Frame(*self[:5], path, (*self.position, index))

    def leaf_path(self, leaf: Child) -> Path:
        name = self.operation or functools.partial(name_of, leaf.target)
        if self.derived is not None and len(self.derived.children):
            return (*self.path, self.derived.label, name)
        return (*self.path, name)


def written(path: Path) -> tuple[str, ...]:
    return tuple([part if isinstance(part, str) else part() for part in path])
