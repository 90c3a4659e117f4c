"""What cannot run piece by piece is refused when the stream is made, with its path and the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.stream.toys import Attention, Conv, Sum, make_block

SPEC = "f32[b, t, 4]"
IMAGES = "f32[b, t, 6, 4]"

CONV = "Use xn.CausalConv, which sees the past alone and remembers it."
ANEW = (
    "it starts anew with each block. Use xn.Recurrent(cell), which remembers the carry, or xn.LSTM or "
    "xn.GRU."
)
ATTENDS = (
    "it attends to the steps of the block, and to no others. Use xn.SelfAttention(causal=True), which "
    "remembers keys and values."
)
STATISTICS = (
    "it takes the statistics of all steps of the block. Use a norm over the features alone, such as "
    "nn.LayerNorm, or its reduction_axes."
)
REVERSE = "it starts at the last step. Leave reverse out, or call it without decode."


def zeros(x: Any) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(x[:, 0]), jnp.zeros_like(x[:, 0])


def lstm() -> cb.Combinator:
    return cb.scan(xn.LSTMCell(), n_carry=2)


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "Conv": (
        lambda: nn.Conv(4, [3]),
        SPEC,
        f"its kernel of 3 steps needs steps that are not in the block. {CONV}",
    ),
    "Conv, causal": (
        lambda: nn.Conv(4, 2, padding="CAUSAL"),
        SPEC,
        f"its kernel of 2 steps needs steps that are not in the block. {CONV}",
    ),
    "Conv with strides": (
        lambda: nn.Conv(4, [1], strides=2),
        SPEC,
        (
            "its stride of 2 steps starts anew with each block. Use xn.CausalConv(kernel_size=1, "
            "strides=2), which takes whole strides alone."
        ),
    ),
    "Conv of images": (
        lambda: nn.Conv(4, [3, 1]),
        IMAGES,
        f"its kernel of 3 steps needs steps that are not in the block. {CONV}",
    ),
    "ConvLocal": (
        lambda: nn.ConvLocal(4, [3]),
        SPEC,
        f"its kernel of 3 steps needs steps that are not in the block. {CONV}",
    ),
    "ConvTranspose": (
        lambda: nn.ConvTranspose(4, [3], strides=[2]),
        SPEC,
        (
            "its kernel of 3 steps and stride of 2 spread a step over other blocks. Repeat "
            "each step, as jnp.repeat does, and use xn.CausalConv."
        ),
    ),
    "SelfAttention": (lambda: nn.SelfAttention(2), SPEC, ATTENDS),
    "MultiHeadDotProductAttention": (
        lambda: nn.MultiHeadDotProductAttention(2, decode=True),
        SPEC,
        ATTENDS,
    ),
    "RNN": (lambda: nn.RNN(nn.GRUCell(4)), SPEC, ANEW),
    "RNN in reverse": (lambda: nn.RNN(nn.GRUCell(4), reverse=True), SPEC, ANEW),
    "Bidirectional": (
        lambda: nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4))),
        SPEC,
        ANEW,
    ),
    "BatchNorm": (
        lambda: nn.BatchNorm(use_running_average=False),
        SPEC,
        (
            "it takes the statistics of all rows and steps of the block. Give it "
            "use_running_average=True."
        ),
    ),
    "LayerNorm": (lambda: nn.LayerNorm(reduction_axes=(1, 2)), SPEC, STATISTICS),
    "RMSNorm": (lambda: nn.RMSNorm(reduction_axes=-2, feature_axes=-1), SPEC, STATISTICS),
    "GroupNorm": (lambda: nn.GroupNorm(2), SPEC, STATISTICS),
    "InstanceNorm": (lambda: nn.InstanceNorm(), SPEC, STATISTICS),
    "scan": (
        lambda: cb.scan(xn.LSTMCell(), n_carry=2, reverse=True),
        ["f32[b, 4]", "f32[b, 4]", SPEC],
        "it runs from the last step to the first. Use a scan that runs forward.",
    ),
}


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_layers_of_linen(name: str) -> None:
    make, specs, reason = REFUSED[name]
    kind = name.replace(",", " ").split()[0]
    with pytest.raises(cb.StreamError) as caught:
        cb.stream(make(), *([specs] if isinstance(specs, str) else specs))
    assert str(caught.value) == f"{kind} cannot run piece by piece: {reason}"


OURS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: xn.LSTM(4, reverse=True),
    "GRU": lambda: xn.GRU(4, reverse=True),
    "Recurrent": lambda: xn.Recurrent(nn.GRUCell(4), reverse=True),
    "LinearRecurrence": lambda: xn.LinearRecurrence(reverse=True),
}


@pytest.mark.parametrize("name", OURS)
def test_layers_of_ours_in_reverse(name: str) -> None:
    with pytest.raises(cb.StreamError) as caught:
        cb.stream(cb.serial(abs, OURS[name]()), SPEC)
    assert str(caught.value) == (
        f"{name} with reverse=True cannot run piece by piece: it starts at the last step. Leave reverse "
        f"out, or call it without decode."
    )
    notes = [note for note in caught.value.__notes__ if note.startswith("flax_extra")]
    assert notes == [
        f"flax_extra: in serial[1] -> {name}\n  signature: 1 -> 1\n  stack: f32[2, 1, 4]"
    ]


def test_layers_of_several_modalities() -> None:
    class Decode(nn.Module):
        @nn.compact
        def __call__(self, x, *, decode=False):
            decoding = xn.MultimodalDecoding([lambda: lambda x: x] * 2)
            return decoding(x, [1, 1], decode=decode)[0]

    with pytest.raises(cb.StreamError) as caught:
        cb.stream(Decode(), SPEC)
    assert str(caught.value) == (
        "MultimodalDecoding cannot run piece by piece: it puts one modality after another, not one "
        "block after another. Stream the part of the pipeline after it; or, if its inputs are the same "
        "for all blocks, keep decode away: cb.fn(MultimodalDecoding(...), decode=False)."
    )


class Nested(nn.Module):
    """A user's layer, with a convolution deep inside."""

    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(4), nn.Conv(4, [3], name="mix")])(x)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: cb.serial(Sum(), nn.Conv(4, [3])), "serial[1] -> Conv"),
        (lambda: cb.repeat(cb.residual(nn.Conv(4, [3])), 2), "repeat[0] -> residual[0] -> Conv"),
        (lambda: cb.repeat(nn.Conv(4, [3]), 2, shared=True, remat=True), "repeat[0] -> Conv"),
        (lambda: cb.serial(abs, cb.residual(Nested())), "serial[1] -> residual[0] -> Nested -> mix"),
        (lambda: Nested(), "Nested -> mix"),
        (lambda: cb.remat(cb.residual(nn.Conv(4, [3], name="mix"))), "remat[0] -> residual[0] -> Conv"),
    ],
)  # fmt: skip
def test_the_path_leads_to_the_layer(make: Callable[[], Any], path: str) -> None:
    with pytest.raises(cb.StreamError) as caught:
        cb.stream(make(), SPEC)
    assert str(caught.value).startswith(f"{path} cannot run piece by piece: its kernel")


