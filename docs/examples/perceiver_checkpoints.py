"""The Perceivers of Hugging Face's transformers: their configurations and weights in our words.

Three of its classes are known: ``PerceiverForMaskedLM``, ``PerceiverForImageClassificationFourier``
and ``PerceiverForMultimodalAutoencoding``. Each is built by one of the functions of
perceiver_models.py; images and videos go in with their colours last.

    model, variables = PERCEIVERS.load("directory")  # that save_pretrained wrote
    logits = model.apply(variables, tokens, mask)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from checkpoint_names import ACTIVATIONS, Architecture, Settings, Weight, linear, norm
from checkpoints import Family
from flax_extra import combinator as cb
from flax_extra import layer as xn
from perceiver_io import Core
from perceiver_models import Clip, image_classifier, masked_language_model, multimodal_autoencoder


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
        attention=config.choose("cross_attention_shape_for_attention", ATTENTIONS),
        feed_forward=functools.partial(
            xn.FeedForward, activation=config.choose("hidden_act", ACTIVATIONS)
        ),
    )


def _features_of_queries(inputs_q: jax.Array, *_: Any) -> int:
    return int(inputs_q.shape[-1])


ATTENTIONS: Mapping[str, Callable[..., nn.Module]] = {
    "kv": xn.KVQAttention,
    "q": functools.partial(xn.KVQAttention, d_qk=_features_of_queries),
}
"""What queries and keys have the features of, where no number is given."""


def _language(config: Settings) -> cb.Combinator:
    return masked_language_model(
        _core(config),
        n_tokens=config.vocab_size,
        n_positions=config.max_position_embeddings,
        d_model=config.d_model,
    )


def _image(config: Settings) -> cb.Combinator:
    return image_classifier(_core(config), n_labels=_count_labels(config))


def _multimodal(config: Settings) -> cb.Combinator:
    frames, size = config.num_frames, config.image_size
    clip = Clip(
        n_samples=frames * config.audio_samples_per_frame,
        samples_per_patch=config.samples_per_patch,
        video_shape=tuple(config.output_shape[1:4]),
        max_resolution=(frames, size, size),
        n_labels=_count_labels(config),
        d_label_query=config._label_trainable_num_channels,
    )
    return multimodal_autoencoder(_core(config), clip, d_output=config.output_num_channels)


def _count_labels(config: Settings) -> int:
    """Counts the labels: transformers writes their names instead, unless there are 2."""
    names = config.get("id2label")
    return int(config.get("num_labels", 2)) if names is None else len(names)


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
        np.zeros((1, _count_labels(config)), np.float32),
        np.zeros((1, 1), np.int32),
        np.zeros((1, 1), np.int32),
    ]


# Names: ours -> theirs


def _self_attention(ours: str, theirs: str) -> dict[str, Weight]:
    return {
        **norm(f"{ours}/norm_inputs", f"{theirs}.attention.self.layernorm1"),
        **linear(f"{ours}/attention/query", f"{theirs}.attention.self.query"),
        **linear(f"{ours}/attention/key", f"{theirs}.attention.self.key"),
        **linear(f"{ours}/attention/value", f"{theirs}.attention.self.value"),
        **linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense"),
        **norm(f"{ours}/norm", f"{theirs}.layernorm"),
        **linear(f"{ours}/feed_forward/Dense_0", f"{theirs}.mlp.dense1"),
        **linear(f"{ours}/feed_forward/Dense_1", f"{theirs}.mlp.dense2"),
    }


def _cross_attention(ours: str, theirs: str) -> dict[str, Weight]:
    return {
        **_self_attention(ours, theirs),
        **norm(f"{ours}/norm_queries", f"{theirs}.attention.self.layernorm1"),
        **norm(f"{ours}/norm_inputs", f"{theirs}.attention.self.layernorm2"),
    }


CORE_NAMES = {
    "latents/positional_encoding": Weight("perceiver.embeddings.latents"),
    **_cross_attention("encoder", "perceiver.encoder.cross_attention"),
    **_self_attention("processor/layers", "perceiver.encoder.self_attends.{layer}"),
}

LANGUAGE_NAMES = {
    **CORE_NAMES,
    "embed/embedding": Weight("perceiver.input_preprocessor.embeddings.weight"),
    "positions/positional_encoding": Weight(
        "perceiver.input_preprocessor.position_embeddings.weight"
    ),
    "queries/positional_encoding": Weight(
        "perceiver.decoder.output_position_encodings.position_embeddings"
    ),
    **_cross_attention("decoder", "perceiver.decoder.decoding_cross_attention"),
    "scores/decoding/bias": Weight("embedding_decoder.bias"),
}

IMAGE_NAMES = {
    **CORE_NAMES,
    "queries/positional_encoding": Weight(
        "perceiver.decoder.decoder.output_position_encodings.position_embeddings"
    ),
    **_cross_attention("decoder", "perceiver.decoder.decoder.decoding_cross_attention"),
    **linear("logits", "perceiver.decoder.decoder.final_layer"),
}

MODALITIES = ("audio", "image", "label")
"""Sound, video and label: their order in a clip is transformers' as well, which is alphabetical."""

MULTIMODAL_NAMES = {
    **CORE_NAMES,
    **_cross_attention("chunks/decoder", "perceiver.decoder.decoder.decoding_cross_attention"),
    **linear("chunks/outputs", "perceiver.decoder.decoder.final_layer"),
    "chunks/queries/position_encoder_2/positional_encoding": Weight(
        "perceiver.decoder.modalities.label.decoder.output_position_encodings.position_embeddings"
    ),
}
for _index, _modality in enumerate(MODALITIES):
    MULTIMODAL_NAMES |= {
        f"inputs/padding_{_index}/padding": Weight(
            f"perceiver.input_preprocessor.padding.{_modality}"
        ),
        f"inputs/masking_{_index}/mask": Weight(f"perceiver.input_preprocessor.mask.{_modality}"),
        f"chunks/queries/padding_{_index}/padding": Weight(
            f"perceiver.decoder.padding.{_modality}"
        ),
        **linear(
            f"chunks/modalities/decoder_{_index}/embedding_decoder",
            f"perceiver.output_postprocessor.modalities.{_modality}.classifier",
        ),
    }


PERCEIVERS = Family(
    {
        "PerceiverForMaskedLM": Architecture(_language, _language_inputs, LANGUAGE_NAMES),
        "PerceiverForImageClassificationFourier": Architecture(_image, _image_inputs, IMAGE_NAMES),
        "PerceiverForMultimodalAutoencoding": Architecture(
            _multimodal, _multimodal_inputs, MULTIMODAL_NAMES
        ),
    }
)
"""What is known, by the name of transformers' class."""
