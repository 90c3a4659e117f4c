"""What is on the stack between the steps of a pipeline, found without computing anything.

A pipeline is initialised under ``jax.eval_shape`` while its steps are watched. Shape signatures,
summaries and diagrams read what is recorded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from flax_extra.combinator._base import Combinator
from flax_extra.combinator._frame import Visit, Watch, watched
from flax_extra.combinator._inference import is_combinator, name_of
from flax_extra.combinator._leaf import fn
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._specs import abstract, abstract_value
from flax_extra.combinator._stack import Missing, Stack, flatten, take


@dataclasses.dataclass
class Record:
    """One step of a pipeline, as it ran.

    Args:
        position: the indices of children that lead to it from the outermost pipeline.
        path: the same for people to read.
        target: the callable.
        signature: how many items it takes and gives.
        before: the whole stack that it found, top first: ``jax.ShapeDtypeStruct`` for arrays.
        after: the whole stack that it left; None if it failed.
        modules: paths, in the parameter tree, of the modules that it uses.
        error: what it raised.
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
    children: list[Record] = dataclasses.field(default_factory=list)

    @property
    def taken(self) -> Stack:
        """The items that it took."""
        return take(self.before, self.signature.n_in)[0]

    @property
    def given(self) -> Stack:
        """The items that it gave; none if it failed."""
        return take(self.after or (), self.signature.n_out)[0]

    def steps(self) -> Iterator[Record]:
        """The steps within, each before those within it."""
        for child in self.children:
            yield child
            yield from child.steps()

    def leaves(self) -> Iterator[Record]:
        """The steps that have no steps within, in the order in which they ran."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


@dataclasses.dataclass(frozen=True)
class Recording:
    """A pipeline's run on specs.

    Args:
        root: the pipeline as a step.
        variables: the collections of variables that it made, as shapes; none if it failed.
    """

    root: Record
    variables: Mapping[str, Any]

    @property
    def error(self) -> Exception | None:
        """What stopped the run, if anything did."""
        return self.root.error


def record(f: Callable[..., Any], specs: tuple[Any, ...], context: Mapping[str, Any]) -> Recording:
    """Runs a pipeline, or any callable, on specs. What it raises is in the recording."""
    pipeline = as_pipeline(f)
    items = abstract(specs)
    root = Record((), (name_of(f),), f, pipeline.signature, items)
    leaves, tree = jax.tree_util.tree_flatten(items)
    is_array = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    arrays = [leaf for leaf, traced in zip(leaves, is_array, strict=True) if traced]

    def run(key: jax.Array, arrays: list[jax.Array]) -> Any:
        given = iter(arrays)
        merged = [next(given) if t else leaf for leaf, t in zip(leaves, is_array, strict=True)]
        inputs = jax.tree.unflatten(tree, merged)
        outputs, variables = pipeline.init_with_output(key, *inputs, **context)
        root.after = tuple(map(abstract_value, flatten(outputs)))
        return variables

    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        variables = watched(_recorder(root), lambda: jax.eval_shape(run, key, arrays))
    except Exception as error:
        root.error, root.after, variables = error, None, {}
    return Recording(root, variables)


def as_pipeline(f: Callable[..., Any]) -> Combinator:
    """The pipeline itself, bound to nothing; any other callable as a pipeline."""
    pipeline = f if isinstance(f, Combinator) else fn(f)
    if pipeline.parent is None and pipeline.scope is None:
        return pipeline
    clones: dict[int, nn.Module] = {}

    def unbound(module: nn.Module) -> nn.Module:  # one that waits in a setup has a parent, too
        return clones.setdefault(id(module), module.clone(parent=None, _deep_clone=True))

    return pipeline.clone(parent=None, children=pipeline.children.with_modules(unbound))


def _recorder(root: Record) -> Watch:
    records = {root.position: root}
    declaring = set() if is_combinator(root.target) and root.target.is_visible else {root.position}

    def watch(visit: Visit, step: Callable[[], Stack]) -> Stack:
        if visit.is_wiring:
            return watch_wiring(visit, step)
        owner = records[visit.position[:-1]]
        if _declares(visit.child.target):
            declaring.add(visit.position)
        if visit.position[:-1] in declaring:  # what `fn` and `typed` hold is the same step
            owner.path, owner.modules = visit.path, _modules(visit)
            records[visit.position] = owner
            return step()
        # A loop may run its body more than once: the last time counts.
        owner.children[:] = [c for c in owner.children if c.position != visit.position]
        record = records[visit.position] = _record_of(visit)
        owner.children.append(record)
        return run(record, step)

    def watch_wiring(visit: Visit, step: Callable[[], Stack]) -> Stack:
        """What a derived combinator is made of is a step if it fails, and nothing in it has."""
        try:
            return step()
        except Exception as error:
            owner = records[visit.position]
            has_parts = len(getattr(owner.target, "children", ())) > 0
            if has_parts and all(part.error is not error for part in owner.steps()):
                owner.children.append(dataclasses.replace(_record_of(visit), error=error))
            raise

    def run(record: Record, step: Callable[[], Stack]) -> Stack:
        try:
            after = step()
        except Exception as error:
            record.error = error
            raise
        record.after = _present(after)
        return after

    return watch


def _record_of(visit: Visit) -> Record:
    child = visit.child
    return Record(
        visit.position,
        visit.path,
        child.target,
        child.signature,
        _present(visit.stack),
        modules=_modules(visit),
    )


def _modules(visit: Visit) -> tuple[tuple[str, ...], ...]:
    return () if visit.module is None else (tuple(visit.module.path),)


def _present(stack: Stack) -> Stack:
    return tuple(abstract_value(item) for item in stack if not isinstance(item, Missing))


def _declares(target: Callable[..., Any]) -> bool:
    return isinstance(target, Combinator) and not target.is_visible
