"""Loads models of Hugging Face's transformers as pipelines, and saves them for it.

    model, variables = LLAMA.load("directory")  # that save_pretrained wrote
    logits = model.apply(variables, tokens)
    LLAMA.save("another directory", variables, config)  # that from_pretrained loads

``LLAMA`` is a :class:`Family`: architectures, in the words of checkpoint_names.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from checkpoint_files import CheckpointError, SavedWeights, read_json, write_files
from checkpoint_names import Architecture, Settings, Weight
from flax_extra import combinator as cb

Track = Callable[[list[str]], Iterable[str]]
"""Goes through names, and may show how far it is: ``rich.progress.track``, or ``tqdm``."""


class Family:
    """Classes of transformers that can be loaded.

    Args:
        architectures: what is known of each, by the name of its class.
    """

    def __init__(self, architectures: Mapping[str, Architecture]) -> None:
        self.architectures = architectures

    def load(
        self,
        directory: str | Path,
        architecture: str | None = None,
        *,
        dtype: Any = jnp.float32,
        track: Track = iter,
    ) -> tuple[cb.Combinator, Any]:
        """Loads the model and the variables of a directory that ``save_pretrained`` wrote.

        Args:
            directory: with ``config.json`` and ``model.safetensors`` in it, or its shards.
            architecture: the class that is wanted; any of the family by default.
            dtype: of the parameters and the computation; None for that of the configuration.
            track: goes through the names of the parameters, and may show how far it is.

        Returns:
            The pipeline and its variables, for ``model.apply(variables, ...)``.

        Raises:
            CheckpointError: If it is not such a directory, or holds another model.
        """
        config = self.read_config(directory, architecture)
        variables = self.read(directory, config, dtype=dtype, track=track)
        return self.build(config, dtype=dtype), variables

    def build(self, config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> cb.Combinator:
        """Builds the pipeline of a configuration.

        Args:
            config: what ``config.json`` holds; the first of its ``architectures`` says which model.
            dtype: of the computation, and of what a stream remembers; None for that of the
                configuration.

        Raises:
            CheckpointError: If the configuration is of another model, or lacks something.
        """
        architecture = self.architectures[self.find_architecture(config)]
        dtype = _choose_dtype(config, dtype)
        return architecture.build(Settings(config, None if dtype == jnp.float32 else dtype))

    def read(
        self,
        weights: Mapping[str, Any] | str | Path,
        config: Mapping[str, Any] | str | Path,
        *,
        dtype: Any = jnp.float32,
        track: Track = iter,
    ) -> dict[str, Any]:
        """Turns the weights of a model of transformers into the variables of :meth:`build`.

        Files are read weight by weight, and layers are stacked where they stay. So the most memory
        that it takes is that of the variables and of one weight.

        Args:
            weights: weights by name, arrays or torch tensors; or a safetensors file, an index of
                its shards, or a directory with one of them.
            config: what ``config.json`` holds, or where it is.
            dtype: of the parameters; None for that of the configuration.
            track: goes through the names of the parameters, and may show how far it is.

        Returns:
            ``{"params": ...}``.

        Raises:
            CheckpointError: If a file cannot be read, the configuration is of another model, or
                weights are missing, not expected or of another shape: it lists all of them.
        """
        if isinstance(config, str | Path):
            config = self.read_config(config)
        if isinstance(weights, str | Path):
            weights = SavedWeights(weights)
        name = self.find_architecture(config)
        parameters = self._list_parameters(config)
        architecture = self.architectures[name]
        stored = _Stored(weights, architecture.prefix)
        _check(stored, parameters.values(), name, architecture.ignored)
        dtype = _choose_dtype(config, dtype)
        arrays = {path: parameters[path].read(stored, dtype) for path in track(list(parameters))}
        return {"params": unflatten_dict(arrays, sep="/")}  # type: ignore[no-untyped-call]

    def to_huggingface(
        self, variables: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """Turns variables into the weights of the model of transformers: :meth:`read` backwards.

        Args:
            variables: those of :meth:`build`.
            config: what ``config.json`` holds.

        Returns:
            The weights by name, for transformers' ``load_state_dict``. Weights that are tied to
            others are left out; ``strict=False`` and ``tie_weights`` put them there.

        Raises:
            CheckpointError: If the configuration is of another model.
        """
        parts: dict[str, dict[int, np.ndarray]] = {}
        params: dict[str, Any] = flatten_dict(variables["params"], sep="/")  # type: ignore[no-untyped-call]
        for path, parameter in self._list_parameters(config).items():
            for name, array in parameter.write(params[path]).items():
                parts.setdefault(name, {})[parameter.weight.part[0]] = array
        return {name: _join([found[i] for i in sorted(found)]) for name, found in parts.items()}

    def save(
        self, directory: str | Path, variables: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Writes a directory that transformers' ``from_pretrained`` loads.

        Raises:
            CheckpointError: If the configuration is of another model.
        """
        write_files(directory, config, self.to_huggingface(variables, config))

    def read_config(self, path: str | Path, architecture: str | None = None) -> dict[str, Any]:
        """Reads the configuration of a directory, or a file of its own.

        Args:
            path: the directory or the file.
            architecture: the class that is wanted; any of the family by default.

        Raises:
            CheckpointError: If there is none, or it is of another model.
        """
        path = Path(path)
        config = read_json(path / "config.json" if path.is_dir() else path)
        found = self.find_architecture(config)
        if architecture not in (None, found):
            raise CheckpointError(f"{path} holds a {found}; asked for was a {architecture}.")
        return config

    def find_architecture(self, config: Mapping[str, Any]) -> str:
        """Finds the class that a configuration is of: the first of its ``architectures``.

        Raises:
            CheckpointError: If it is not of this family.
        """
        kind, names = config.get("model_type"), config.get("architectures") or [None]
        if names[0] in self.architectures:
            return str(names[0])
        raise CheckpointError(
            f"The configuration is of a model of type {kind!r}, class {names[0]!r}. "
            f"Known here are: {', '.join(self.architectures)}."
        )

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Lists the names and shapes of the weights that a configuration asks for.

        Raises:
            CheckpointError: If the configuration is of another model.
        """
        return _list_torch_shapes(self._list_parameters(config).values())

    def _list_parameters(self, config: Mapping[str, Any]) -> dict[str, _Parameter]:
        architecture = self.architectures[self.find_architecture(config)]
        inputs = architecture.inputs(Settings(config))
        try:
            shapes = jax.eval_shape(self.build(config).init, jax.random.key(0), *inputs)
        except CheckpointError:
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"The configuration makes no model: {error}") from error
        flat: dict[str, Any] = flatten_dict(shapes["params"], sep="/")  # type: ignore[no-untyped-call]
        return {
            path: _Parameter(architecture.names[path], leaf.shape) for path, leaf in flat.items()
        }


def _choose_dtype(config: Mapping[str, Any], dtype: Any) -> Any:
    saved = config.get("dtype") or config.get("torch_dtype") or "float32"
    return jnp.dtype(str(saved).removeprefix("torch.") if dtype is None else dtype)


# One parameter, theirs and ours


class _Parameter(NamedTuple):
    """A parameter of ours, and what holds it in torch: one weight, or one for each layer."""

    weight: Weight
    shape: tuple[int, ...]

    @property
    def is_stacked(self) -> bool:
        return "{layer}" in self.weight.name

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.is_stacked else self.shape

    @property
    def torch_names(self) -> list[str]:
        if self.weight.is_zero:
            return []
        n_layers = self.shape[0] if self.is_stacked else 1
        return [self.weight.name.format(layer=layer) for layer in range(n_layers)]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        whole = self.weight.layout.to_torch(np.broadcast_to(np.float32(0), self.layer_shape))
        return (*whole.shape[:-1], *(n * self.weight.part[1] for n in whole.shape[-1:]))

    def read(self, stored: _Stored, dtype: Any) -> Array:
        if self.weight.is_zero:
            return jnp.zeros(self.shape, dtype)
        first, *others = self.torch_names
        layer = self._read_layer(stored[first], dtype)
        if not self.is_stacked:
            return layer
        stacked: Array = _write_layer(jnp.zeros(self.shape, layer.dtype), layer, 0)
        for index, name in enumerate(others, 1):
            stacked = _write_layer(stacked, self._read_layer(stored[name], dtype), index)
        return stacked

    def _read_layer(self, weight: Any, dtype: Any) -> Array:
        index, n_parts = self.weight.part
        array = _to_numpy(weight)
        part = np.split(array, n_parts, axis=-1)[index] if n_parts > 1 else array
        return jnp.asarray(self.weight.layout.from_torch(part).reshape(self.layer_shape), dtype)

    def write(self, value: Any) -> dict[str, np.ndarray]:
        if self.weight.is_zero:
            return {}
        layers = value if self.is_stacked else [value]
        to_torch = self.weight.layout.to_torch
        named = zip(self.torch_names, layers, strict=True)
        return {name: to_torch(np.asarray(layer)) for name, layer in named}


def _to_numpy(weight: Any) -> np.ndarray:
    if str(weight.dtype) == "torch.bfloat16":  # torch gives numpy no array of it
        weight = jnp.from_dlpack(weight)
    return np.asarray(weight)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stacked: Array, layer: Array, index: int) -> Array:
    """Writes one layer among the others, in place."""
    written: Array = jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)
    return written


class _Stored:
    """Weights as they are stored, under the names that an architecture has for them."""

    def __init__(self, weights: Mapping[str, Any], prefix: str) -> None:
        self._weights = weights
        has_prefix = any(name.startswith(prefix) for name in weights)
        self._names = {name if has_prefix else prefix + name: name for name in weights}

    def __getitem__(self, name: str) -> Any:
        return self._weights[self._names[name]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        if isinstance(self._weights, SavedWeights):
            return {name: self._weights.shapes[stored] for name, stored in self._names.items()}
        return {name: tuple(self[name].shape) for name in self._names}


def _list_torch_shapes(parameters: Iterable[_Parameter]) -> dict[str, tuple[int, ...]]:
    return {name: one.torch_shape for one in parameters for name in one.torch_names}


def _check(
    stored: _Stored,
    parameters: Iterable[_Parameter],
    class_name: str,
    ignored: tuple[str, ...],
) -> None:
    """Raises an error if weights are missing, not expected or of another shape."""
    shapes, found = _list_torch_shapes(parameters), stored.shapes
    problems = {
        "missing": [f"{name} {shapes[name]}" for name in shapes if name not in found],
        "unexpected": [
            f"{name} {found[name]}"
            for name in found
            if name not in shapes and not name.endswith(ignored)
        ],
        "of another shape": [
            f"{name} is {found[name]}, not {shape}"
            for name, shape in shapes.items()
            if name in found and found[name] != shape
        ],
    }
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in problems.items() if names)
    if not counts:
        return
    details = [f"  {kind}: {name}" for kind, names in problems.items() for name in names]
    raise CheckpointError(
        "\n".join(
            [
                f"These are not the weights of a {class_name} of this configuration: {counts}.",
                *details,
                "Give the config.json that was saved with them.",
            ]
        )
    )
