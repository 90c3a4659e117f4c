"""Reads and writes the files of a directory that transformers' ``save_pretrained`` makes.

It holds ``config.json``, and the weights as safetensors: in one file, or in several (shards) with
an index that says which weight is in which. :class:`SavedWeights` reads each weight when it is
asked for, so that a model is loaded with little more memory than it takes itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class CheckpointError(ValueError):
    """Weights or a configuration that cannot be used. The first line says all in short."""


class SavedWeights(Mapping[str, np.ndarray]):
    """The weights in safetensors files, by name. Each is read when it is asked for.

    Args:
        path: a safetensors file, an index of shards, or a directory with one of them.

    Raises:
        CheckpointError: If there are no weights, or a file is not whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in _list_files(Path(path)):
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no dictionary
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._files[name] = file

    def __getitem__(self, name: str) -> np.ndarray:
        # The file is mapped into memory, and what was read stays there until it is closed.
        with _open(self._files[name]) as opened:
            weight: np.ndarray = opened.get_tensor(name)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        CheckpointError: If it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def write_files(
    directory: str | Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> None:
    """Writes a directory that transformers' ``from_pretrained`` loads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    contiguous = {name: np.asarray(weight, order="C") for name, weight in weights.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})


def _list_files(path: Path) -> list[Path]:
    if path.is_dir():
        path = _find_weights(path)
    if path.suffix != ".json":
        return [path]
    shards = sorted(set(read_json(path).get("weight_map", {}).values()))
    if not shards:
        raise CheckpointError(f"{path} is no index of weights: it has no 'weight_map'.")
    return [path.parent / shard for shard in shards]


def _find_weights(directory: Path) -> Path:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (directory / name).exists():
            return directory / name
    others = sorted(path.name for path in directory.iterdir())
    raise CheckpointError(
        f"{directory} has no model.safetensors: it holds {', '.join(others) or 'nothing'}. "
        "Save the model with transformers' save_pretrained."
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error
