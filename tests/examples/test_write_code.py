"""The language model of bytes, and the program that trains it and writes with it."""

from __future__ import annotations

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import language_model
import write_code
from corpus import read_corpus
from flax_extra import testing
from language_model import LanguageRecipe, evaluate
from ngrams import NgramModel
from training import train

RECIPE = LanguageRecipe(n_steps=120, batch_size=2, n_positions=16, d_model=8, n_layers=1, n_heads=2)
FLAGS = [
    *("--steps", "120", "--save-every", "40", "--batch-size", "2", "--positions", "16"),
    *("--width", "8", "--layers", "1", "--heads", "2"),
]


# A piece of the corpus, for to count the n-grams of all of it takes seconds.
CORPUS = {held_out: read_corpus(held_out=held_out)[:40_000] for held_out in (False, True)}


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch):
    for module in (write_code, language_model):
        monkeypatch.setattr(module, "read_corpus", lambda held_out: CORPUS[held_out])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last state of a training without interruption, and where it is."""
    directory = tmp_path_factory.mktemp("whole")
    return train(RECIPE, CORPUS[False], directory), directory


# The model


def test_the_model_streams():
    testing.check_streaming(RECIPE.model(), "i32[b, t]", gradients=False, max_examples=4)


def test_scores_come_from_the_embedding():
    variables = jax.eval_shape(RECIPE.init_params, jax.random.key(0))
    kernels = [leaf.shape for leaf in jax.tree.leaves(variables) if 256 in leaf.shape]
    assert sorted(kernels) == [(256,), (256, 8)]


def test_each_byte_predicts_the_next():
    corpus = np.arange(200, dtype=np.uint8)
    first, again, other = (RECIPE.draw_batch(corpus, index) for index in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == (2, 17)
    assert (np.diff(first) == 1).all()


def test_losses_fall(trained):
    losses = np.asarray(trained[0].losses)
    assert losses[-20:].mean() < losses[:10].mean() - 1


def test_bits_are_those_of_the_bytes_that_the_others_predict(trained):
    score = evaluate(RECIPE, trained[0].params, n_windows=3)
    unseen, seen = CORPUS[True], CORPUS[False]
    bits = {order: NgramModel.fit(seen, order).count_bits(unseen) for order in (1, 5)}
    found = []
    for start in (0, (len(unseen) - 17) // 2, len(unseen) - 17):
        window = unseen[start : start + 17].astype(np.int32)
        logits = RECIPE.model().apply(trained[0].params, jnp.asarray(window[None, :-1]))
        log_probabilities = jax.nn.log_softmax(logits)[0] / np.log(2)
        found += [
            (
                -log_probabilities[index - 1, window[index]],
                bits[1][start + index],
                bits[5][start + index],
            )
            for index in range(9, 17)
        ]
    assert score.n_bytes == len(found) == 24
    expected = np.mean(np.array(found), axis=0)
    np.testing.assert_allclose(score[1:], expected, rtol=1e-4)


# The program


def test_it_trains_goes_on_after_an_interruption_and_writes(trained, tmp_path, monkeypatch, capsys):
    arguments = [*FLAGS, "--checkpoints", str(tmp_path), "--new", "20"]
    draw_batch = LanguageRecipe.draw_batch

    def draw(recipe, corpus, index):
        if index == 49:
            signal.raise_signal(signal.SIGINT)
        return draw_batch(recipe, corpus, index)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageRecipe, "draw_batch", draw)
        assert write_code.main(arguments) == 128 + signal.SIGINT
    printed = capsys.readouterr().out
    assert printed.endswith("Interrupted after step 50, which is saved. Start again to go on.\n")
    assert not list(tmp_path.glob("120"))

    options = ["--prompt", "def f(", "--prompt", "", "--seed", "3"]
    assert write_code.main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "bytes of held-out files, bits per byte: " in printed
    assert "\ndef f(" in printed

    state = train(RECIPE, CORPUS[False], tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, trained[0])


def run(trained, capsys, *options):
    assert write_code.main([*FLAGS, "--checkpoints", str(trained[1]), *options]) == 0
    *_, rule, text = capsys.readouterr().out.partition("\u2500\n")
    assert rule
    return text


def test_a_seed_gives_the_same_text_again(trained, capsys):
    options = ("--prompt", "x", "--new", "12", "--temperature", "5")
    first, again, other = (run(trained, capsys, *options, "--seed", seed) for seed in "112")
    assert first == again != other


def test_a_temperature_of_zero_is_greedy(trained, capsys):
    options = ("--prompt", "x", "--new", "12", "--temperature")
    greedy = run(trained, capsys, *options, "0")
    assert greedy == run(trained, capsys, *options, "1", "--top-k", "1")


def test_it_stops(trained, capsys):
    every = "".join(map(chr, range(128)))
    text = run(trained, capsys, "--prompt", "x", "--new", "12", "--stop", every)
    assert len(text.removesuffix("\n")) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "A temperature of -1.0 is not above 0."),
        (["--top-k", "0"], "argument --top-k: 0 is below 1"),
        (["--top-p", "1.5"], "top_p must be above 0 and at most 1; got 1.5."),
        (["--new", "0"], "argument --new: 0 is below 1"),
        (["--width", "6"], "A width of 6 is no multiple of 4, twice the number of heads."),
        (["--steps", "many"], "argument --steps: invalid at_least_1 value: 'many'"),
        (["--checkpoints", "file"], "file is a file; checkpoints need a directory."),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        write_code.main([*FLAGS, *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("write_code.py: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
