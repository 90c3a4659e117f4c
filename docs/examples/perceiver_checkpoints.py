"""Weights that Hugging Face's transformers saved, in the parameter tree of our pipelines.

Three of its classes are known: ``PerceiverForMaskedLM``, ``PerceiverForImageClassificationFourier``
and ``PerceiverForMultimodalAutoencoding``. What ``save_pretrained`` wrote is read as it lies there:

    model, variables = load("directory")
    logits = model.apply(variables, tokens, mask)

Two differences of layout are ours to bridge. A linear layer of torch holds its weight as
``[out, in]``, one of linen as ``[in, out]``, split by heads where it is attention's. And torch has
a module for each self-attention block, where ``repeat`` stacks them on a leading axis. Images and
videos go in with their colours last.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from perceiver_io import Core
from perceiver_models import Clip, image_classifier, masked_language_model, multimodal_autoencoder
from safetensors import SafetensorError
from safetensors.numpy import load_file

from flax_extra import combinator as cb
from flax_extra import layer as xn


class CheckpointError(ValueError):
    """Weights or a configuration that cannot be used. The first line says all in short."""


def load(directory: str | Path, architecture: str | None = None) -> tuple[cb.Combinator, Any]:
    """The model and the variables of a directory that ``save_pretrained`` wrote.

    Args:
        directory: with ``config.json`` and ``model.safetensors`` in it, or its shards.
        architecture: the class that is wanted; any of those known where None.

    Returns:
        The pipeline and its variables, for ``model.apply(variables, ...)``.

    Raises:
        CheckpointError: where it is not such a directory, or holds another model.
    """
    config = read_config(directory)
    found = _architecture(config)
    if architecture not in (None, found):
        raise CheckpointError(f"{directory} holds a {found}; asked for was a {architecture}.")
    return pipeline(config), from_huggingface(directory, config)


def pipeline(config: Mapping[str, Any]) -> cb.Combinator:
    """The model of a configuration.

    Args:
        config: what ``config.json`` holds; the first of its ``architectures`` says which model.

    Returns:
        One of the pipelines of perceiver_models.py.

    Raises:
        CheckpointError: where the configuration is of another model, or lacks something.
    """
    return ARCHITECTURES[_architecture(config)].build(_Settings(config))


def from_huggingface(
    state_dict: Mapping[str, Any] | str | Path, config: Mapping[str, Any] | str | Path
) -> dict[str, Any]:
    """The variables of :func:`pipeline` with the weights of a model of transformers.

    Args:
        state_dict: weights by name, arrays or torch tensors; or a safetensors file, an index of
            its shards, or a directory with one of them.
        config: what ``config.json`` holds, or where it is.

    Returns:
        ``{"params": ...}``, in float32.

    Raises:
        CheckpointError: where a file cannot be read, the configuration is of another model, or
            weights are missing, not expected or of another shape: it lists all of them.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    if isinstance(state_dict, str | Path):
        state_dict = read_weights(state_dict)
    architecture = _architecture(config)
    names = ARCHITECTURES[architecture].names
    wanted = {
        path: _Weight(names[path], path.rpartition("/")[2], leaf.shape)
        for path, leaf in flatten_dict(_abstract_params(config), sep="/").items()
    }
    _check(wanted.values(), state_dict, architecture)
    arrays = {path: jnp.asarray(weight.read(state_dict)) for path, weight in wanted.items()}
    return {"params": unflatten_dict(arrays, sep="/")}


# One weight, theirs and ours


