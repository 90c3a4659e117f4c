"""Llama, Mistral and GPT-2 against transformers, with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_extra import combinator as cb
from generation import generate
from llama_checkpoints import LANGUAGE_MODELS
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

N_TOKENS, BATCH, TIME = 97, 2, 12
SIZES = {
    "vocab_size": N_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


def llama_3() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA_3))


def llama_with_biases() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True, hidden_act="gelu"
        )
    )


def mistral() -> Any:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=5, head_dim=16, tie_word_embeddings=True)
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=N_TOKENS,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


MODELS = [llama_3, llama_with_biases, mistral, gpt2]


@functools.cache
def reference(model: Any) -> Any:
    return redraw(model())


def texts() -> np.ndarray:
    return np.random.default_rng(0).integers(3, N_TOKENS, (BATCH, TIME)).astype(np.int32)


PADDING = {
    "none": np.ones((BATCH, TIME), bool),
    "left": np.arange(TIME) >= np.array([[7], [0]]),
    "right": np.arange(TIME) < np.array([[5], [TIME]]),
}


@pytest.mark.parametrize("model", MODELS)
def test_logits_and_hidden_states(model):
    theirs, tokens = reference(model), texts()
    pipeline, variables = ours(LANGUAGE_MODELS, theirs)

    @jax.jit
    def run(mask: Any) -> Any:
        return [p.apply(variables, tokens, padding_mask=mask) for p in (pipeline, pipeline[:-1])]

    for mask in PADDING.values():
        with torch.no_grad():
            expected = theirs(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask.astype(int)),
                output_hidden_states=True,
            )
        logits, hidden = run(mask[:, None])
        assert_close(logits[mask], expected.logits[mask])
        assert_close(hidden[mask], expected.hidden_states[-1][mask])


@pytest.mark.parametrize("model", MODELS)
def test_gradients(model):
    theirs, tokens = reference(model), texts()
    pipeline, variables = ours(LANGUAGE_MODELS, theirs)
    labels = np.random.default_rng(1).integers(0, N_TOKENS, tokens.shape)

    @jax.jit
    @jax.grad
    def differentiate(variables: Any, mask: Any) -> jax.Array:
        logits = pipeline.apply(variables, tokens, padding_mask=mask[:, None])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses, where=mask) / jnp.sum(mask)

    for mask in PADDING.values():
        theirs.zero_grad()
        given = torch.tensor(mask.astype(int))
        logits = theirs(torch.tensor(tokens), attention_mask=given).logits
        torch.nn.functional.cross_entropy(logits[mask], torch.tensor(labels[mask])).backward()
        assert_gradients(LANGUAGE_MODELS, theirs, differentiate(variables, mask))


@pytest.mark.parametrize("model", MODELS)
def test_half_precision(model):
    theirs = reference(model)
    tokens = np.random.default_rng(0).integers(3, N_TOKENS, (16, TIME)).astype(np.int32)
    pipeline, variables = ours(LANGUAGE_MODELS, theirs, dtype=jnp.bfloat16)
    half = redraw(model()).to(torch.bfloat16)
    with torch.no_grad():
        expected, in_half = (m(torch.tensor(tokens)).logits for m in (theirs, half))
    same = LANGUAGE_MODELS.read(half.state_dict(), config_of(theirs), dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    found = jax.jit(pipeline.apply)(variables, tokens)
    assert found.dtype == jnp.bfloat16
    assert_half_precision(found, in_half.float(), expected)


@pytest.mark.parametrize("model", MODELS)
def test_greedy_generation(model):
    """Theirs wants padding on the left, ours on the right."""
    theirs, lengths = reference(model), np.array([TIME, 5, 1])
    prompts = np.random.default_rng(2).integers(3, N_TOKENS, (3, TIME)).astype(np.int32)
    left, mask = np.zeros_like(prompts), np.arange(TIME) >= TIME - lengths[:, None]
    for row, length in enumerate(lengths):
        left[row, TIME - length :] = prompts[row, :length]
    expected = theirs.generate(
        torch.tensor(left),
        attention_mask=torch.tensor(mask.astype(int)),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, TIME:]
    assert_varied(expected)
    pipeline, variables = ours(LANGUAGE_MODELS, theirs)
    stream = cb.stream(pipeline, "i32[b, t]", capacity=TIME + 64)
    found = generate(stream, variables, prompts, lengths, 64)
    np.testing.assert_array_equal(found.tokens, expected)


def test_generation_ends_where_theirs_does():
    theirs = reference(gpt2)
    prompt = np.array([[3, 4, 5], [6, 7, 8]], np.int32)
    mask = torch.ones(2, 3, dtype=int)
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    free = theirs.generate(torch.tensor(prompt), eos_token_id=None, pad_token_id=0, **settings)
    end = int(free[0, 3 + 4])
    expected = theirs.generate(
        torch.tensor(prompt), eos_token_id=end, pad_token_id=end, **settings
    )[:, 3:]
    pipeline, variables = ours(LANGUAGE_MODELS, theirs)
    stream = cb.stream(pipeline, "i32[b, t]", capacity=23)
    found, lengths = generate(stream, variables, prompt, None, 20, stop=(end,))
    assert lengths[0] <= 5
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_array_equal(found[row, :length], expected[row, :length])
        assert (expected[row, length:] == end).all()


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("model", MODELS)
def test_directories_there_and_back(model, shard, tmp_path):
    theirs, tokens = reference(model), torch.tensor(texts())

    def is_same(again: Any) -> None:
        with torch.no_grad():
            np.testing.assert_array_equal(again(tokens).logits, theirs(tokens).logits)

    assert_round_trip(LANGUAGE_MODELS, theirs, tmp_path, shard, is_same)


def test_names_without_the_prefix_of_the_published_gpt2():
    theirs = reference(gpt2)
    state = {
        name.removeprefix("transformer."): weight
        for name, weight in theirs.state_dict().items()
        if name != "lm_head.weight"
    }
    state["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    config = config_of(theirs)
    _, expected = ours(LANGUAGE_MODELS, theirs)
    jax.tree.map(np.testing.assert_array_equal, LANGUAGE_MODELS.read(state, config), expected)
