"""The pictures that are pinned, each of which was looked at, in light and in dark.

python -m tests.combinator.pictures    # draws them anew, to look at again
"""

import operator
from pathlib import Path

import jax.numpy as jnp
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn

FOLDER = Path(__file__).parent / "pictures"


def attention_block():
    attention = cb.residual(nn.LayerNorm(), xn.SelfAttention(n_heads=4))
    return cb.keep(attention) >> cb.residual(nn.LayerNorm(), xn.FeedForward(4))


def perceiver():
    latents = cb.serial(lambda x: x.shape[0], xn.TrainablePositionalEncoding(8, 64))
    attention = cb.fn(xn.Attention(n_heads=4), mask=None)
    read = cb.residual(cb.parallel(nn.LayerNorm(), nn.LayerNorm()), attention)
    think = cb.residual(nn.LayerNorm(), cb.fn(xn.SelfAttention(n_heads=4), mask=None))
    return cb.serial(
        cb.serial(cb.branch(latents, cb.identity()), read, name="encoder"),
        cb.repeat(think, 6, shared=True, name="processor"),
        nn.Dense(10),
    )


def sixty_boxes():
    blocks = [
        cb.residual(nn.LayerNorm(), nn.Dense(64), nn.gelu, nn.Dropout(0.1)) for _ in range(11)
    ]
    return cb.serial(
        nn.Embed(256, 64), blocks, nn.LayerNorm(), nn.relu, nn.Dense(256), nn.log_softmax
    )


MASKED = ("f32[b, t, 64]", "bool[b, t, t]")

PICTURES = {
    "three_boxes": (cb.serial(nn.Embed(256, 64), nn.LayerNorm(), nn.Dense(10)), ()),
    "three_boxes_with_shapes": (
        cb.serial(nn.Embed(256, 64), nn.LayerNorm(), nn.Dense(10)),
        ("i32[b, t]",),
    ),
    "attention_block": (attention_block(), MASKED),
    "transformer": (cb.repeat(attention_block(), 6) >> cb.swap() >> cb.drop(), (*MASKED, "f32[b]")),
    "two_towers": (
        cb.serial(
            cb.parallel(nn.Dense(8), nn.Embed(10, 8)),
            cb.branch(cb.add(), cb.concatenate()),
        ),
        ("f32[b, 3]", "i32[b]"),
    ),
    "moves": (
        cb.serial(cb.swap(), cb.dup(2), cb.select((2, 0, 0, 3)), cb.drop(), cb.select((2, 0, 1))),
        (),
    ),
    "merges": (
        cb.serial(
            cb.sub(3),
            cb.div(),
            cb.mul(4),
            cb.split(2),
            cb.concatenate(axis=2),
            cb.fold(operator.floordiv, 3),
        ),
        ("f32[b, 4, 8]",) * 10,
    ),
    "running_sum": (cb.scan(cb.add() >> cb.dup(), name="sums"), ("f32[b]", "f32[b, t]")),
    "sources_and_depths": (
        cb.serial(cb.fn(lambda: 1, n_in=0, n_out=1), abs, operator.add, cb.dip(operator.mul)),
        (),
    ),
    "frames_in_frames": (
        cb.remat(
            cb.repeat(cb.residual(nn.Dense(4), nn.relu, shortcut=nn.Dense(4)), 3, shared=True),
            name="tower",
        ),
        ("f32[b, 4]",),
    ),
    "perceiver": (perceiver(), ("f32[b, t, 64]",)),
    "branches": (
        cb.serial(
            cb.cond(nn.Dense(8), cb.serial(nn.Dense(32), nn.gelu, nn.Dense(8))),
            cb.vmap(nn.LayerNorm(), axis=1),
        ),
        ("bool[]", "f32[b, t, 64]"),
    ),
    "choices": (cb.switch(jnp.add, cb.wire("x y -> y"), cb.mul()), ()),
    "ensemble": (
        cb.vmap(cb.residual(nn.Dense(8)), axis=(None,), shared=False, n=5),
        ("f32[b, 8]",),
    ),
    "named_wires": (
        cb.serial(
            cb.wire("x memory mask -> x memory mask memory mask"),
            cb.residual(xn.Attention(n_heads=4)),
            cb.wire("x memory mask -> memory mask x"),
        ),
        ("f32[b, t, 64]", "f32[b, s, 64]", "bool[b, t, s]"),
    ),
    "named_wires_without_shapes": (cb.wire("x memory mask -> memory x x"), ()),
    "sixty_boxes": (sixty_boxes(), ("i32[b, t]",)),
    "nothing": (cb.serial(), ()),
}
"""Pipelines, and the inputs that they are drawn with."""


def draw(name):
    pipeline, inputs = PICTURES[name]
    context = {"deterministic": True} if "deterministic" in pipeline.keywords and inputs else {}
    return cb.diagram(pipeline, *inputs, **context)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        draw(name).save(FOLDER / f"{name}.svg")
