"""What llama.py, clip.py and whisper.py promise, without transformers: shapes, programs, streams."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from clip import clip, image_tower, text_tower
from flax_extra import combinator as cb
from generation import generate
from llama import Llama, gpt2, llama
from sound import log_mel
from transformer import Tower
from whisper import Suppress, Task, decoder, encoder, transcribe, whisper

SMALL = Llama(n_tokens=31, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=24)
TOWER = Tower(d_model=16, n_layers=2, n_heads=2, d_hidden=24, activation=nn.gelu)


def small_clip(n_layers: int = 2) -> cb.Combinator:
    tower = Tower(16, n_layers, 2, 24, nn.gelu)
    return clip(
        image_tower(tower, image_size=8, patch_size=4, d_shared=8),
        text_tower(tower, n_tokens=31, n_positions=7, d_shared=8),
    )


def small_whisper(n_layers: int = 2) -> cb.Combinator:
    tower = Tower(16, n_layers, 2, 24, nn.gelu)
    return whisper(encoder(tower, n_positions=50), decoder(tower, n_tokens=31, n_positions=20))


def deep_llama(n_layers: int) -> cb.Combinator:
    return llama(Llama(n_tokens=31, d_model=16, n_layers=n_layers, n_heads=4, d_hidden=24))


def deep_gpt2(n_layers: int) -> cb.Combinator:
    return gpt2(Tower(16, n_layers, 2, 24, nn.gelu), n_tokens=31, n_positions=20)


MODELS = {
    "llama": (deep_llama, ("i32[b, t]",)),
    "gpt2": (deep_gpt2, ("i32[b, t] where t <= 20",)),
    "clip": (small_clip, ("f32[i, 8, 8, 3]", "i32[b, t] where t <= 7")),
    "whisper": (small_whisper, ("i32[b, t] where t <= 20", "f32[b, 100, 80]")),
}
SIGNATURES = {
    "llama": "i32[b, t] -> f32[b, t, 31]",
    "gpt2": "i32[b, t] where t <= 20 -> f32[b, t, 31]",
    "clip": "f32[i, 8, 8, 3], i32[b, t] where t <= 7 -> f32[i, b]",
    "whisper": "i32[b, t], f32[b, 100, 80] where t <= 20 -> f32[b, t, 31]",
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_at_every_batch_and_length(name):
    build, specs = MODELS[name]
    assert str(cb.shape_signature(build(2), *specs)) == SIGNATURES[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_program_does_not_grow_with_the_depth(name):
    build, specs = MODELS[name]
    inputs = [
        jnp.zeros([{"b": 2, "t": 5, "i": 3}.get(n, n) for n in shape], dtype)
        for dtype, shape in map(parse, specs)
    ]

    def trace(n_layers: int) -> Any:
        model = build(n_layers)
        variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        return jax.make_jaxpr(model.apply)(variables, *inputs)

    two, many = trace(2), trace(40)
    assert len(str(two)) == pytest.approx(len(str(many)), rel=0.01)
    assert sum(np.asarray(constant).nbytes for constant in two.consts) < 2**20


def parse(spec: str) -> tuple[Any, list[Any]]:
    kind, _, axes = spec.partition("]")[0].partition("[")
    shape = [int(axis) if axis.isdigit() else axis for axis in axes.split(", ")]
    return {"f32": jnp.float32, "i32": jnp.int32}[kind], shape


STREAMS = {
    "llama": llama(SMALL),
    "mistral": llama(dataclasses.replace(SMALL, window=3, is_tied=True)),
    "gpt2": gpt2(TOWER, n_tokens=31, n_positions=64),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_the_whole(name):
    model, text = STREAMS[name], np.arange(3, 19, dtype=np.int32).reshape(2, 8)
    variables = model.init(jax.random.key(0), text)
    expected = jax.jit(model.apply)(variables, text)
    stream = cb.stream(model, "i32[b, t]", capacity=8)
    step = jax.jit(stream.step)
    state, first = step(variables, stream.start(2), text[:, :4])
    state, second = step(variables, state, text[:, 4:5])
    state, third = step(variables, state, text[:, 5:])
    found = jnp.concatenate([first, second, third], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_nothing():
    model, text = llama(SMALL), np.arange(3, 9, dtype=np.int32)[None]
    variables = model.init(jax.random.key(0), text)
    padded = np.pad(text, ((0, 0), (4, 0)))
    mask = (np.arange(10) >= 4)[None, None]
    expected = model.apply(variables, text)
    found = model.apply(variables, padded, padding_mask=mask)[:, 4:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(model.apply(variables, padded)[:, 4:] - expected).max() > 1e-3


def test_a_block_is_a_value_that_can_be_swapped():
    """GPT-2's blocks between Llama's embedding and norm."""
    embed, _, norm, head = llama(SMALL)
    mixed = cb.serial(embed, TOWER.blocks(causal=True), norm, head)
    assert str(cb.shape_signature(mixed, "i32[b, t]")) == "i32[b, t] -> f32[b, t, 31]"


# Generation


def test_generation_is_the_same_as_computing_the_whole_each_time():
    model = llama(SMALL)
    prompts, lengths = np.array([[3, 4, 5], [6, 0, 0]], np.int32), jnp.array([3, 1])
    variables = model.init(jax.random.key(0), prompts)
    stream = cb.stream(model, "i32[b, t]", capacity=16)
    found = generate(stream, variables, prompts, lengths, 6).tokens
    whole = jax.jit(model.apply)
    for row, length in enumerate(lengths.tolist()):
        text = np.zeros((1, 9), np.int32)
        text[0, :length] = prompts[row, :length]
        for at, token in enumerate(found[row].tolist(), length):
            assert token == int(whole(variables, text)[0, at - 1].argmax())
            text[0, at] = token


def test_transcription_is_the_same_as_computing_the_whole_each_time():
    model, draw = small_whisper(), np.random.default_rng(0)
    sounds = draw.normal(size=(2, 16000)).astype(np.float32)
    features = log_mel(sounds)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 1), np.int32), features)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) * 0.3, jnp.float32), shapes
    )
    task = Task(prompt=(1, 2), end=30, never=(4,), not_first=(5,))
    run = functools.partial(transcribe, model, task=task, n_new=6)
    found = np.asarray(jax.jit(run)(variables, sounds).tokens)
    whole = jax.jit((model >> Suppress(task)).apply)
    text = np.zeros((2, 8), np.int32)
    text[:, :2] = task.prompt
    for step in range(6):
        text[:, step + 2] = whole(variables, text, features)[:, step + 1].argmax(axis=1)
    assert task.end not in text
    np.testing.assert_array_equal(found, text[:, 2:])
