"""The command line of the language model: filling in, training, resuming, and bad input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import perceiver_full_size
import perceiver_mlm
from corpus import read_corpus
from perceiver_text import CLS, MASK, PAD, SEP, TextError, as_bytes, as_tokens, padded, parse
from perceiver_training import MaskedRecipe, evaluate
from tests.examples.test_perceiver_checkpoints import saved
from training import open_checkpoints, resume, train

TINY = {
    "n_steps": 600,
    "batch_size": 2,
    "n_positions": 24,
    "n_latents": 4,
    "d_model": 8,
    "n_layers": 1,
}
RECIPE = MaskedRecipe(**TINY)
FLAGS = [
    *("--steps", "600", "--save-every", "100", "--batch-size", "2", "--positions", "24"),
    *("--latents", "4", "--width", "8", "--layers", "1"),
]


# Text


def test_text_is_bytes_with_masks():
    assert as_bytes(parse("a[MASK]é[MASK:3]")) == "aé".encode()
    assert (parse("a[MASK]é[MASK:3]") == MASK).tolist() == [0, 1, 0, 0, 1, 1, 1]
    tokens, mask = padded(as_tokens(b"ab"), 6)
    assert tokens.tolist() == [[CLS, 97 + 6, 98 + 6, SEP, PAD, PAD]]
    assert mask.tolist() == [[True] * 4 + [False] * 2]


def test_a_text_can_be_as_long_as_the_model_takes():
    assert padded(as_tokens(b"abcd"), 6)[1].all()
    with pytest.raises(TextError, match=r"^The text has 5 bytes; the model takes 4 at most\.$"):
        padded(as_tokens(b"abcde"), 6)


# Training


def test_texts_of_a_step_follow_from_its_number():
    corpus = read_corpus(held_out=True)
    first, again, other = (RECIPE.draw_batch(corpus, index) for index in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.tokens != other.tokens).any()
    is_masked = first.masked == MASK
    np.testing.assert_array_equal(first.masked[~is_masked], first.tokens[~is_masked])
    assert not is_masked[~first.mask].any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last state of a training without interruption, and where it is."""
    directory = tmp_path_factory.mktemp("whole")
    return train(RECIPE, read_corpus(held_out=False), directory), directory


def test_losses_fall(trained):
    losses = np.asarray(trained[0].losses)
    assert losses[-100:].mean() < losses[:10].mean() - 1


def test_an_interrupted_training_goes_on_with_the_same_losses(trained, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, perceiver_mlm.__file__, *FLAGS, "--checkpoints", str(tmp_path)]
    with subprocess.Popen([*command, "--text", "[MASK]"], env=environment) as process:
        while not (tmp_path / "100").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    with open_checkpoints(tmp_path) as manager:
        assert 100 <= resume(manager, RECIPE)[0] < 600
    state = train(RECIPE, read_corpus(held_out=False), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, trained[0])


def test_a_score_has_something_to_beat(trained):
    score = evaluate(RECIPE, trained[0].params, n_batches=5)
    assert score.most_frequent == b" "
    assert 0.1 < score.baseline < 0.5
    assert 0 <= score.accuracy <= 1


# The command line


def test_what_was_trained_fills_in(trained, capsys):
    arguments = [*FLAGS, "--checkpoints", str(trained[1]), "--text", "import o[MASK]"]
    assert perceiver_mlm.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "masked bytes of held-out files: " in lines[-2]
    assert lines[-1].startswith("import o")
    assert len(lines[-1]) == len("import o?")


def test_saved_weights_fill_in(tmp_path, capsys):
    arguments = ["--weights", str(saved(tmp_path)), "--text", "[MASK:2] are"]
    assert perceiver_mlm.main(arguments) == 0
    assert capsys.readouterr().out.endswith(" are\n")


LONG = "[MASK:23]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--text", ""],
            "The text is empty. Give one with [MASK] where a byte is to be filled in.",
        ),
        (
            ["--text", "all there"],
            "Nothing is masked in the text. Write [MASK] where a byte is to be filled in",
        ),
        (["--text", LONG], "The text has 23 bytes; the model takes 22 at most."),
        (["--weights", "saved", "--text", ""], "The text is empty."),
        (["--weights", "saved", "--text", LONG], "The text has 23 bytes; the model takes 14"),
        (["--weights", "saved"], 'There is no text. Give one: --text "..." with [MASK] in it.'),
        (["--weights", "other", "--text", "[MASK]"], "type 'bert', class 'BertModel'."),
        (["--weights", "image", "--text", "[MASK]"], "asked for was a PerceiverForMaskedLM."),
        (["--weights", "deeper", "--text", "[MASK]"], "of this configuration: 16 missing."),
        (["--weights", "truncated", "--text", "[MASK]"], "cannot be read as safetensors"),
        (["--weights", "missing", "--text", "[MASK]"], "No such file or directory"),
        (
            ["--checkpoints", "saved/config.json", "--text", "[MASK]"],
            "saved/config.json is a file; checkpoints need a directory.",
        ),
        (["--width", "6"], "A width of 6 is no multiple of 4, the number of heads."),
        (["--steps", "0"], "argument --steps: 0 is below 1"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    directories(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        perceiver_mlm.main([*FLAGS, *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("perceiver_mlm.py: ")
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def directories(root: Path) -> None:
    """Weights that can be used, and some that cannot."""
    for name, change in {
        "saved": {},
        "truncated": {},
        "other": {"model_type": "bert", "architectures": ["BertModel"]},
        "image": {"architectures": ["PerceiverForImageClassificationFourier"]},
        "deeper": {"num_self_attends_per_block": 3},
    }.items():
        (root / name).mkdir()
        saved(root / name, change)
    file = root / "truncated" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_what_the_full_size_costs(capsys):
    assert perceiver_full_size.main(["--layers", "1", "--positions", "16", "--compile-only"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"1 layers, 17\.\d million parameters", printed)
    assert re.search(r"compile +\d+\.\d\d s   peak memory +\d+\.\d\d GiB\n", printed)
