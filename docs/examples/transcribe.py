"""Writes down what is said in a sound: the command line of whisper.py."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

import whisper
from checkpoint_files import CheckpointError
from checkpoint_names import Settings
from command_line import Parser
from model_commands import InputError, read_tokenizer, show_status, track_weights
from sound import HOP, RATE, read_sound
from whisper_checkpoints import WHISPER, read_task


def main(arguments: list[str] | None = None) -> int:
    """Writes down what is said; the exit status is 2 if something cannot be used."""
    parser = Parser("whisper.py", whisper.__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="that save_pretrained wrote")
    parser.add_argument("--sound", type=Path, required=True, help="a WAV file, at any rate")
    parser.add_argument("--language", default="en", help="that is spoken (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        write_down(options.weights, options.sound, options.language, console)
    except (CheckpointError, InputError) as error:
        parser.error(str(error))
    return 0


def write_down(directory: Path, file: Path, language: str, console: Console) -> None:
    """Reads a model and a sound, and prints what is said."""
    config = Settings(WHISPER.read_config(directory))
    task, tokenizer = read_task(directory, language), read_tokenizer(directory)
    seconds = 2 * config.max_source_positions * HOP // RATE
    sound = read_sound(file, seconds)
    model, variables = WHISPER.load(directory, track=track_weights)
    n_new = config.max_target_positions - len(task.prompt)
    program = jax.jit(functools.partial(whisper.transcribe, model, task=task, n_new=n_new))
    with show_status(f"listening to {file.name}"):
        tokens = np.asarray(program(variables, sound).tokens)[0]
    text = tokens[: tokens.tolist().index(task.end)] if task.end in tokens else tokens
    console.print(Text(tokenizer.decode(text.tolist()).strip()))
