r"""Attention whose time is split over devices: keys and values go around a ring.

Each device has the queries of its part of a sequence, and at first its keys and values. It attends
to those, hands them to the next device, and goes on with those of the device before, until it has
seen all. Derivatives keep no keys of other devices: they fetch each part again when they need it.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers" (2023), section 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Float

from flax_extra.layer import _attend, _chunked, _errors, _logits
from flax_extra.layer._attend import Mask
from flax_extra.layer._causal import CausalRule
from flax_extra.layer._logits import DIFFERENTIABLE, Inputs, Settings
from flax_extra.layer._sharding import match_varying_axes, run_with_auto_axes


def ring_attend(
    query: Float[Array, "batch time_q heads d_qk"],
    key: Float[Array, "batch time_kv kv_heads d_qk"],
    value: Float[Array, "batch time_kv kv_heads d_v"],
    mask: Mask | None = None,
    *,
    axis: str,
    precision: PrecisionLike = None,
    chunk_size: int | None = None,
    causal: bool = False,
    window: int | None = None,
    logit_cap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "batch time_q heads*d_v"]:
    """Computes what :func:`attend` does, with the time of a sequence split over devices.

    The memory of a device is in proportion to its part of the sequence, in derivatives of any order
    and in every mode. Devices hand keys and values on, ``jax.lax.ppermute``, and nothing else.

    It runs under ``jax.jit`` and ``jax.set_mesh``, and inside ``jax.shard_map`` over the axis.
    Other axes of the mesh may split the batch or the heads. With ``causal``, the device with the
    last part has the most to do, and the others wait for it.

    Args:
        query: what each position asks for, ``[batch, time_q, heads, d_qk]``.
        key: what each position answers to, ``[batch, time_kv, kv_heads, d_qk]``.
        value: what each position answers, ``[batch, time_kv, kv_heads, d_v]``.
        mask: as for :func:`attend`. Its queries are split; its keys are whole on every device.
        axis: the axis of the mesh that splits time.
        precision: numerical precision of the products; see ``jax.lax.Precision``.
        chunk_size: how many keys of a part to take at a time; chosen from the sizes by default.
        causal: whether a query sees only keys up to its own position.
        window: how many positions a query sees, its own included; all by default.
        logit_cap: what the scaled products stay below, by a tanh; no cap by default.
        scale: factor of the products; ``1 / sqrt(d_qk)`` by default.

    Returns:
        Attention vectors, ``[batch, time_q, heads * d_v]``, in the dtype of ``value``.

    Raises:
        ValueError: If there is no mesh with the axis, it does not divide ``time_q`` and
            ``time_kv``, or an argument is not such as :func:`attend` takes.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> ring = functools.partial(xn.ring_attend, axis="time")
        >>> layer = cb.fn(xn.SelfAttention(n_heads=2, causal=True, attention_fn=ring), mask=None)
        >>> auto = (jax.sharding.AxisType.Auto,)
        >>> with jax.set_mesh(jax.make_mesh((1,), ("time",), auto)):
        ...     init = jax.jit(layer.init_with_output)
        ...     y, variables = init(jax.random.key(0), jnp.ones((1, 8, 4)))
        >>> y.shape
        (1, 8, 4)
    """
    _attend.check_chunk_size("ring_attend", chunk_size)
    _attend.check_window("ring_attend", window, causal)
    _attend.check_logit_cap("ring_attend", logit_cap)
    settings = Settings(
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        logit_cap=None if logit_cap is None else float(logit_cap),
        causal=CausalRule(window, is_aligned=False) if causal else None,
        dropout_rate=0.0,
        precision=precision,
    )
    mesh: Any = jax.sharding.get_abstract_mesh()
    if axis not in mesh.shape:
        raise _errors.no_mesh_axis("ring_attend", axis, list(mesh.shape))
    is_local = axis in mesh.manual_axes
    n_devices = mesh.shape[axis]
    shape = _attend.infer_logits_shape(query, key, value)
    n_parts = 1 if is_local else n_devices
    for name, time in (("time_q", shape[2]), ("time_kv", shape[3])):
        if time % n_parts:
            raise _errors.indivisible_time("ring_attend", name, time, n_parts, axis)
    whole = (shape[0], shape[1], shape[2], shape[3] * (n_devices if is_local else 1))
    inputs = Inputs(query, key, value, mask=_attend.broadcast_mask(mask, whole))
    ring = Ring(axis, n_devices, shape[2] // n_parts, shape[3] // n_parts)
    if chunk_size is None:
        chunk_size = _chunked.choose_chunk_size(shape[1], ring.time_q, is_causal=causal)
    run = functools.partial(_run, settings=settings, ring=ring, chunk_size=chunk_size)
    if is_local:
        return run(inputs)
    time, across = _spec(None, axis), _spec(None, None, axis)
    is_split = inputs.mask is not None and inputs.mask.shape[2] > 1
    specs = Inputs(time, time, time, mask=across if is_split else _spec())
    if inputs.mask is None:
        specs = specs._replace(mask=None)

    def run_split(inputs: Inputs) -> Array:
        mapped = jax.shard_map(run, in_specs=(specs,), out_specs=time, axis_names={axis})
        vectors: Array = mapped(inputs)
        return vectors

    return run_with_auto_axes(run_split, inputs, like=query)


@dataclasses.dataclass(frozen=True)
class Ring:
    """How the time of queries and keys is split over devices.

    Attributes:
        axis: the axis of the mesh.
        n_devices: the number of devices on it.
        time_q: number of queries of a device.
        time_kv: number of keys of a device.
    """

    axis: str
    n_devices: int
    time_q: int
    time_kv: int

    def find_query_positions(self) -> Array:
        """Returns the positions of the queries of this device: the last is at the last key."""
        offset = self.n_devices * (self.time_kv - self.time_q)
        start = lax.axis_index(self.axis) * self.time_q + offset
        return (start + jnp.arange(self.time_q, dtype=jnp.int32))[None]

    def hand_on(self, x: Any) -> Any:
        """Hands arrays on to the next device."""
        return self._hand_on(x, 1)

    def fetch(self, x: Any, n_steps: Any) -> Any:
        """Fetches arrays from the device that comes so many steps before, all at once."""
        branches = [functools.partial(self._hand_on, n_steps=i) for i in range(self.n_devices)]
        return lax.switch(n_steps, branches, x)

    def _hand_on(self, x: Any, n_steps: int) -> Any:
        pairs = [(i, (i + n_steps) % self.n_devices) for i in range(self.n_devices)]
        permute: Any = lax.ppermute
        return permute(x, self.axis, pairs)

    def place(self, inputs: Inputs, n_steps: Any, *, is_causal: bool) -> Inputs:
        """Adds what belongs to keys that have been handed on so often: mask and positions."""
        part = (lax.axis_index(self.axis) - n_steps) % self.n_devices
        start = part * self.time_kv
        mask = inputs.mask
        if mask is not None and mask.shape[3] > 1:
            mask = lax.dynamic_slice_in_dim(mask, start, self.time_kv, axis=3)
        placed = inputs._replace(mask=mask)
        if is_causal:
            keys = (start + jnp.arange(self.time_kv, dtype=jnp.int32))[None]
            placed = placed._replace(
                query_positions=self.find_query_positions(), key_positions=keys
            )
        return match_varying_axes(placed)


def _run(inputs: Inputs, settings: Settings, ring: Ring, chunk_size: int) -> Array:
    vectors = _attend_around(match_varying_axes(inputs), settings, ring, chunk_size)[0]
    return vectors.reshape(*vectors.shape[:2], vectors.shape[2] * vectors.shape[3])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _attend_around(
    inputs: Inputs, settings: Settings, ring: Ring, chunk_size: int
) -> tuple[Array, Array]:
    """Attends to the keys of all devices: vectors and logsumexp of the queries of this one."""
    is_causal = settings.causal is not None

    def attend_to_part(n_steps: Any, state: Any) -> Any:
        (vectors, total, greatest), (key, value) = state
        placed = ring.place(inputs._replace(key=key, value=value), n_steps, is_causal=is_causal)
        part_vectors, logsumexp = _chunked.attend_in_chunks(placed, settings, chunk_size)
        sees_part = _find_queries_with_keys(settings, placed)
        seen_greatest = jnp.where(sees_part, logsumexp, greatest)
        new_greatest = jnp.maximum(greatest, seen_greatest)
        weight = jnp.where(sees_part, jnp.exp(seen_greatest - new_greatest), 0)
        shrink = jnp.exp(greatest - new_greatest)
        vectors = vectors * shrink[..., None] + part_vectors * weight[..., None]
        sums = vectors, total * shrink + weight, new_greatest
        return sums, ring.hand_on((key, value))

    shapes = jax.eval_shape(
        lambda: _chunked.attend_in_chunks(
            ring.place(inputs, 0, is_causal=is_causal), settings, chunk_size
        )
    )
    zeros, total = (jnp.zeros_like(inputs.query, shapes[1].dtype, shape=x.shape) for x in shapes)
    sums = zeros, total, jnp.full_like(total, np.finfo(total.dtype).min)
    (vectors, total, greatest), _ = lax.fori_loop(
        0, ring.n_devices, attend_to_part, (sums, (inputs.key, inputs.value))
    )
    vectors = vectors * _logits.invert_total(total)[..., None]
    logsumexp = _chunked.find_logsumexp(total, greatest)
    return vectors.astype(inputs.value.dtype), logsumexp


@functools.partial(_attend_around.defjvp, symbolic_zeros=True)
def _attend_around_jvp(
    settings: Settings,
    ring: Ring,
    chunk_size: int,
    primals: tuple[Inputs],
    tangents: tuple[Inputs],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (inputs,) = primals
    results = _attend_around(inputs, settings, ring, chunk_size)
    results = _chunked.name_result(results[0]), _chunked.name_result(results[1])
    changes = {
        name: change
        for name, change in tangents[0].get_present().items()
        if name in DIFFERENTIABLE and not isinstance(change, SymbolicZero)
    }

    # The backward pass runs this again, so that it keeps no keys of other devices.
    @jax.checkpoint
    def sum_part(
        inputs: Inputs, results: tuple[Array, Array], changes: dict[str, Array], n_steps: Any
    ) -> tuple[Array, Array]:
        key, value = ring.fetch((inputs.key, inputs.value), n_steps)
        part = inputs._replace(key=key, value=value)
        part = ring.place(part, n_steps, is_causal=settings.causal is not None)
        of_keys = {name: x for name, x in changes.items() if name in {"key", "value"}}
        of_part = {**changes, **ring.fetch(of_keys, n_steps)}
        return _chunked.sum_changes(part, results, of_part, settings, chunk_size)

    def add_part(sums: Any, n_steps: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, sum_part(inputs, results, changes, n_steps)), None

    zeros = jax.tree.map(jnp.zeros_like, results)
    sums, _ = lax.scan(add_part, zeros, jnp.arange(ring.n_devices))
    return results, sums


def _find_queries_with_keys(settings: Settings, inputs: Inputs) -> Array:
    """Says which queries see a key of a part: it broadcasts to ``[batch, time_q, heads]``.

    If the mask is the same for all queries, the keys that it leaves are counted up to a position.
    """
    mask, rule = inputs.mask, settings.causal
    if mask is not None and mask.shape[2] > 1:
        seen: Any = _logits.find_seen(settings, inputs.get_present())
        return jnp.swapaxes(jnp.any(seen, axis=3), 1, 2)
    time_q, time_kv = inputs.query.shape[1], inputs.key.shape[1]
    if rule is None:
        every = jnp.ones((1, 1, 1), bool)
        return every if mask is None else jnp.any(mask[:, :, 0], axis=2)[:, None]
    if mask is None:
        n_before = jnp.arange(time_kv + 1)[None, None]
    else:
        is_key = jnp.broadcast_to(mask[:, :, 0], (*mask.shape[:2], time_kv))
        n_before = jnp.pad(jnp.cumsum(is_key, axis=2), ((0, 0), (0, 0), (1, 0)))
    # For queries that come before the part, or after it, the ends are repeated.
    n_before = jnp.pad(n_before, ((0, 0), (0, 0), (time_q, time_q)), mode="edge")
    positions: Any = inputs.query_positions, inputs.key_positions
    distance = positions[0][0, 0] - positions[1][0, 0]

    def count_up_to(offset: Any) -> Array:
        start = jnp.clip(offset + 1 + time_q, 0, time_q + time_kv)
        return lax.dynamic_slice_in_dim(n_before, start, time_q, axis=2)

    n_seen = count_up_to(distance)
    if rule.window is not None:
        n_seen = n_seen - count_up_to(distance - rule.window)
    return jnp.swapaxes(n_seen > 0, 1, 2)


def _spec(*entries: Any) -> Any:
    return PartitionSpec(*entries)  # type: ignore[no-untyped-call]
