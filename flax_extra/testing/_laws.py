"""The laws of the algebra, as pairs of pipelines that must mean the same.

Each law makes its two sides from pipelines of any arity. :func:`check_laws` tries them on your
layers; the library's own tests try them on generated pipelines.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from flax_extra import combinator as cb
from flax_extra.combinator._core.describe import describe_stack, shorten
from flax_extra.combinator._core.expression import format_expression
from flax_extra.combinator._core.stack import flatten
from flax_extra.testing import _errors
from flax_extra.testing._inputs import inputs_for
from flax_extra.testing._search import search

Pipeline: TypeAlias = cb.Combinator
Sides: TypeAlias = Iterator[tuple[Pipeline, Pipeline]]


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of the algebra.

    Attributes:
        name: the law in words.
        n: how many pipelines it is about.
        sides: makes the pairs of pipelines that must mean the same.
        arrange: changes the pipelines so that each finds its inputs, if the law puts them together
            and one stack holds the inputs of all.

    Example:
        >>> from flax_extra import combinator as cb, testing
        >>> law = testing.LAWS[0]
        >>> law.name, law.n
        ('identity is neutral', 1)
        >>> for left, right in law.sides(cb.serial(abs)):
        ...     testing.assert_same_meaning(left, right, -1, law=law.name)
    """

    name: str
    n: int
    sides: Callable[..., Sides]
    arrange: Callable[..., tuple[Pipeline, ...]]


def arrange_in_series(*fs: Pipeline) -> tuple[Pipeline, ...]:
    """Lets each work beneath the outputs of those before it."""
    given = itertools.accumulate((f.signature.n_out for f in fs), initial=0)
    return tuple(cb.dip(f, n) if n else f for f, n in zip(fs, given, strict=False))


def arrange_in_parallel(*fs: Pipeline) -> tuple[Pipeline, ...]:
    """Leaves each as it is: it takes the next span."""
    return fs


def arrange_in_branch(*fs: Pipeline) -> tuple[Pipeline, ...]:
    """Lets each first drop the inputs of those before it."""
    taken = itertools.accumulate((f.signature.n_in for f in fs), initial=0)
    return tuple(cb.drop(n) >> f if n else f for f, n in zip(fs, taken, strict=False))


def identity_is_neutral(p: Pipeline) -> Sides:
    """Passing items through, before or after, changes nothing."""
    yield cb.identity(p.signature.n_in) >> p, p
    yield p >> cb.identity(p.signature.n_out), p
    yield cb.serial() >> p, p
    yield p @ cb.serial(), p


def serial_is_associative(p: Pipeline, q: Pipeline, r: Pipeline) -> Sides:
    """Grouping does not matter in series."""
    yield cb.serial(p, cb.serial(q, r)), cb.serial(cb.serial(p, q), r)
    yield cb.serial(p, cb.serial(q, r)), cb.serial(p, q, r)
    yield cb.serial(p, q, r), p >> q >> r


def parallel_is_associative(p: Pipeline, q: Pipeline, r: Pipeline) -> Sides:
    """Grouping does not matter in parallel."""
    yield cb.parallel(p, cb.parallel(q, r)), cb.parallel(cb.parallel(p, q), r)
    yield cb.parallel(p, q, r), p @ q @ r


def branch_is_associative(p: Pipeline, q: Pipeline, r: Pipeline) -> Sides:
    """Grouping does not matter in a branch."""
    yield cb.branch(p, cb.branch(q, r)), cb.branch(cb.branch(p, q), r)
    yield cb.branch(p, q, r), p & q & r


def branch_is_select_then_parallel(*fs: Pipeline) -> Sides:
    """A branch copies the top of the stack for each child."""
    spans = [i for f in fs for i in range(f.signature.n_in)]
    n_in = max(f.signature.n_in for f in fs)
    yield cb.branch(*fs), cb.select(spans, n_in=n_in) >> cb.parallel(*fs)


def dip_is_parallel_under_identity(p: Pipeline) -> Sides:
    """Dip leaves the top alone."""
    for n in range(4 if p.signature.n_in else 1):
        on_top = cb.select([0] * n, n_in=0)
        yield on_top >> cb.dip(p, n), on_top >> (cb.identity(n) @ p)


def keep_gives_inputs_again(p: Pipeline) -> Sides:
    """Keep keeps the last inputs."""
    n_in = p.signature.n_in
    for n in range(n_in + 1):
        yield cb.keep(p, n), cb.branch(p, cb.select(range(n_in - n, n_in), n_in=n_in))


def a_copy_can_be_dropped(p: Pipeline) -> Sides:
    """Copying and dropping, or swapping twice, changes nothing."""
    n_in = p.signature.n_in
    yield cb.dup(n_in) >> cb.drop(n_in) >> p, p
    if n_in > 1:
        yield cb.swap() >> cb.swap() >> p, p


