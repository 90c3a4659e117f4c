"""CLIP of transformers in our words. Images go in with their colours last.

model, variables = CLIP.load("directory")  # that save_pretrained wrote
similarities = model.apply(variables, images, tokens)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from checkpoint_names import (
    ACTIVATIONS,
    CONV,
    VECTOR,
    Architecture,
    Settings,
    Weight,
    linear,
    norm,
)
from checkpoints import Family
from clip import clip, image_tower, text_tower
from flax_extra import combinator as cb
from transformer import Tower


def _tower(ours: str, theirs: str) -> dict[str, Weight]:
    block = f"{theirs}.encoder.layers.{{layer}}"
    return {
        **norm(f"{ours}/layers/norm_attention", f"{block}.layer_norm1"),
        **linear(f"{ours}/layers/attention/query", f"{block}.self_attn.q_proj"),
        **linear(f"{ours}/layers/attention/key", f"{block}.self_attn.k_proj"),
        **linear(f"{ours}/layers/attention/value", f"{block}.self_attn.v_proj"),
        **linear(f"{ours}/layers/attention/out", f"{block}.self_attn.out_proj"),
        **norm(f"{ours}/layers/norm_feed_forward", f"{block}.layer_norm2"),
        **linear(f"{ours}/layers/feed_forward/Dense_0", f"{block}.mlp.fc1"),
        **linear(f"{ours}/layers/feed_forward/Dense_1", f"{block}.mlp.fc2"),
        f"{ours}/positions/position_encoder/positional_encoding": Weight(
            f"{theirs}.embeddings.position_embedding.weight"
        ),
    }


NAMES = {
    **_tower("image", "vision_model"),
    "image/patches/kernel": Weight("vision_model.embeddings.patch_embedding.weight", CONV),
    "image/class_token/vectors": Weight("vision_model.embeddings.class_embedding", VECTOR),
    **norm("image/norm_inputs", "vision_model.pre_layrnorm"),
    **norm("image/norm", "vision_model.post_layernorm"),
    **linear("image/projection", "visual_projection"),
    **_tower("text", "text_model"),
    "text/embed/embedding": Weight("text_model.embeddings.token_embedding.weight"),
    **norm("text/norm", "text_model.final_layer_norm"),
    **linear("text/projection", "text_projection"),
    "similarity/log_scale": Weight("logit_scale"),
}


def _build(config: Settings) -> cb.Combinator:
    image, text, d_shared = config.vision_config, config.text_config, config.projection_dim
    end = None if text.eos_token_id == 2 else text.eos_token_id  # 2: of the first weights, wrong
    return clip(
        image_tower(_read_tower(image), image.image_size, image.patch_size, d_shared),
        text_tower(_read_tower(text), text.vocab_size, text.max_position_embeddings, d_shared, end),
    )


def _read_tower(config: Settings) -> Tower:
    return Tower(
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        d_hidden=config.intermediate_size,
        activation=config.choose("hidden_act", ACTIVATIONS),
        epsilon=config.layer_norm_eps,
        dtype=config.compute_dtype,
    )


def _inputs(config: Settings) -> list[Any]:
    size = config.vision_config.image_size
    return [np.zeros((1, size, size, 3), np.float32), np.zeros((1, 1), np.int32)]


CLIP = Family(
    {"CLIPModel": Architecture(_build, _inputs, NAMES, ignored=("embeddings.position_ids",))}
)
"""What loads and saves it."""
