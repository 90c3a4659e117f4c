"""The loader of all models: layouts, parts, layers, files, and the way back.

Numbers against transformers are in tests/parity; here weights are made up, so that it is not needed.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_files import CheckpointError, SavedWeights
from clip_checkpoints import CLIP
from llama_checkpoints import LANGUAGE_MODELS
from whisper import Suppress
from whisper_checkpoints import WHISPER, read_task

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 11,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
WHISPER_CONFIG: dict[str, Any] = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "vocab_size": 11,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 12,
    "num_mel_bins": 4,
    "max_source_positions": 50,
    "max_target_positions": 16,
    "activation_function": "gelu",
}
TOWER = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_CONFIG: dict[str, Any] = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 6,
    "text_config": {**TOWER, "vocab_size": 11, "max_position_embeddings": 7, "eos_token_id": 2},
    "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
}
MODELS = {
    "llama": (LANGUAGE_MODELS, LLAMA),
    "gpt2": (LANGUAGE_MODELS, GPT2),
    "whisper": (WHISPER, WHISPER_CONFIG),
    "clip": (CLIP, CLIP_CONFIG),
}


@functools.cache
def weights(kind: str = "llama") -> dict[str, np.ndarray]:
    family, config = MODELS[kind]
    draw = np.random.default_rng(0)
    shapes = family.shapes(config)
    return {name: np.asarray(draw.normal(size=shape), np.float32) for name, shape in shapes.items()}


def saved(directory: Path, kind: str = "llama", changed: dict[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**MODELS[kind][1], **(changed or {})}))
    save_file(weights(kind), directory / "model.safetensors")
    return directory


# Layouts


def test_heads_of_queries_and_of_keys():
    state = weights()
    params = LANGUAGE_MODELS.read(state, LLAMA)["params"]["layers"]["attention"]
    for name, theirs, heads in (("query", "q_proj", 4), ("key", "k_proj", 2)):
        for layer in range(2):
            weight = state[f"model.layers.{layer}.self_attn.{theirs}.weight"]
            expected = weight.T.reshape(8, heads, 2)
            np.testing.assert_array_equal(params[name]["kernel"][layer], expected)


def test_parts_of_one_weight_that_is_not_turned():
    state = weights("gpt2")
    params = LANGUAGE_MODELS.read(state, GPT2)["params"]["layers"]["attention"]
    for index, name in enumerate(("query", "key", "value")):
        part = slice(8 * index, 8 * index + 8)
        weight = state["transformer.h.1.attn.c_attn.weight"][:, part]
        bias = state["transformer.h.1.attn.c_attn.bias"][part]
        np.testing.assert_array_equal(params[name]["kernel"][1], weight.reshape(8, 2, 4))
        np.testing.assert_array_equal(params[name]["bias"][1], bias.reshape(2, 4))


def test_convolutions():
    one, two = weights("whisper"), weights("clip")
    kernel = WHISPER.read(one, WHISPER_CONFIG)["params"]["encoder"]["conv_0"]["kernel"]
    np.testing.assert_array_equal(kernel, one["model.encoder.conv1.weight"].transpose(2, 1, 0))
    image = CLIP.read(two, CLIP_CONFIG)["params"]["image"]
    patches = two["vision_model.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(image["patches"]["kernel"], patches.transpose(2, 3, 1, 0))
    token = two["vision_model.embeddings.class_embedding"]
    np.testing.assert_array_equal(image["class_token"]["vectors"], token[None])


def test_a_bias_that_torch_does_not_have_is_zeros():
    params = WHISPER.read(weights("whisper"), WHISPER_CONFIG)["params"]
    bias = params["decoder"]["layers"]["cross_attention"]["key"]["bias"]
    assert bias.shape == (2, 2, 4)
    assert not bias.any()


# There and back


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_there_and_back(kind, dtype, tmp_path):
    family, config = MODELS[kind]
    variables = family.read(weights(kind), config, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(dtype)}
    family.save(tmp_path, variables, config)
    stored = SavedWeights(tmp_path)
    assert stored.shapes == family.shapes(config)
    for name, weight in weights(kind).items():
        np.testing.assert_array_equal(stored[name], weight.astype(dtype), err_msg=name)
    config = {**config, "dtype": jnp.dtype(dtype).name}
    family.save(tmp_path, variables, config)
    again = family.load(tmp_path, dtype=None)[1]
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(dtype)}


def test_progress_is_told():
    names: list[str] = []

    def track(sequence):
        for name in sequence:
            names.append(name)
            yield name

    LANGUAGE_MODELS.read(weights(), LLAMA, track=track)
    assert "layers/feed_forward/gate/kernel" in names
    assert len(names) == 12


# Memory


MEASURE = """
import resource, sys
import jax
from llama_checkpoints import LANGUAGE_MODELS
directory = sys.argv[1]
config = LANGUAGE_MODELS.read_config(directory)
LANGUAGE_MODELS.shapes(config)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
variables = LANGUAGE_MODELS.read(directory, config, dtype=None)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
print((after - before) * 1024 / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is not in kilobytes")
def test_reading_takes_little_more_memory_than_the_weights(tmp_path):
    config = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    state = {
        name: np.ones(shape, np.float32) for name, shape in LANGUAGE_MODELS.shapes(config).items()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    assert sum(weight.nbytes for weight in state.values()) > 2**27
    environment = {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu", "PATH": ""}
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(printed.stdout) < 1.3


# What is refused


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            LANGUAGE_MODELS,
            {"model_type": "bert", "architectures": ["BertModel"]},
            (
                "The configuration is of a model of type 'bert', class 'BertModel'. "
                "Known here are: LlamaForCausalLM, MistralForCausalLM, GPT2LMHeadModel."
            ),
        ),
        (
            LANGUAGE_MODELS,
            {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "The configuration has rope_type='yarn'. Known are: 'default', 'linear', 'llama3'.",
        ),
        (
            LANGUAGE_MODELS,
            {**GPT2, "scale_attn_by_inverse_layer_idx": True},
            "The configuration has scale_attn_by_inverse_layer_idx=True, which is not known.",
        ),
        (
            CLIP,
            {**CLIP_CONFIG, "text_config": TOWER},
            "The configuration, of type None, has no 'eos_token_id'.",
        ),
    ],
)
def test_configurations_that_are_not_known(family, config, message):
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        family.build(config)


def test_older_and_newer_names_of_rotary_positions():
    llama_3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": llama_3}
    newer = {**LLAMA, "rope_parameters": {**llama_3, "rope_theta": 5e5}}
    assert LANGUAGE_MODELS.build(older) == LANGUAGE_MODELS.build(newer)
    assert LANGUAGE_MODELS.build(older) != LANGUAGE_MODELS.build(LLAMA)


def test_all_that_does_not_fit_is_listed():
    state = dict(weights())
    del state["lm_head.weight"]
    del state["model.layers.1.mlp.up_proj.weight"]
    state["score.weight"] = np.zeros((2, 8))
    state["model.norm.weight"] = np.zeros(9)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        LANGUAGE_MODELS.read(state, LLAMA)
    assert str(caught.value).split("\n") == [
        (
            "These are not the weights of a LlamaForCausalLM of this configuration: "
            "2 missing, 1 unexpected, 1 of another shape."
        ),
        "  missing: lm_head.weight (11, 8)",
        "  missing: model.layers.1.mlp.up_proj.weight (12, 8)",
        "  unexpected: score.weight (2, 8)",
        "  of another shape: model.norm.weight is (9,), not (8,)",
        "Give the config.json that was saved with them.",
    ]


def test_a_truncated_shard_and_a_lost_one(tmp_path):
    saved(tmp_path)
    names = sorted(weights())
    (tmp_path / "model.safetensors").unlink()
    for shard, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
        save_file({name: weights()[name] for name in part}, tmp_path / shard)
    where = dict.fromkeys(names[:9], "a.safetensors") | dict.fromkeys(names[9:], "b.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = LANGUAGE_MODELS.read(weights(), LLAMA)
    jax.tree.map(np.testing.assert_array_equal, LANGUAGE_MODELS.load(tmp_path)[1], expected)
    shard = tmp_path / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"b\.safetensors cannot be read as safetensors: "):
        LANGUAGE_MODELS.load(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors cannot be read as safetensors: No"):
        LANGUAGE_MODELS.load(tmp_path)


# What a transcription starts with


def test_tasks(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"decoder_start_token_id": 7, "eos_token_id": [3, 4]}))
    task = read_task(tmp_path)
    assert (task.prompt, task.end, task.never, task.not_first) == ((7,), 3, (), ())
    several = {
        "decoder_start_token_id": 7,
        "eos_token_id": 3,
        "lang_to_id": {"<|en|>": 8, "<|de|>": 9},
        "task_to_id": {"transcribe": 10, "translate": 11},
        "no_timestamps_token_id": 12,
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [5],
    }
    file.write_text(json.dumps(several))
    task = read_task(tmp_path, "de")
    assert (task.prompt, task.end, task.never) == ((7, 9, 10, 12), 3, (1, 2))
    logits = Suppress(task).apply({}, jnp.zeros((1, 6, 13)))
    suppressed = [np.flatnonzero(np.isneginf(row)).tolist() for row in logits[0]]
    assert suppressed == [[1, 2], [1, 2], [1, 2], [1, 2, 5], [1, 2], [1, 2]]
    with pytest.raises(CheckpointError, match=r"^The model does not know .* 'fr': de, en\.$"):
        read_task(tmp_path, "fr")
