"""The Perceivers against transformers, with the same weights.

Weights are drawn anew at sigma 0.2: at the 0.02 that transformers starts from, most of a model could
be wrong without a difference showing.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

from perceiver_checkpoints import PERCEIVERS
from perceiver_models import in_chunks

PARITY = "comes with the extra flax_extra[parity]"
torch = pytest.importorskip("torch", reason=f"torch {PARITY}")
transformers = pytest.importorskip("transformers", reason=f"transformers {PARITY}")

BATCH, TIME = 2, 48
SMALL = {"num_latents": 8, "d_latents": 16, "num_self_attends_per_block": 2}
DEEP = {"num_latents": 16, "d_latents": 32, "num_self_attends_per_block": 4, "num_blocks": 2}
LANGUAGE = {"d_model": 24, "max_position_embeddings": TIME}
CLIP = {
    "num_cross_attention_heads": 1,
    "num_labels": 7,
    "num_frames": 2,
    "audio_samples_per_frame": 64,
    "image_size": 4,
    "output_shape": [BATCH, 2, 16, 16],
    "output_num_channels": 24,
    "_label_trainable_num_channels": 20,
}


def reference(kind: str, act: str = "gelu_pytorch_tanh", **sizes: Any) -> Any:
    """A model of transformers with weights to tell differences by."""
    torch.manual_seed(0)
    config = transformers.PerceiverConfig(hidden_act=act, **sizes)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "layernorm" in name and name.endswith("weight")
            parameter.normal_(mean=1.0 if is_scale else 0.0, std=0.2)
    return model


def config_of(model: Any) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def ours(model: Any) -> tuple[Any, Any]:
    config = config_of(model)
    return PERCEIVERS.build(config), PERCEIVERS.read(model.state_dict(), config)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def a_text() -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and a mask for texts of different lengths."""
    tokens = np.random.default_rng(0).integers(0, 262, (BATCH, TIME))
    mask = np.arange(TIME)[None] < np.array([[TIME], [TIME // 3]])
    return tokens.astype(np.int32), mask.astype(np.int32)


def assert_close(found: Any, expected: torch.Tensor, tolerance: float) -> None:
    assert np.abs(expected.numpy()).max() > 0.5, "outputs this small show no difference"
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=tolerance)


SIZES = [
    pytest.param(SMALL, 2e-5, id="small"),
    pytest.param({**SMALL, "num_blocks": 2, "qk_channels": 8, "v_channels": 16}, 2e-5, id="shards"),
    pytest.param(
        {
            **SMALL,
            "cross_attention_shape_for_attention": "q",
            "self_attention_widening_factor": 2,
            "cross_attention_widening_factor": 3,
            "use_query_residual": False,
        },
        2e-5,
        id="variant",
    ),
    pytest.param(DEEP, 1e-4, id="eight blocks"),
]


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("sizes", "tolerance"), SIZES)
def test_language_model(sizes, tolerance, act):
    theirs = reference("PerceiverForMaskedLM", act, **sizes, **LANGUAGE)
    model, variables = ours(theirs)
    tokens, padding = a_text()
    for mask in (None, padding):
        with torch.no_grad():
            given = None if mask is None else torch.tensor(mask)
            expected = theirs(inputs=torch.tensor(tokens), attention_mask=given).logits
        assert_close(jax.jit(model.apply)(variables, tokens, mask), expected, tolerance)


@pytest.mark.parametrize(
    ("sizes", "is_padded"),
    [
        pytest.param(SMALL, False, id="small"),
        pytest.param(SMALL, True, id="small, padded"),
        pytest.param(DEEP, True, id="eight blocks, padded"),
    ],
)
def test_gradients_of_the_language_model(sizes, is_padded):
    theirs = reference("PerceiverForMaskedLM", **sizes, **LANGUAGE)
    model, variables = ours(theirs)
    tokens, padding = a_text()
    mask = padding if is_padded else None
    labels = np.random.default_rng(1).integers(0, 262, tokens.shape)
    given = torch.tensor(mask) if is_padded else None
    theirs(
        inputs=torch.tensor(tokens), attention_mask=given, labels=torch.tensor(labels)
    ).loss.backward()

    def loss(variables: Any) -> jax.Array:
        logits = model.apply(variables, tokens, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = PERCEIVERS.read(gradients, config_of(theirs))
    found = jax.jit(jax.grad(loss))(variables)
    jax.tree_util.tree_map_with_path(assert_relative, found, expected)


def assert_relative(path: Any, found: Any, expected: Any) -> None:
    """Within 1e-4 of the largest. The bias of a key has none: it moves all logits of a softmax."""
    scale = float(np.abs(np.asarray(expected)).max())
    if jax.tree_util.keystr(path).endswith("['key']['bias']"):
        assert scale < 1e-7
        scale = 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("sizes", "tolerance"),
    [
        pytest.param(SMALL, 2e-5, id="small"),
        pytest.param(DEEP, 1e-4, id="eight blocks"),
    ],
)
def test_image_classifier(sizes, tolerance):
    theirs = reference(
        "PerceiverForImageClassificationFourier",
        num_cross_attention_heads=1,
        num_labels=10,
        **sizes,
    )
    model, variables = ours(theirs)
    images = normal(BATCH, 224, 224, 3, seed=0)
    with torch.no_grad():
        expected = theirs(inputs=torch.tensor(images).permute(0, 3, 1, 2)).logits
    assert_close(jax.jit(model.apply)(variables, images), expected, tolerance)


def a_clip() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sound, video = normal(BATCH, 128, seed=0), normal(BATCH, 2, 16, 16, 3, seed=1)
    return sound, video, normal(BATCH, 7, seed=2)


def their_clip(sound: np.ndarray, video: np.ndarray, label: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "audio": torch.tensor(sound)[..., None],
        "image": torch.tensor(video).permute(0, 1, 4, 2, 3),
        "label": torch.tensor(label),
    }


@pytest.mark.parametrize(
    ("sizes", "tolerance"),
    [pytest.param(SMALL, 2e-5, id="small"), pytest.param(DEEP, 1e-4, id="eight blocks")],
)
def test_multimodal_autoencoder(sizes, tolerance):
    theirs = reference("PerceiverForMultimodalAutoencoding", **CLIP, **sizes)
    model, variables = ours(theirs)
    clip = a_clip()
    sound_positions, video_positions = in_chunks(8, 4), in_chunks(512, 4)
    expected = []
    for at_sound, at_video in zip(sound_positions, video_positions, strict=True):
        points = {"audio": torch.tensor(at_sound), "image": torch.tensor(at_video), "label": None}
        with torch.no_grad():
            inputs = their_clip(*clip)
            expected.append(theirs(inputs=inputs, subsampled_output_points=points).logits)
    found = jax.jit(model.apply)(variables, *clip, sound_positions, video_positions)
    for modality, mine in zip(("audio", "image"), found, strict=False):
        theirs = torch.cat([chunk[modality] for chunk in expected], dim=1)
        assert_close(mine, theirs, tolerance * largest(theirs))
    for chunk in expected:
        assert_close(found[2], chunk["label"], tolerance * largest(chunk["label"]))


def largest(outputs: torch.Tensor) -> float:
    """With 400 features a layer, sigma 0.2 makes outputs of 150, which float32 has to 1.5e-5."""
    return float(outputs.abs().max())


MODELS = {
    "PerceiverForMaskedLM": {**SMALL, **LANGUAGE},
    "PerceiverForImageClassificationFourier": {**SMALL, "num_cross_attention_heads": 1},
    "PerceiverForMultimodalAutoencoding": {**SMALL, **CLIP},
}


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_directory_that_save_pretrained_wrote(kind, shard, tmp_path):
    theirs = reference(kind, **MODELS[kind])
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    model, variables = PERCEIVERS.load(tmp_path, kind)
    expected_model, expected = ours(theirs)
    assert str(model) == str(expected_model)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_nothing_of_the_weights_is_left_out():
    theirs = reference("PerceiverForMaskedLM", **SMALL, **LANGUAGE)
    _, variables = ours(theirs)
    n_theirs = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == n_theirs