class _Weight(NamedTuple):
    """A parameter of ours, and what it is called in torch: one name, or one for each layer."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def is_stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def one_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.is_stacked else self.shape

    @property
    def torch_shape(self) -> tuple[int, ...]:
        if self.kind == "kernel":
            n_in, *n_out = self.one_shape
            return math.prod(n_out), n_in
        return (math.prod(self.one_shape),) if self.kind == "bias" else self.one_shape

    @property
    def torch_names(self) -> list[str]:
        if not self.is_stacked:
            return [self.name]
        return [self.name.format(layer=layer) for layer in range(self.shape[0])]

    def read(self, state_dict: Mapping[str, Any]) -> np.ndarray:
        arrays = [np.asarray(state_dict[name], np.float32) for name in self.torch_names]
        if self.kind == "kernel":
            arrays = [array.T for array in arrays]
        return np.stack(arrays).reshape(self.shape)


def _check(wanted: Any, state_dict: Mapping[str, Any], architecture: str) -> None:
    shapes = {name: weight.torch_shape for weight in wanted for name in weight.torch_names}
    found = {name: tuple(array.shape) for name, array in state_dict.items()}
    missing = [f"{name} {shapes[name]}" for name in shapes if name not in found]
    unexpected = [f"{name} {found[name]}" for name in found if name not in shapes]
    other = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or other:
        raise _not_its_weights(architecture, missing, unexpected, other)


def _not_its_weights(
    architecture: str, missing: list[str], unexpected: list[str], other: list[str]
) -> CheckpointError:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items() if names)
    details = [f"  {kind}: {name}" for kind, names in kinds.items() for name in names]
    return CheckpointError(
        "\n".join(
            [
                f"These are not the weights of a {architecture} of this configuration: {counts}.",
                *details,
                "Give the config.json that was saved with them.",
            ]
        )
    )


# Files


def read_config(path: str | Path) -> dict[str, Any]:
    """A configuration: of a directory, or a file of its own.

    Raises:
        CheckpointError: where there is none.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no configuration: it holds a {type(config).__name__}.")
    return config


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The weights by name: of a safetensors file, an index of its shards, or a directory.

    Raises:
        CheckpointError: where there are none, or a file is not whole.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if path.suffix != ".json":
        return _read_safetensors(path)
    index = _read_json(path)
    shards = sorted(set(index.get("weight_map", {}).values())) if isinstance(index, dict) else []
    if not shards:
        raise CheckpointError(f"{path} is no index of weights: it has no 'weight_map'.")
    weights: dict[str, np.ndarray] = {}
    for shard in shards:
        weights |= _read_safetensors(path.parent / shard)
    return weights


def _weights_in(directory: Path) -> Path:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (directory / name).exists():
            return directory / name
    others = sorted(path.name for path in directory.iterdir())
    raise CheckpointError(
        f"{directory} has no model.safetensors: it holds {', '.join(others) or 'nothing'}. "
        "Save the model with transformers' save_pretrained."
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error


# Configurations


class _Settings:
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


def _architecture(config: Mapping[str, Any]) -> str:
    kind, names = config.get("model_type"), config.get("architectures") or [None]
    if kind == "perceiver" and names[0] in ARCHITECTURES:
        return str(names[0])
    raise CheckpointError(
        f"The configuration is of a model of type {kind!r}, class {names[0]!r}. "
        f"Of type 'perceiver' these classes are known: {', '.join(ARCHITECTURES)}."
    )


def _core(config: _Settings) -> Core:
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


def _choice(known: Mapping[str, Any], config: _Settings, key: str) -> Any:
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


def _language(config: _Settings) -> cb.Combinator:
    return masked_language_model(
        _core(config),
        n_tokens=config.vocab_size,
        n_positions=config.max_position_embeddings,
        d_model=config.d_model,
    )


def _image(config: _Settings) -> cb.Combinator:
    return image_classifier(_core(config), n_labels=config.n_labels)


def _multimodal(config: _Settings) -> cb.Combinator:
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


def _abstract_params(config: Mapping[str, Any]) -> Any:
    inputs = ARCHITECTURES[_architecture(config)].inputs(_Settings(config))
    return jax.eval_shape(pipeline(config).init, jax.random.key(0), *inputs)["params"]


def _language_inputs(config: _Settings) -> list[Any]:
    return [jax.ShapeDtypeStruct((1, config.max_position_embeddings), jnp.int32), None]


def _image_inputs(config: _Settings) -> list[Any]:
    del config  # transformers, too, takes no other size
    return [jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)]


def _multimodal_inputs(config: _Settings) -> list[Any]:
    _, frames, rows, columns = config.output_shape
    return [
        jax.ShapeDtypeStruct((1, config.num_frames * config.audio_samples_per_frame), jnp.float32),
        jax.ShapeDtypeStruct((1, frames, rows, columns, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, config.n_labels), jnp.float32),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
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
    """A class of transformers: our pipeline, inputs that it takes, and its names for our weights."""

    build: Callable[[_Settings], cb.Combinator]
    inputs: Callable[[_Settings], list[Any]]
    names: Mapping[str, str]


ARCHITECTURES: Mapping[str, Architecture] = {
    "PerceiverForMaskedLM": Architecture(_language, _language_inputs, LANGUAGE_NAMES),
    "PerceiverForImageClassificationFourier": Architecture(_image, _image_inputs, IMAGE_NAMES),
    "PerceiverForMultimodalAutoencoding": Architecture(
        _multimodal, _multimodal_inputs, MULTIMODAL_NAMES
    ),
}
"""What is known, by the name of transformers' class."""
