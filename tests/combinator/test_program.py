"""A pipeline compiles to the program that one would write by hand in linen."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import testing
from flax_extra.combinator._core.stack import flatten, unwrap_stack

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)


class Attention(nn.Module):
    """A layer of two inputs."""

    @nn.compact
    def __call__(self, x, mask):
        return nn.MultiHeadDotProductAttention(2, deterministic=True)(x, mask=mask)


SPLIT = {"params": True, "dropout": True}
# Linen's scan traces its body once more by default, which leaves dead equations in the jaxpr.
ONCE = {"check_constancy_invariants": False}


# Each model twice: as a pipeline, and by hand with the same parameter tree.


def mlp():
    return cb.serial(nn.Dense(8), nn.relu, nn.Dropout(0.5), nn.Dense(2))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(2)(nn.Dropout(0.5)(x, deterministic=deterministic))


def two_towers():
    return cb.serial(
        cb.branch(cb.serial(nn.Dense(4), nn.relu), nn.Dense(4)),
        cb.concatenate(),
        cb.residual(nn.LayerNorm(), nn.Dense(8), shortcut=nn.Dense(8)),
        cb.split(2),
        cb.mul(),
    )


class TwoTowers(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = nn.relu(nn.Dense(4)(x)), nn.Dense(4)(x)
        x = jnp.concatenate([a, b], axis=-1)
        x = nn.Dense(8)(nn.LayerNorm()(x)) + nn.Dense(8)(x)
        a, b = jnp.split(x, 2, axis=-1)
        return a * b


def encoder():
    block = cb.residual(nn.LayerNorm(), Attention()) >> cb.residual(nn.Dense(4), nn.gelu)
    return nn.Embed(10, 4) >> cb.repeat(block, 3) >> nn.LayerNorm()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        x = Attention()(nn.LayerNorm()(x), mask) + x
        return nn.gelu(nn.Dense(4)(x)) + x


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(10, 4)(tokens)

        def step(block, x, _):
            return block(x, mask), None

        loop = nn.scan(step, variable_axes={"params": 0}, split_rngs=SPLIT, length=3, **ONCE)
        x, _ = loop(Block(name="Repeat_0"), x, None)
        return nn.LayerNorm()(x)


def recurrent():
    cell = cb.serial(cb.add(), nn.Dense(4), jnp.tanh, cb.dup())
    return cb.serial(cb.scan(cell), cb.drop(), nn.Dense(2))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        carry = jnp.tanh(nn.Dense(4)(carry + x))
        return carry, carry


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, carry, xs):
        rnn = nn.scan(
            Cell,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            in_axes=1,
            out_axes=1,
            **ONCE,
        )
        _, ys = rnn(name="Scan_0")(carry, xs)
        return nn.Dense(2)(ys)


def rematted():
    return cb.serial(nn.Dense(4), cb.remat(cb.serial(nn.Dense(8), jnp.sin, nn.Dense(4))), jnp.cos)


class Inside(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.sin(nn.Dense(8)(x))
        return nn.Dense(4)(x)


class Rematted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.cos(nn.remat(Inside)(name="Remat_0")(nn.Dense(4)(x)))


def multimodal():
    return cb.serial(
        cb.parallel(nn.Dense(4), cb.serial(nn.Embed(10, 4), jnp.tanh)),
        cb.concatenate(axis=1),
        cb.repeat(cb.residual(nn.LayerNorm(), nn.Dense(4), nn.relu), 2, remat=True),
        cb.branch(lambda x: x.mean(1), nn.Dense(3)),
    )


class ResidualBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(4)(nn.LayerNorm()(x))) + x


class Multimodal(nn.Module):
    @nn.compact
    def __call__(self, image, tokens):
        x = jnp.concatenate([nn.Dense(4)(image), jnp.tanh(nn.Embed(10, 4)(tokens))], axis=1)

        def step(block, x, _):
            return block(x), None

        loop = nn.scan(
            nn.remat(step, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs=SPLIT,
            length=2,
            **ONCE,
        )
        x, _ = loop(ResidualBlock(name="Repeat_0"), x, None)
        return x.mean(1), nn.Dense(3)(x)


TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
MASK = jnp.ones((2, 1, 3, 3), bool)

MODELS = {
    "mlp, evaluating": (mlp, MLP, (X,), {"deterministic": True}),
    "mlp, training": (mlp, MLP, (X,), {"deterministic": False}),
    "two towers": (two_towers, TwoTowers, (X,), {}),
    "encoder": (encoder, Encoder, (TOKENS, MASK), {}),
    "recurrent": (recurrent, Recurrent, (jnp.zeros((2, 4)), X), {}),
    "rematted": (rematted, Rematted, (X,), {}),
    "multimodal": (multimodal, Multimodal, (X, TOKENS), {}),
}


def instructions(model, variables, inputs, context) -> int:
    def apply(variables, key, *inputs):
        return model.apply(variables, *inputs, rngs={"dropout": key}, **context)

    text = jax.jit(apply).lower(variables, KEY, *inputs).compile().as_text()
    return sum(" = " in line for line in text.splitlines())


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_and_handwritten_are_one_program(name):
    pipeline, handwritten, inputs, context = MODELS[name]
    ours, theirs = pipeline(), handwritten()
    variables = ours.init({"params": KEY, "dropout": KEY}, *inputs, **context)
    testing.assert_same_program(
        ours, theirs, *inputs, variables=variables, rngs=("dropout",), **context
    )
    counts = [instructions(model, variables, inputs, context) for model in (ours, theirs)]
    assert counts[0] == counts[1]


# Generated pipelines against a reference that reads the expression


def meaning(p, stack):
    """What an expression means, read from its parts in the plainest way."""
    if isinstance(p, cb.Serial):
        for child in p:
            stack = meaning(child, stack)
        return stack
    n_in = cb.infer_signature(p).n_in
    if isinstance(p, cb.Parallel):
        outputs = ()
        for child in p:
            n = cb.infer_signature(child).n_in
            outputs, stack = outputs + meaning(child, stack[:n]), stack[n:]
        return outputs + stack
    if isinstance(p, cb.Branch):
        return branched(p, stack) + stack[n_in:]
    if isinstance(p, cb.Residual):
        body, shortcut = branched([cb.serial(*p), p.shortcut], stack)
        return (body + shortcut, *stack[n_in:])
    if isinstance(p, cb.Keep):
        return meaning(p[0], stack[:n_in]) + stack[n_in - p.n : n_in] + stack[n_in:]
    if isinstance(p, cb.Dip):
        return stack[: p.n] + meaning(p[0], stack[p.n :])
    if isinstance(p, cb.Select):
        return tuple(stack[i] for i in p.indices) + stack[p._n_popped :]
    if isinstance(p, cb.Wire):
        names, given = (side.split() for side in p.names.split("->"))
        wires = dict(zip(names, stack, strict=False))
        return tuple(wires[name] for name in given) + stack[len(names) :]
    if isinstance(p, cb.Dup):
        return stack[: p.n_in] * 2 + stack[p.n_in :]
    if isinstance(p, cb.Drop):
        return stack[p.n_in :]
    if isinstance(p, cb.Swap):
        return (stack[1], stack[0], *stack[2:])
    if isinstance(p, cb.Identity):
        return stack
    if isinstance(p, cb.Fn):
        return meaning(p[0], stack)
    if isinstance(p, cb.Concatenate):
        return (jnp.concatenate(stack[:n_in], axis=p.axis), *stack[n_in:])
    if isinstance(p, cb.Split):
        return (*jnp.split(stack[0], p.n_out, axis=p.axis), *stack[1:])
    if isinstance(p, cb.Fold):
        return (folded(lambda *pair: meaning(p[0], pair)[0], stack[:n_in]), *stack[n_in:])
    for kind, operation in ARITHMETIC.items():
        if isinstance(p, kind):
            return (folded(operation, stack[:n_in]), *stack[n_in:])
    return flatten(p(*stack[:n_in])) + stack[n_in:]


ARITHMETIC = {
    cb.Add: operator.add,
    cb.Sub: operator.sub,
    cb.Mul: operator.mul,
    cb.Div: operator.truediv,
}


def folded(f, items):
    total, *rest = items
    for item in rest:
        total = f(total, item)
    return total


def branched(children, stack):
    return tuple(
        output
        for child in children
        for output in meaning(child, stack[: cb.infer_signature(child).n_in])
    )


LIFTED = {"repeat", "scan", "remat", "cond", "switch", "vmap"}
plain = testing.pipelines(combinators=testing.COMBINATORS - LIFTED)


@given(plain)
def test_the_jaxpr_is_that_of_the_expression_read_by_hand(p):
    inputs = [jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)] * p.signature.n_in
    variables = jax.eval_shape(p.init, KEY, *inputs)

    def by_hand(variables, *stack):
        return unwrap_stack(meaning(p.clone().bind(variables), stack))

    testing.assert_same_program(p.apply, by_hand, variables, *inputs)


# No layer norm, which makes rounding errors large where features are nearly the same.
tame = testing.pipelines(
    leaves=[nn.Dense(4), nn.Dense(4), jnp.tanh, jnp.maximum],
    combinators=testing.COMBINATORS - {"div"},
)


@settings(max_examples=60)
@given(tame, st.data())
def test_eval_shape_equals_apply(p, data):
    inputs = data.draw(testing.inputs_for(p))
    variables = p.init(KEY, *inputs)
    abstract = jax.eval_shape(p.apply, variables, *inputs)
    actual = p.apply(variables, *inputs)
    assert len(flatten(actual)) == p.signature.n_out
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(
        lambda a: (a.shape, a.dtype), actual
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        jax.jit(p.apply)(variables, *inputs),
        actual,
    )
