"""``check_streaming`` finds planted faults, and names the step of the pipeline that has one.

Each fault is one that people make when they write a layer that streams. Without ``decode`` all of
these layers are right.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import testing

SPEC = "f32[b, t, 4]"


def last_step(x, lengths):
    """The last valid step of each row, ``[batch, ...]``; the first if there is none."""
    if lengths is None:
        return x[:, -1]
    at = jnp.maximum(lengths - 1, 0)[:, None]
    return jnp.take_along_axis(x, jnp.expand_dims(at, tuple(range(2, x.ndim))), axis=1)[:, 0]


def choose(rows, yes, no):
    return jnp.where(jnp.expand_dims(rows, tuple(range(1, yes.ndim))), yes, no)


# Sums and means of the past


class Sum(nn.Module):
    """The sum of all steps so far."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        start = jnp.zeros_like(x[:, 0])
        if not decode:
            return jnp.cumsum(x, axis=1)
        state = self.variable("cache", "total", jnp.zeros_like, start)
        if self.is_initializing():
            return x
        total = self.read(state.value)
        totals = total[:, None] + jnp.cumsum(x, axis=1)
        state.value = self.write(total, totals, lengths)
        return totals

    @nn.nowrap
    def read(self, total):
        return total

    @nn.nowrap
    def write(self, total, totals, lengths):
        last = last_step(totals, lengths)
        return last if lengths is None else choose(lengths > 0, last, total)


class SumThatForgets(Sum):
    @nn.nowrap
    def read(self, total):
        return jnp.zeros_like(total)


class SumOfOneStepTooFew(Sum):
    @nn.nowrap
    def write(self, total, totals, lengths):
        before = jnp.concatenate([total[:, None], totals[:, :-1]], axis=1)
        return super().write(total, before, lengths)


class SumThatTakesPadding(Sum):
    @nn.nowrap
    def write(self, total, totals, lengths):
        return totals[:, -1]


class SumThatMovesWithoutAStep(Sum):
    @nn.nowrap
    def write(self, total, totals, lengths):
        return last_step(totals, lengths)


class SumOfAllRows(Sum):
    @nn.nowrap
    def read(self, total):
        return jnp.broadcast_to(total[:1], total.shape)


class SumInHalfPrecision(Sum):
    @nn.nowrap
    def write(self, total, totals, lengths):
        total = super().write(total, totals, lengths)
        return total.astype(jnp.bfloat16).astype(total.dtype)


class SumWithoutGradient(Sum):
    @nn.nowrap
    def read(self, total):
        return jax.lax.stop_gradient(total)


class MeanOfTheBlock(nn.Module):
    """The mean of all steps so far, that counts the steps of the block alone."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        total = cache.recall("total", jnp.zeros_like(x[:, 0]))
        totals = total[:, None] + jnp.cumsum(x, axis=1)
        cache.keep("total", cache.take_last(totals))
        return totals / (1 + jnp.arange(x.shape[1])[None, :, None])


class DecayOfTheBlock(nn.Module):
    """A leaky sum whose state decays once for each block, not for each step."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        total = cache.recall("total", jnp.zeros_like(x[:, 0]))
        steps = jnp.arange(x.shape[1])
        weights = jnp.tril(0.5 ** jnp.abs(steps[:, None] - steps[None]).astype(x.dtype))
        totals = 0.5 * total[:, None] + jnp.einsum("ts,bsd->btd", weights, x)
        cache.keep("total", cache.take_last(totals))
        return totals


