"""Sharding rules for the layers of this library: what lies on which axis of a mesh, and why.

Source: Shoeybi et al., "Megatron-LM" (2019), section 3, for tensor parallelism; Rajbhandari et al.,
"ZeRO" (2020), section 5.3, for sharded parameters.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec

from flax_extra import combinator as cb


def layer_rules(
    *, tensor: str | None = None, fsdp: str | tuple[str, ...] | None = None
) -> tuple[cb.ShardingRule, ...]:
    r"""Returns sharding rules for the layers of this library.

    They are for :func:`flax_extra.combinator.shardings`.

    Data parallelism needs no rules: parameters are whole on every device, and batches are sharded.

    **Tensor parallelism** splits the work of a layer. The first product of a block is split by
    columns and the second by rows, so that nothing moves between them, and one all-reduce follows
    the second:

    - attention: ``query``, ``key`` and ``value`` by heads, ``out`` by the same heads. Each device
      attends with its own heads.
    - ``FeedForward``: ``Dense_0``, or ``gate`` and ``up``, by hidden features, ``Dense_1`` or
      ``out`` by the same features.
    - embeddings, and the bias of ``EmbedDecoding``, by the vocabulary: each device has the logits
      of its own entries, and only sums over the vocabulary move.
    - recurrent layers, convolutions and ``LinearRecurrence`` are whole: a split hidden state would
      be gathered at every step.

    **FSDP** (fully sharded data parallelism) splits parameters over devices that each have a part
    of the batch. A layer's parameters are gathered when it runs; gradients and the moments of an
    optimizer stay split. Rules are for kernels and embeddings, on an axis that tensor parallelism
    leaves free: the features of the residual stream, or the last axis. Vectors are whole: to gather
    them would take longer than they save.

    Both together split a kernel on two axes. The rules know layers by the names that linen gives
    them. A ``FeedForward`` with a name of its own, or a layer of linen's, needs a rule of your own:
    put it first. Key and value of fewer heads than devices need one, too.

    Args:
        tensor: the mesh axis for tensor parallelism.
        fsdp: the mesh axis, or axes, that parameters are split over; most often those of the batch.

    Returns:
        The rules. Each may match nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb, layer as xn
        >>> attention = cb.residual(nn.LayerNorm(), cb.fn(xn.SelfAttention(n_heads=8), mask=None))
        >>> block = attention >> cb.residual(nn.LayerNorm(), xn.FeedForward(widening_factor=4))
        >>> model = nn.Embed(256, 64) >> cb.repeat(block, 6)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), int))
        >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
        >>> where = cb.shardings(params, mesh, xn.layer_rules(tensor="model", fsdp="data"))
        >>> block = where["params"]["Repeat_0"]
        >>> tuple(block["SelfAttention_0"]["query"]["kernel"].spec)
        (None, 'data', 'model', None)
        >>> tuple(block["FeedForward_0"]["Dense_1"]["kernel"].spec)
        (None, 'model', 'data')
    """
    rules = []
    for pattern, axes in _AXES.items():
        spec = [{"tensor": tensor, "fsdp": fsdp}.get(axis) for axis in axes]
        if any(axis is not None for axis in spec):
            rules.append(cb.ShardingRule(pattern, _spec(*spec), is_optional=True))
    return tuple(rules)


_AXES = {
    # Attention: kernels of features x heads x features of a head, and out of all heads x features.
    r"(query|key|value)/kernel": ("fsdp", "tensor", ""),
    r"(query|key|value)/bias": ("tensor", ""),
    # A bias of the logits: buckets x heads.
    r"(position_bias|RelativePositionBias_\d+)/bias": ("", "tensor"),
    # FeedForward: kernels of features x hidden, then of hidden x features.
    r"(gate|up|FeedForward_\d+/Dense_0)/kernel": ("fsdp", "tensor"),
    r"(gate|up|FeedForward_\d+/Dense_0)/bias": ("tensor",),
    r"(out|FeedForward_\d+/Dense_1)/kernel": ("tensor", "fsdp"),
    # Embeddings: vocabulary x features, and a bias for each of the vocabulary.
    r"embedding": ("tensor", "fsdp"),
    r"EmbedDecoding_\d+/bias": ("tensor",),
    # The gates of LSTM and GRU: features or hidden x hidden.
    r"[ih][ifgorzn]/kernel": ("", "fsdp"),
    # The gates of LinearRecurrence: blocks x features of a block x features of a block.
    r"(input|recurrence)_gate/kernel": ("fsdp",),
    # CausalConv: steps x features of a group x features.
    r"CausalConv_\d+/kernel": ("fsdp",),
}
"""For each pattern, what the last axes of an array are split for."""


def _spec(*entries: Any) -> PartitionSpec:
    return PartitionSpec(*entries)  # type: ignore[no-untyped-call]
