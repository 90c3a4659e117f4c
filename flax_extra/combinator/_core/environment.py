"""Where the run of a pipeline stands: the path to here, the context, and the hook on each step.

Errors take their paths from here. Summaries and shape signatures see each step through the hook.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from flax import linen as nn

from flax_extra.combinator._core.binding import Binding
from flax_extra.combinator._core.children import Child, Pipeline
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.stack import Stack


@dataclasses.dataclass(frozen=True)
class StepCall:
    """A child that is about to run.

    Args:
        position: the indices of children that lead from the outermost pipeline to it.
        path: the same for people to read.
        child: the callable, and how it meets the stack.
        module: the bound module whose variables it uses, if any.
        stack: the whole stack that it finds.
        is_wiring: whether it comes from the expansion of a derived combinator, such as the ``add``
            of a residual, and not from the expression that the user wrote.
    """

    position: tuple[int, ...]
    path: tuple[str, ...]
    child: Child
    module: nn.Module | None
    stack: Stack
    is_wiring: bool


StepHook: TypeAlias = Callable[[StepCall, Callable[[], Stack]], Stack]
"""Is called in place of each step, with the step itself to call: it sees the stack around it."""


Path: TypeAlias = tuple[str | Callable[[], str], ...]
"""The way from the outermost pipeline. A segment that is a function is written when it is read."""


class CallSite(NamedTuple):
    """Where a callable runs: the path to it, the hook on its steps, and the outermost pipeline."""

    path: Path = ()
    position: tuple[int, ...] = ()
    hook: StepHook | None = None
    root: Pipeline | None = None


call_site: contextvars.ContextVar[CallSite] = contextvars.ContextVar(
    "call_site",
    default=CallSite(),  # noqa: B039  # it is immutable
)
"""Where the innermost running pipeline was called."""


def run_with_hook(hook: StepHook, f: Callable[[], Any]) -> Any:
    """Calls ``f``. Each step of the pipeline that it runs goes through the hook."""
    token = call_site.set(CallSite(hook=hook))
    try:
        return f()
    finally:
        call_site.reset(token)


class Environment(NamedTuple):
    """What a run knows where it stands.

    Args:
        binding: which bound module stands for which child.
        context: the keywords handed to every descendant that takes them.
        n_in: how many inputs the pipeline takes, for errors.
        n_given: how many it was called with.
        hook: the hook on each step, if there is one.
        root: the outermost pipeline, in which the keywords were given.
        path: the segments from the outermost pipeline to here.
        position: the indices of children that lead here.
        derived: the derived combinator whose expansion is being run, if one is. Steps of an
            expansion add nothing to the path.
        operation: the childless combinator that is being run, if one is.
    """

    binding: Binding
    context: Mapping[str, Any]
    n_in: int
    n_given: int
    hook: StepHook | None
    root: Pipeline
    path: Path
    position: tuple[int, ...]
    derived: Pipeline | None = None
    operation: str | None = None

    def enter(self, owner: Pipeline, index: int) -> Environment:
        """Returns the environment of a child."""
        path = self.path
        if owner._is_visible:
            segment = functools.partial(owner._name_child, index)
            path = (*path, segment if self.hook is None else segment())
        return Environment(*self[:6], path, (*self.position, index))

    def get_path(self, child: Child) -> Path:
        """Returns the path to a child that is called here."""
        name = self.operation or functools.partial(get_name, child.target)
        if self.derived is not None and len(self.derived.children):
            return (*self.path, self.derived._label, name)
        return (*self.path, name)


def format_path(path: Path) -> tuple[str, ...]:
    """Writes the segments of a path."""
    return tuple([part if isinstance(part, str) else part() for part in path])
