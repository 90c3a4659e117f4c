"""Writes Python, byte by byte, with a small language model that it trains first.

The model learns from the sources of Python's own library: about four minutes on two cores. It keeps
checkpoints; started again, it goes on where it was, or is done at once. In files that were held out
it then takes fewer bits per byte than a count of frequencies and than a 5-gram model:

    python docs/examples/write_code.py --prompt "def __init__(self" --prompt "import "

Prompts are generated together, in one compiled program; --prompt "" is none.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from command_line import Parser, at_least_1
from corpus import read_corpus
from flax_extra import combinator as cb
from generation import ChooseToken, Sampler, generate, greedy, pad_prompts
from language_model import LanguageRecipe, Score, evaluate
from training import Interrupted, train

EXAMPLES = ["class Stack:\n    def __init__(self", "import ", "    for name in "]


def main(arguments: list[str] | None = None) -> int:
    """Trains if need be, and writes; the exit status is 2 if something cannot be used."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        choose_sampler(options)  # wrong options are refused before minutes of training
        recipe = LanguageRecipe(
            n_steps=options.steps,
            batch_size=options.batch_size,
            n_positions=options.positions,
            d_model=options.width,
            n_layers=options.layers,
            n_heads=options.heads,
        )
        state = train(
            recipe,
            read_corpus(held_out=False),
            options.checkpoints,
            save_every=options.save_every,
            console=console,
        )
    except ValueError as error:
        parser.error(str(error))
    except Interrupted as interruption:
        console.print(str(interruption))
        return interruption.status
    report(evaluate(recipe, state.params), console)
    prompts = [encode(prompt) for prompt in options.prompts or EXAMPLES]
    for text in write(recipe, state.params, prompts, options, console):
        console.rule()
        console.print(Text(text.decode(errors="replace")))
    return 0


def choose_sampler(options: argparse.Namespace) -> ChooseToken:
    """Chooses the sampler that the options ask for; a temperature of 0 is greedy."""
    if options.temperature == 0:
        return greedy
    return Sampler(options.temperature, options.top_k, options.top_p)


def encode(prompt: str) -> bytes:
    """Encodes a prompt; one without text starts a line, as after a line break."""
    return prompt.encode(errors="surrogateescape") or b"\n"


def write(
    recipe: LanguageRecipe,
    params: Any,
    prompts: list[bytes],
    options: argparse.Namespace,
    console: Console,
) -> list[bytes]:
    """Writes on from each prompt, all in one batch.

    Returns:
        Each prompt, with what follows it.
    """
    tokens, lengths = pad_prompts(prompts)
    stream = cb.stream(recipe.model(), "i32[b, t]", capacity=tokens.shape[1] + options.new)
    columns = (
        TextColumn("writing"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} bytes"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("writing", total=options.new)
        generated = generate(
            stream,
            params,
            tokens,
            lengths,
            options.new,
            sampler=choose_sampler(options),
            stop=options.stop.encode(),
            key=jax.random.key(options.seed),
            show=lambda n_new: bar.update(task, completed=int(n_new)),
        )
    new, n_new = map(np.asarray, generated)
    return [
        prompt + row[:n].astype(np.uint8).tobytes()
        for prompt, row, n in zip(prompts, new, n_new, strict=True)
    ]


def report(score: Score, console: Console) -> None:
    """Prints how well bytes are predicted."""
    console.print(
        f"{score.n_bytes} bytes of held-out files, bits per byte: {score.model:.3f}; a 5-gram "
        f"model {score.five_grams:.3f}, a count of frequencies {score.frequencies:.3f}"
    )


def _make_parser() -> Parser:
    parser = Parser("write_code.py", __doc__)
    parser.add_argument(
        "--prompt",
        action="append",
        dest="prompts",
        help="what to go on from; may be given several times",
    )
    parser.add_argument(
        "--new", type=at_least_1, default=400, help="bytes to write (default: %(default)s)"
    )
    parser.add_argument(
        "--stop", default="", help="end at the first of these bytes (default: none)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.6,
        help="below 1 for probable bytes, 0 for the most probable (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=at_least_1, help="draw from so many bytes (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="draw from the fewest with this probability (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is drawn (default: %(default)s)"
    )
    recipe = LanguageRecipe()
    sizes = {
        "--steps": (recipe.n_steps, "training steps"),
        "--batch-size": (recipe.batch_size, "texts a step"),
        "--positions": (recipe.n_positions, "bytes of a text"),
        "--width": (recipe.d_model, "features of a byte"),
        "--layers": (recipe.n_layers, "blocks of attention and feed-forward"),
        "--heads": (recipe.n_heads, "heads of the attention"),
    }
    parser.add_training("build/write_code", sizes)
    return parser


if __name__ == "__main__":
    sys.exit(main())