def a_pipeline_is_its_parts(p: Pipeline, q: Pipeline) -> Sides:
    """The slices of a pipeline, put together again, are the pipeline."""
    whole = cb.serial(p, q)
    yield cb.serial(*whole), whole
    for cut in range(len(whole) + 1):
        yield whole[:cut] >> whole[cut:], whole


LAWS = (
    Law("identity is neutral", 1, identity_is_neutral, arrange_in_series),
    Law("serial is associative", 3, serial_is_associative, arrange_in_series),
    Law("parallel is associative", 3, parallel_is_associative, arrange_in_parallel),
    Law("branch is associative", 3, branch_is_associative, arrange_in_branch),
    Law("branch is select, then parallel", 3, branch_is_select_then_parallel, arrange_in_branch),
    Law("dip is parallel under identity", 1, dip_is_parallel_under_identity, arrange_in_series),
    Law("keep gives inputs again", 1, keep_gives_inputs_again, arrange_in_series),
    Law("a copy can be dropped", 1, a_copy_can_be_dropped, arrange_in_series),
    Law("a pipeline is its parts", 2, a_pipeline_is_its_parts, arrange_in_series),
)


def check_laws(*layers: Callable[..., Any], max_examples: int = 3) -> None:
    """Checks that the laws of the algebra hold for pipelines made of given layers.

    The two sides of a law have the same signature, the same variables and, from the same key, the
    same initial values and outputs, bit by bit. The inputs are drawn by :func:`inputs_for`.

    Args:
        layers: linen modules, functions or combinators. A law about more pipelines than there are
            layers uses some of them twice: one instance, with one set of parameters.
        max_examples: how many inputs are drawn for each law.

    Returns:
        None.

    Raises:
        AssertionError: If a law does not hold. It shows both sides, and what differs.
        SignatureError: If a layer gives another number of items than its signature says.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import testing
        >>> testing.check_laws(nn.Dense(4), nn.LayerNorm(), max_examples=1)
    """
    for law in LAWS:
        chosen = list(itertools.islice(itertools.cycle(layers), law.n if layers else 0))
        if chosen:
            inputs = st.tuples(*map(inputs_for, chosen))
            search(inputs, _Trial(law, chosen), max_examples)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """Tries a law on layers, with inputs for each."""

    law: Law
    layers: list[Callable[..., Any]]

    def __call__(self, inputs: tuple[Any, ...]) -> None:
        pipelines = [f if isinstance(f, cb.Combinator) else cb.serial(f) for f in self.layers]
        for left, right in self.law.sides(*self.law.arrange(*pipelines)):
            assert_same_meaning(left, right, *flatten(inputs), law=self.law.name)


def assert_same_meaning(
    p: cb.Combinator, q: cb.Combinator, *inputs: Any, law: str = "The equation"
) -> None:
    """Asserts that two pipelines mean the same: outputs, variables and initial values.

    Args:
        p: a pipeline.
        q: another.
        inputs: a stack that both are called with. Items that they do not take must pass through.
        law: the name of the law, for the message.

    Returns:
        None.

    Raises:
        AssertionError: If their signatures, their variables or their outputs differ in any bit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb, testing
        >>> testing.assert_same_meaning(cb.swap() >> cb.swap(), cb.identity(2), 1, 2)
        >>> testing.assert_same_meaning(cb.sub(), cb.swap() >> cb.sub(), 5, 3)
        Traceback (most recent call last):
            ...
        AssertionError: The equation does not hold: the two sides differ in what they give.
          left:  sub()
            2
          right: serial(swap(), sub())
            -2
    """
    texts = shorten(format_expression(p)), shorten(format_expression(q))
    if p.signature != q.signature:
        a, b = str(p.signature), str(q.signature)
        raise _errors.broken_law(law, texts[0], texts[1], "their signatures", a, b)
    key = jax.random.key(0)
    ours, our_variables = p.init_with_output(key, *inputs)
    theirs, their_variables = q.init_with_output(key, *inputs)
    if not _is_equal(our_variables, their_variables):
        a, b = _describe_variables(our_variables), _describe_variables(their_variables)
        raise _errors.broken_law(law, texts[0], texts[1], "their variables", a, b)
    if not _is_equal(ours, theirs):
        a, b = (describe_stack(flatten(output)) for output in (ours, theirs))
        raise _errors.broken_law(law, texts[0], texts[1], "what they give", a, b)


def _is_equal(a: Any, b: Any) -> bool:
    trees: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    same_tree = bool(trees[0] == trees[1])
    return same_tree and all(map(_is_same, jax.tree.leaves(a), jax.tree.leaves(b)))


def _is_same(a: Any, b: Any) -> bool:
    if not (hasattr(a, "shape") and hasattr(b, "shape")):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    return a.tobytes() == b.tobytes() or np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")


def _describe_variables(variables: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    named = (
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {describe_stack([leaf])}"
        for path, leaf in leaves
    )
    return ", ".join(named) or "none"