class StartsAtZeros(nn.Module):
    """A sum that starts at one; in a stream at zero, as the state is made."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        one = jnp.ones_like(x[:, 0])
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        total = cache.recall("total", jnp.zeros_like(one) if decode else one)
        totals = total[:, None] + jnp.cumsum(x, axis=1)
        cache.keep("total", cache.take_last(totals))
        return totals


# Convolutions


class Conv(nn.Module):
    """A causal convolution."""

    width = 3

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        conv = nn.Conv(x.shape[-1], (self.width,), padding="VALID")
        n_past = self.width - 1
        if not decode:
            return conv(self.pad(x, n_past))
        past = self.variable("cache", "past", jnp.zeros, (x.shape[0], n_past, x.shape[2]))
        both = jnp.concatenate([past.value, x], axis=1)
        if not self.is_initializing():
            past.value = self.write(both, x.shape[1], n_past, lengths)
        return conv(both)

    @nn.nowrap
    def pad(self, x, n_past):
        return jnp.pad(x, ((0, 0), (n_past, 0), (0, 0)))

    @nn.nowrap
    def write(self, both, time, n_past, lengths):
        if lengths is None:
            return both[:, time:]
        at = lengths[:, None] + jnp.arange(n_past)[None]
        return jnp.take_along_axis(both, at[..., None], axis=1)


class ConvThatSeesAhead(Conv):
    @nn.nowrap
    def pad(self, x, n_past):
        return jnp.pad(x, ((0, 0), (n_past - 1, 1), (0, 0)))


class ConvThatForgets(Conv):
    @nn.nowrap
    def write(self, both, time, n_past, lengths):
        return jnp.zeros_like(both[:, :n_past])


class ConvOfTheFirstSteps(Conv):
    @nn.nowrap
    def write(self, both, time, n_past, lengths):
        return both[:, 1 : n_past + 1]


class ConvThatTakesPadding(Conv):
    @nn.nowrap
    def write(self, both, time, n_past, lengths):
        return both[:, time:]


# Positions


class Positions(nn.Module):
    """Adds the sine of the position."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        start = jnp.zeros(x.shape[:1], jnp.int32)
        if decode:
            position = self.variable("cache", "position", jnp.zeros_like, start)
            start = position.value
            if not self.is_initializing():
                position.value = self.count(start, x.shape[1], lengths)
        at = start[:, None] + jnp.arange(x.shape[1])[None]
        return x + jnp.sin(at.astype(x.dtype))[..., None]

    @nn.nowrap
    def count(self, start, time, lengths):
        return start + (time if lengths is None else lengths)


class PositionsThatStartAnew(Positions):
    @nn.nowrap
    def count(self, start, time, lengths):
        return jnp.zeros_like(start)


class PositionsOfTheFirstRow(Positions):
    @nn.nowrap
    def count(self, start, time, lengths):
        return jnp.broadcast_to(super().count(start, time, lengths)[:1], start.shape)


class PositionsThatCountPadding(Positions):
    @nn.nowrap
    def count(self, start, time, lengths):
        return start + time


# Attention


class Attention(nn.Module):
    """Causal attention in a window."""

    window: int = 2

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        query, key, value = (nn.Dense(4, name=name)(x)[:, :, None] for name in ("q", "k", "v"))
        self.append(cache, key, value)
        at, positions = cache.positions[:, :, None], cache.locate("keys")[:, None]
        mask = (positions >= 0) & (positions <= at) & (positions > at - self.window)
        if cache.is_streaming:
            mask = self.mask(at, positions)
        keys, values = cache.read("keys"), cache.read("values")
        return nn.dot_product_attention(query, keys, values, mask=mask[:, None])[:, :, 0]

    @nn.nowrap
    def append(self, cache, key, value):
        cache.append("keys", key)
        cache.append("values", value)

    @nn.nowrap
    def mask(self, at, positions):
        return (positions >= 0) & (positions <= at) & (positions > at - self.window)


class AttentionWithoutOffset(Attention):
    @nn.nowrap
    def mask(self, at, positions):
        return super().mask(at - at[:, :1], positions)


class AttentionThatSeesAhead(Attention):
    @nn.nowrap
    def mask(self, at, positions):
        return (positions >= 0) & (positions <= at + 1) & (positions > at - self.window)


class AttentionWithoutItself(Attention):
    @nn.nowrap
    def mask(self, at, positions):
        return super().mask(at, positions) & ((positions < at) | (at == 0))


class AttentionInAWindowTooLarge(Attention):
    @nn.nowrap
    def mask(self, at, positions):
        return (positions >= 0) & (positions <= at) & (positions >= at - self.window)


class AttentionToEmptyPlaces(Attention):
    @nn.nowrap
    def append(self, cache, key, value):
        cache.append("keys", key, window=self.window)
        cache.append("values", value, window=self.window)

    @nn.nowrap
    def mask(self, at, positions):
        return (positions <= at) & (positions > at - self.window)


class AttentionInARingTooShort(Attention):
    @nn.nowrap
    def append(self, cache, key, value):
        cache.append("keys", key, window=self.window - 1)
        cache.append("values", value, window=self.window - 1)


class AttentionWithAWrongRing(nn.Module):
    """Causal attention in a window whose ring wraps one place too late."""

    window = 2

    @nn.compact
    def __call__(self, x, *, decode=False):
        time, steps = x.shape[1], jnp.arange(x.shape[1])[None]
        value, start, positions = x, jnp.zeros((x.shape[0], 1), jnp.int32), steps
        if decode:
            ring = self.variable("cache", "ring", jnp.zeros, (x.shape[0], self.window, 4))
            position = self.variable("cache", "position", jnp.zeros, x.shape[:1], jnp.int32)
            start = position.value[:, None]
            last = start - 1
            places = jnp.arange(self.window)[None]
            value = jnp.concatenate([ring.value, x], axis=1)
            past = last - (last - places) % self.window
            positions = jnp.concatenate([past, start + steps], axis=1)
            if not self.is_initializing():
                at = (start + steps) % (self.window + 1)  # one too many
                rows = jnp.arange(x.shape[0])[:, None]
                ring.value = ring.value.at[rows, at].set(x, mode="drop")
                position.value = position.value + time
        at, positions = (start + steps)[:, :, None], positions[:, None]
        mask = (positions >= 0) & (positions <= at) & (positions > at - self.window)
        return jnp.einsum("bts,bsd->btd", mask.astype(x.dtype), value)


