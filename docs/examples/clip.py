"""CLIP: images and texts in one space, as one pipeline with two inputs.

Two towers of the same blocks, one for images and one for texts, give one vector for each. The model
says how similar each image is to each text; trained on pairs, it finds the text of an image.

    >>> tower = Tower(d_model=16, n_layers=2, n_heads=2, d_hidden=32, activation=nn.gelu)
    >>> image = image_tower(tower, image_size=8, patch_size=4, d_shared=8)
    >>> text = text_tower(tower, n_tokens=99, n_positions=7, d_shared=8)
    >>> print(cb.shape_signature(clip(image, text), "f32[i, 8, 8, 3]", "i32[b, t] where t <= 7"))
    f32[i, 8, 8, 3], i32[b, t] where t <= 7 -> f32[i, b]

clip_checkpoints.py loads the directories that transformers' ``CLIPModel`` saves, and the numbers
are its numbers (tests/parity/test_clip.py).

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(2021), section 2.4; Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), for the image
tower.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from flax_extra import combinator as cb
from flax_extra import layer as xn
from transformer import PADDING, Tower


def image_tower(tower: Tower, image_size: int, patch_size: int, d_shared: int) -> cb.Combinator:
    """Images ``[images, rows, columns, 3]`` -> a vector for each, ``[images, d_shared]``.

    An image is a sequence of square patches with a class token in front, which reads off the image.
    """
    d, side = tower.d_model, (patch_size, patch_size)
    return cb.serial(
        nn.Conv(d, side, side, padding="VALID", use_bias=False, dtype=tower.dtype, name="patches"),
        flatten,
        cb.branch(xn.Learned(1, d, dtype=tower.dtype, name="class_token"), cb.identity())
        >> cb.concatenate(axis=1),
        tower.positions((image_size // patch_size) ** 2 + 1),
        tower.norm("norm_inputs"),
        tower.blocks(causal=False),
        take_first,
        tower.norm("norm"),
        nn.Dense(d_shared, use_bias=False, dtype=tower.dtype, name="projection"),
        name="image",
    )


def text_tower(
    tower: Tower, n_tokens: int, n_positions: int, d_shared: int, end: int | None = None
) -> cb.Combinator:
    """Texts ``[texts, time]`` -> a vector for each, ``[texts, d_shared]``.

    A text is read from left to right, so that its end knows all of it. ``end`` is the token there:
    the highest of each text by default.
    """
    encoder = cb.serial(
        tower.embed(n_tokens),
        tower.positions(n_positions),
        tower.blocks(causal=True, mask=PADDING),
        tower.norm("norm"),
    )
    return cb.serial(
        cb.branch(encoder, cb.identity()),
        functools.partial(take_end, end=end),
        nn.Dense(d_shared, use_bias=False, dtype=tower.dtype, name="projection"),
        name="text",
    )


def clip(image: cb.Combinator, text: cb.Combinator) -> cb.Combinator:
    """Images and texts -> how similar each image is to each text, ``[images, texts]``.

    The context keyword ``padding_mask``, ``bool[texts, 1, time]``, says where texts are not
    padding. Padding after the end of a text needs none.
    """
    return cb.serial(cb.parallel(image, text), Similarity(name="similarity"))


class Similarity(nn.Module):
    """The cosine of the angle between vectors, times a learned scale."""

    @nn.compact
    def __call__(self, images: Array, texts: Array) -> Array:
        """``[images, d]``, ``[texts, d]`` -> ``[images, texts]``."""
        scale = self.param("log_scale", nn.initializers.constant(math.log(1 / 0.07)), ())
        return jnp.exp(scale) * (normalize(images) @ normalize(texts).T)


def normalize(x: Array) -> Array:
    """Scales vectors to length 1."""
    lengths: Array = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / lengths


def flatten(patches: Array) -> Array:
    """``[batch, rows, columns, d]`` -> ``[batch, time, d]``."""
    return patches.reshape(patches.shape[0], -1, patches.shape[-1])


def take_first(sequence: Array) -> Array:
    """``[batch, time, d]`` -> ``[batch, d]``."""
    return sequence[:, 0]


def take_end(sequence: Array, tokens: Array, *, end: int | None) -> Array:
    """``[batch, time, d]`` at the first end token of each text -> ``[batch, d]``."""
    at = jnp.argmax(tokens if end is None else tokens == end, axis=1)
    ends: Array = jnp.take_along_axis(sequence, at[:, None, None], axis=1)
    return ends[:, 0]
