"""What is on the stack between the steps of a pipeline, found without computing anything.

A pipeline is initialised under ``jax.eval_shape`` while a hook sees each step. Shape signatures,
summaries and diagrams read the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeAlias

import jax
from flax import linen as nn

from flax_extra.combinator._core.arrays import get_key_shape, split_arrays
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.environment import StepCall, run_with_hook
from flax_extra.combinator._core.linen import clone_without_scope
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import Missing, Stack, flatten, take
from flax_extra.combinator._views.specs import CallShapes, to_shapes
from flax_extra.combinator._words.fn import fn

RunStep: TypeAlias = Callable[[], Stack]
"""The step itself, which the hook calls: it returns the stack after the step."""


@dataclasses.dataclass
class StepRecord:
    """One step of a pipeline, as it ran.

    Args:
        position: the indices of children that lead to it from the outermost pipeline.
        path: the same for people to read.
        target: the callable.
        signature: how many items it takes and gives.
        before: the whole stack that it found, top first: ``jax.ShapeDtypeStruct`` for arrays.
        after: the whole stack that it left; None if it failed.
        modules: paths, in the parameter tree, of the modules that it uses.
        error: the exception that it raised, if it did.
        children: the steps within.
    """

    position: tuple[int, ...]
    path: tuple[str, ...]
    target: Callable[..., Any]
    signature: Signature
    before: Stack
    after: Stack | None = None
    modules: tuple[tuple[str, ...], ...] = ()
    error: Exception | None = None
    children: list[Self] = dataclasses.field(default_factory=list)

    @property
    def inputs(self) -> Stack:
        """The items that it took."""
        return take(self.before, self.signature.n_in)[0]

    @property
    def outputs(self) -> Stack:
        """The items that it gave; none if it failed."""
        return take(self.after or (), self.signature.n_out)[0]

    def steps(self) -> Iterator[Self]:
        """Yields the steps within, each before those within it."""
        for child in self.children:
            yield child
            yield from child.steps()

    def leaves(self) -> Iterator[Self]:
        """Yields the steps that have no steps within, in the order in which they ran."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run of a pipeline on specs.

    Args:
        root: the pipeline as a step.
        variables: the collections of variables that it made, as shapes; empty if it failed.
        call: the inputs of the run.
    """

    root: StepRecord
    variables: Mapping[str, Any]
    call: CallShapes

    @property
    def error(self) -> Exception | None:
        """The exception that stopped the run, if one did."""
        return self.root.error


def record_run(f: Callable[..., Any], call: CallShapes) -> RunRecord:
    """Runs a pipeline, or any callable, on shapes. An exception goes into the record."""
    pipeline = to_pipeline(f)
    root = StepRecord((), (get_name(f),), f, pipeline.signature, call.items)
    shapes, merge = split_arrays((call.items, call.context))

    def run(key: jax.Array, arrays: list[jax.Array]) -> Any:
        items, context = merge(arrays)
        outputs, variables = pipeline.init_with_output(key, *items, **context)
        root.after = tuple(map(to_shapes, flatten(outputs)))
        return variables

    try:
        variables = run_with_hook(
            _Recorder(root).run, lambda: jax.eval_shape(run, get_key_shape(), shapes)
        )
    except Exception as error:
        root.error, root.after, variables = error, None, {}
    return RunRecord(root, variables, call)


def to_pipeline(f: Callable[..., Any]) -> Combinator:
    """Returns any callable as a pipeline that is bound to nothing."""
    pipeline = f if isinstance(f, Combinator) else fn(f)
    if pipeline.parent is None and pipeline.scope is None:
        return pipeline
    clones: dict[int, nn.Module] = {}

    def clone(module: nn.Module) -> nn.Module:  # one that waits in a setup has a parent, too
        return clones.setdefault(id(module), clone_without_scope(module))

    return pipeline.clone(parent=None, children=pipeline.children.replace_modules(clone))


class _Recorder:
    """Records the steps of one run; :meth:`run` is the hook."""

    def __init__(self, root: StepRecord) -> None:
        self._records = {root.position: root}
        # `fn` and `typed` only declare: the callable that they hold is the same step.
        is_declared = not isinstance(root.target, Combinator) or _declares(root.target)
        self._declaring = {root.position} if is_declared else set()

    def run(self, step: StepCall, run_step: RunStep) -> Stack:
        if step.is_wiring:
            return self._run_wiring(step, run_step)
        owner = self._records[step.position[:-1]]
        if _declares(step.child.target):
            self._declaring.add(step.position)
        if step.position[:-1] in self._declaring:
            owner.path, owner.modules = step.path, _get_module_paths(step)
            self._records[step.position] = owner
            return run_step()
        # A loop may run its body more than once: the last run counts.
        owner.children[:] = [c for c in owner.children if c.position != step.position]
        record = self._records[step.position] = _make_record(step)
        owner.children.append(record)
        try:
            after = run_step()
        except Exception as error:
            record.error = error
            raise
        record.after = _drop_missing(after)
        return after

    def _run_wiring(self, step: StepCall, run_step: RunStep) -> Stack:
        """Runs a step of an expansion. It is recorded if it fails and none within it did."""
        try:
            return run_step()
        except Exception as error:
            owner = self._records[step.position]
            has_parts = len(getattr(owner.target, "children", ())) > 0
            if has_parts and all(part.error is not error for part in owner.steps()):
                owner.children.append(dataclasses.replace(_make_record(step), error=error))
            raise


def _make_record(step: StepCall) -> StepRecord:
    return StepRecord(
        step.position,
        step.path,
        step.child.target,
        step.child.signature,
        _drop_missing(step.stack),
        modules=_get_module_paths(step),
    )


def _get_module_paths(step: StepCall) -> tuple[tuple[str, ...], ...]:
    return () if step.module is None else (tuple(step.module.path),)


def _drop_missing(stack: Stack) -> Stack:
    return tuple(to_shapes(item) for item in stack if not isinstance(item, Missing))


def _declares(target: Callable[..., Any]) -> bool:
    return isinstance(target, Combinator) and not target._is_visible
