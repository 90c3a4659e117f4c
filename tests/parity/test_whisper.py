"""Whisper against transformers: features, logits, and what is written down of a real voice."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.io import wavfile

from sound import RATE, log_mel, read_sound
from tests.parity.redrawn import (
    assert_close,
    assert_gradients,
    assert_half_precision,
    assert_round_trip,
    assert_varied,
    config_of,
    ours,
    redraw,
    torch,
    transformers,
)
from tests.parity.speech import say
from whisper import Task, transcribe
from whisper_checkpoints import WHISPER

N_TOKENS, TIME, SECONDS = 97, 9, 2
START, END = 1, 96


@functools.cache
def reference() -> Any:
    return redraw(make())


def make() -> Any:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=64,
        vocab_size=N_TOKENS,
        max_source_positions=50 * SECONDS,
        max_target_positions=80,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        suppress_tokens=[5, 6],
        begin_suppress_tokens=[3, END],
    )
    return transformers.WhisperForConditionalGeneration(config)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> np.ndarray:
    """A voice that says two things, at 16 kHz."""
    folder, sounds = tmp_path_factory.mktemp("sounds"), []
    for index, text in enumerate(("It was a bright cold day.", "The clocks.")):
        rate, samples = say(text)
        assert rate != RATE
        wavfile.write(folder / f"{index}.wav", rate, samples)
        sounds.append(read_sound(folder / f"{index}.wav", SECONDS)[0])
    assert min(np.abs(sound).max() for sound in sounds) > 0.1
    return np.stack(sounds)


def their_features(sounds: np.ndarray, n_mels: int = 80) -> np.ndarray:
    extract = transformers.WhisperFeatureExtractor(feature_size=n_mels, chunk_length=SECONDS)
    features = extract(list(sounds), sampling_rate=RATE, return_tensors="np")
    return features["input_features"]


@pytest.mark.parametrize("n_mels", [80, 128])
def test_features(sounds, n_mels):
    """Where it is silent, the logarithm makes much of rounding: theirs is no more exact than ours."""
    noise = np.random.default_rng(0).normal(size=sounds.shape).astype(np.float32)
    extract = transformers.WhisperFeatureExtractor(feature_size=n_mels, chunk_length=SECONDS)
    for given in (sounds, noise, np.zeros_like(sounds)):
        found, theirs = log_mel(given, n_mels), their_features(given, n_mels).transpose(0, 2, 1)
        exact = extract._np_extract_fbank_features(given.astype(np.float64), "cpu")
        errors = [np.abs(x - exact.transpose(0, 2, 1)) for x in (found, theirs)]
        assert errors[0].max() < 5e-5
        assert errors[0].mean() <= 1.05 * errors[1].mean()
        np.testing.assert_allclose(found, theirs, rtol=0, atol=5e-5)


def a_text() -> np.ndarray:
    return np.random.default_rng(0).integers(7, END, (2, TIME)).astype(np.int32)


def test_logits_and_memory(sounds):
    theirs, tokens = reference(), a_text()
    model, variables = ours(WHISPER, theirs)
    features = their_features(sounds)

    @jax.jit
    def run(features: Any) -> Any:
        memory, encoder = variables["params"]["encoder"], model[0][0]
        return model.apply(variables, tokens, features), encoder.apply({"params": memory}, features)

    with torch.no_grad():
        expected = theirs(
            input_features=torch.tensor(features), decoder_input_ids=torch.tensor(tokens)
        )
    logits, memory = run(features.transpose(0, 2, 1))
    assert_close(logits, expected.logits)
    assert_close(memory, expected.encoder_last_hidden_state)


def test_gradients(sounds):
    theirs, tokens = reference(), a_text()
    model, variables = ours(WHISPER, theirs)
    features = their_features(sounds)
    labels = np.random.default_rng(1).integers(0, N_TOKENS, tokens.shape)

    @jax.jit
    @jax.grad
    def differentiate(variables: Any) -> jax.Array:
        logits = model.apply(variables, tokens, features.transpose(0, 2, 1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    for parameter in theirs.parameters():  # theirs fixes the positions of the encoder
        parameter.requires_grad_(True)
    theirs.zero_grad()
    logits = theirs(
        input_features=torch.tensor(features), decoder_input_ids=torch.tensor(tokens)
    ).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(labels).flatten()
    ).backward()
    assert_gradients(WHISPER, theirs, differentiate(variables))


def test_half_precision(sounds):
    theirs, tokens, features = reference(), a_text(), their_features(sounds)
    model, variables = ours(WHISPER, theirs, dtype=jnp.bfloat16)
    half = redraw(make()).to(torch.bfloat16)
    with torch.no_grad():
        expected, in_half = (
            m(
                input_features=torch.tensor(features, dtype=m.dtype),
                decoder_input_ids=torch.tensor(tokens),
            ).logits
            for m in (theirs, half)
        )
    given = features.transpose(0, 2, 1).astype(jnp.bfloat16)
    found = jax.jit(model.apply)(variables, tokens, given)
    assert found.dtype == jnp.bfloat16
    assert_half_precision(found, in_half.float(), expected)


def test_transcription(sounds):
    theirs = reference()
    expected = theirs.generate(
        torch.tensor(their_features(sounds)), max_new_tokens=64, do_sample=False
    ).numpy()
    assert_varied(expected)
    model, variables = ours(WHISPER, theirs)
    task = Task((START,), END, never=(5, 6), not_first=(3, END))
    found = jax.jit(lambda variables, sounds: transcribe(model, variables, sounds, task, 64))(
        variables, sounds
    )
    for row, length in enumerate(found.lengths.tolist()):
        np.testing.assert_array_equal(found.tokens[row, :length], expected[row, :length])
        assert (expected[row, length:] == END).all()


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards"])
def test_directories_there_and_back(shard, tmp_path):
    theirs = reference()
    features = np.random.default_rng(0).normal(size=(1, 80, 100 * SECONDS)).astype(np.float32)

    def is_same(again: Any) -> None:
        inputs = {
            "input_features": torch.tensor(features),
            "decoder_input_ids": torch.tensor(a_text()[:1]),
        }
        with torch.no_grad():
            np.testing.assert_array_equal(again(**inputs).logits, theirs(**inputs).logits)

    assert_round_trip(WHISPER, theirs, tmp_path, shard, is_same)


def test_gradients_of_zeros_are_not_lost():
    """Whisper's keys have no bias; ours are zeros, which go nowhere on the way back."""
    theirs = reference()
    _, variables = ours(WHISPER, theirs)
    state = WHISPER.to_huggingface(variables, config_of(theirs))
    assert not [name for name in state if "k_proj.bias" in name]
