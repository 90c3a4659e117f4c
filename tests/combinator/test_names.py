"""A layer may have any name that it may have in an ``nn.compact`` method."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ApplyScopeInvalidVariablesStructureError
from flax.traverse_util import flatten_dict

from flax_extra import combinator as cb

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


class Shift(nn.Module):
    """A layer with one parameter."""

    @nn.compact
    def __call__(self, x):
        return x + self.param("shift", nn.initializers.ones, ())


BUILDERS: dict[str, Callable[[Any], cb.Combinator]] = {
    "serial": lambda f: cb.serial(f, jnp.tanh),
    "named serial": lambda f: cb.serial(cb.serial(f, name="outer")),
    "parallel": lambda f: cb.parallel(f),
    "branch": lambda f: cb.branch(f, jnp.sin) >> cb.add(),
    "residual": lambda f: cb.residual(f),
    "shortcut": lambda f: cb.residual(jnp.sin, shortcut=f),
    "keep": lambda f: cb.keep(f) >> cb.add(),
    "dip": lambda f: cb.dup() >> cb.dip(f) >> cb.add(),
    "fold": lambda f: cb.dup() >> cb.fold(cb.add() >> f),
    "fn": lambda f: cb.fn(f),
    "typed": lambda f: cb.typed(f, "f32[2, 3] -> f32[2, 3]"),
    "repeat": lambda f: cb.repeat(f, 2),
    "shared repeat": lambda f: cb.repeat(f, 2, shared=True),
    "scan": lambda f: (
        cb.branch(lambda x: x[:, 0], cb.identity())
        >> cb.scan(cb.add() >> f >> cb.dup())
        >> cb.drop()
    ),
    "remat": lambda f: cb.remat(f),
}


def names_of_the_machinery() -> list[str]:
    """Every attribute, public or private, of every combinator, bound or not."""
    names: set[str] = set()
    for build in BUILDERS.values():
        p = build(Shift())
        for part in (p, *p, p.bind(p.init(KEY, X))):
            names |= set(dir(type(part))) | set(vars(part))
    for kind in (cb.Select, cb.Swap, cb.Concatenate, cb.Split, cb.Residual, cb.Fold):
        names |= set(dir(kind))
    return sorted(names)


NAMES = [*names_of_the_machinery(), "", "a/b", "a b", "1", "_flax_extra_adopted"]


def parameters(variables: Any) -> dict[tuple[str, ...], Any]:
    return flatten_dict(variables["params"])


def rename(path: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(name if part == "Shift_0" else part for part in path)


@pytest.mark.parametrize("kind", BUILDERS)
def test_any_name_serves(kind: str) -> None:
    plain = BUILDERS[kind](Shift())
    variables = plain.init(KEY, X)
    expected, paths = plain.apply(variables, X), list(parameters(variables))
    shift = variables["params"]
    for name in NAMES:
        p = BUILDERS[kind](Shift(name=name))
        found = jax.eval_shape(p.init, KEY, X)
        assert list(parameters(found)) == [rename(path, name) for path in paths], name
        assert jax.eval_shape(p.apply, found, X).shape == expected.shape
    p = BUILDERS[kind](Shift(name="_label"))
    found = jax.tree.unflatten(jax.tree.structure(p.init(KEY, X)), jax.tree.leaves(shift))
    np.testing.assert_array_equal(p.apply(found, X), expected)
    np.testing.assert_array_equal(p.bind(found)(X), expected)


class InCompact(nn.Module):
    """A module with attributes of its own, whose method uses a pipeline."""

    name_of_layer: str

    @property
    def label(self) -> str:
        return "a property of the user's"

    @nn.compact
    def __call__(self, x):
        return cb.serial(Shift(name=self.name_of_layer), jnp.tanh)(x)


class InSetup(nn.Module):
    name_of_layer: str

    def setup(self) -> None:
        self.body = cb.serial(Shift(name=self.name_of_layer), jnp.tanh)

    def __call__(self, x):
        return self.body(x)


@pytest.mark.parametrize("name", ["label", "path", "scope", "setup", "name_of_layer", "_state"])
def test_any_name_serves_in_other_modules(name: str) -> None:
    assert list(parameters(InCompact(name).init(KEY, X))) == [(name, "shift")]
    assert list(parameters(InSetup(name).init(KEY, X))) == [("body", name, "shift")]


def test_a_named_combinator_may_have_any_name() -> None:
    for name in NAMES:
        p = cb.serial(cb.serial(Shift(), name=name), cb.repeat(jnp.tanh, 2, name=f"{name}_"))
        found = jax.eval_shape(p.init, KEY, X)
        assert list(parameters(found)) == [(name, "Shift_0", "shift")]


def test_the_machinery_still_works_beside_such_a_layer() -> None:
    p = cb.branch(nn.Dense(3, name="_label"), nn.Dense(2, name="signature"))
    bound = p.bind(p.init(KEY, X))
    assert str(bound.signature) == "1 -> 2"
    assert bound[1](X).shape == (2, 2)
    assert p.init(KEY, X)["params"].keys() == {"_label", "signature"}


def test_a_layer_is_an_attribute_if_nothing_else_has_its_name() -> None:
    p = cb.serial(Shift(name="first"), Shift(name="keywords"))
    bound = p.bind(p.init(KEY, X))
    assert isinstance(bound.first, Shift)
    assert bound.keywords == frozenset()


TAKEN = "Two layers of one scope are called 'a': a Dense and a LayerNorm."


@pytest.mark.parametrize(
    "build",
    [
        lambda f, g: cb.serial(f, g),
        lambda f, g: cb.serial(cb.residual(f), cb.branch(g)),
        lambda f, g: cb.serial(f) >> cb.serial(g),
        lambda f, g: cb.repeat(cb.serial(f, g), 2),
        lambda f, g: cb.residual(f, shortcut=g),
    ],
)
def test_one_scope_cannot_hold_two_layers_of_one_name(build: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(TAKEN)):
        build(nn.Dense(3, name="a"), nn.LayerNorm(name="a"))


def test_one_name_serves_twice_for_one_instance_and_in_other_scopes() -> None:
    d = nn.Dense(3, name="a")
    assert list(cb.serial(d, jnp.tanh, d).init(KEY, X)["params"]) == ["a"]
    apart = cb.serial(nn.Dense(3, name="a"), cb.serial(nn.Dense(3, name="a"), name="b"))
    assert list(apart.init(KEY, X)["params"]) == ["a", "b"]
    shared = cb.serial(cb.serial(d, name="b"), d, nn.Dense(3, name="a"))
    assert list(shared.init(KEY, X)["params"]) == ["b", "a"]


def test_a_name_that_linen_reserves_is_refused() -> None:
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Shift(name="params")(x)

    with pytest.raises(ApplyScopeInvalidVariablesStructureError):
        Compact().apply(Compact().init(KEY, X), X)
    message = "Linen does not apply variables with a layer called 'params'; Shift has that name."
    with pytest.raises(ValueError, match=re.escape(message)):
        cb.serial(Shift(name="params"))


def test_a_name_is_a_string() -> None:
    with pytest.raises(TypeError, match=re.escape("is a string; Dense has name=3.")):
        cb.serial(nn.Dense(3, name=3))
