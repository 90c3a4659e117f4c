"""Loading weights: what is read, and what is said where they do not fit.

Numbers against transformers are in tests/parity; here weights are made up, so that it is not needed.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_files import CheckpointError, SavedWeights
from perceiver_checkpoints import PERCEIVERS

CONFIG: dict[str, Any] = {
    "model_type": "perceiver",
    "architectures": ["PerceiverForMaskedLM"],
    "num_latents": 4,
    "d_latents": 8,
    "d_model": 8,
    "num_blocks": 1,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "qk_channels": None,
    "v_channels": None,
    "cross_attention_shape_for_attention": "kv",
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "use_query_residual": True,
    "vocab_size": 262,
    "max_position_embeddings": 16,
}


@functools.cache
def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = PERCEIVERS.shapes(CONFIG)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def saved(directory: Path, changed: dict[str, Any] | None = None) -> Path:
    """A directory as save_pretrained writes it, with a configuration that was changed since."""
    (directory / "config.json").write_text(json.dumps(CONFIG | (changed or {})))
    save_file(weights(), directory / "model.safetensors")
    return directory


def test_linear_layers_are_turned_and_layers_stacked():
    state = dict(weights())
    params = PERCEIVERS.read(state, CONFIG)["params"]
    layers = params["processor"]["layers"]
    for i in range(2):
        theirs = f"perceiver.encoder.self_attends.{i}."
        query = state[theirs + "attention.self.query.weight"]
        np.testing.assert_array_equal(
            layers["attention"]["query"]["kernel"][i], query.T.reshape(8, 2, 4)
        )
        np.testing.assert_array_equal(
            layers["norm"]["scale"][i], state[theirs + "layernorm.weight"]
        )
    embedding = state["perceiver.input_preprocessor.embeddings.weight"]
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding)


def test_files_and_directories(tmp_path):
    saved(tmp_path)
    expected = PERCEIVERS.read(weights(), CONFIG)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for given in (
        PERCEIVERS.read(file, config),
        PERCEIVERS.read(str(tmp_path), tmp_path),
        PERCEIVERS.load(tmp_path)[1],
    ):
        assert str(given) == str(expected)


def test_shards(tmp_path):
    names = sorted(weights())
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, of_shard in shards.items():
        save_file({name: weights()[name] for name in of_shard}, tmp_path / shard)
    where = {name: shard for shard, of_shard in shards.items() for name in of_shard}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert SavedWeights(tmp_path).keys() == weights().keys()
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"is no index of weights: it has no 'weight_map'\.$"):
        SavedWeights(tmp_path)


def test_all_that_does_not_fit_is_listed():
    state = dict(weights())
    del state["perceiver.embeddings.latents"]
    del state["perceiver.encoder.self_attends.1.mlp.dense1.bias"]
    state["classifier.weight"] = np.zeros((2, 8))
    state["embedding_decoder.bias"] = np.zeros(100)
    with pytest.raises(CheckpointError) as caught:
        PERCEIVERS.read(state, CONFIG)
    first, *others = str(caught.value).split("\n")
    assert first == (
        "These are not the weights of a PerceiverForMaskedLM of this configuration: "
        "2 missing, 1 unexpected, 1 of another shape."
    )
    assert others == [
        "  missing: perceiver.embeddings.latents (4, 8)",
        "  missing: perceiver.encoder.self_attends.1.mlp.dense1.bias (8,)",
        "  unexpected: classifier.weight (2, 8)",
        "  of another shape: embedding_decoder.bias is (100,), not (262,)",
        "Give the config.json that was saved with them.",
    ]


KNOWN = (
    "Known here are: PerceiverForMaskedLM, PerceiverForImageClassificationFourier, "
    "PerceiverForMultimodalAutoencoding."
)
OF_MODEL = "The configuration is of a model of type"
ACTIVATIONS = (
    "'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'quick_gelu', 'relu', 'silu', 'swish', 'tanh'."
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "bert", "architectures": ["BertModel"]},
            f"{OF_MODEL} 'bert', class 'BertModel'. {KNOWN}",
        ),
        (
            {"architectures": None},
            f"{OF_MODEL} 'perceiver', class None. {KNOWN}",
        ),
        (
            {"hidden_act": "mish"},
            f"The configuration has hidden_act='mish'. Known are: {ACTIVATIONS}",
        ),
    ],
)
def test_configurations_of_other_models(changed, message):
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        PERCEIVERS.build(CONFIG | changed)


def test_what_a_configuration_lacks_is_said():
    config = {key: value for key, value in CONFIG.items() if key != "d_latents"}
    with pytest.raises(
        CheckpointError, match=r"^The configuration, of type 'perceiver', has no 'd_latents'\.$"
    ):
        PERCEIVERS.build(config)


def test_a_configuration_that_makes_no_model():
    message = r"^The configuration makes no model: .* 8 .* 3"
    with pytest.raises(CheckpointError, match=message):
        PERCEIVERS.read({}, CONFIG | {"num_self_attention_heads": 3})


def test_directories_that_hold_something_else(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"config.json cannot be read as JSON: .*No such file"
    ):
        PERCEIVERS.load(tmp_path)
    saved(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds a PerceiverForMaskedLM; asked for was a BertModel\.$"
    ):
        PERCEIVERS.read_config(tmp_path, "BertModel")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors: Error while"):
        PERCEIVERS.load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    message = (
        f"{tmp_path} has no model.safetensors: it holds config.json, pytorch_model.bin. "
        "Save the model with transformers' save_pretrained."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        PERCEIVERS.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json holds a list, not an object\.$"):
        PERCEIVERS.load(tmp_path)
