"""The Perceivers against transformers, with the same weights.

Weights are drawn anew at sigma 0.2: at the 0.02 that transformers starts from, most of a model could
be wrong without a difference showing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from perceiver_checkpoints import from_huggingface, load, pipeline
from perceiver_models import in_chunks

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
    return pipeline(config), from_huggingface(model.state_dict(), config)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def a_text() -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and a mask for texts of different lengths."""
    tokens = np.random.default_rng(0).integers(0, 262, (BATCH, TIME))
    mask = np.arange(TIME)[None] < np.array([[TIME], [TIME // 3]])
    return tokens.astype(np.int32), mask.astype(np.int32)


def assert_close(found: Any, expected: torch.Tensor, tolerance: float) -> None:
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


SIZES = [
    pytest.param(SMALL, 2e-5, id="small"),
    pytest.param({**SMALL, "num_blocks": 2, "qk_channels": 8, "v_channels": 16}, 2e-5, id="shards"),
    pytest.param(
        {**SMALL, "cross_attention_shape_for_attention": "q", "self_attention_widening_factor": 2,
         "cross_attention_widening_factor": 3, "use_query_residual": False},
        2e-5,
        id="queries",
    ),
    pytest.param({**DEEP, "num_self_attends_per_block": 8}, 1e-4, id="eight blocks, two shards"),
]  # fmt: skip


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("sizes", "tolerance"), SIZES)
@pytest.mark.parametrize("is_masked", [False, True], ids=["full", "padded"])
def test_language_model(sizes, tolerance, is_masked, act):
    theirs = reference("PerceiverForMaskedLM", act, **sizes, **LANGUAGE)
    model, variables = ours(theirs)
    tokens, mask = a_text()
    with torch.no_grad():
        expected = theirs(
            inputs=torch.tensor(tokens), attention_mask=torch.tensor(mask) if is_masked else None
        ).logits
    found = jax.jit(model.apply)(variables, tokens, mask if is_masked else None)
    print(np.abs(found - expected.numpy()).max(), np.abs(found).max())
    assert_close(found, expected, tolerance)
