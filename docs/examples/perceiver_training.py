"""Training of a small language model on text that every machine has: Python's own library.

Some bytes of a text are masked, and the model learns to fill them in. What happens at a step
follows from its number alone, and all that a step changes is in the checkpoint. So a training that
was interrupted goes on with the numbers that it would have had:

    state = train(recipe, directory)  # again, until it is done

Source of the task: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding" (2018), section 3.1; here every chosen byte is masked, and none is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flax_extra import combinator as cb
from perceiver_io import Core
from perceiver_models import masked_language_model
from perceiver_text import MASK, N_SPECIAL, as_bytes, as_tokens, padded


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, and how: all that the losses depend on.

    Args:
        n_steps: how many steps.
        batch_size: texts a step.
        n_positions: bytes of a text.
        n_latents: of the model.
        d_model: features of tokens and of latents.
        n_layers: self-attention blocks of the model.
        learning_rate: the highest; it rises for a twentieth of the steps, and falls in a cosine.
        mask_rate: how probably a byte is masked.
        copy_weight: how much it counts that the other bytes come back as they are. There are more
            of them, and from them the model learns sooner where to look.
        seed: of the weights and of the texts.
    """

    n_steps: int = 3000
    batch_size: int = 32
    n_positions: int = 64
    n_latents: int = 32
    d_model: int = 96
    n_layers: int = 2
    learning_rate: float = 2e-3
    mask_rate: float = 0.15
    copy_weight: float = 1.0
    seed: int = 0

    def model(self) -> cb.Combinator:
        """The model, without its weights."""
        core = Core(
            n_latents=self.n_latents,
            d_latents=self.d_model,
            n_layers=self.n_layers,
            n_heads=4,
            n_heads_encoder=4,
            widening_factor=2,
        )
        return masked_language_model(
            core,
            n_positions=self.n_positions,
            d_model=self.d_model,
            n_heads_decoder=4,
            d_qk_decoder=self.d_model,
        )


class State(NamedTuple):
    """All that a step changes."""

    params: Any
    optimizer: Any
    losses: Array
    """Of each step; zeros for those to come."""


