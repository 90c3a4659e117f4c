"""CLIP against transformers, with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_checkpoints import CLIP
from tests.parity.redrawn import (
    assert_close,
    assert_gradients,
    assert_half_precision,
    assert_round_trip,
    ours,
    redraw,
    torch,
    transformers,
)

N_IMAGES, N_TEXTS, SIDE, TIME, END = 3, 2, 16, 12, 96
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "projection_dim": 16,
}


@functools.cache
def reference(end: int = END, activation: str = "quick_gelu") -> Any:
    special = {"eos_token_id": end, "bos_token_id": 1, "pad_token_id": 0}
    tower = {**TOWER, "hidden_act": activation}
    config = transformers.CLIPConfig(
        text_config={**tower, **special, "vocab_size": 97, "max_position_embeddings": TIME},
        vision_config={**tower, "image_size": SIDE, "patch_size": 4},
        projection_dim=16,
    )
    return redraw(transformers.CLIPModel(config))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Images, and texts with their end in the middle and at the end."""
    draw = np.random.default_rng(0)
    images = draw.normal(size=(N_IMAGES, SIDE, SIDE, 3)).astype(np.float32)
    texts = draw.integers(3, END, (N_TEXTS, TIME)).astype(np.int32)
    texts[0, 7] = texts[1, 11] = END
    return images, texts


PADDING = {
    "none": np.ones((N_TEXTS, TIME), bool),
    "left": np.arange(TIME) >= np.array([[4], [0]]),
    "right": np.arange(TIME) < np.array([[8], [TIME]]),
}


def run(theirs: Any, images: np.ndarray, texts: np.ndarray, mask: np.ndarray) -> Any:
    return theirs(
        input_ids=torch.tensor(texts),
        pixel_values=torch.tensor(images, dtype=theirs.dtype).permute(0, 3, 1, 2),
        attention_mask=torch.tensor(mask.astype(int)),
    )


@pytest.mark.parametrize(
    ("end", "activation"),
    [
        pytest.param(END, "quick_gelu", id="end"),
        pytest.param(2, "gelu", id="highest token"),
    ],
)
def test_similarities_and_vectors(end, activation):
    theirs, (images, texts) = reference(end, activation), inputs()
    model, variables = ours(CLIP, theirs)

    @jax.jit
    def find(mask: Any) -> Any:
        towers = model[0].apply(variables, images, texts, padding_mask=mask)
        return model.apply(variables, images, texts, padding_mask=mask), *towers

    for mask in PADDING.values():
        with torch.no_grad():
            expected = run(theirs, images, texts, mask)
            vectors = theirs.get_image_features(torch.tensor(images).permute(0, 3, 1, 2))
        similarities, image_vectors, _ = find(mask[:, None])
        assert_close(similarities, expected.logits_per_image)
        assert_close(image_vectors, vectors.pooler_output)


def test_gradients():
    theirs, (images, texts) = reference(), inputs()
    model, variables = ours(CLIP, theirs)
    weights = np.random.default_rng(1).normal(size=(N_IMAGES, N_TEXTS)).astype(np.float32)

    @jax.jit
    @jax.grad
    def differentiate(variables: Any, mask: Any) -> jax.Array:
        similarities = model.apply(variables, images, texts, padding_mask=mask)
        return jnp.sum(weights * similarities)

    for mask in PADDING.values():
        theirs.zero_grad()
        outputs = run(theirs, images, texts, mask)
        (torch.tensor(weights) * outputs.logits_per_image).sum().backward()
        assert_gradients(CLIP, theirs, differentiate(variables, mask[:, None]))


def test_half_precision():
    theirs, (images, texts) = reference(), inputs()
    model, variables = ours(CLIP, theirs, dtype=jnp.bfloat16)
    half = redraw(transformers.CLIPModel(theirs.config)).to(torch.bfloat16)
    images = np.concatenate([images + i for i in range(8)])
    with torch.no_grad():
        expected, in_half = (
            m.get_image_features(torch.tensor(images, dtype=m.dtype).permute(0, 3, 1, 2))
            for m in (theirs, half)
        )
    found, _ = jax.jit(model[0].apply)(variables, images.astype(jnp.bfloat16), texts)
    assert found.dtype == jnp.bfloat16
    assert_half_precision(found, in_half.pooler_output.float(), expected.pooler_output)


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards"])
def test_directories_there_and_back(shard, tmp_path):
    theirs, (images, texts) = reference(), inputs()

    def is_same(again: Any) -> None:
        with torch.no_grad():
            found, expected = (run(m, images, texts, PADDING["none"]) for m in (again, theirs))
        np.testing.assert_array_equal(found.logits_per_image, expected.logits_per_image)

    assert_round_trip(CLIP, theirs, tmp_path, shard, is_same)
