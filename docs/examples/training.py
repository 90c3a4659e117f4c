"""Training that goes on after an interruption as if there had been none.

What happens at a step follows from its number alone, and all that a step changes is in the
checkpoint. So a training that was interrupted goes on with the numbers that it would have had:

    state = train(recipe, corpus, directory)  # again, until it is done

What is trained, and on what, is a :class:`Recipe`: perceiver_training.py and language_model.py have
one each.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@dataclasses.dataclass(frozen=True)
class Recipe(abc.ABC):
    """What is trained, and how: all that the losses depend on, besides the corpus.

    Args:
        n_steps: how many steps.
        batch_size: texts a step.
        learning_rate: the highest; it rises for a twentieth of the steps, and falls in a cosine.
        seed: of the weights and of the texts.
    """

    n_steps: int
    batch_size: int
    learning_rate: float
    seed: int

    @abc.abstractmethod
    def init_params(self, key: Array) -> Any:
        """Returns the weights before the first step."""

    @abc.abstractmethod
    def draw_batch(self, corpus: np.ndarray, index: int) -> Any:
        """Draws the texts of a step, a pytree of arrays: the same whenever it is called."""

    @abc.abstractmethod
    def compute_loss(self, params: Any, batch: Any) -> tuple[Array, Array]:
        """Computes what is made small, and the loss that is shown and kept."""


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
    """A recipe that cannot be trained, or a directory that a training cannot go on in."""


def train(
    recipe: Recipe,
    corpus: np.ndarray,
    directory: Path,
    *,
    save_every: int = 100,
    console: Console | None = None,
) -> State:
    """Trains, or goes on with the training that is in the directory.

    Args:
        recipe: what to train.
        corpus: what to train it on.
        directory: where checkpoints are, or will be.
        save_every: how many steps apart.
        console: where progress is shown.

    Returns:
        The state after all steps.

    Raises:
        TrainingError: If the directory is a file, holds the training of another recipe, or has a
            checkpoint that cannot be read.
        Interrupted: If SIGINT or SIGTERM came, once the step is done and saved.
    """
    if directory.exists() and not directory.is_dir():
        raise TrainingError(f"{directory} is a file; checkpoints need a directory.")
    with open_checkpoints(directory) as manager, catch_signals() as came:
        done, state = resume(manager, recipe)
        with show_progress(recipe, console) as show:
            show(done, state)
            for index in range(done, recipe.n_steps):
                state = take_step(recipe, state, index, recipe.draw_batch(corpus, index))
                is_last = index + 1 == recipe.n_steps
                if is_last or came or (index + 1) % save_every == 0:
                    save(manager, recipe, index + 1, state)
                if came and not is_last:
                    raise Interrupted(came[0], index + 1)
                show(index + 1, state)
    return state


# One step


@functools.partial(jax.jit, static_argnums=0)
def make_state(recipe: Recipe) -> State:
    """Makes the state before the first step."""
    params = recipe.init_params(jax.random.key(recipe.seed))
    return State(params, make_optimizer(recipe).init(params), jnp.zeros(recipe.n_steps))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def take_step(recipe: Recipe, state: State, index: int, batch: Any) -> State:
    """Makes the state after one more step."""
    compute_gradient = jax.grad(recipe.compute_loss, has_aux=True)
    gradient, loss = compute_gradient(state.params, batch)
    updates, changed = make_optimizer(recipe).update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, changed, state.losses.at[index].set(loss))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Makes AdamW, with gradients clipped."""
    rates = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, max(recipe.n_steps // 20, 1), recipe.n_steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, weight_decay=0.01))


# Checkpoints


@contextlib.contextmanager
def open_checkpoints(directory: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens the checkpoints of a directory; the last two are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, recipe: Recipe, step: int, state: State) -> None:
    """Writes a checkpoint; it is there as a whole, or not at all."""
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), recipe=ocp.args.JsonSave(dataclasses.asdict(recipe))
    )
    manager.save(step, args=items)


def resume(manager: ocp.CheckpointManager, recipe: Recipe) -> tuple[int, State]:
    """Returns how many steps are done, and the state after them."""
    last = manager.latest_step()
    if last is None:
        return 0, make_state(recipe)
    saved = _restore(manager, last, recipe=ocp.args.JsonRestore())
    for name, asked in dataclasses.asdict(recipe).items():
        if saved["recipe"].get(name) != asked:
            raise TrainingError(
                f"{manager.directory} holds a training with {name}={saved['recipe'].get(name)}; "
                f"asked for was {name}={asked}. Give another directory, or remove this one."
            )
    abstract = jax.eval_shape(functools.partial(make_state, recipe))
    return last, _restore(manager, last, state=ocp.args.StandardRestore(abstract))["state"]


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    """Reads items of a checkpoint."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # whatever the storage raises over a damaged file
        raise TrainingError(
            f"{manager.directory}/{step} is a checkpoint that cannot be read. Remove it to go on "
            "from an earlier one."
        ) from error


# What is outside


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collects the signals that come, SIGINT and SIGTERM, instead of what they would do."""
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


Show: TypeAlias = Callable[[int, State], None]
"""Shows how many steps are done, and the loss of the last."""


@contextlib.contextmanager
def show_progress(recipe: Recipe, console: Console | None) -> Iterator[Show]:
    """Shows a bar."""
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
