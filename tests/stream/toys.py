"""Layers that stream, as a user would write them with ``cb.Cache``. The tests of streams use them.

A layer of the library may know tricks of its own; these show that the convention alone is enough.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_extra import combinator as cb

FEATURES = 4


def draw(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Most of the time here goes into compiling: a third of it without optimization."""


class Attention(nn.Module):
    """Causal attention with two heads, to all steps of the past or to those in a window."""

    window: int | None = None
    n_heads: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        heads = self.n_heads, x.shape[-1] // self.n_heads
        query, key, value = (
            nn.DenseGeneral(heads, dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        cache.append("keys", key, window=self.window)
        cache.append("values", value, window=self.window)
        at, positions = cache.positions[:, :, None], cache.locate("keys")[:, None]
        mask = (positions <= at) & (positions >= 0)
        if self.window is not None:
            mask &= positions > at - self.window
        y = nn.dot_product_attention(
            query, cache.read("keys"), cache.read("values"), mask=mask[:, None]
        )
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="out")(y)


class Conv(nn.Module):
    """A causal convolution."""

    width: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        steps = cache.extend("past", x, self.width - 1)
        return nn.Conv(x.shape[-1], (self.width,), padding="VALID", dtype=self.dtype)(steps)


class Sum(nn.Module):
    """The sum of all steps so far, times a parameter."""

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        total = cache.recall("total", jnp.zeros_like(x[:, 0]))
        totals = total[:, None] + jnp.cumsum(x, axis=1)
        cache.keep("total", cache.take_last(totals))
        return totals * self.param("scale", nn.initializers.ones, ()).astype(x.dtype)


class Positions(nn.Module):
    """Learned vectors for positions up to a most, added to the inputs."""

    n: int = 16

    @nn.compact
    def __call__(self, x, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        table = self.param("table", nn.initializers.normal(), (self.n, x.shape[-1]))
        return x + table.at[cache.positions].get(mode="fill", fill_value=jnp.nan)


class Memory(nn.Module):
    """Adds what is given once, in the first block."""

    @nn.compact
    def __call__(self, x, memory, *, decode=False, lengths=None):
        cache = cb.Cache(self, x, decode=decode, lengths=lengths)
        projected = None if memory is None else nn.Dense(x.shape[-1], name="project")(memory)
        cache.remember("memory", projected)
        return cache.lose_rows(x + cache.read("memory")[:, None])


def make_block(dtype: Any = None) -> cb.Combinator:
    """Makes a block with each kind of memory."""
    return cb.serial(
        cb.residual(nn.LayerNorm(dtype=dtype), Attention(dtype=dtype)),
        cb.residual(Conv(dtype=dtype)),
        Sum(),
    )