# Functions that mix steps


def centre(x):
    return x - x.mean(axis=1, keepdims=True)


def reverse(x):
    return x[:, ::-1]


def scale_to_largest(x):
    return x / jnp.abs(x).max(axis=1, keepdims=True)


def add_up(x):
    return jnp.cumsum(x, axis=1)


def mix_rows(x):
    return x + x.mean(axis=0, keepdims=True)


RIGHT: list[Any] = [Sum, Conv, Positions, Attention]
FAULTS: list[Any] = [
    SumThatForgets,
    SumOfOneStepTooFew,
    SumThatTakesPadding,
    SumThatMovesWithoutAStep,
    SumOfAllRows,
    SumInHalfPrecision,
    MeanOfTheBlock,
    DecayOfTheBlock,
    StartsAtZeros,
    ConvThatSeesAhead,
    ConvThatForgets,
    ConvOfTheFirstSteps,
    ConvThatTakesPadding,
    PositionsThatStartAnew,
    PositionsOfTheFirstRow,
    PositionsThatCountPadding,
    AttentionWithoutOffset,
    AttentionThatSeesAhead,
    AttentionWithoutItself,
    AttentionInAWindowTooLarge,
    AttentionToEmptyPlaces,
    AttentionInARingTooShort,
    AttentionWithAWrongRing,
    centre,
    reverse,
    scale_to_largest,
    add_up,
    mix_rows,
]


def name_of(fault: Any) -> str:
    return fault.__name__


def place(fault: Any) -> cb.Combinator:
    """Puts a step among others that are right."""
    step = fault() if isinstance(fault, type) else fault
    return cb.serial(Sum(), cb.residual(jnp.tanh, step), Positions())


@pytest.mark.parametrize("layer", RIGHT, ids=name_of)
def test_nothing_is_found_where_nothing_is_wrong(layer: Any) -> None:
    testing.check_streaming(place(layer), SPEC, gradients=False, max_examples=4)


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_a_fault_is_found_and_its_step_is_named(fault: Any) -> None:
    with pytest.raises(AssertionError) as caught:
        testing.check_streaming(place(fault), SPEC, gradients=False, max_examples=40)
    first, second, *_ = str(caught.value).splitlines()
    assert first == "serial does not give block by block what it gives for the whole."
    path = f"serial[1] -> residual[1] -> {name_of(fault)}"
    assert second.startswith(f"  The first step that parts is {path}, at block ")


def test_a_fault_in_a_loop_is_named_by_the_loop_or_its_step() -> None:
    for p, path in [
        (cb.repeat(place(ConvThatForgets), 2), "repeat[0] -> serial[1] -> residual[1] -> ConvThatForgets"),
        (cb.repeat(SumThatForgets(), 2, shared=True, remat=True), "repeat[0] -> SumThatForgets"),
        (cb.serial(abs, cb.hold(cb.fn(lambda s, x: (s * 0, x + s[:, None]), n_out=2), lambda x: x[:, 0])), "serial[1] -> hold[0]"),
    ]:  # fmt: skip
        with pytest.raises(AssertionError) as caught:
            testing.check_streaming(p, SPEC, gradients=False, max_examples=20)
        assert f"The first step that parts is {path}" in str(caught.value)


def test_a_gradient_that_ends_at_the_block_is_found() -> None:
    layer = cb.serial(nn.Dense(4), SumWithoutGradient())
    testing.check_streaming(layer, SPEC, gradients=False, max_examples=4)
    with pytest.raises(AssertionError) as caught:
        testing.check_streaming(layer, SPEC, max_examples=40)
    _, second, *_ = str(caught.value).splitlines()
    assert second.startswith(
        "  Its outputs agree, and the gradient with respect to params/Dense_0/"
    )


def test_the_whole_message() -> None:
    with pytest.raises(AssertionError) as caught:
        testing.check_streaming(SumThatForgets(), "f32[b, t, 1]", gradients=False, max_examples=40)
    lines = str(caught.value).splitlines()
    assert lines[0] == "SumThatForgets does not give block by block what it gives for the whole."
    assert lines[1].startswith("  Its outputs part at block 1: row 0, step 0, is ")
    assert lines[2:] == [
        "  The plan: 1 row, 6 steps in the whole",
        "    block 0: 1 step",
        "    block 1: 1 step",
    ]
