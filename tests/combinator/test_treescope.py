"""Treescope, which comes with flax, shows a pipeline and its variables in a notebook."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb

treescope = pytest.importorskip("treescope", reason="flax did not bring treescope")

TOWER = cb.repeat(cb.residual(nn.LayerNorm(), nn.Dense(4)), 3)
MODEL = cb.serial(nn.Embed(9, 4), TOWER, jnp.tanh)


def test_a_pipeline_unfolds_down_to_its_layers():
    text = treescope.render_to_text(MODEL)
    kinds = ["Serial", "Embed", "Repeat", "Residual", "LayerNorm", "Dense", "Identity"]
    assert re.findall(rf"\b({'|'.join(kinds)})\(", text) == kinds
    for field in ("num_embeddings=9", "features=4", "n=3", "jax.numpy.tanh"):
        assert field in text


def test_functions_and_moves_are_shown_whole():
    text = treescope.render_to_text(cb.serial(abs, cb.dup(2), name="absolute"))
    assert " ".join(text.split()) == (
        "Serial( children=[builtins.abs, Dup(children=[], n_in=2, name=None)], name='absolute', )"
    )


def test_variables_are_shown_with_their_shapes():
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 2), int))
    text = treescope.render_to_text(variables)
    assert "'Repeat_0'" in text
    assert re.search(r"'kernel': <jax.Array float32\(3, 4, 4\)", text)
