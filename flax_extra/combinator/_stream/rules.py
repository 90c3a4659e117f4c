"""Which layers cannot run piece by piece, and why.

A layer of this library that cannot says so itself, in decode mode. This file knows linen's layers,
and mistakes that a layer cannot see by itself. A plain function that mixes steps cannot be known:
``testing.check_streaming`` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from flax import linen as nn

from flax_extra.combinator._core import stream_errors
from flax_extra.combinator._core.children import is_pipeline
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._stream.probe import LayerCall, Run
from flax_extra.combinator._words.hold import Hold
from flax_extra.combinator._words.scan import Scan
from flax_extra.combinator._words.vmap import Vmap

Axes: TypeAlias = Mapping[str, frozenset[int]]
"""For each argument that is an array, which of its axes are time."""

Refusal: TypeAlias = tuple[str, str]
"""Why a layer cannot go on, and what to do instead."""


def check_layers(run: Run, longer: Run) -> None:
    """Raises an error if a layer cannot go on from block to block.

    Args:
        run: a run in decode mode.
        longer: the same with another length of time.

    Raises:
        StreamError: If a layer cannot, or two places would share one state.
    """
    time: dict[int, Axes] = {}
    others: dict[tuple[Any, ...], list[LayerCall]] = {}
    for call in longer.calls:
        others.setdefault((call.site, call.layer.path), []).append(call)
    for call in run.calls:
        same = others.get((call.site, call.layer.path))
        if not same:  # it unrolls its steps
            continue
        axes = time[id(call)] = _find_time(call, same.pop(0))
        for outer in call.around if call.state else ():
            if isinstance(outer.layer, Vmap) and _maps_time(outer.layer, outer, time):
                raise stream_errors.cannot_go_on(call.name, *_refuse_steps(outer))
        if any(axes.values()):
            refusal = _find_refusal(call, axes)
            if refusal is not None:
                raise stream_errors.cannot_go_on(call.name, *refusal)
    _check_parameters(run, longer)
    _check_sharing(run.calls)


def list_without_lengths(run: Run, time: int) -> list[str]:
    """Lists the layers that remember, and do not take the lengths of a block as it has them."""
    return list(
        dict.fromkeys(
            call.name for call in run.calls if call.state and not _takes_lengths(call, time)
        )
    )


def _takes_lengths(call: LayerCall, time: int) -> bool:
    if call.arguments.get("lengths") is None:
        return False
    leaves = jax.tree.leaves(list(call.arguments.values()))
    shapes = [leaf.shape for leaf in leaves if getattr(leaf, "ndim", 0) > 1]
    axis = call.layer.axis if isinstance(call.layer, Hold) else 1
    return bool(shapes) and bool(shapes[0][axis] == time)  # otherwise it runs at another rate


def _find_time(call: LayerCall, longer: LayerCall) -> Axes:
    """Finds the axes whose size follows the length of the block."""
    axes: dict[str, frozenset[int]] = {}
    for name, value in call.arguments.items():
        leaves = zip(
            jax.tree.leaves(value), jax.tree.leaves(longer.arguments.get(name)), strict=False
        )
        axes[name] = frozenset(
            axis
            for one, other in leaves
            if hasattr(one, "shape")
            for axis, (size, more) in enumerate(zip(one.shape, other.shape, strict=False))
            if size != more
        )
    return axes


def _maps_time(vmap: Vmap, call: LayerCall, time: Mapping[int, Axes]) -> bool:
    axes = time.get(id(call), {})
    for name, axis in zip(call.arguments, vmap._in_axes, strict=False):
        ranks = {len(leaf.shape) for leaf in jax.tree.leaves(call.arguments[name])}
        if axis is not None and any(axis % rank in axes.get(name, ()) for rank in ranks):
            return True
    return False


def _refuse_steps(vmap: LayerCall) -> Refusal:
    label = str(getattr(vmap.layer, "_label", "vmap"))
    return f"{label} runs it on each step by itself, so it has none to remember", "Map another axis"


def _find_refusal(call: LayerCall, axes: Axes) -> Refusal | None:
    takes_decode = "decode" in call.arguments
    if takes_decode and call.arguments["decode"] is not True and not isinstance(call.layer, Hold):
        return (
            "it was called without decode=True, so it does not go on from the last block",
            "Hand the keyword on to it in the layer that calls it",
        )
    if any(outer.state and not isinstance(outer.layer, Hold) for outer in call.around):
        return None  # a layer that remembers may use it as a part
    for kind, find in _RULES.items():
        if isinstance(call.layer, kind):
            return find(call, axes)
    return None


def _refuse_conv(call: LayerCall, axes: Axes) -> Refusal | None:
    size, stride = _get_window(call, axes)
    if size > 1:
        return (
            f"its kernel of {size} steps needs steps that are not in the block",
            "Use xn.CausalConv, which sees the past alone and remembers it",
        )
    if stride > 1:
        return (
            f"its stride of {stride} steps starts anew with each block",
            f"Use xn.CausalConv(kernel_size=1, strides={stride}), which takes whole strides alone",
        )
    return None


def _refuse_conv_transpose(call: LayerCall, axes: Axes) -> Refusal | None:
    size, stride = _get_window(call, axes)
    if max(size, stride) == 1:
        return None
    return (
        f"its kernel of {size} steps and stride of {stride} spread a step over other blocks",
        "Repeat each step, as jnp.repeat does, and use xn.CausalConv",
    )


def _get_window(call: LayerCall, axes: Axes) -> tuple[int, int]:
    """Returns the size of the kernel, and the stride, of a convolution along time."""
    layer: Any = call.layer
    name, shape = _get_input(call)
    kernel, strides = (
        (n,) if isinstance(n, int) else tuple(n) for n in (layer.kernel_size, layer.strides or 1)
    )
    first = len(shape) - 1 - len(kernel)
    for index, size in enumerate(kernel):
        if first + index in axes[name]:
            return size, strides[min(index, len(strides) - 1)]
    return 1, 1


def _refuse_attention(call: LayerCall, axes: Axes) -> Refusal | None:
    name = "inputs_kv" if call.arguments.get("inputs_kv") is not None else "inputs_q"
    if call.layer.__class__ is nn.SelfAttention:
        name = "inputs_q"
    if not axes.get(name):
        return None
    return (
        "it attends to the steps of the block, and to no others",
        "Use xn.SelfAttention(causal=True), which remembers keys and values",
    )


def _refuse_rnn(call: LayerCall, axes: Axes) -> Refusal | None:
    return (
        "it starts anew with each block",
        "Use xn.Recurrent(cell), which remembers the carry, or xn.LSTM or xn.GRU",
    )


def _refuse_scan(call: LayerCall, axes: Axes) -> Refusal | None:
    layer: Any = call.layer
    n_carry, n_in = layer._n_carry, layer.signature.n_in
    sequences = {str(index): call.arguments[str(index)] for index in range(n_carry, n_in)}
    if not any(
        layer.axis % leaf.ndim in axes[name]
        for name, value in sequences.items()
        for leaf in jax.tree.leaves(value)
    ):
        return None  # it runs over another axis than time
    if layer.reverse:
        return ("it runs from the last step to the first", "Use a scan that runs forward")
    is_held = any(isinstance(outer.layer, Hold) for outer in call.around)
    if is_held or all(str(index) in call.given for index in range(n_carry)):
        return None
    return (
        "it starts from its initial carry with each block",
        "Hold the carry: cb.hold(cb.scan(cell), initial)",
    )


def _refuse_batch_norm(call: LayerCall, axes: Axes) -> Refusal | None:
    uses_running_average = nn.merge_param(
        "use_running_average",
        getattr(call.layer, "use_running_average", None),
        call.arguments.get("use_running_average"),
    )
    if uses_running_average:
        return None
    return (
        "it takes the statistics of all rows and steps of the block",
        "Give it use_running_average=True",
    )


def _refuse_norm(call: LayerCall, axes: Axes) -> Refusal | None:
    layer: Any = call.layer
    name, shape = _get_input(call)
    n_axes = len(shape)
    if isinstance(layer, nn.InstanceNorm):
        features = layer.feature_axes
        features = (features,) if isinstance(features, int) else features
        kept = {0, *(axis % n_axes for axis in features)}
        reduced = set(range(n_axes)) - kept
    elif isinstance(layer, nn.GroupNorm) and layer.reduction_axes is None:
        reduced = set(range(1, n_axes))
    else:
        given = layer.reduction_axes
        reduced = {axis % n_axes for axis in ((given,) if isinstance(given, int) else given)}
    if reduced.isdisjoint(axes[name]):
        return None
    return (
        "it takes the statistics of all steps of the block",
        "Use a norm over the features alone, such as nn.LayerNorm, or its reduction_axes",
    )


_RULES: Mapping[type[nn.Module], Callable[[LayerCall, Axes], Refusal | None]] = {
    nn.Conv: _refuse_conv,
    nn.ConvLocal: _refuse_conv,
    nn.ConvTranspose: _refuse_conv_transpose,
    nn.MultiHeadDotProductAttention: _refuse_attention,
    nn.RNN: _refuse_rnn,
    nn.Bidirectional: _refuse_rnn,
    nn.BatchNorm: _refuse_batch_norm,
    nn.LayerNorm: _refuse_norm,
    nn.RMSNorm: _refuse_norm,
    nn.GroupNorm: _refuse_norm,
    nn.InstanceNorm: _refuse_norm,
    Scan: _refuse_scan,
}


def _get_input(call: LayerCall) -> tuple[str, tuple[int, ...]]:
    """Returns the name and shape of the first argument."""
    name, value = next(iter(call.arguments.items()))
    return name, tuple(value.shape)


def _check_parameters(run: Run, longer: Run) -> None:
    """Raises an error if the length of the block sizes a parameter."""
    found = jax.tree_util.tree_leaves_with_path(run.variables)
    others = dict(jax.tree_util.tree_leaves_with_path(longer.variables))
    for path, leaf in found:
        if path in others and others[path].shape != leaf.shape:
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            raise stream_errors.time_sizes_parameter(
                name, describe_item(leaf), describe_item(others[path])
            )


def _check_sharing(calls: Sequence[LayerCall]) -> None:
    """Raises an error if one state serves two places."""
    first: dict[tuple[Any, ...], LayerCall] = {}
    for call in calls:
        if not call.state:
            continue
        known = first.setdefault(call.layer.path, call)
        if known is not call and (known.site != call.site or _is_called_again(known, call)):
            raise stream_errors.shared_state(
                type(call.layer).__name__, known.name, call.name, known.site == call.site
            )


def _is_called_again(known: LayerCall, call: LayerCall) -> bool:
    """Whether a layer of the user's calls the same layer twice. A loop does so with clones."""
    if known.layer.scope is not call.layer.scope or known.around != call.around:
        return False
    return not (known.around and is_pipeline(known.around[-1].layer))
