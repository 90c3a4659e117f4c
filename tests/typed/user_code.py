"""Code as users write it, with the annotations of a strict user: no ``type: ignore``, no ``cast``.

``make check`` runs mypy --strict and pyright on this file. ``test_user_code.py`` runs the code, so
that it is not only well typed but true.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, assert_type

import jax
import jax.numpy as jnp
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from jaxtyping import Float, Int

import flax_extra
from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing

assert_type(flax_extra.__version__, str)


# Building, with functions and with operators


def softcap(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """A step that is a plain function."""
    capped: Array = jnp.tanh(x / 30.0) * 30.0
    return capped


def split_heads(x: Array) -> tuple[Array, Array]:
    """A step that puts two items on the stack."""
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


def transformer_block(n_heads: int, *, dropout_rate: float = 0.0) -> cb.Combinator:
    """Functions and operators, with layers of linen's and of ours."""
    attention = cb.residual(
        nn.LayerNorm(), cb.fn(xn.SelfAttention(n_heads=n_heads), mask=None), name="attention"
    )
    assert_type(attention, cb.Residual)
    feed_forward = cb.residual(nn.LayerNorm(), xn.FeedForward(widening_factor=2))
    return attention >> nn.Dropout(dropout_rate, deterministic=True) >> feed_forward


def encoder(n_layers: int) -> cb.Combinator:
    """A layer on the left of an operator, and one on the right."""
    tower = cb.repeat(transformer_block(2), n_layers, remat=True)
    assert_type(tower, cb.Repeat)
    model = nn.Embed(10, 8) >> tower >> nn.LayerNorm() >> softcap
    assert_type(model, cb.Combinator)
    return model


def wired() -> list[cb.Combinator]:
    """Every operator, with a callable that is no combinator on either side."""
    top_two = cb.select((0, 1))
    assert_type(top_two, cb.Select)
    return [
        top_two >> jnp.maximum,
        nn.Dense(4) >> top_two,
        top_two @ nn.Dense(4),
        nn.Dense(4) @ top_two,
        top_two & jnp.add,
        jnp.add & top_two,
        cb.serial(split_heads, [nn.Dense(4), (abs, softcap)], cb.dip(nn.Dense(4))),
        cb.branch(nn.Dense(4), cb.identity()) >> cb.concatenate(axis=-1),
        cb.parallel(nn.Dense(4), partial(jnp.sum, axis=-1)),
        cb.keep(jnp.add) >> cb.swap() >> cb.drop(),
        cb.fold(jnp.maximum, 3) >> cb.dup() >> cb.add(),
        cb.fn(max, n_in=2, n_out=1),
    ]


# A combinator, extended


class PreNorm(cb.Combinator):
    """A residual block: ``PreNorm([norm, *body])``."""

    def expand(self, norm: Callable[..., Any], *body: Callable[..., Any]) -> cb.Combinator:
        return cb.residual(norm, *body)


class Scaled(cb.Combinator):
    """A combinator of one callable, with a field."""

    factor: float = 1.0

    def expand(self, f: Callable[..., Any]) -> cb.Combinator:
        return cb.serial(f, partial(operator.mul, self.factor))


class Twice(cb.Combinator):
    """A combinator without children."""

    def expand(self) -> cb.Combinator:
        return cb.dup() >> cb.add()


def extended() -> list[cb.Combinator]:
    """Any iterable of callables serves for the children."""
    layers: tuple[nn.Module, ...] = (nn.LayerNorm(), nn.Dense(4))
    block = PreNorm([nn.LayerNorm(), nn.Dense(4)])
    assert_type(block, PreNorm)
    return [
        block,
        PreNorm(layers, name="block"),
        PreNorm(layer for layer in layers),
        Scaled([nn.Dense(4)], factor=0.5),
        Scaled([block], 0.5) >> Twice(),
    ]


# A pipeline is a sequence


def taken_apart(model: cb.Combinator) -> None:
    """Indexing gives a callable, slicing a combinator of the same kind."""
    block = PreNorm([nn.LayerNorm(), nn.Dense(4), softcap])
    series = cb.serial(nn.Dense(4), softcap)
    assert_type(series[0], Callable[..., Any])
    assert_type(series[-1:], cb.Serial)
    assert_type(block[:2], PreNorm)
    assert_type(cb.residual(softcap)[:1], cb.Residual)
    assert_type(model[:2], cb.Combinator)
    assert_type(model[1:] >> nn.Dense(4), cb.Combinator)
    assert_type(len(model), int)
    assert_type(iter(model), Iterator[Callable[..., Any]])
    outputs: list[Any] = [step(jnp.ones((1, 4))) for step in cb.serial(jnp.tanh, softcap)]
    assert len(outputs) == 2
    for step in model:
        assert callable(step)
        assert_type(cb.infer_signature(step), cb.Signature)
    assert_type(model.signature, cb.Signature)
    assert_type(model.signature.n_in, int)
    assert_type(hash(model), int)
    assert_type(str(model), str)


# What is known before there is an array


