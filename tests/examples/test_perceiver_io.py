"""The Perceivers as pipelines: parts that can be swapped, and what is compiled."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flax_extra import combinator as cb
from flax_extra import layer as xn
from perceiver_io import Core, cross_attention_block, self_attention_block, without_mask
from perceiver_models import (
    Clip,
    image_classifier,
    in_chunks,
    main,
    masked_language_model,
    multimodal_autoencoder,
)

KEY = jax.random.key(0)
CORE = Core(n_latents=4, d_latents=8, n_layers=2)
CLIP = Clip(
    n_samples=64, n_bands_sound=4, video_shape=(2, 8, 8), n_bands_video=3, max_resolution=(2, 2, 2),
    n_labels=5, d_label_query=12,
)  # fmt: skip


def language(core: Core = CORE) -> cb.Combinator:
    return masked_language_model(core, n_positions=16, d_model=8, d_qk_decoder=16)


def text() -> tuple[jax.Array, jax.Array]:
    return jnp.arange(32).reshape(2, 16), jnp.arange(16)[None] < jnp.array([[16], [5]])


def clip(batch: int = 2) -> list[jax.Array]:
    shapes = (batch, 64), (batch, 2, 8, 8, 3), (batch, 5)
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def autoencoder(core: Core = CORE, parts: Clip = CLIP) -> cb.Combinator:
    return multimodal_autoencoder(core, parts, d_output=6)


def some(model: cb.Combinator, *inputs: Any) -> Any:
    """Some variables; to draw those of init takes longer to compile than all the rest."""
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(np.float32) / 3,
        jax.eval_shape(model.init, KEY, *inputs),
    )


def apply(model: cb.Combinator, variables: Any, *inputs: Any) -> Any:
    return jax.jit(model.apply)(variables, *inputs)


def shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}


# Parts


class Everything(nn.Module):
    """Another attention: the mean of what is seen."""

    n_heads: int
    d_qk: int = 0  # asked for, and of no use here
    d_v: int = 0

    @nn.compact
    def __call__(self, queries, inputs, mask):
        mean = jnp.mean(inputs, axis=1, keepdims=True)
        return jnp.broadcast_to(nn.Dense(queries.shape[-1])(mean), queries.shape)


class Gated(nn.Module):
    """Another feed-forward."""

    widening_factor: int = 1

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.glu(nn.Dense(2 * x.shape[-1])(x)))


@pytest.mark.parametrize(
    ("part", "value", "pattern"),
    [
        ("attention", Everything, r"(encoder|decoder)/attention/"),
        ("feed_forward", Gated, r"/feed_forward/"),
        ("norm", nn.RMSNorm, r"/norm"),
    ],
)
def test_a_part_is_swapped_without_touching_the_rest(part, value, pattern):
    plain = shapes(jax.eval_shape(language().init, KEY, *text()))
    core = dataclasses.replace(CORE, **{part: value})
    logits, variables = jax.eval_shape(language(core).init_with_output, KEY, *text())
    swapped = shapes(variables)
    assert logits.shape == (2, 16, 262)
    assert swapped != plain
    for path in swapped.keys() ^ plain.keys():
        assert re.search(pattern, path), path
    for path in swapped.keys() & plain.keys():
        assert swapped[path] == plain[path] or re.search(pattern, path), path


def test_blocks_take_a_mask_where_their_attention_does():
    attention = xn.KVQAttention(n_heads=2)
    assert str(cross_attention_block(attention, nn.Dense(4)).signature) == "3 -> 1"
    assert str(cross_attention_block(without_mask(attention), nn.Dense(4)).signature) == "2 -> 1"
    assert str(self_attention_block(xn.SelfAttention(2), nn.Dense(4)).signature) == "2 -> 1"


def test_shards_share_their_weights():
    once = some(language(), *text())
    twice = language(dataclasses.replace(CORE, n_shards=2))
    assert shapes(once) == shapes(jax.eval_shape(twice.init, KEY, *text()))
    four = dataclasses.replace(CORE, n_layers=4)
    doubled = dict(once["params"])
    doubled["processor"] = jax.tree.map(lambda x: jnp.concatenate([x, x]), doubled["processor"])
    np.testing.assert_allclose(
        apply(twice, once, *text()), apply(language(four), {"params": doubled}, *text()), atol=1e-6
    )


# What they compute


def test_the_language_model_does_not_see_padding():
    tokens, mask = text()
    model = language()
    variables = some(model, tokens, mask)
    changed = jnp.where(mask, tokens, 200)
    run = jax.jit(model.apply)
    np.testing.assert_array_equal(run(variables, tokens, mask), run(variables, changed, mask))
    everything = jnp.ones_like(mask)
    assert (run(variables, tokens, everything) != run(variables, changed, everything)).any()


def test_the_autoencoder_in_chunks():
    model, (sound, video, label) = autoencoder(), clip()
    n_traces = 0

    @jax.jit
    def run(*arguments):
        nonlocal n_traces
        n_traces += 1
        return model.apply(*arguments)

    in_one, in_two = [(in_chunks(4, n), in_chunks(128, n)) for n in (1, 2)]
    variables = some(model, sound, video, label, *in_one)
    expected = run(variables, sound, video, label, *in_one)
    assert [x.shape for x in expected] == [(2, 64), (2, 128, 3), (2, 5)]
    for found, whole in zip(run(variables, sound, video, label, *in_two), expected, strict=True):
        np.testing.assert_allclose(found, whole, atol=2e-6)

    # Positions are data: others go through the same program.
    backwards = [positions[::-1] for positions in in_two]
    assert n_traces == 2
    _, pixels, logits = run(variables, sound, video, -label, *backwards)
    assert n_traces == 2
    np.testing.assert_allclose(jnp.roll(pixels, 64, axis=1), expected[1], atol=2e-6)
    np.testing.assert_allclose(logits, expected[2], atol=2e-6)  # the label that went in is masked


def test_positions_are_shared_out_evenly():
    message = (
        "10 positions cannot be shared out to 4 chunks of one size. "
        "Take a number of chunks that divides them."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        in_chunks(10, 4)


# What is compiled


def program(model: cb.Combinator, *inputs: Any) -> str:
    """The optimised program, for parameters that are never made."""
    variables = jax.eval_shape(model.init, KEY, *inputs)
    return jax.jit(model.apply).lower(variables, *inputs).compile().as_text()


def largest_constant(program: str) -> int:
    """Bytes."""
    sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* constant\(", program)
    return max(
        sizes.get(dtype, 4) * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in found
    )


def test_a_large_constant_would_be_found():
    table = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    compiled = jax.jit(lambda x: x * table).lower(jnp.ones(300_000)).compile()
    assert largest_constant(compiled.as_text()) == 1_200_000


def published_sizes() -> list[Any]:
    """As many inputs and outputs as were published, and little in between."""

    def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return np.zeros(shape, dtype)

    tokens = zeros(1, 2048, dtype=np.int32)
    positions = zeros(8, 240, dtype=np.int32), zeros(8, 6272, dtype=np.int32)
    scene = zeros(1, 30720), zeros(1, 16, 224, 224, 3), zeros(1, 700), *positions
    return [
        pytest.param(masked_language_model(CORE), (tokens, tokens), id="language"),
        pytest.param(image_classifier(CORE), (zeros(1, 224, 224, 3),), id="image"),
        pytest.param(multimodal_autoencoder(CORE), scene, id="multimodal"),
    ]


@pytest.mark.parametrize(("model", "inputs"), published_sizes())
def test_one_program_without_large_constants(model, inputs):
    compiled = program(model, *inputs)
    assert compiled.count("ENTRY ") == 1
    assert largest_constant(compiled) < 2**20


def test_depth_does_not_grow_the_program():
    n_lines = set()
    for n_layers, n_shards in ((4, 2), (40, 8)):
        model = language(dataclasses.replace(CORE, n_layers=n_layers, n_shards=n_shards))
        variables = jax.eval_shape(model.init, KEY, *text())
        n_lines.add(jax.jit(model.apply).lower(variables, *text()).as_text().count("\n"))
    assert len(n_lines) == 1


def test_published_sizes_are_those_of_the_paper_and_are_drawn(tmp_path, capsys):
    main(tmp_path)
    printed = capsys.readouterr().out
    totals = [line.split()[1] for line in printed.splitlines() if line.startswith("  total")]
    assert totals == ["201,108,230", "48,440,627", "19,858,855"]  # the paper: 201M, 48.4M, 20.0M
    assert max(map(len, printed.splitlines())) <= 120
    assert "layers x26" in printed
    for name in ("language", "image", "multimodal"):
        picture = (tmp_path / f"{name}.svg").read_text()
        assert all(part in picture for part in ("encoder", "processor", "decoder"))
