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

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from flax_extra import combinator as cb
from perceiver_architectures import ARCHITECTURES, CheckpointError, Settings, architecture_of

__all__ = [
    "CheckpointError",
    "from_huggingface",
    "load",
    "pipeline",
    "read_config",
    "read_weights",
    "shapes_in_huggingface",
]


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
    config = read_config(directory, architecture)
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
    return ARCHITECTURES[architecture_of(config)].build(Settings(config))


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
    wanted = _wanted(config)
    _check(wanted.values(), state_dict, architecture_of(config))
    arrays = {path: jnp.asarray(weight.read(state_dict)) for path, weight in wanted.items()}
    return {"params": unflatten_dict(arrays, sep="/")}  # type: ignore[no-untyped-call]


def shapes_in_huggingface(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights that a configuration asks for.

    Raises:
        CheckpointError: where the configuration is of another model.
    """
    return _torch_shapes(_wanted(config).values())


def _wanted(config: Mapping[str, Any]) -> dict[str, _Weight]:
    names = ARCHITECTURES[architecture_of(config)].names
    flat: dict[str, Any] = flatten_dict(_abstract_params(config), sep="/")  # type: ignore[no-untyped-call]
    return {
        path: _Weight(names[path], path.rpartition("/")[2], leaf.shape)
        for path, leaf in flat.items()
    }


def _abstract_params(config: Mapping[str, Any]) -> Any:
    inputs = ARCHITECTURES[architecture_of(config)].inputs(Settings(config))
    try:
        return jax.eval_shape(pipeline(config).init, jax.random.key(0), *inputs)["params"]
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The configuration makes no model: {error}") from error


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


def _torch_shapes(wanted: Iterable[_Weight]) -> dict[str, tuple[int, ...]]:
    return {name: weight.torch_shape for weight in wanted for name in weight.torch_names}


def _check(wanted: Iterable[_Weight], state_dict: Mapping[str, Any], architecture: str) -> None:
    shapes = _torch_shapes(wanted)
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


def read_config(path: str | Path, architecture: str | None = None) -> dict[str, Any]:
    """A configuration: of a directory, or a file of its own.

    Args:
        path: the directory or the file.
        architecture: the class that is wanted; any of those known where None.

    Raises:
        CheckpointError: where there is none, or it is of another model.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no configuration: it holds a {type(config).__name__}.")
    found = architecture_of(config)
    if architecture not in (None, found):
        raise CheckpointError(f"{path} holds a {found}; asked for was a {architecture}.")
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
