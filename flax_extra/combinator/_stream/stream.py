"""``stream``: a pipeline that runs block by block, as a value.

A stream knows the shapes of its state before there are arrays: it initializes the pipeline on
shapes with ``decode=True``, at the full length of the capacity. Two batch sizes show which axis of
the state, and of the outputs, is the batch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, export

from flax_extra.combinator._cache.cache import (
    COLLECTION,
    LOST,
    check_lengths,
    has_capacity,
    is_known,
)
from flax_extra.combinator._core import stream_errors
from flax_extra.combinator._core.arrays import split_arrays
from flax_extra.combinator._core.checks import as_integer, check_at_least
from flax_extra.combinator._core.children import make_child
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.expression import format_short
from flax_extra.combinator._core.linen import unfreeze
from flax_extra.combinator._core.stack import flatten
from flax_extra.combinator._core.tracebacks import api_boundary
from flax_extra.combinator._stream.axes import Axes, find_axes
from flax_extra.combinator._stream.probe import Run, run_init, run_step
from flax_extra.combinator._stream.rules import check_layers, list_without_lengths
from flax_extra.combinator._stream.sizes import read_sizes
from flax_extra.combinator._views.specs import (
    CallShapes,
    are_satisfied,
    find_dimension_names,
    parse_call,
    substitute_sizes,
)
from flax_extra.combinator._words.compose import serial


@dataclasses.dataclass(frozen=True)
class StreamState:
    """What a stream remembers: a pytree of arrays. See :func:`stream`.

    Args:
        cache: the state of the layers, the collection ``"cache"``.
        position: how many steps each row has taken, ``[batch]``.
        sizes: the sizes with which it was started, other than the batch.
    """

    cache: Any
    position: Array
    sizes: tuple[tuple[str, int], ...] = ()


jax.tree_util.register_dataclass(
    StreamState, data_fields=["cache", "position"], meta_fields=["sizes"]
)


def _pack_sizes(auxiliary: tuple[Any, ...]) -> bytes:
    return json.dumps(auxiliary).encode()


def _unpack_sizes(data: bytes) -> tuple[Any, ...]:
    (sizes,) = json.loads(data)
    return (tuple((name, size) for name, size in sizes),)


export.register_pytree_node_serialization(
    StreamState,
    serialized_name="flax_extra.combinator.StreamState",
    serialize_auxdata=_pack_sizes,
    deserialize_auxdata=_unpack_sizes,
)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The shapes of a state for two rows, and the axis of the batch in each array.

    An axis is -1 if there is none.
    """

    state: Any
    state_axes: Any
    output_axes: Any


