"""Generated pipelines over a free algebra.

Functions and layers return terms that record what was called on what, so two pipelines mean the
same exactly when their terms are equal. A layer's term tells which of its parameters it used.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from hypothesis import strategies as st

from flax_extra import combinator as cb


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


def one_output(p: Any) -> cb.Combinator:
    """The pipeline, with its outputs merged into one, or one made up."""
    n_out = cb.infer_signature(p).n_out
    return cb.serial(p, Function("merge", cb.Signature(n_out, 1)))


def with_n_in(p: Any, n_in: int) -> cb.Combinator:
    """The pipeline, changed to take ``n_in`` items."""
    taken = cb.infer_signature(p).n_in
    if n_in >= taken:
        return cb.parallel(p, cb.identity(n_in - taken))
    if n_in == 0:
        return cb.serial(Function("source", cb.Signature(0, taken)), p)
    return cb.serial(cb.select([i % n_in for i in range(taken)], n_in=n_in), p)


def not_growing(p: Any) -> cb.Combinator:
    """The pipeline, without the outputs that are more than its inputs."""
    signature = cb.infer_signature(p)
    surplus = max(0, signature.n_out - signature.n_in)
    return cb.serial(p, cb.drop(surplus)) if surplus else cb.serial(p)


def _several(build: Callable[..., Any]) -> Callable[..., Any]:
    return lambda parts: build(*parts)


def _extend(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(parts, max_size=4)
    small = st.integers(0, 3)
    return st.one_of(
        several.map(_several(cb.serial)),
        several.map(_several(cb.parallel)),
        several.map(_several(cb.branch)),
        st.tuples(parts, parts).map(lambda fg: cb.fn(fg[0]) >> fg[1]),
        st.tuples(parts, parts).map(lambda fg: cb.fn(fg[0]) @ fg[1]),
        st.tuples(parts, parts).map(lambda fg: cb.fn(fg[0]) & fg[1]),
        st.tuples(parts, parts).map(
            lambda fg: cb.serial(cb.branch(one_output(fg[0]), one_output(fg[1])), _merge(2))
        ),
        st.tuples(parts, small).map(
            lambda fn: cb.keep(fn[0], min(fn[1], cb.infer_signature(fn[0]).n_in))
        ),
        st.tuples(parts, small).map(lambda fn: cb.dip(*fn)),
    )


def _merge(n_in: int) -> Function:
    return Function("merge", cb.Signature(n_in, 1))


shuffles = st.one_of(
    st.builds(cb.identity, st.integers(0, 3)),
    st.builds(cb.dup, st.integers(0, 2)),
    st.builds(cb.drop, st.integers(0, 2)),
    st.just(cb.swap()),
    st.builds(
        lambda indices, n_in: cb.select(indices, n_in=n_in),
        st.lists(st.integers(0, 4), max_size=4),
        st.none() | st.integers(0, 5),
    ),
)

folds = st.builds(
    lambda name, n: cb.fold(Function(name, cb.Signature(2, 1)), n),
    st.sampled_from("fg"),
    st.integers(1, 3),
)


@st.composite
def pipelines(draw: st.DrawFn, layers: st.SearchStrategy[Any] | None = None, max_leaves: int = 6):
    """A pipeline of functions and layers. Some layers are one instance, used more than once."""
    shared = draw(st.lists(fresh_layers, min_size=1, max_size=2))
    leaves = st.one_of(
        functions,
        layers if layers is not None else fresh_layers,
        st.sampled_from(shared),
        shuffles,
        folds,
    )
    expressions = st.recursive(leaves, _extend, max_leaves=max_leaves)
    # Four levels at least, whatever the drawn parts are.
    a, b, c = draw(expressions), draw(expressions), draw(expressions)
    return cb.serial(a, cb.branch(b, cb.parallel(c, cb.serial(draw(leaves)))))


def numbered_layers() -> st.SearchStrategy[Layer]:
    """Layers with names of their own, so that moving one in the expression does not rename it."""
    counter = itertools.count()
    return st.sampled_from(ARITIES).map(
        lambda s: Layer(s.n_in, s.n_out, name=f"layer{next(counter)}")
    )


def run(p: Any, n_extra: int = 0) -> tuple[Any, Any]:
    """What a pipeline gives on distinct items, with ``n_extra`` more beneath, and its parameters."""
    items = [f"x{i}" for i in range(p.signature.n_in + n_extra)]
    output, variables = p.init_with_output(KEY, *items)
    return output, jax.tree.map(lambda x: x if isinstance(x, Path) else x.tolist(), variables)
