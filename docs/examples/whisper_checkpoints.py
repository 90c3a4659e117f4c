"""Whisper of transformers in our words.

model, variables = WHISPER.load("directory")  # that save_pretrained wrote
logits = model.apply(variables, tokens, features)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_files import CheckpointError, read_json
from checkpoint_names import ACTIVATIONS, CONV, Architecture, Settings, Weight, linear, norm
from checkpoints import Family
from flax_extra import combinator as cb
from transformer import Tower
from whisper import Task, decoder, encoder, whisper


def _attention(ours: str, theirs: str) -> dict[str, Weight]:
    """Whisper has no bias of keys. It would move all logits of a softmax alike, so it is zeros."""
    return {
        **linear(f"{ours}/query", f"{theirs}.q_proj"),
        **linear(f"{ours}/key", f"{theirs}.k_proj"),
        f"{ours}/key/bias": Weight(f"{theirs}.k_proj", is_zero=True),
        **linear(f"{ours}/value", f"{theirs}.v_proj"),
        **linear(f"{ours}/out", f"{theirs}.out_proj"),
    }


def _tower(ours: str, theirs: str) -> dict[str, Weight]:
    layers, block = f"{ours}/layers", f"{theirs}.layers.{{layer}}"
    positions = f"{ours}/positions/position_encoder/positional_encoding"
    return {
        positions: Weight(f"{theirs}.embed_positions.weight"),
        **norm(f"{layers}/norm_attention", f"{block}.self_attn_layer_norm"),
        **_attention(f"{layers}/attention", f"{block}.self_attn"),
        **norm(f"{layers}/norm_cross_attention", f"{block}.encoder_attn_layer_norm"),
        **_attention(f"{layers}/cross_attention", f"{block}.encoder_attn"),
        **norm(f"{layers}/norm_feed_forward", f"{block}.final_layer_norm"),
        **linear(f"{layers}/feed_forward/Dense_0", f"{block}.fc1"),
        **linear(f"{layers}/feed_forward/Dense_1", f"{block}.fc2"),
        **norm(f"{ours}/norm", f"{theirs}.layer_norm"),
    }


NAMES = {
    **_tower("encoder", "model.encoder"),
    **linear("encoder/conv_0", "model.encoder.conv1", CONV),
    **linear("encoder/conv_1", "model.encoder.conv2", CONV),
    **_tower("decoder", "model.decoder"),
    "decoder/embed/embedding": Weight("model.decoder.embed_tokens.weight"),
}


def _build(config: Settings) -> cb.Combinator:
    towers = [
        Tower(
            d_model=config.d_model,
            n_layers=getattr(config, f"{side}_layers"),
            n_heads=getattr(config, f"{side}_attention_heads"),
            d_hidden=getattr(config, f"{side}_ffn_dim"),
            activation=config.choose("activation_function", ACTIVATIONS),
            dtype=config.compute_dtype,
        )
        for side in ("encoder", "decoder")
    ]
    return whisper(
        encoder(towers[0], config.max_source_positions),
        decoder(towers[1], config.vocab_size, config.max_target_positions),
    )


def _inputs(config: Settings) -> list[Any]:
    features = np.zeros((1, 2 * config.max_source_positions, config.num_mel_bins), np.float32)
    return [np.zeros((1, 1), np.int32), features]


WHISPER = Family(
    {
        "WhisperForConditionalGeneration": Architecture(
            _build, _inputs, NAMES, ignored=("proj_out.weight",)
        )
    }
)
"""What loads and saves it."""


def read_task(directory: Path, language: str = "en") -> Task:
    """Reads which tokens start and end a transcription, from ``generation_config.json``.

    Args:
        directory: that ``save_pretrained`` wrote.
        language: of the speech, if the model knows several.

    Raises:
        CheckpointError: If there is no such file, or the model does not know the language.
    """
    config = read_json(directory / "generation_config.json")
    settings = Settings(config)
    prompt = [settings.decoder_start_token_id]
    languages = config.get("lang_to_id")
    if languages:
        if f"<|{language}|>" not in languages:
            known = ", ".join(sorted(name.strip("<|>") for name in languages))
            raise CheckpointError(f"The model does not know the language {language!r}: {known}.")
        prompt += [languages[f"<|{language}|>"], config["task_to_id"]["transcribe"]]
    if settings.get("no_timestamps_token_id") is not None:
        prompt.append(settings.no_timestamps_token_id)
    end = settings.eos_token_id
    return Task(
        tuple(prompt),
        end[0] if isinstance(end, list) else end,
        never=tuple(settings.get("suppress_tokens", ())),
        not_first=tuple(settings.get("begin_suppress_tokens", ())),
    )