class Stream:
    """A pipeline that runs block by block. See :func:`stream`."""

    def __init__(
        self,
        pipeline: Callable[..., Any],
        call: CallShapes,
        capacity: int | None,
        batch: str,
        time: str,
    ) -> None:
        self.pipeline = pipeline
        self.capacity = capacity
        self._module: nn.Module = pipeline if isinstance(pipeline, nn.Module) else serial(pipeline)
        self._call = call
        self._batch, self._time = batch, time
        self._keywords = make_child(pipeline).call_spec.keywords
        self._layouts: dict[tuple[tuple[str, int], ...], _Layout] = {}
        self._names = [
            name
            for name in find_dimension_names((*call.items, *call.context.values()))
            if name not in (batch, time)
        ]
        self._check()

    def __repr__(self) -> str:
        inputs = ", ".join(repr(describe_item(item)) for item in self._call.items)
        capacity = "" if self.capacity is None else f", capacity={self.capacity}"
        return f"stream({format_short(self.pipeline)}, {inputs}{capacity})"

    @property
    def room(self) -> int | None:
        """How many steps a row can take; None if the stream never ends."""
        return self._room

    @property
    def takes_lengths(self) -> bool:
        """Whether rows may have lengths of their own: every layer that remembers takes them."""
        return not self._without_lengths

    @property
    def can_reset(self) -> bool:
        """Whether rows may start anew by themselves: every state has rows."""
        layout = self._find_layout(self._tried)
        return all(axis >= 0 for axis in jax.tree.leaves(layout.state_axes))

    # What people call

    def start(self, batch: Any = None, **sizes: int) -> StreamState:
        """Returns the state at the start of a stream: zeros.

        Args:
            batch: how many rows there are.
            sizes: the sizes of other names in the specs.

        Raises:
            TypeError: If a size is missing, or a name is not in the specs.
        """
        zeros: StreamState = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.state_shapes(batch, **sizes)
        )
        return zeros

    def state_shapes(self, batch: Any = None, **sizes: int) -> StreamState:
        """Returns the state with ``jax.ShapeDtypeStruct`` in place of arrays.

        Args:
            batch: how many rows there are; a symbolic dimension serves, too, as for ``jax.export``.
            sizes: the sizes of other names in the specs.

        Raises:
            TypeError: If a size is missing, or a name is not in the specs.
        """
        missing = [name for name in self._names if name not in sizes]
        if batch is None or missing:
            names = [*([self._batch] if batch is None else []), *missing]
            raise stream_errors.missing_sizes(names, self._batch)
        if sizes.keys() - self._names:
            raise stream_errors.unknown_sizes(sorted(sizes), self._names)
        key = tuple(sorted(sizes.items()))
        layout = self._find_layout(key)
        cache = jax.tree.map(
            lambda leaf, axis: _resize(leaf, axis, batch), layout.state, layout.state_axes
        )
        position: Any = _struct((batch,), jnp.int32)
        return StreamState(cache, position, key)

    @api_boundary
    def step(
        self,
        variables: Mapping[str, Any],
        state: StreamState,
        *inputs: Any,
        lengths: Any = None,
        rngs: Any = None,
        **context: Any,
    ) -> tuple[StreamState, Any]:
        """Runs the next block.

        Args:
            variables: the variables of the pipeline, such as ``{"params": ...}``.
            state: the state that :meth:`start`, or the last step, gave.
            inputs: the block: one array for each spec, of any length of time.
            lengths: how many steps of the block are valid in each row, ``[batch]``; all by default.
                A row of length 0 stands still. What is padding changes nothing.
            rngs: keys for layers that draw random numbers, as in ``apply``.
            context: context keywords of the pipeline.

        Returns:
            The next state, and the outputs. If a row cannot go on, because it has run over the
            capacity or its length is not in the block, its outputs are NaN from there on.

        Raises:
            StreamError: If a row is known to run over the capacity, or the state is not one of this
                stream or has other rows than the inputs.
            TypeError: If ``state`` is no state.
            ValueError: If the inputs or lengths are not such as the specs say.
        """
        if not isinstance(state, StreamState):
            raise stream_errors.not_a_state(type(state).__name__)
        if "decode" in context:
            raise stream_errors.decode_in_step(describe_item(context["decode"]))
        sizes = read_sizes(self._call.items, flatten(inputs))
        if sizes.get(self._time, 0) == 0:
            raise stream_errors.empty_block(
                describe_stack(self._call.items), describe_stack(flatten(inputs))
            )
        rows, time = state.position.shape[0], sizes[self._time]
        if sizes.get(self._batch, rows) != rows:
            raise stream_errors.other_rows(rows, sizes[self._batch])
        self._check_state(state)
        lengths = self._check_lengths(lengths, rows, time)
        self._check_room(state.position, time, lengths)
        keywords = {**context, **self._stream_keywords(lengths)}
        inputs = self._zero_padding(inputs, lengths)
        cache = state.cache
        if cache:
            outputs, changed = self._module.apply(
                {**variables, COLLECTION: cache},
                *inputs,
                rngs=rngs,
                mutable=[COLLECTION],
                **keywords,
            )
            cache = unfreeze(changed)[COLLECTION]
        else:
            outputs = self._module.apply(dict(variables), *inputs, rngs=rngs, **keywords)
        position, is_lost = self._move_on(state.position, time, lengths)
        layout = self._find_layout(state.sizes)
        outputs = jax.tree.map(
            lambda leaf, axis: _lose_rows(leaf, axis, is_lost), outputs, layout.output_axes
        )
        return StreamState(cache, position, state.sizes), outputs

    def take(self, state: StreamState, rows: Any) -> StreamState:
        """Takes rows of a state, in any order and number: for beams, and for finished rows.

        Args:
            state: the state.
            rows: the indices of rows, ``[n]``.

        Returns:
            A state of n rows. A row that is out of range, in a compiled program, gives NaN.

        Raises:
            ValueError: If the rows are not integers on one axis, or are known to be out of range.
        """
        rows = self._check_rows(state, _as_rows(rows))
        axes = self._find_layout(state.sizes).state_axes
        cache = jax.tree.map(lambda leaf, axis: _take_rows(leaf, axis, rows), state.cache, axes)
        return StreamState(cache, _take_rows(state.position, 0, rows), state.sizes)

    def reset(self, state: StreamState, rows: Any) -> StreamState:
        """Starts some rows anew; the others go on.

        Args:
            state: the state.
            rows: the indices of rows, ``[n]``, or a boolean for each row, ``[batch]``.

        Raises:
            StreamError: If a layer keeps one state for all rows.
            ValueError: If the rows are neither, or are known to be out of range.
        """
        axes = self._find_layout(state.sizes).state_axes
        self._check_each_row(axes)
        n_rows = state.position.shape[0]
        rows = _as_rows(rows)
        if rows.dtype == bool:
            if rows.shape != (n_rows,):
                raise stream_errors.wrong_rows_to_reset(describe_item(rows), n_rows)
            is_reset = rows
        else:
            rows = self._check_rows(state, rows)
            is_reset = jnp.zeros((n_rows,), bool).at[rows].set(True, mode="drop")
        cache = jax.tree.map(lambda leaf, axis: _clear(leaf, axis, is_reset), state.cache, axes)
        return StreamState(cache, _clear(state.position, 0, is_reset), state.sizes)

    def position(self, state: StreamState) -> Array:
        """Returns how many steps each row has taken, ``[batch]``; -1 for one that is lost.

        A row is lost that was given a length outside of its block.
        """
        return jnp.where(state.position >= LOST, -1, state.position)

    # Checks of a call

    def _check_state(self, state: StreamState) -> None:
        """Raises an error if a state has other shapes than one that this stream starts."""
        expected = self.state_shapes(state.position.shape[0], **dict(state.sizes))
        known = dict(jax.tree_util.tree_leaves_with_path(expected))
        found = dict(jax.tree_util.tree_leaves_with_path(state))
        for path in [*known, *found]:
            one, other = (
                describe_item(_to_struct(leaves[path])) if path in leaves else "absent"
                for leaves in (known, found)
            )
            if one != other:
                raise stream_errors.other_stream(_format_path(path), one, other)

    def _check_lengths(self, lengths: Any, rows: Any, time: Any) -> Array | None:
        if lengths is None:
            return None
        if self._without_lengths:
            raise stream_errors.no_lengths(self._without_lengths)
        return check_lengths("The stream", lengths, rows, time)

    def _check_room(self, position: Array, time: Any, lengths: Array | None) -> None:
        """Raises an error if a row is known to run over the capacity."""
        if self._room is None:
            return
        if lengths is None and isinstance(time, int) and time > self._room:
            raise stream_errors.block_over_capacity(time, self._room)
        end = position + (time if lengths is None else lengths)
        if not is_known(end):
            return
        is_over = (end > self._room) & (position < LOST)  # a row that is lost stays NaN
        over = np.flatnonzero(np.asarray(is_over)).tolist()
        if over:
            places = [(row, int(position[row])) for row in over]
            raise stream_errors.full_stream(places, time, self._room)

    def _check_rows(self, state: StreamState, rows: Array) -> Array:
        """Returns rows; those out of range, if that is not known, beyond the last."""
        n_rows = state.position.shape[0]
        if not jnp.issubdtype(rows.dtype, jnp.integer) or rows.ndim != 1:
            raise stream_errors.wrong_rows(describe_item(rows))
        if is_known(rows) and isinstance(n_rows, int):
            beyond = [row for row in np.asarray(rows).tolist() if not 0 <= row < n_rows]
            if beyond:
                raise stream_errors.rows_out_of_range(beyond, n_rows)
        return jnp.where(rows < 0, n_rows, rows)  # JAX would count them from the end

    def _stream_keywords(self, lengths: Any) -> dict[str, Any]:
        keywords: dict[str, Any] = {"decode": True} if "decode" in self._keywords else {}
        if lengths is not None and "lengths" in self._keywords:
            keywords["lengths"] = lengths
        return keywords

    def _zero_padding(self, inputs: Any, lengths: Array | None) -> Any:
        """Puts zeros in the padding, which may be NaN: no gradient can then come from there."""
        if lengths is None:
            return inputs

        def zero(axes: Axes, x: Any) -> Any:
            if axes.batch is None or axes.time is None or not jnp.issubdtype(x.dtype, jnp.inexact):
                return x
            steps = jnp.arange(x.shape[axes.time], dtype=jnp.int32)
            is_valid = steps[None] < lengths[:, None] * axes.rate
            if axes.batch > axes.time:
                is_valid = is_valid.T
            others = [axis for axis in range(x.ndim) if axis not in (axes.batch, axes.time)]
            return jnp.where(jnp.expand_dims(is_valid, others), x, jnp.zeros((), x.dtype))

        remaining = iter(self._input_axes)

        def zero_item(item: Any) -> Any:
            if type(item) is tuple:  # several items
                return tuple(map(zero_item, item))
            axes = next(remaining)
            arrays, merge = split_arrays(item)  # an item that a layer remembers may be None
            return merge(map(zero, axes, arrays))

        return zero_item(inputs)

    def _move_on(self, position: Array, time: Any, lengths: Array | None) -> tuple[Array, Array]:
        """Returns the next position of each row, and which rows cannot go on."""
        is_lost = position >= LOST
        if lengths is not None:
            is_lost |= (lengths < 0) | (lengths > time)
        position = jnp.where(is_lost, LOST, position + (time if lengths is None else lengths))
        return position, is_lost if self._room is None else position > self._room

    # What is known of the pipeline

    def _check(self) -> None:
        """Raises an error if the pipeline cannot run block by block."""
        items = (*self._call.items, *self._call.context.values())
        for name, kind in ((self._time, "time"), (self._batch, "batch")):
            if name not in find_dimension_names(items):
                raise stream_errors.no_such_name(describe_stack(self._call.items), name, kind)
        time = self.capacity or 1
        others = self._choose_sizes(time)
        run = self._run(2, time, others)
        calls = (self._shape_call(*size, others) for size in ((2, time), (3, time), (2, time + 1)))
        self._input_axes = [
            find_axes(*items) for items in zip(*(c.items for c in calls), strict=True)
        ]
        other_time, other = self._run_other_length(time, others)
        check_layers(run, other)
        self._room = self._find_room(run, other, is_longer=other_time > time)
        self._without_lengths = list_without_lengths(run, time)
        self._tried = tuple(sorted(others.items()))
        self._find_layout(self._tried)
        self._check_step(run, min(time, other_time), others)

    def _choose_sizes(self, time: int) -> dict[str, int]:
        """Chooses sizes for the names other than batch and time, to try the pipeline with."""
        for size in (4, *range(1, 65)):
            others = dict.fromkeys(self._names, size)
            sizes = {self._batch: 2, self._time: time, **others}
            if are_satisfied(self._call.constraints, sizes):
                return others
        raise stream_errors.unsatisfied(" and ".join(self._call.constraints), time)

    def _run(self, batch: int, time: int, others: Mapping[str, int]) -> Run:
        call = self._shape_call(batch, time, others)
        lengths = _struct((batch,), jnp.int32)
        token = has_capacity.set(self.capacity is not None)
        try:
            return run_init(self._module, call, self._stream_keywords(lengths))
        finally:
            has_capacity.reset(token)

    def _shape_call(self, batch: int, time: int, others: Mapping[str, int]) -> CallShapes:
        sizes = {self._batch: batch, self._time: time, **others}
        items, context = substitute_sizes((self._call.items, dict(self._call.context)), sizes)
        return CallShapes(items, context)

    def _run_other_length(self, time: int, others: Mapping[str, int]) -> tuple[int, Run]:
        """Runs another length of time: a longer one, unless the pipeline has a most."""
        lengths = [2 * time, *([max(1, time // 2)] if time > 1 else [])]
        for length in lengths[:-1]:
            try:
                return length, self._run(2, length, others)
            except Exception:  # noqa: S112  # it may end at the capacity, as learned positions do
                continue
        return lengths[-1], self._run(2, lengths[-1], others)

    def _find_room(self, run: Run, other: Run, is_longer: bool) -> int | None:
        """Returns how many steps there is room for; None if the stream never ends."""
        longer = dict(jax.tree_util.tree_leaves_with_path(other.state))
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.state):
            if path in longer and longer[path].shape != leaf.shape:
                if self.capacity is None:
                    found, more = describe_item(leaf), describe_item(longer[path])
                    raise stream_errors.needs_capacity(_format_path(path), found, more)
                return self.capacity
        return None if is_longer else self.capacity

    def _find_layout(self, key: tuple[tuple[str, int], ...]) -> _Layout:
        if key not in self._layouts:
            sizes, time = dict(key), self.capacity or 1
            two, three = self._run(2, time, sizes), self._run(3, time, sizes)
            self._layouts[key] = _Layout(
                two.state,
                jax.tree_util.tree_map_with_path(_find_state_axis, two.state, three.state),
                jax.tree.map(_find_axis, two.outputs, three.outputs),
            )
        return self._layouts[key]

    def _check_step(self, run: Run, time: int, others: Mapping[str, int]) -> None:
        """Raises an error if a step does not keep the shapes of the state, or makes another."""
        call = self._shape_call(2, time, others)
        if not run.state:
            return
        step = run_step(self._module, run.variables, run.state, call, self._stream_keywords(None))
        known, after = (
            dict(jax.tree_util.tree_leaves_with_path(state)) for state in (run.state, step.state)
        )
        for path, leaf in known.items():
            found = describe_item(after[path]) if path in after else "absent"
            if found != describe_item(leaf):
                raise stream_errors.changing_state(_format_path(path), describe_item(leaf), found)
        for path in after.keys() - known.keys():
            raise stream_errors.new_state(_format_path(path))

    def _check_each_row(self, axes: Any) -> None:
        for path, axis in jax.tree_util.tree_leaves_with_path(axes):
            if axis < 0:
                raise stream_errors.one_state_for_all(_format_path(path))


def stream(
    f: Callable[..., Any],
    *specs: Any,
    capacity: int | None = None,
    batch: str = "b",
    time: str = "t",
    context: Mapping[str, Any] | None = None,
) -> Stream:
    """Makes a stream of a pipeline: it runs block by block what was trained on whole sequences.

    For every cut of time into blocks, the outputs of the blocks, put together, are the outputs for
    the whole. The variables are the same. Layers that remember do so in the collection ``"cache"``
    when the context keyword ``decode`` is true, which a stream sees to.

    A part that cannot go on from block to block, such as attention that is not causal, is refused
    here, by its path. A plain function that mixes steps cannot be known:
    ``flax_extra.testing.check_streaming`` finds it.

    Args:
        f: a pipeline, a linen module, or any callable that could be a step of a pipeline.
        specs: the inputs, as in :func:`shape_signature`, with names for batch and time:
            ``"f32[b, t, 64]"``. An input without time, such as what a decoder attends to, may be
            None in later blocks if its layer remembers it.
        capacity: how many steps there is room for. It may be left out if nothing remembers all
            steps, as in a recurrent model, or attention with a window.
        batch: the name of the batch in the specs.
        time: the name of time in the specs. A block has any length of it.
        context: specs of the context keywords that a call has to give.

    Returns:
        A stream. ``start(batch)`` gives the state, a pytree of zeros; ``step(variables, state,
        *inputs)`` gives the next state and the outputs of a block, for ``jax.jit`` with the state
        donated; ``take``, ``reset`` and ``position`` work on rows of the state.

    Raises:
        StreamError: If a part of the pipeline cannot go on from block to block, two places would
            share one state, or a capacity is needed.
        ValueError: If the specs do not name batch and time, or are no specs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb, layer as xn
        >>> model = nn.Embed(256, 8) >> cb.residual(xn.LSTM(8, return_sequences=True))
        >>> stream = cb.stream(model, "i32[b, t]")
        >>> text = jnp.array([[3, 1, 4, 1, 5, 9]])
        >>> variables = model.init(jax.random.key(0), text)
        >>> step = jax.jit(stream.step, donate_argnums=1)
        >>> state, first = step(variables, stream.start(1), text[:, :4])
        >>> state, second = step(variables, state, text[:, 4:])
        >>> blocks = jnp.concatenate([first, second], axis=1)
        >>> bool(jnp.allclose(blocks, model.apply(variables, text), atol=1e-6))
        True
        >>> stream.position(state).tolist()
        [6]

    Source:
        The collection ``"cache"`` is that of linen's own layers; "SequenceLayers" has the law.
    """
    if capacity is not None:
        capacity = as_integer("stream", "capacity", capacity)
        check_at_least("stream", "capacity", 1, capacity)
    return Stream(f, parse_call(specs, context), capacity, batch, time)


def _struct(shape: tuple[Any, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _to_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return _struct(leaf.shape, leaf.dtype)


def _resize(leaf: jax.ShapeDtypeStruct, axis: int, batch: Any) -> jax.ShapeDtypeStruct:
    if axis < 0:
        return leaf
    return _struct((*leaf.shape[:axis], batch, *leaf.shape[axis + 1 :]), leaf.dtype)


def _find_axis(two: Any, three: Any) -> int:
    """Finds the axis of the batch in an array for two rows; -1 if there is not exactly one."""
    pairs = zip(jnp.shape(two), jnp.shape(three), strict=True)
    axes = [axis for axis, sizes in enumerate(pairs) if sizes[0] != sizes[1]]
    is_batch = len(axes) == 1 and jnp.shape(two)[axes[0]] == 2  # noqa: PLR2004
    return axes[0] if is_batch else -1


def _find_state_axis(path: Any, two: Any, three: Any) -> int:
    axis = _find_axis(two, three)
    if axis < 0 and two.shape != three.shape:
        raise stream_errors.rows_of_state(_format_path(path), describe_item(two))
    return axis


def _lose_rows(leaf: Any, axis: int, is_lost: Array) -> Any:
    if axis < 0 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jnp.where(_align(is_lost, axis, leaf.ndim), jnp.nan, leaf)


def _clear(leaf: Array, axis: int, is_reset: Array) -> Array:
    return jnp.where(_align(is_reset, axis, leaf.ndim), jnp.zeros((), leaf.dtype), leaf)


def _as_rows(rows: Any) -> Array:
    """Returns rows as an array. An empty list has no dtype, and stands for no indices."""
    return jnp.asarray(rows, jnp.int32 if isinstance(rows, list | tuple) and not rows else None)


def _align(rows: Array, axis: int, ndim: int) -> Array:
    """Puts rows on one axis of several."""
    return jnp.expand_dims(rows, [i for i in range(ndim) if i != axis])


def _take_rows(leaf: Array, axis: int, rows: Array) -> Array:
    if axis < 0:
        return leaf
    fill = None if jnp.issubdtype(leaf.dtype, jnp.inexact) else LOST
    return jnp.take(leaf, rows, axis=axis, mode="fill", fill_value=fill)


def _format_path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
