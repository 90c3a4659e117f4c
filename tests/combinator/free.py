"""A free algebra, for pipelines that are generated over it.

Functions and layers return terms that record what was called on what, so two pipelines mean the
same exactly when their terms are equal. A layer's term tells which of its parameters it used.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra import testing


@dataclasses.dataclass(frozen=True)
class Term:
    """The output ``index`` of a call."""

    f: str
    arguments: tuple[Any, ...]
    index: int


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of ``n_in`` items that gives ``n_out``."""

    name: str
    signature: cb.Signature

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *items):
        return call(self.name, items, self.signature.n_out)


class Layer(nn.Module):
    """A linen layer of ``n_in`` items that gives ``n_out``, whose one variable is its path."""

    n_in: int = 1
    n_out: int = 1

    @property
    def signature(self) -> cb.Signature:
        return cb.Signature(self.n_in, self.n_out)

    @nn.compact
    def __call__(self, *items):
        path = self.variable("params", "path", lambda: Path(self.path)).value
        return call(f"layer {path}", items, self.n_out)


class Other(Layer):
    """A second class of layers, with names of its own."""


class Seeded(Layer):
    """A layer whose parameter is the key it was initialised with."""

    @nn.compact
    def __call__(self, *items):
        key = self.param("key", jax.random.key_data)
        return call(f"layer {np.asarray(key).tolist()}", items, self.n_out)


@dataclasses.dataclass(frozen=True)
class Path:
    """A variable's value, in tests that compute nothing."""

    parts: tuple[str, ...]


def call(name: str, items: tuple[Any, ...], n_out: int) -> Any:
    if len(items) > 4:  # a term stays small, however often it is copied
        items = (hash(items),)
    outputs = tuple(Term(name, items, index) for index in range(n_out))
    return outputs[0] if n_out == 1 else outputs


KEY = jax.random.key(0)

ARITIES = [cb.Signature(i, o) for i, o in itertools.product(range(4), range(3))]

functions = st.builds(Function, st.sampled_from("fgh"), st.sampled_from(ARITIES))
fresh_layers = st.builds(
    lambda kind, signature: kind(signature.n_in, signature.n_out),
    st.sampled_from([Layer, Other]),
    st.sampled_from(ARITIES),
)


def with_n_in(p: Any, n_in: int) -> Any:
    """The pipeline, changed to take ``n_in`` items; of none, it is given some made up."""
    if n_in == 0:
        source = Function("source", cb.Signature(0, cb.infer_signature(p).n_in))
        return cb.serial(source, p)
    return testing.with_n_in(p, n_in)


def pipelines(
    layers: st.SearchStrategy[Any] | None = None, combinators: Iterable[str] = testing.SHUFFLING
) -> st.SearchStrategy[cb.Combinator]:
    """Pipelines of functions and layers. Some layers are one instance, used more than once."""
    shared = st.shared(fresh_layers, key="free")
    leaves = st.one_of(functions, fresh_layers if layers is None else layers, shared)
    parts = testing.pipelines(leaves=leaves, combinators=combinators, max_depth=2)
    # Four levels at least, whatever the drawn parts are.
    return st.builds(
        lambda a, b, c, leaf: cb.serial(a, cb.branch(b, cb.parallel(c, cb.serial(leaf)))),
        parts,
        parts,
        parts,
        leaves,
    )


_LAYER_NUMBERS = itertools.count()


def numbered_layers() -> st.SearchStrategy[Layer]:
    """Layers with names of their own, so that moving one in the expression does not rename it."""
    return st.sampled_from(ARITIES).map(
        lambda s: Layer(s.n_in, s.n_out, name=f"layer{next(_LAYER_NUMBERS)}")
    )


def items_of(p: Any, n_extra: int = 0) -> list[str]:
    """Distinct items for a pipeline, and ``n_extra`` more beneath."""
    return [f"x{i}" for i in range(p.signature.n_in + n_extra)]


def run(p: Any, n_extra: int = 0) -> tuple[Any, Any]:
    """What a pipeline gives on its items, with ``n_extra`` more beneath, and its parameters."""
    output, variables = p.init_with_output(KEY, *items_of(p, n_extra))
    return output, jax.tree.map(lambda x: x if isinstance(x, Path) else x.tolist(), variables)