def described(model: cb.Combinator) -> str:
    """Shapes, a table and a picture."""
    shapes = cb.shape_signature(model, "i32[b, t]")
    assert_type(shapes, cb.ShapeSignature)
    assert shapes == "i32[b, t] -> f32[b, t, 8]"
    declared = cb.typed(model, "i32[b, t] -> f32[b, t, 8]")
    assert_type(declared, cb.Typed)
    summary = cb.summary(declared, jnp.zeros((2, 5), jnp.int32))
    assert_type(summary, cb.Summary)
    assert_type(summary.root, cb.Step)
    picture = cb.diagram(model, "i32[b, t]")
    assert_type(picture, cb.Diagram)
    return f"{shapes}\n{summary}\n{picture}"


# Running it


def trained_for_a_step(model: cb.Combinator) -> Any:
    """``init`` and ``apply`` are linen's own."""
    tokens: Int[Array, "batch time"] = jnp.zeros((2, 5), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    y, _ = model.init_with_output(jax.random.key(0), tokens)

    def loss(variables: Any) -> Array:
        squared: Array = jnp.square(model.apply(variables, tokens) - y + 1.0)
        return squared.mean()

    gradient = jax.grad(loss)(variables)
    return jax.tree.map(lambda p, g: p - 0.1 * g, variables, gradient)


def called_without_variables() -> tuple[Any, Any]:
    """A pipeline of functions is a function."""
    running_sum = cb.scan(cb.add() >> cb.dup())
    assert_type(running_sum, cb.Scan)
    total, sums = running_sum(jnp.zeros(1), jnp.ones((1, 3)))
    return total, sums


# Layers, and a pipeline as a field of one


class Tagger(nn.Module):
    """A pipeline as a field, one in ``setup`` and one in the call."""

    n_tags: int
    encoder: cb.Combinator
    positions: Callable[..., nn.Module] = partial(xn.FourierPositionEncoding, (5,), n_bands=2)

    def setup(self) -> None:
        self.head = cb.serial(nn.LayerNorm(), nn.Dense(self.n_tags))

    def __call__(
        self, tokens: Int[Array, "batch time"], mask: Int[Array, "batch time"] | None = None
    ) -> Float[Array, "batch time tags"]:
        features = self.encoder(tokens)
        if mask is not None:
            features = features * mask[..., None]
        tags: Array = self.head(features)
        return tags


def layers() -> list[nn.Module]:
    """Layers by their fields, and what makes them."""
    attention = xn.Attention(n_heads=2, d_qk=8, d_v=lambda *references: 8, dropout_rate=0.1)
    assert_type(attention, xn.Attention)
    words = partial(
        xn.Encoding,
        preprocessing=partial(nn.Embed, 10, 8),
        positional_encoding=partial(xn.TrainablePositionalEncoding, 5, 8),
    )
    sequence = xn.LSTM(8, return_sequences=True)
    assert_type(sequence, xn.LSTM)
    return [
        attention,
        sequence,
        xn.FeedForward(widening_factor=2, dtype=jnp.bfloat16),
        xn.MultimodalEncoding([words, words], mask_rates=[None, 0.5]),
        Tagger(3, encoder(1)),
    ]


# Testing it


class Doubled(nn.Module):
    """A layer of the user's own."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch 2*features"]:
        doubled: Array = nn.Dense(2 * x.shape[-1])(x)
        return doubled


def check_layers() -> None:
    """Whole tests of a layer, in one line each."""
    testing.check_shapes(Doubled(), sizes={"batch": 2, "features": st.integers(1, 3)})
    testing.check_signature(Doubled(), jnp.ones((2, 3)))
    testing.check_laws(nn.Dense(4), max_examples=1)
    testing.assert_same_program(cb.residual(jnp.tanh), lambda x: jnp.tanh(x) + x, jnp.ones(3))
    testing.assert_same_meaning(cb.swap() >> cb.swap(), cb.identity(2), 1, 2)
    for law in testing.LAWS:
        assert_type(law, testing.Law)


assert_type(testing.pipelines(), st.SearchStrategy[cb.Combinator])
assert_type(testing.signatures(max_n_in=2), st.SearchStrategy[cb.Signature])
assert_type(testing.functions(cb.Signature(1, 1)), st.SearchStrategy[testing.Function])


@settings(max_examples=5, deadline=None)
@given(testing.pipelines(leaves=[jnp.tanh, jnp.maximum], combinators=["dup", "swap"]), st.data())
def check_pipelines(p: cb.Combinator, data: st.DataObject) -> None:
    """A property of every pipeline."""
    inputs = data.draw(testing.inputs_for(p))
    signature = cb.shape_signature(p, *inputs)
    assert len(signature.outputs) == p.signature.n_out


# What goes wrong


def mistakes() -> list[str]:
    """Errors by their class, and what they say."""
    said = []
    wrong: list[Callable[[], object]] = [
        lambda: cb.serial(max),
        lambda: cb.typed(nn.Dense(4), "f32[b, 3] -> f32[b, 5]"),
    ]
    for build in wrong:
        try:
            build()
        except cb.ShapeError as error:
            said.append(str(error))
        except cb.SignatureError as error:
            said.append(str(error))
    return said
