"""What every public layer says of its shapes is what it does, for every batch and length."""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Any

import jax.numpy as jnp
import pytest
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from tests.layer.entries import SETTINGS

NAMESPACE = {"xn": xn, "io": xn.io, "nn": nn, "jnp": jnp, "partial": partial}
STATED = re.compile(r"\n\s*Shapes:\n\s+``(?P<layer>.+?)``:\s+``(?P<shapes>.+?)``\n", re.DOTALL)
PUBLIC: dict[str, Any] = {
    **{name: getattr(xn, name) for name in xn.__all__ if callable(getattr(xn, name))},
    **{f"io.{name}": member for name, member in vars(xn.io).items() if name in xn.io.__all__},
}
LAYERS = {
    name: member
    for name, member in PUBLIC.items()
    if inspect.getdoc(member) and name not in SETTINGS
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_stated_shapes_are_what_is_computed(name: str) -> None:
    stated = STATED.search(LAYERS[name].__doc__)
    assert stated is not None, f"{name} does not state its shapes"
    layer = eval(" ".join(stated["layer"].split()), NAMESPACE)
    shapes = " ".join(stated["shapes"].split())
    declared = cb.ShapeSignature.parse(shapes)
    assert str(cb.shape_signature(layer, *declared.inputs)) == shapes