@pytest.mark.parametrize(
    ("make", "specs"),
    [
        (lambda: nn.Conv(4, [1]), SPEC),
        (lambda: nn.Conv(4, [1, 3]), IMAGES),
        (lambda: nn.ConvTranspose(4, [1]), SPEC),
        (lambda: nn.BatchNorm(use_running_average=True), SPEC),
        (lambda: nn.LayerNorm(), SPEC),
        (lambda: nn.GroupNorm(2, reduction_axes=-1), SPEC),
        (lambda: nn.DenseGeneral(3, axis=(2, 3)), IMAGES),
        (lambda: nn.Embed(5, 4), "i32[b, t]"),
        (lambda: nn.Dropout(0.5, deterministic=True), SPEC),
        # Over another axis than time all may be mixed.
        (
            lambda: cb.serial(
                lambda x: x[:, 0], nn.MultiHeadDotProductAttention(2), lambda x: x[:, None]
            ),
            IMAGES,
        ),
        (
            lambda: cb.fn(jax.vmap(nn.avg_pool, (1, None), 1), n_in=1, n_out=1, window_shape=(2,)),
            IMAGES,
        ),
    ][:-1],
)
def test_what_works_step_by_step_is_not_refused(make: Callable[[], Any], specs: str) -> None:
    cb.stream(make(), specs)


def test_batch_norm_is_refused_by_what_a_call_says() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.BatchNorm()(x, use_running_average=not train)

    cb.stream(cb.fn(functools.partial(Model(), train=False)), SPEC)
    with pytest.raises(cb.StreamError, match="statistics of all rows"):
        cb.stream(cb.fn(functools.partial(Model(), train=True)), SPEC)


