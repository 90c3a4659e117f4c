"""Three classes of transformers in our words: configurations, and the names of weights.

Each is built by one of the functions of perceiver_models.py. Names are those of a state dict; where
torch has a module for each layer, ``{layer}`` stands for its number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from perceiver_io import Core
from perceiver_models import Clip, image_classifier, masked_language_model, multimodal_autoencoder


class CheckpointError(ValueError):
    """Weights or a configuration that cannot be used. The first line says all in short."""


class Settings:
    """A configuration that says what it lacks."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name not in self._config:
            raise CheckpointError(f"The configuration has no {name!r}. Is it of a Perceiver?")
        return self._config[name]

    @property
    def n_labels(self) -> int:
        """Transformers writes the names of the labels instead of their number, unless it is 2."""
        names = self._config.get("id2label")
        return len(names) if names is not None else int(self._config.get("num_labels", 2))


def _core(config: Settings) -> Core:
    return Core(
        n_latents=config.num_latents,
        d_latents=config.d_latents,
        n_layers=config.num_self_attends_per_block,
        n_shards=config.num_blocks,
        n_heads=config.num_self_attention_heads,
        n_heads_encoder=config.num_cross_attention_heads,
        d_qk=config.qk_channels,
        d_v=config.v_channels,
        widening_factor=config.self_attention_widening_factor,
        widening_factor_encoder=config.cross_attention_widening_factor,
        query_residual=config.use_query_residual,
        attention=_choice(ATTENTIONS, config, "cross_attention_shape_for_attention"),
        feed_forward=functools.partial(
            xn.FeedForward, activation=_choice(ACTIVATIONS, config, "hidden_act")
        ),
    )


def _choice(known: Mapping[str, Any], config: Settings, key: str) -> Any:
    value = getattr(config, key)
    if value not in known:
        raise CheckpointError(
            f"The configuration has {key}={value!r}. Known are: {', '.join(map(repr, known))}."
        )
    return known[value]


def _features_of_queries(inputs_q: jax.Array, *_: Any) -> int:
    return int(inputs_q.shape[-1])


ATTENTIONS: Mapping[str, Callable[..., nn.Module]] = {
    "kv": xn.KVQAttention,
    "q": functools.partial(xn.KVQAttention, d_qk=_features_of_queries),
}
"""What queries and keys have the features of, where no number is given."""

