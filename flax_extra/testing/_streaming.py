"""``check_streaming``: checks that a pipeline gives block by block what it gives for the whole.

Plans are drawn: blocks, how many of their steps are valid in each row, and what happens to the rows
after a block. A plan runs on a stream, with NaN in all padding, and each block is compared with its
part of the whole sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra.combinator._core.arrays import split_arrays
from flax_extra.combinator._core.environment import StepCall, run_with_hook
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.stack import Stack, take
from flax_extra.combinator._stream.axes import Axes, find_axes
from flax_extra.combinator._views.record import record_run
from flax_extra.combinator._views.specs import CallShapes
from flax_extra.testing import _errors
from flax_extra.testing._plans import (
    CAPACITY_STEP,
    Block,
    Plan,
    Visit,
    cut_block,
    list_known_rows,
    list_visits,
    plans,
    zero_padding,
)
from flax_extra.testing._search import search


def check_streaming(
    f: Callable[..., Any],
    *specs: Any,
    variables: Any = None,
    context: Mapping[str, Any] | None = None,
    batch: str = "b",
    time: str = "t",
    sizes: Mapping[str, int] | None = None,
    gradients: bool = True,
    rtol: float | None = None,
    max_examples: int = 20,
) -> None:
    """Checks that a pipeline gives block by block what it gives for the whole sequence.

    Drawn are cuts into blocks, how many steps of a block are valid in each row, rows that are taken
    in another order, and rows that start anew. All padding is NaN: nothing of it may matter.
    Outputs are compared at every valid step; for some of the plans, gradients with respect to
    parameters and inputs, too.

    Args:
        f: a pipeline, a linen module, or any callable that could be a step of a pipeline.
        specs: its inputs, as for :func:`flax_extra.combinator.stream`: ``"f32[b, t, 8]"``.
        variables: its variables. By default it is initialized, and the parameters are moved away
            from their initial values: zeros would hide mistakes.
        context: context keywords of the call: specs for arrays, and values for others, such as
            ``{"deterministic": True}``.
        batch: the name of the batch in the specs.
        time: the name of time in the specs.
        sizes: the sizes of other names in the specs; 3 by default.
        gradients: whether to compare gradients, too.
        rtol: the largest difference of outputs, relative to their size or to 1; by default 1e-5, or
            1e-12 for float64. Gradients may differ ten times as much.
        max_examples: how many plans are drawn, at most.

    Returns:
        None.

    Raises:
        AssertionError: If an output or a gradient differs. It shows the smallest plan found, and
            names the first step of the pipeline that parts from the whole, and the block.
        StreamError: If the pipeline refuses to be streamed.

    Example:
        >>> from flax_extra import combinator as cb, layer as xn, testing
        >>> conv = cb.residual(xn.CausalConv(kernel_size=2))
        >>> testing.check_streaming(conv, "f32[b, t, 4]", max_examples=3)
        >>> centred = cb.serial(conv, lambda x: x - x.mean(axis=1, keepdims=True))
        >>> testing.check_streaming(centred, "f32[b, t, 4]", max_examples=3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: serial does not give block by block what it gives for the whole.
          The first step that parts is serial[1] -> <lambda>, at block 0: row 0, step 0, ...
    """
    stream = functools.partial(cb.stream, f, *specs, batch=batch, time=time, context=context)
    checker = _Checker(stream, sizes or {}, variables, rtol)

    def check(plan: Plan) -> None:
        checker.check_outputs(plan)
        if gradients and plan.has_gradients:
            checker.check_gradients(plan)

    try:
        search(plans(checker.takes_lengths, checker.can_reset), check, max_examples)
    except _Parted as parted:
        found = checker.locate(parted.plan) or str(parted)
        raise _errors.parted(get_name(f), found, str(parted.plan)) from None


class _Parted(AssertionError):
    """Blocks part from the whole."""

    def __init__(self, plan: Plan, text: str) -> None:
        super().__init__(text)
        self.plan = plan


class _Checker:
    """Runs plans on one pipeline. Streams and compiled programs are kept from plan to plan."""

    def __init__(
        self,
        make_stream: Callable[..., cb.Stream],
        sizes: Mapping[str, int],
        variables: Any,
        rtol: float | None,
    ) -> None:
        stream: cb.Stream = make_stream(capacity=CAPACITY_STEP)

        @functools.cache
        def get_stream(capacity: int) -> tuple[cb.Stream, Callable[..., Any]]:
            found = stream if capacity == CAPACITY_STEP else make_stream(capacity=capacity)
            return found, _quick_jit(found.step)

        self._get_stream = get_stream
        self._is_bounded = stream._room is not None
        self._rtol = rtol
        self._module = stream._module
        self._sizes = {name: sizes.get(name, 3) for name in stream._names}
        calls = [
            stream._shape_call(batch, time, self._sizes)
            for batch, time in ((2, CAPACITY_STEP), (3, CAPACITY_STEP), (2, 2 * CAPACITY_STEP))
        ]
        self._input_axes = _find_axes((call.items, call.context) for call in calls)
        self._run_whole = _quick_jit(self._apply)
        self._variables = _init(self._module, calls[0]) if variables is None else variables
        self._output_axes = _find_axes(map(self._trace_whole, calls))
        axes = [*self._input_axes, *self._output_axes]
        moves_rows = all(a.batch is not None for a in axes if a.time is not None)
        keeps_rate = all(a.rate == 1 for a in axes)
        self.takes_lengths = stream.takes_lengths and moves_rows and keeps_rate
        self.can_reset = stream.can_reset and moves_rows

    def check_outputs(self, plan: Plan) -> None:
        """Raises an error if an output differs at a valid step."""
        inputs = self._draw_inputs(plan)
        whole = self._run_whole(self._variables, *inputs)
        _, step = self._get_stream(self._get_capacity(plan))
        for visit, outputs in self._run_blocks(step, plan, self._variables, inputs):
            leaves = zip(jax.tree.leaves(whole), jax.tree.leaves(outputs), strict=True)
            for axes, (expected, found) in zip(self._output_axes, leaves, strict=True):
                difference = self._compare(expected, found, axes, visit, plan.capacity)
                if difference:
                    raise _Parted(plan, _errors.outputs_part(visit.index, difference))

    def check_gradients(self, plan: Plan) -> None:
        """Raises an error if a gradient with respect to parameters or inputs differs."""
        floats, merge = _split_floats((self._variables, self._draw_inputs(plan)))

        def weigh_blocks(floats: list[Any]) -> Any:
            variables, inputs = merge(floats)
            step = self._make_stream(plan).step
            runs = self._run_blocks(step, plan, variables, inputs)
            return sum(self._weigh(outputs, visit, plan.capacity) for visit, outputs in runs)

        def weigh_whole(floats: list[Any]) -> Any:
            variables, inputs = merge(floats)
            leaves = jax.tree.leaves(self._apply(variables, *inputs))
            pairs = list(zip(self._output_axes, leaves, strict=True))
            return sum(
                self._weigh(
                    [cut_block(axes, leaf, visit) for axes, leaf in pairs], visit, plan.capacity
                )
                for _, visit in list_visits(plan)
            )

        found, expected = (_quick_jit(jax.grad(f))(floats) for f in (weigh_blocks, weigh_whole))
        names = _name_floats(self._variables)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            rtol = 10 * self._get_rtol(one.dtype)
            largest = float(np.abs(other).max(initial=0))
            difference = np.abs(np.asarray(one) - np.asarray(other)).max(initial=0)
            if not difference <= rtol * max(1.0, largest):
                name = names[index] if index < len(names) else "an input"
                raise _Parted(plan, _errors.gradient_parts(name, float(difference), largest))

    def locate(self, plan: Plan) -> str | None:
        """Describes the first step of the pipeline that parts, and the block. None if none does.

        Steps within a loop over time cannot be compared; the loop is.
        """
        if not isinstance(self._module, cb.Combinator):
            return None
        inputs = self._draw_inputs(plan)
        step_axes = self._find_step_axes(plan)
        arrays = jax.tree.map(jnp.asarray, inputs)
        whole, _ = _record_steps(functools.partial(self._apply, self._variables, *arrays))
        stream = self._make_stream(plan)
        state = stream.start(plan.batch, **self._sizes)
        for block, visit in list_visits(plan):
            run = functools.partial(self._step, stream.step, state, block, visit, inputs)
            found, (next_state, _) = _record_steps(run)
            for key, (path, expected) in whole.items():
                leaves = zip(expected, found.get(key, (path, ()))[1], strict=False)
                for axes, (one, other) in zip(step_axes.get(key[0], ()), leaves, strict=False):
                    difference = self._compare(one, other, axes, visit, plan.capacity)
                    if difference:
                        return _errors.first_step(" -> ".join(path), visit.index, difference)
            state = _move_rows(stream, next_state, block)
        return None

    # Running

    def _make_stream(self, plan: Plan) -> cb.Stream:
        stream, _ = self._get_stream(self._get_capacity(plan))
        return stream

    def _get_capacity(self, plan: Plan) -> int:
        """Returns the capacity for a plan: the same for all, if the stream never ends."""
        return plan.capacity if self._is_bounded else CAPACITY_STEP

    def _apply(self, variables: Any, items: Stack, context: Mapping[str, Any]) -> Any:
        return self._module.apply(variables, *items, **context)

    def _trace_whole(self, call: CallShapes) -> Any:
        shapes, merge = split_arrays((call.items, dict(call.context)))
        return jax.eval_shape(lambda x: self._apply(self._variables, *merge(x)), shapes)

    def _run_blocks(
        self,
        step: Callable[..., Any],
        plan: Plan,
        variables: Any,
        inputs: tuple[Stack, Mapping[str, Any]],
    ) -> Iterator[tuple[Visit, Any]]:
        stream = self._make_stream(plan)
        state = stream.start(plan.batch, **self._sizes)
        for block, visit in list_visits(plan):
            state, outputs = self._step(step, state, block, visit, inputs, variables)
            yield visit, outputs
            state = _move_rows(stream, state, block)

    def _step(
        self,
        step: Callable[..., Any],
        state: Any,
        block: Block,
        visit: Visit,
        inputs: tuple[Stack, Mapping[str, Any]],
        variables: Any = None,
    ) -> tuple[Any, Any]:
        items, context = self._cut_inputs(inputs, visit)
        lengths = None if block.lengths is None else jnp.asarray(block.lengths)
        variables = self._variables if variables is None else variables
        result: tuple[Any, Any] = step(variables, state, *items, lengths=lengths, **context)
        return result

    def _cut_inputs(self, inputs: Any, visit: Visit) -> Any:
        """Cuts the block of a visit out of the inputs. All padding is NaN."""
        arrays, merge = split_arrays(inputs)
        fills = (jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in arrays)
        return merge(
            jnp.asarray(cut_block(axes, x, visit, fill))
            for axes, x, fill in zip(self._input_axes, arrays, fills, strict=True)
        )

    def _draw_inputs(self, plan: Plan) -> tuple[Stack, Mapping[str, Any]]:
        """Draws inputs for the whole sequence."""
        call = self._make_stream(plan)._shape_call(plan.batch, plan.capacity, self._sizes)
        shapes, merge = split_arrays((call.items, dict(call.context)))
        random = np.random.default_rng(plan.seed)
        inputs: tuple[Stack, Mapping[str, Any]] = merge(_draw(random, x) for x in shapes)
        return inputs

    # Comparing

    def _compare(self, whole: Any, block: Any, axes: Axes, visit: Visit, capacity: int) -> str:
        """Describes where a block differs from its part of the whole; empty if it does not."""
        expected, found = cut_block(axes, np.asarray(whole), visit), np.asarray(block)
        if found.shape != expected.shape:
            return _errors.shapes_part(str(expected.shape), str(found.shape))
        rtol = self._get_rtol(expected.dtype)
        is_close = np.isclose(found, expected, rtol=rtol, atol=rtol, equal_nan=False)
        for row in list_known_rows(axes, visit, capacity):
            index: list[Any] = [slice(None)] * found.ndim
            if axes.batch is not None:
                index[axes.batch] = row
            n_steps = visit.lengths[row] * axes.rate
            for step in range(1 if axes.time is None else n_steps):
                if axes.time is not None:
                    index[axes.time] = step
                at = tuple(index)
                if not is_close[at].all():
                    wrong = np.flatnonzero(~is_close[at].reshape(-1))[0]
                    pair = (float(x[at].reshape(-1)[wrong]) for x in (expected, found))
                    return _errors.values_part(row, step, *pair)
        return ""

    def _weigh(self, outputs: Any, visit: Visit, capacity: int) -> Any:
        """Sums the valid outputs of a block, each with a weight of its own."""
        total: Any = 0.0
        for axes, leaf in zip(self._output_axes, jax.tree.leaves(outputs), strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                continue
            if axes.time is None and len(list_known_rows(axes, visit, capacity)) < len(visit.order):
                continue
            weights = jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
            total = total + jnp.sum(zero_padding(axes, leaf, visit) * weights)
        return total

    def _get_rtol(self, dtype: Any) -> float:
        if self._rtol is not None:
            return self._rtol
        return 1e-12 if dtype == np.float64 else 1e-5

    def _find_step_axes(self, plan: Plan) -> Mapping[tuple[int, ...], list[Axes]]:
        """Finds the axes of the outputs of each step."""
        stream = self._make_stream(plan)
        records = [
            {step.position: step.outputs for step in record_run(self._module, call).root.steps()}
            for call in (
                stream._shape_call(batch, time, self._sizes)
                for batch, time in (
                    (2, CAPACITY_STEP),
                    (3, CAPACITY_STEP),
                    (2, 2 * CAPACITY_STEP),
                )
            )
        ]
        return {
            position: _find_axes(record[position] for record in records) for position in records[0]
        }


def _record_steps(
    run: Callable[[], Any],
) -> tuple[dict[tuple[tuple[int, ...], int], tuple[tuple[str, ...], list[Any]]], Any]:
    """Records the outputs of each step of a pipeline as it runs, those within loops, too.

    Returns:
        For each step (its position, and how often it has run before): its path, and the arrays
        among its outputs, in the order in which they were computed. And what ``run`` returns.
    """
    found: dict[Any, Any] = {}
    counts: dict[tuple[int, ...], int] = {}

    def keep(position: tuple[int, ...], path: tuple[str, ...], *arrays: Any) -> None:
        count = counts[position] = counts.get(position, -1) + 1
        found[position, count] = path, list(map(np.asarray, arrays))

    def hook(step: StepCall, run_step: Callable[[], Stack]) -> Stack:
        after = run_step()
        outputs, _ = take(after, step.child.signature.n_out)
        arrays, _ = split_arrays(outputs)
        if not step.is_wiring:
            jax.debug.callback(functools.partial(keep, step.position, step.path), *arrays)
        return after

    result = run_with_hook(hook, run)
    jax.effects_barrier()  # type: ignore[no-untyped-call]
    return found, result


def _find_axes(trees: Iterable[Any]) -> list[Axes]:
    """Finds axes from two rows, three rows, and two rows with as many steps again."""
    two, three, longer = trees
    return find_axes(two, three, longer, CAPACITY_STEP)


def _move_rows(stream: cb.Stream, state: Any, block: Block) -> Any:
    if block.rows is not None:
        state = stream.take(state, jnp.asarray(block.rows))
    if block.reset:
        state = stream.reset(state, jnp.asarray(block.reset))
    return state


def _init(module: nn.Module, call: CallShapes) -> dict[str, Any]:
    """Initializes a module, and moves its parameters away from zeros."""
    random = np.random.default_rng(0)
    shapes, merge = split_arrays((call.items, dict(call.context)))

    def init(arrays: list[Any]) -> Any:
        items, context = merge(arrays)
        return module.init(jax.random.key(0), *items, **context)

    variables = dict(_quick_jit(init)([_draw(random, x) for x in shapes]))
    variables["params"] = jax.tree.map(
        lambda x: _move_away(random, x) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        variables.get("params", {}),
    )
    return variables


def _move_away(random: np.random.Generator, x: Any) -> Any:
    return jnp.asarray(np.asarray(x) + np.asarray(0.1 * _draw(random, x), x.dtype))


def _draw(random: np.random.Generator, like: Any) -> Any:
    if jnp.issubdtype(like.dtype, jnp.inexact):
        return random.normal(size=like.shape).astype(like.dtype)
    if like.dtype == bool:
        return random.random(size=like.shape) < 0.5  # noqa: PLR2004
    return random.integers(0, 4, size=like.shape).astype(like.dtype)


def _quick_jit(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function without optimizing it: each program runs a few times."""
    options = {"xla_backend_optimization_level": 0}
    compiled: Callable[..., Any] = jax.jit(f, compiler_options=options)
    return compiled


def _split_floats(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Splits the floating-point arrays of a pytree from the rest."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [
        hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves
    ]

    def merge(floats: Sequence[Any]) -> Any:
        remaining = iter(floats)
        merged = [next(remaining) if f else leaf for f, leaf in zip(is_float, leaves, strict=True)]
        return jax.tree.unflatten(structure, merged)

    return [leaf for f, leaf in zip(is_float, leaves, strict=True) if f], merge


def _name_floats(variables: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
