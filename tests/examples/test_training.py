"""Training that goes on after an interruption, tried on a model of one matrix."""

from __future__ import annotations

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corpus import read_corpus, standard_library
from training import Interrupted, Recipe, TrainingError, open_checkpoints, resume, train

CORPUS = np.arange(50, dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class MatrixRecipe(Recipe):
    """Finds a matrix that doubles."""

    n_steps: int = 60
    batch_size: int = 4
    learning_rate: float = 0.1
    seed: int = 0

    def init_params(self, key):
        return jax.random.normal(key, (3, 3))

    def draw_batch(self, corpus, index):
        draw = np.random.default_rng([self.seed, index])
        return draw.choice(corpus, (self.batch_size, 3)).astype(np.float32) / len(corpus)

    def compute_loss(self, params, batch):
        loss = jnp.mean((batch @ params - 2 * batch) ** 2)
        return loss, loss


RECIPE = MatrixRecipe()


@pytest.fixture
def interrupt_at(monkeypatch):
    """Lets a signal come while the batch of a step is drawn."""
    draw_batch = MatrixRecipe.draw_batch

    def interrupt_at(step):
        def draw(recipe, corpus, index):
            if index == step:
                signal.raise_signal(signal.SIGTERM)
            return draw_batch(recipe, corpus, index)

        monkeypatch.setattr(MatrixRecipe, "draw_batch", draw)

    yield interrupt_at
    monkeypatch.undo()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last state of a training without interruption, and where it is."""
    directory = tmp_path_factory.mktemp("whole")
    return train(RECIPE, CORPUS, directory, save_every=20), directory


def test_losses_fall_and_are_kept(trained):
    state, directory = trained
    losses = np.asarray(state.losses)
    assert losses[-10:].mean() < losses[:10].mean() / 10
    with open_checkpoints(directory) as manager:
        assert sorted(manager.all_steps()) == [40, 60]
        done, again = resume(manager, RECIPE)
    assert done == 60
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize("step", [0, 19, 33])
def test_an_interrupted_training_goes_on_with_the_same_numbers(
    trained, tmp_path, interrupt_at, step
):
    interrupt_at(step)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        train(RECIPE, CORPUS, tmp_path, save_every=20)
    assert caught.value.status == 128 + signal.SIGTERM
    assert str(caught.value) == (
        f"Interrupted after step {step + 1}, which is saved. Start again to go on."
    )
    assert signal.getsignal(signal.SIGTERM) is handler
    interrupt_at(None)
    with open_checkpoints(tmp_path) as manager:
        assert manager.latest_step() == step + 1
    state = train(RECIPE, CORPUS, tmp_path, save_every=20)
    jax.tree.map(np.testing.assert_array_equal, state, trained[0])


def test_a_signal_at_the_last_step_changes_nothing(trained, tmp_path, interrupt_at):
    interrupt_at(59)
    state = train(RECIPE, CORPUS, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, trained[0])


def test_other_settings_do_not_go_on(trained):
    message = r"holds a training with n_steps=60; asked for was n_steps=61\. Give another directory"
    with pytest.raises(TrainingError, match=message):
        train(dataclasses.replace(RECIPE, n_steps=61), CORPUS, trained[1])


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    state, directory = trained
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "60").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(TrainingError, match=r"/60 is a checkpoint that cannot be read\. Remove"):
        train(RECIPE, CORPUS, tmp_path)
    shutil.rmtree(tmp_path / "60")
    jax.tree.map(np.testing.assert_array_equal, train(RECIPE, CORPUS, tmp_path), state)


def test_a_file_is_no_directory(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(TrainingError, match=r"file is a file; checkpoints need a directory\."):
        train(RECIPE, CORPUS, path)


def test_held_out_files_are_not_trained_on():
    seen, unseen = (set(standard_library(held_out=held_out)) for held_out in (False, True))
    assert not seen & unseen
    assert len(seen) == pytest.approx(9 * len(unseen), rel=0.1)
    assert len(read_corpus(held_out=True)) == sum(path.stat().st_size + 1 for path in unseen) - 1