ACTIVATIONS: Mapping[str, Callable[..., jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}
"""As transformers names them. Its plain GELU is the exact one, linen's is the tanh form."""


def _language(config: Settings) -> cb.Combinator:
    return masked_language_model(
        _core(config),
        n_tokens=config.vocab_size,
        n_positions=config.max_position_embeddings,
        d_model=config.d_model,
    )


def _image(config: Settings) -> cb.Combinator:
    return image_classifier(_core(config), n_labels=config.n_labels)


def _multimodal(config: Settings) -> cb.Combinator:
    frames, size = config.num_frames, config.image_size
    clip = Clip(
        n_samples=frames * config.audio_samples_per_frame,
        samples_per_patch=config.samples_per_patch,
        video_shape=tuple(config.output_shape[1:4]),
        max_resolution=(frames, size, size),
        n_labels=config.n_labels,
        d_label_query=config._label_trainable_num_channels,
    )
    return multimodal_autoencoder(_core(config), clip, d_output=config.output_num_channels)


# Inputs of the right shapes: parameters are known once a model has seen some


def _language_inputs(config: Settings) -> list[Any]:
    return [np.zeros((1, config.max_position_embeddings), np.int32), None]


def _image_inputs(config: Settings) -> list[Any]:
    del config  # transformers, too, takes no other size
    return [np.zeros((1, 224, 224, 3), np.float32)]


def _multimodal_inputs(config: Settings) -> list[Any]:
    _, frames, rows, columns = config.output_shape
    return [
        np.zeros((1, config.num_frames * config.audio_samples_per_frame), np.float32),
        np.zeros((1, frames, rows, columns, 3), np.float32),
        np.zeros((1, config.n_labels), np.float32),
        np.zeros((1, 1), np.int32),
        np.zeros((1, 1), np.int32),
    ]


# Names: ours -> theirs


def _linear(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/kernel": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def _self_attention(ours: str, theirs: str) -> dict[str, str]:
    return {
        **_norm(f"{ours}/norm_inputs", f"{theirs}.attention.self.layernorm1"),
        **_linear(f"{ours}/attention/query", f"{theirs}.attention.self.query"),
        **_linear(f"{ours}/attention/key", f"{theirs}.attention.self.key"),
        **_linear(f"{ours}/attention/value", f"{theirs}.attention.self.value"),
        **_linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense"),
        **_norm(f"{ours}/norm", f"{theirs}.layernorm"),
        **_linear(f"{ours}/feed_forward/Dense_0", f"{theirs}.mlp.dense1"),
        **_linear(f"{ours}/feed_forward/Dense_1", f"{theirs}.mlp.dense2"),
    }


def _cross_attention(ours: str, theirs: str) -> dict[str, str]:
    return {
        **_self_attention(ours, theirs),
        **_norm(f"{ours}/norm_queries", f"{theirs}.attention.self.layernorm1"),
        **_norm(f"{ours}/norm_inputs", f"{theirs}.attention.self.layernorm2"),
    }


CORE_NAMES = {
    "latents/positional_encoding": "perceiver.embeddings.latents",
    **_cross_attention("encoder", "perceiver.encoder.cross_attention"),
    **_self_attention("processor/layers", "perceiver.encoder.self_attends.{layer}"),
}

LANGUAGE_NAMES = {
    **CORE_NAMES,
    "embed/embedding": "perceiver.input_preprocessor.embeddings.weight",
    "positions/positional_encoding": "perceiver.input_preprocessor.position_embeddings.weight",
    "queries/positional_encoding": (
        "perceiver.decoder.output_position_encodings.position_embeddings"
    ),
    **_cross_attention("decoder", "perceiver.decoder.decoding_cross_attention"),
    "scores/decoding/bias": "embedding_decoder.bias",
}

IMAGE_NAMES = {
    **CORE_NAMES,
    "queries/positional_encoding": (
        "perceiver.decoder.decoder.output_position_encodings.position_embeddings"
    ),
    **_cross_attention("decoder", "perceiver.decoder.decoder.decoding_cross_attention"),
    **_linear("logits", "perceiver.decoder.decoder.final_layer"),
}

MODALITIES = ("audio", "image", "label")
"""Sound, video and label: their order in a clip is transformers' as well, which is alphabetical."""

MULTIMODAL_NAMES = {
    **CORE_NAMES,
    **_cross_attention("chunks/decoder", "perceiver.decoder.decoder.decoding_cross_attention"),
    **_linear("chunks/outputs", "perceiver.decoder.decoder.final_layer"),
    "chunks/queries/position_encoder_2/positional_encoding": (
        "perceiver.decoder.modalities.label.decoder.output_position_encodings.position_embeddings"
    ),
}
for _index, _modality in enumerate(MODALITIES):
    MULTIMODAL_NAMES |= {
        f"inputs/padding_{_index}/padding": f"perceiver.input_preprocessor.padding.{_modality}",
        f"inputs/masking_{_index}/mask": f"perceiver.input_preprocessor.mask.{_modality}",
        f"chunks/queries/padding_{_index}/padding": f"perceiver.decoder.padding.{_modality}",
        **_linear(
            f"chunks/modalities/decoder_{_index}/embedding_decoder",
            f"perceiver.output_postprocessor.modalities.{_modality}.classifier",
        ),
    }


class Architecture(NamedTuple):
    """A class of transformers: what builds it, inputs that it takes, its names for our weights."""

    build: Callable[[Settings], cb.Combinator]
    inputs: Callable[[Settings], list[Any]]
    names: Mapping[str, str]


ARCHITECTURES: Mapping[str, Architecture] = {
    "PerceiverForMaskedLM": Architecture(_language, _language_inputs, LANGUAGE_NAMES),
    "PerceiverForImageClassificationFourier": Architecture(_image, _image_inputs, IMAGE_NAMES),
    "PerceiverForMultimodalAutoencoding": Architecture(
        _multimodal, _multimodal_inputs, MULTIMODAL_NAMES
    ),
}
"""What is known, by the name of transformers' class."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a configuration is of: the first of its ``architectures``.

    Raises:
        CheckpointError: where it is of none that is known.
    """
    kind, names = config.get("model_type"), config.get("architectures") or [None]
    if kind == "perceiver" and names[0] in ARCHITECTURES:
        return str(names[0])
    raise CheckpointError(
        f"The configuration is of a model of type {kind!r}, class {names[0]!r}. "
        f"Of type 'perceiver' these classes are known: {', '.join(ARCHITECTURES)}."
    )