def test_a_layer_that_is_not_handed_decode_is_refused() -> None:
    class Forgets(nn.Module):
        @nn.compact
        def __call__(self, x, *, decode=False, lengths=None):
            return Conv(name="conv")(x)

    with pytest.raises(cb.StreamError) as caught:
        cb.stream(cb.serial(Forgets()), SPEC)
    assert str(caught.value) == (
        "serial[0] -> Forgets -> conv cannot run piece by piece: it was called without decode=True, so "
        "it does not go on from the last block. Hand the keyword on to it in the layer that calls it."
    )


# Scans


def test_a_scan_that_starts_anew_is_refused_and_one_that_is_held_is_not() -> None:
    start = cb.branch(cb.fn(zeros, n_out=2), cb.identity())
    with pytest.raises(cb.StreamError) as caught:
        cb.stream(start >> lstm() >> cb.select([2]), SPEC)
    assert str(caught.value) == (
        "serial[1] cannot run piece by piece: it starts from its initial carry with each block. Hold "
        "the carry: cb.hold(cb.scan(cell), initial)."
    )
    cb.stream(cb.hold(lstm(), cb.fn(zeros, n_out=2)), SPEC)
    cb.stream(lstm(), "f32[b, 4]", "f32[b, 4]", SPEC)  # whoever runs it hands the carry on


def test_a_scan_over_another_axis_is_not_refused() -> None:
    over_pixels = cb.scan(cb.fn(lambda c, x: (c + x, c), n_out=2), axis=2)
    start = cb.branch(lambda x: jnp.zeros_like(x[:, :, 0]), cb.identity())
    cb.stream(start >> over_pixels, IMAGES)


def test_a_held_scan_in_reverse_is_refused() -> None:
    reverse = cb.scan(xn.LSTMCell(), n_carry=2, reverse=True)
    with pytest.raises(cb.StreamError, match="it runs from the last step to the first"):
        cb.stream(cb.hold(reverse, cb.fn(zeros, n_out=2)), SPEC)


# One instance, one state


def test_one_instance_at_two_places_is_refused() -> None:
    layer = Sum()
    for make, places in [
        (cb.serial(layer, layer), "at serial[0] -> Sum and at serial[1] -> Sum"),
        (
            cb.serial(layer, cb.residual(nn.Dense(4), layer)),
            "at serial[0] -> Sum and at serial[1] -> residual[1] -> Sum",
        ),
        (cb.branch(layer, layer) >> cb.add(), "at serial[0] -> branch[0] -> Sum and at serial[0] -> branch[1] -> Sum"),
    ]:  # fmt: skip
        with pytest.raises(cb.StreamError) as caught:
            cb.stream(make, SPEC)
        assert str(caught.value).startswith(f"One instance of Sum is used {places}, and would")


def test_one_held_function_at_two_places_is_refused() -> None:
    held = cb.hold(cb.fn(lambda s, x: (s, x), n_out=2), lambda x: x[:, 0])
    with pytest.raises(cb.StreamError, match="One instance of Hold is used"):
        cb.stream(cb.serial(held, nn.Dense(4), held), SPEC)


def test_one_instance_without_state_may_be_at_two_places() -> None:
    dense = nn.Dense(4)
    cb.stream(cb.serial(dense, Sum(), dense), SPEC)


def test_copies_keep_a_state_each() -> None:
    stream = cb.stream(cb.repeat(Sum(), 3, shared=True), SPEC)
    assert stream.start(2).cache["Sum_0"]["total"].shape == (3, 2, 4)
    layer = Sum()
    with pytest.raises(cb.StreamError, match="One instance of Sum"):
        cb.stream(cb.repeat(cb.serial(layer, layer), 3), SPEC)


@pytest.mark.parametrize(
    ("make", "needs"),
    [
        (Attention, True),
        (lambda: Attention(window=3), False),
        (lambda: cb.repeat(make_block(), 2), True),
        (Conv, False),
        (Sum, False),
        (lambda: xn.LSTM(4), False),
    ],
)
def test_a_capacity_is_asked_for_where_all_steps_are_remembered(
    make: Callable[[], Any], needs: bool
) -> None:
    if needs:
        with pytest.raises(cb.StreamError, match="Say how many: "):
            cb.stream(make(), SPEC)
    else:
        cb.stream(make(), SPEC)
    cb.stream(make(), SPEC, capacity=3)
