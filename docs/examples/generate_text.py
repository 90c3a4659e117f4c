"""Goes on with a text: the command line of llama.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from tokenizers import Tokenizer

import llama
from checkpoint_files import CheckpointError
from checkpoint_names import Settings
from command_line import Parser
from flax_extra import combinator as cb
from generation import generate
from llama_checkpoints import LANGUAGE_MODELS
from model_commands import InputError, read_tokenizer, track_weights


def main(arguments: list[str] | None = None) -> int:
    """Goes on with a prompt; the exit status is 2 if something cannot be used."""
    parser = Parser("llama.py", llama.__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="that save_pretrained wrote")
    parser.add_argument("--prompt", required=True, help="the text to go on with")
    parser.add_argument("--tokens", type=int, default=64, help="to add (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        go_on(options.weights, options.prompt, options.tokens, console)
    except (CheckpointError, InputError) as error:
        parser.error(str(error))
    return 0


def go_on(directory: Path, text: str, n_new: int, console: Console) -> None:
    """Reads a model, and prints a text and how it goes on."""
    config = LANGUAGE_MODELS.read_config(directory)
    tokenizer = read_tokenizer(directory)
    prompt = read_prompt(text, n_new, tokenizer, Settings(config))
    model, variables = LANGUAGE_MODELS.load(directory, dtype=None, track=track_weights)
    stream = cb.stream(model, "i32[b, t]", capacity=prompt.shape[1] + n_new)
    end = config.get("eos_token_id")
    ends = tuple(end) if isinstance(end, list) else () if end is None else (end,)
    times = [time.perf_counter()]
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task("generating", total=n_new)

        def show(index: Any) -> None:
            times.append(time.perf_counter())
            progress.update(task, completed=int(index))

        generated = generate(stream, variables, prompt, None, n_new, stop=ends, show=show)
    added = generated.tokens[0, : int(generated.lengths[0])].tolist()
    tokens = [*prompt[0].tolist(), *(token for token in added if token not in ends)]
    console.print(Text(tokenizer.decode(tokens)))
    console.print(f"[dim]{describe_speed(times)}[/dim]")


def describe_speed(times: list[float]) -> str:
    """Says how long it took: to compile and to read the prompt first, and for each token then."""
    first, others = times[1] - times[0], times[-1] - times[1]
    n_new = len(times) - 1
    speed = f", then {(n_new - 1) / others:.1f} a second" if n_new > 1 else ""
    return f"{n_new} tokens: the first after {first:.1f} s{speed}"


def read_prompt(text: str, n_new: int, tokenizer: Tokenizer, config: Settings) -> np.ndarray:
    """Turns a prompt into tokens ``[1, time]``.

    Raises:
        InputError: If it is empty, or too long to go on with.
    """
    if n_new < 1:
        raise InputError(f"There is nothing to do: --tokens is {n_new}. Ask for 1 or more.")
    tokens = tokenizer.encode(text).ids
    if not text or not tokens:
        raise InputError('The prompt is empty. Give one: --prompt "..."')
    n_positions = config.get("max_position_embeddings") or config.n_positions
    if len(tokens) + n_new > n_positions:
        raise InputError(
            f"The prompt has {len(tokens)} tokens, and {n_new} are to be added; "
            f"the model takes {n_positions} in all."
        )
    return np.asarray([tokens], np.int32)
