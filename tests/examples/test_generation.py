"""Generation: how tokens are chosen, and what one compiled program makes of several prompts."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import generation
from flax_extra import combinator as cb
from flax_extra import layer as xn
from generation import Sampler, generate, greedy, pad_prompts
from language_model import language_model

N_TOKENS = 11
TINY = {"n_tokens": N_TOKENS, "d_model": 8, "n_heads": 2, "d_hidden": 12}


# How a token is chosen

logits_of_tokens = arrays(
    np.float32, st.integers(1, 12), elements=st.integers(-6, 6).map(lambda x: np.float32(x / 2))
)
"""Logits of which some are equal."""

samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1.0),
)


def find_probabilities(sampler: Sampler, logits: np.ndarray) -> tuple[np.ndarray, float]:
    """The probability of each token, in float64 and word for word; equal ones in their order.

    And how near top_p came to another number of candidates: in float32 it may come out either way.
    """
    weights = np.exp(logits.astype(np.float64) / sampler.temperature)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = order if sampler.top_k is None else order[: sampler.top_k]
    margin = 1.0
    if sampler.top_p is not None:
        total, candidates, together = weights[kept].sum(), kept, 0.0
        kept = []
        for token in candidates:
            if kept and together / total >= sampler.top_p:
                break
            kept.append(token)
            together += weights[token]
            margin = min(margin, abs(together / total - sampler.top_p))
    chosen = np.zeros_like(weights)
    chosen[kept] = weights[kept]
    return chosen / chosen.sum(), margin


@given(samplers, logits_of_tokens)
def test_candidates_have_the_probabilities_of_the_reference(sampler, logits):
    expected, margin = find_probabilities(sampler, logits)
    assume(margin > 1e-5)
    tokens, scores = sampler.find_candidates(jnp.asarray(logits))
    found = np.zeros_like(expected)
    found[np.asarray(tokens)] = jax.nn.softmax(scores)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(set(np.asarray(tokens).tolist())) == len(tokens)


def test_tokens_are_drawn_as_often_as_they_are_probable():
    sampler, n = Sampler(temperature=1.5, top_k=4, top_p=0.8), 4000
    logits = np.array([0.3, 2.0, -1.0, 1.1, 0.9, -3.0], np.float32)
    keys = jax.random.split(jax.random.key(0), n)
    drawn = jax.vmap(sampler, in_axes=(None, 0))(jnp.asarray(logits), keys)
    expected, _ = find_probabilities(sampler, logits)
    assert 1 < (expected > 0).sum() < 4
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / n, expected, atol=0.03)


@given(logits_of_tokens)
def test_greedy_is_the_first_of_the_most_probable(logits):
    assert greedy(jnp.asarray(logits)) == logits.argmax()
    assert Sampler(top_k=1)(jnp.asarray(logits), jax.random.key(0)) == logits.argmax()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "A temperature of 0.0 is not above 0. To choose the most probable"),
        ({"temperature": float("nan")}, "A temperature of nan is not above 0."),
        ({"top_k": 0}, "top_k must be at least 1; got 0."),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0."),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5."),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(**settings)


# Generation


@functools.cache
def make_model(window: int = 64, n_layers: int = 2):
    """A decoder with weights that make up their mind, and how many times it was traced."""
    n_traces = [0]

    def count_traces(tokens: jax.Array) -> jax.Array:
        n_traces[0] += 1
        return tokens

    decoder = language_model(**TINY, n_layers=n_layers, window=window)
    model = cb.serial(count_traces, decoder)
    return model, make_variables(model, jnp.zeros((1, 4), jnp.int32)), n_traces


def make_variables(model, *inputs):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0), *inputs),
    )


@functools.cache
def make_stream(capacity: int = 24, window: int = 64):
    model, variables, _ = make_model(window)
    return cb.stream(model, "i32[b, t]", capacity=capacity), variables


PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
SAMPLER = Sampler(temperature=2.0, top_k=8, top_p=0.95)


def recompute(variables, model, prompt, n_new, sampler, key, *inputs):
    """Runs the model on the whole text again for each token."""
    text, n = np.zeros((1, 24), np.int32), len(prompt)
    text[0, :n] = prompt
    for index in range(n_new):
        logits = run_whole(model)(variables, text, *inputs)[0, n + index - 1]
        text[0, n + index] = sampler(logits, key if key is None else jax.random.fold_in(key, index))
    return text[0, n : n + n_new].tolist()


@functools.cache
def run_whole(model):
    return jax.jit(model.apply)


@pytest.mark.parametrize("window", [64, 3])
def test_a_stream_gives_the_tokens_of_recomputing(window):
    model, variables, _ = make_model(window)
    stream, _ = make_stream(window=window)
    key = jax.random.key(3)
    keys = [jax.random.fold_in(key, row) for row in range(3)]
    prompts = pad_prompts(PROMPTS)
    for sampler in (greedy, SAMPLER):
        found = generate(stream, variables, *prompts, 10, sampler=sampler, key=key)
        for row, prompt in enumerate(PROMPTS):
            expected = recompute(variables, model, prompt, 10, sampler, keys[row])
            assert found.tokens[row].tolist() == expected
        assert found.lengths.tolist() == [10, 10, 10]


@settings(max_examples=10)
@given(st.data())
def test_a_row_does_not_depend_on_its_neighbours_or_on_the_padding(data):
    stream, variables = make_stream()
    prompt = st.lists(st.integers(0, N_TOKENS - 1), min_size=1, max_size=6)
    prompts = data.draw(st.tuples(prompt, prompt, prompt))
    keys = jax.random.split(jax.random.key(data.draw(st.integers(0, 99))), 3)
    tokens, lengths = pad_prompts(prompts, multiple_of=6)
    noise = data.draw(st.integers(0, N_TOKENS - 1))
    tokens = np.where(np.arange(6) < lengths[:, None], tokens, noise)
    run = functools.partial(generate, stream, variables, sampler=SAMPLER, stop=(0, 3))
    together = run(tokens, lengths, 8, key=keys)
    for row in range(3):
        alone = run(tokens[row : row + 1], lengths[row : row + 1], 8, key=keys[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert alone.lengths[0] == together.lengths[row]


def test_prompts_of_one_length_need_no_lengths():
    stream, variables = make_stream()
    prompts = np.array([[1, 2, 3], [4, 5, 6]])
    with_lengths = generate(stream, variables, prompts, [3, 3], 5)
    without = generate(stream, variables, prompts, None, 5)
    np.testing.assert_array_equal(without.tokens, with_lengths.tokens)


def test_a_row_ends_with_its_first_stop_token_and_the_others_go_on():
    stream, variables = make_stream()
    run = functools.partial(generate, stream, variables, *pad_prompts(PROMPTS), 12)
    whole = np.asarray(run(sampler=SAMPLER, key=jax.random.key(5)).tokens)
    stop = (int(whole[0, 4]), int(whole[1, 7]))
    tokens, lengths = run(sampler=SAMPLER, key=jax.random.key(5), stop=stop)
    assert len(set(lengths.tolist())) > 1
    for row in range(3):
        is_stop = np.isin(whole[row], stop)
        n = int(is_stop.argmax()) + 1 if is_stop.any() else 12
        assert lengths[row] == n
        assert tokens[row].tolist() == whole[row, :n].tolist() + [0] * (12 - n)


def test_the_loop_ends_when_all_rows_have():
    stream, variables = make_stream()
    seen = []
    every = tuple(range(N_TOKENS))
    generated = generate(
        stream, variables, *pad_prompts(PROMPTS), 12, stop=every, show=lambda n: seen.append(int(n))
    )
    assert generated.lengths.tolist() == [1, 1, 1]
    assert seen == [1]


def test_progress_is_shown_after_each_token():
    stream, variables = make_stream()
    seen = []
    generate(stream, variables, *pad_prompts(PROMPTS), 6, show=lambda n: seen.append(int(n)))
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]


def test_one_program_serves_all_calls():
    model, variables, n_traces = make_model()
    stream = cb.stream(model, "i32[b, t]", capacity=24)
    tokens, lengths = pad_prompts(PROMPTS)
    run = functools.partial(generate, stream, stop=b"\0")
    run(variables, tokens, lengths, 5, sampler=Sampler(0.5, top_k=3), key=jax.random.key(0))
    before, n_programs = n_traces[0], generation._generate._cache_size()
    other = jax.tree.map(lambda leaf: leaf + 1, variables)
    run(other, tokens + 1, lengths[::-1], 5, sampler=Sampler(0.5, top_k=3), key=jax.random.key(1))
    assert n_traces[0] == before
    assert generation._generate._cache_size() == n_programs


def compile_generation(capacity: int, n_new: int):
    model, variables, _ = make_model(window=2 * capacity)  # so that all steps are kept
    stream = cb.stream(model, "i32[b, t]", capacity=capacity)
    keys = jax.random.split(jax.random.key(0), 2)
    lowered = generation._generate.lower(
        stream,
        variables,
        None,
        jnp.zeros((2, 5), jnp.int32),
        jnp.array([5, 3]),
        keys,
        (),
        n_new=n_new,
        sampler=greedy,
        stop=(),
        show=None,
    )
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(stream.start(2)))
    return lowered.compile(), cache


def test_the_state_is_updated_in_place():
    compiled, cache = compile_generation(capacity=2**14, n_new=50)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert cache > 2**21
    assert temporaries < 1.2 * cache  # the state itself is one of them; a copy would be another


def test_logits_of_the_prompt_are_not_computed():
    compiled, _ = compile_generation(capacity=64, n_new=4)
    text = compiled.as_text()
    assert re.search(rf"f32\[2,{N_TOKENS}\]|f32\[2,1,{N_TOKENS}\]", text)
    assert f"f32[2,4,{N_TOKENS}]" not in text
    assert f"f32[8,{N_TOKENS}]" not in text


def test_generation_goes_on_from_a_state():
    stream, variables = make_stream()
    tokens = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
    state, _ = stream.step(variables, stream.start(2), tokens[:, :3])
    whole = generate(stream, variables, tokens, None, 6)
    rest = generate(stream, variables, tokens[:, 3:], None, 6, state=state)
    np.testing.assert_array_equal(rest.tokens, whole.tokens)


def test_it_runs_within_a_program_of_the_users_own():
    stream, variables = make_stream()
    tokens, lengths = pad_prompts(PROMPTS)
    outer = jax.jit(lambda tokens, lengths: generate(stream, variables, tokens, lengths, 5))
    found = outer(tokens, lengths)
    np.testing.assert_array_equal(
        found.tokens, generate(stream, variables, tokens, lengths, 5).tokens
    )


def test_tokens_beyond_the_capacity_are_marked_within_a_program():
    stream, variables = make_stream()
    outer = jax.jit(lambda lengths: generate(stream, variables, [[1, 2]], lengths, 30).tokens)
    assert (np.asarray(outer(jnp.array([2])))[0] < 0).tolist() == [False] * 23 + [True] * 7


def test_prompts_are_padded_at_the_end():
    tokens, lengths = pad_prompts([b"ab", b"abc"], multiple_of=4)
    assert tokens.tolist() == [[97, 98, 0, 0], [97, 98, 99, 0]]
    assert lengths.tolist() == [2, 3]
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize(
    ("prompts", "lengths", "n_new", "options", "message"),
    [
        (
            np.zeros((2, 3)),
            None,
            4,
            {},
            "Prompts must be integers [batch, time]; got float32[2, 3]. pad_prompts makes one",
        ),
        ([1, 2], None, 4, {}, "Prompts must be integers [batch, time]; got int32[2]."),
        ([[1, 2]], None, 0, {}, "n_new must be at least 1; got 0."),
        (
            [[1, 2], [1, 2], [3, 4]],
            [0, 2, 3],
            4,
            {},
            "The prompts of rows [0, 2] have lengths [0, 3]: each needs at least 1 token, and the",
        ),
        ([[1, 2]], [1, 2], 4, {}, "The lengths of 1 prompts must be integers [1]; got int32[2]."),
        ([[1], [2]], [1.0, 1], 4, {}, "2 prompts must be integers [2]; got float32[2]."),
        (
            [[1, 2], [N_TOKENS, 3], [4, 5]],
            None,
            4,
            {},
            "The logits of rows [1] are NaN, in row 1 from new token 0 on. Are all tokens of the",
        ),
        (
            [[1, 2, 3], [1, 2, 3]],
            [1, 3],
            23,
            {},
            "Row 1 has 3 tokens, and 23 are to come: the capacity of the stream is 24. Make the",
        ),
        (
            [[1, 2]],
            None,
            4,
            {"sampler": Sampler(0.5)},
            "Sampler(temperature=0.5, top_k=None, top_p=None) draws tokens: give it a key, such as",
        ),
    ],
)
def test_bad_input_is_refused(prompts, lengths, n_new, options, message):
    stream, variables = make_stream()
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(stream, variables, prompts, lengths, n_new, **options)


def test_the_last_token_needs_no_room():
    stream, variables = make_stream()
    tokens = generate(stream, variables, [[1, 2, 3]], None, 22).tokens
    assert tokens.shape == (1, 22)


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("time", [1, 3])
def test_further_inputs_are_given_with_the_prompt(time, is_ragged):
    model = cb.serial(
        nn.Embed(N_TOKENS, 8), cb.residual(cb.fn(xn.Attention(2), mask=None)), nn.Dense(N_TOKENS)
    )
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, N_TOKENS, (2, time))
    memory = draw.normal(size=(2, 3, 8)).astype(np.float32)
    variables = make_variables(model, tokens, memory)
    stream = cb.stream(model, "i32[b, t]", "f32[b, s, 8]")
    lengths = np.array([1, time]) if is_ragged else None
    found = generate(
        stream, variables, tokens, lengths, 5, inputs=[memory], state=stream.start(2, s=3)
    )
    for row, n in enumerate([time, time] if lengths is None else lengths):
        prompt, own = tokens[row, :n], memory[row : row + 1]
        expected = recompute(variables, model, prompt, 5, greedy, None, own)
        assert found.tokens[row].tolist() == expected