class Interrupted(Exception):
    """A signal came; what was done is in a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"Interrupted after step {step}, which is saved. Start again to go on.")
        self.status = 128 + number


class TrainingError(ValueError):
    """A directory that a training cannot go on in."""


def train(
    recipe: Recipe, directory: Path, *, save_every: int = 100, console: Console | None = None
) -> State:
    """The state after all steps, those included that an earlier training in the directory made.

    Args:
        recipe: what to train.
        directory: where checkpoints are, or will be.
        save_every: how many steps apart.
        console: where progress is shown.

    Returns:
        The last state.

    Raises:
        TrainingError: where the directory is none, holds the training of another recipe, or a
            checkpoint that cannot be read.
        Interrupted: where SIGINT or SIGTERM came, once the step is done and saved.
    """
    if directory.exists() and not directory.is_dir():
        raise TrainingError(f"{directory} is a file; checkpoints need a directory.")
    text = Corpus.of(standard_library(held_out=False))
    with checkpoints(directory) as manager, signals() as came:
        done, state = resume(manager, recipe)
        with progress(recipe, console) as show:
            show(done, state)
            for index in range(done, recipe.n_steps):
                state = step(recipe, state, index, batch(recipe, text, index))
                is_last = index + 1 == recipe.n_steps
                if is_last or came or (index + 1) % save_every == 0:
                    save(manager, recipe, index + 1, state)
                if came and not is_last:
                    raise Interrupted(came[0], index + 1)
                show(index + 1, state)
    return state


# One step


@functools.partial(jax.jit, static_argnums=0)
def initial(recipe: Recipe) -> State:
    """The state before the first step."""
    tokens = jnp.zeros((1, recipe.n_positions), jnp.int32)
    params = recipe.model().init(jax.random.key(recipe.seed), tokens, None)
    return State(params, optimizer(recipe).init(params), jnp.zeros(recipe.n_steps))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(recipe: Recipe, state: State, index: int, texts: Batch) -> State:
    """The state after one more step."""

    def loss(params: Any) -> tuple[Array, Array]:
        filled, copied = losses(recipe.model(), params, texts)
        return filled + recipe.copy_weight * copied, filled

    gradient, filled = jax.grad(loss, has_aux=True)(state.params)
    updates, changed = optimizer(recipe).update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, changed, state.losses.at[index].set(filled))


def losses(model: cb.Combinator, params: Any, texts: Batch) -> tuple[Array, Array]:
    """How badly masked bytes are filled in and others come back: nats for each."""
    logits: Any = model.apply(params, texts.masked, texts.mask)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, texts.tokens)
    is_masked = texts.masked == MASK
    return _mean(each, is_masked), _mean(each, ~is_masked & texts.mask)


def _mean(x: Array, where: Array) -> Array:
    """The mean where there is something, and nothing else."""
    return jnp.sum(x, where=where) / jnp.maximum(jnp.sum(where), 1)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW, with gradients clipped."""
    rates = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, max(recipe.n_steps // 20, 1), recipe.n_steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, weight_decay=0.01))


# Text


class Batch(NamedTuple):
    """Texts, the same with some bytes masked, and where there is no padding, ``[batch, time]``."""

    tokens: np.ndarray
    masked: np.ndarray
    mask: np.ndarray


class Corpus(NamedTuple):
    """Files one after the other, as tokens."""

    tokens: np.ndarray

    @classmethod
    def of(cls, files: list[Path]) -> Corpus:
        """The corpus of some files."""
        return cls(as_tokens(b"\n".join(path.read_bytes() for path in files)))


def standard_library(*, held_out: bool) -> list[Path]:
    """Sources of Python's own library: nine files of ten, or every tenth, which is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(
        path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)
    )
    return [path for index, path in enumerate(files) if (index % 10 == 9) == held_out]


def batch(recipe: Recipe, corpus: Corpus, index: int) -> Batch:
    """The texts of a step: of any length, but every second one as long as can be."""
    draw = np.random.default_rng([recipe.seed, index])
    n_rows, longest = recipe.batch_size, recipe.n_positions - 2
    lengths = np.full(n_rows, longest)
    lengths[1::2] = draw.integers(1, longest, n_rows // 2, endpoint=True)
    starts = draw.integers(0, len(corpus.tokens) - longest, n_rows)
    rows = [
        padded(corpus.tokens[start : start + length], recipe.n_positions)
        for start, length in zip(starts, lengths, strict=True)
    ]
    tokens, mask = map(np.concatenate, zip(*rows, strict=True))
    is_masked = (tokens >= N_SPECIAL) & (draw.random(tokens.shape) < recipe.mask_rate)
    return Batch(tokens, np.where(is_masked, MASK, tokens).astype(np.int32), mask)


class Score(NamedTuple):
    """How many of the masked bytes are filled in right, and what there is to beat."""

    n_bytes: int
    accuracy: float
    baseline: float
    most_frequent: bytes


def evaluate(recipe: Recipe, params: Any, n_batches: int = 20) -> Score:
    """Fills masks in files that were held out, and compares with the most frequent byte."""
    seen = Corpus.of(standard_library(held_out=False))
    unseen = Corpus.of(standard_library(held_out=True))
    most_frequent = int(np.bincount(seen.tokens).argmax())
    score = jax.jit(recipe.model().apply)
    right, baseline, n_bytes = 0, 0, 0
    for index in range(n_batches):
        texts = batch(recipe, unseen, index)
        is_masked = texts.masked == MASK
        n_bytes += int(is_masked.sum())
        guesses = np.asarray(score(params, texts.masked, texts.mask)).argmax(-1)
        right += int((guesses == texts.tokens)[is_masked].sum())
        baseline += int((texts.tokens[is_masked] == most_frequent).sum())
    guess = as_bytes(np.array([most_frequent]))
    return Score(n_bytes, right / n_bytes, baseline / n_bytes, guess)


# Checkpoints


@contextlib.contextmanager
def checkpoints(directory: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a directory; the last two are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, recipe: Recipe, step: int, state: State) -> None:
    """Writes what was reached; a checkpoint is there as a whole, or not at all."""
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), recipe=ocp.args.JsonSave(dataclasses.asdict(recipe))
    )
    manager.save(step, args=items)


def resume(manager: ocp.CheckpointManager, recipe: Recipe) -> tuple[int, State]:
    """How many steps are done, and the state after them."""
    last = manager.latest_step()
    if last is None:
        return 0, initial(recipe)
    saved = _restored(manager, last, recipe=ocp.args.JsonRestore())
    for name, asked in dataclasses.asdict(recipe).items():
        if saved["recipe"].get(name) != asked:
            raise TrainingError(
                f"{manager.directory} holds a training with {name}={saved['recipe'].get(name)}; "
                f"asked for was {name}={asked}. Give another directory, or remove this one."
            )
    abstract = jax.eval_shape(functools.partial(initial, recipe))
    return last, _restored(manager, last, state=ocp.args.StandardRestore(abstract))["state"]


def _restored(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    """Items of a checkpoint."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # whatever the storage raises over a damaged file
        raise TrainingError(
            f"{manager.directory}/{step} is a checkpoint that cannot be read. Remove it to go on "
            "from an earlier one."
        ) from error


# What is outside


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The signals that came, SIGINT and SIGTERM, instead of what they would do."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread hears of them
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def progress(recipe: Recipe, console: Console | None) -> Iterator[Any]:
    """A bar, moved by a function of (steps done, state)."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(quiet=True)) as bar:
        task = bar.add_task("training", total=recipe.n_steps, loss=float("nan"))

        def show(step: int, state: State) -> None:
            if step and (step % 10 == 0 or step == recipe.n_steps):
                bar.update(task, completed=step, loss=float(state.losses[step - 1]))

        yield show
