"""What the command lines of published models share: progress, tokenizers, and errors of inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from checkpoint_files import CheckpointError


class InputError(ValueError):
    """An input that a model cannot take, such as an empty prompt."""


def track_weights(names: list[str]) -> Iterable[str]:
    """Goes through the names of weights, and shows a progress bar on a terminal."""
    console = Console(stderr=True)
    is_hidden = not console.is_terminal
    return track(names, "reading weights", console=console, transient=True, disable=is_hidden)


def show_status(message: str) -> AbstractContextManager[Any]:
    """Shows on a terminal what is going on."""
    console = Console(stderr=True)
    return console.status(message) if console.is_terminal else contextlib.nullcontext()


def read_tokenizer(directory: Path) -> Tokenizer:
    """Reads the ``tokenizer.json`` of a directory.

    Raises:
        CheckpointError: If there is none that can be read.
    """
    path = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other kind
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}.") from error
