"""Goes on with a text: the command line of llama.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

import llama
from checkpoint_files import CheckpointError
from checkpoint_names import Settings
from command_line import Parser
from flax_extra import combinator as cb
from greedy import generate
from llama_checkpoints import LANGUAGE_MODELS
from model_commands import InputError, read_tokenizer, show_status, track_weights


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


def go_on(directory: Path, text: str, n_steps: int, console: Console) -> None:
    """Reads a model, and prints a text and how it goes on."""
    config = LANGUAGE_MODELS.read_config(directory)
    tokenizer = read_tokenizer(directory)
    prompt = read_prompt(text, n_steps, tokenizer, Settings(config))
    model, variables = LANGUAGE_MODELS.load(directory, dtype=None, track=track_weights)
    stream = cb.stream(model, "i32[b, t]", capacity=prompt.shape[1] + n_steps)
    end = config.get("eos_token_id")
    ends = tuple(end) if isinstance(end, list) else () if end is None else (end,)

    def run(variables: Any, prompt: Any) -> Any:
        return generate(stream, variables, prompt, n_steps, end=ends)

    with show_status("compiling"):
        program = jax.jit(run).lower(variables, prompt).compile()
    with show_status(f"generating {n_steps} tokens"):
        start = time.perf_counter()
        added = np.asarray(program(variables, prompt))[0]
        seconds = time.perf_counter() - start
    is_end = np.isin(added, ends)
    n_added = int(is_end.argmax()) if is_end.any() else n_steps
    console.print(Text(tokenizer.decode([*prompt[0].tolist(), *added[:n_added].tolist()])))
    console.print(
        f"[dim]{n_added} tokens in {seconds:.1f} s: {n_added / seconds:.1f} a second[/dim]"
    )


def read_prompt(text: str, n_steps: int, tokenizer: Tokenizer, config: Settings) -> np.ndarray:
    """Turns a prompt into tokens ``[1, time]``.

    Raises:
        InputError: If it is empty, or too long to go on with.
    """
    if n_steps < 1:
        raise InputError(f"There is nothing to do: --tokens is {n_steps}. Ask for 1 or more.")
    tokens = tokenizer.encode(text).ids
    if not text or not tokens:
        raise InputError('The prompt is empty. Give one: --prompt "..."')
    n_positions = config.get("max_position_embeddings") or config.n_positions
    if len(tokens) + n_steps > n_positions:
        raise InputError(
            f"The prompt has {len(tokens)} tokens, and {n_steps} are to be added; "
            f"the model takes {n_positions} in all."
        )
    return np.asarray([tokens], np.int32)
