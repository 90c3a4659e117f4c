"""Strategies: signatures, functions that have them, and pipelines of such functions and layers.

Pipelines are built so that arities fit, and so that each item keeps the shape and dtype of the
inputs. No draw is rejected: ``identity``, ``select`` and ``drop`` around a part make it fit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from hypothesis import strategies as st
from jax import Array

from flax_extra import combinator as cb
from flax_extra.combinator._core.signature import Nesting
from flax_extra.combinator._core.stack import flatten, unwrap_stack
from flax_extra.testing import _errors
from flax_extra.testing._inputs import SHAPE

Part: TypeAlias = Callable[..., Any]
Parts: TypeAlias = st.SearchStrategy[Any]

TIME = 1
"""The default axis of ``scan``."""


def signatures(
    *,
    min_n_in: int = 0,
    max_n_in: int = 3,
    min_n_out: int = 0,
    max_n_out: int = 2,
    grouped: bool = False,
) -> st.SearchStrategy[cb.Signature]:
    """Draws signatures of callables.

    Args:
        min_n_in: the least number of items that they take.
        max_n_in: the largest.
        min_n_out: the least number of items that they give.
        max_n_out: the largest.
        grouped: whether some of the arguments are tuples of items.

    Returns:
        A strategy of signatures, which shrinks to the smallest numbers.

    Raises:
        InvalidArgument: If a range is empty.

    Example:
        >>> from flax_extra import combinator as cb, testing
        >>> from hypothesis import given, settings
        >>> @settings(deadline=None)
        ... @given(testing.signatures(max_n_in=2))
        ... def test_what_is_declared_is_inferred(signature):
        ...     assert cb.infer_signature(cb.fn(max, signature.n_in, 1)).n_in == signature.n_in
        >>> test_what_is_declared_is_inferred()
    """
    for name, least, most in (("n_in", min_n_in, max_n_in), ("n_out", min_n_out, max_n_out)):
        if not 0 <= least <= most:
            raise _errors.empty_range("signatures", name, least, most)
    n_in, n_out = st.integers(min_n_in, max_n_in), st.integers(min_n_out, max_n_out)
    if not grouped:
        return st.builds(cb.Signature, n_in, n_out)
    nested = n_in.flatmap(lambda n: st.tuples(st.just(n), _nestings(n)))
    return st.builds(
        lambda taken, n_out: cb.Signature(taken[0], n_out, in_shape=taken[1]), nested, n_out
    )


@st.composite
def _nestings(draw: st.DrawFn, n: int) -> Nesting:
    """Draws groupings of ``n`` items into arguments."""
    arguments: list[Nesting] = []
    while n:
        size = draw(st.integers(1, n))
        arguments.append(() if size == 1 else draw(_nestings(size)))
        n -= size
    return tuple(arguments)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of arrays that all have one shape. See :func:`functions`.

    Example:
        >>> from flax_extra import combinator as cb, testing
        >>> testing.Function(cb.Signature(2, 1), seed=0)
        Function(2 -> 1, seed=0)
    """

    signature: cb.Signature
    seed: int = 0
    shape: tuple[int, ...] = SHAPE

    def __call__(self, *arguments: Any) -> Any:
        """Returns sines of weighted sums of the items: another order gives another result."""
        return unwrap_stack(
            tuple(map(self._output(flatten(arguments)), range(self.signature.n_out)))
        )

    def _output(self, items: tuple[Array, ...]) -> Callable[[int], Array]:
        def output(index: int) -> Array:
            total = jnp.zeros(items[0].shape if items else self.shape, jnp.float32)
            for position, item in enumerate(items):
                total = total + item * (1 + (7 * self.seed + 3 * index + position) % 5) / 4
            return jnp.sin(total + (self.seed + index))

        return output

    def __repr__(self) -> str:
        return f"Function({self.signature}, seed={self.seed})"


def functions(
    signature: cb.Signature, *, shape: tuple[int, ...] = SHAPE
) -> st.SearchStrategy[Function]:
    """Draws elementwise functions with a given signature, of arrays of one shape.

    Their outputs depend on the order of the items, so that a misplaced item shows.

    Args:
        signature: how many items they take, how these are grouped, and how many they give.
        shape: the shape of the outputs of a function without inputs.

    Returns:
        A strategy of functions.

    Raises:
        InvalidArgument: If ``signature`` is not a signature, or ``shape`` is not a shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import combinator as cb, testing
        >>> from hypothesis import given, settings
        >>> @settings(deadline=None)
        ... @given(testing.functions(cb.Signature(1, 1)), testing.functions(cb.Signature(1, 1)))
        ... def test_residual_adds(f, shortcut):
        ...     x = jnp.linspace(0, 1, 3)
        ...     assert (cb.residual(f, shortcut=shortcut)(x) == f(x) + shortcut(x)).all()
        >>> test_residual_adds()
    """
    if not isinstance(signature, cb.Signature):
        raise _errors.not_a_signature("functions", type(signature).__name__)
    _check_shape("functions", shape)
    return st.builds(Function, st.just(signature), st.integers(0, 20), st.just(tuple(shape)))


def pipelines(
    *,
    leaves: Iterable[Part] | st.SearchStrategy[Part] | None = None,
    combinators: Iterable[str] | None = None,
    shape: tuple[int, ...] = SHAPE,
    max_depth: int = 3,
) -> st.SearchStrategy[cb.Combinator]:
    """Draws pipelines whose arities fit. They shrink towards ``identity()``.

    All items have one shape, and every step keeps it, so that each pipeline runs on the inputs of
    :func:`inputs_for`. One layer may be used in several places.

    Args:
        leaves: the callables to build from, or a strategy of them. Their outputs must have the
            shape and dtype of their inputs. In a ``scan`` or a ``vmap``, items have one axis less,
            which is not the last. The default leaves are functions, Dense, LayerNorm and Dropout.
        combinators: the names of the combinators to build with; all by default. If the items are
            no arrays, use those that only move items: ``SHUFFLING``.
        shape: the shape of the items. ``scan`` and ``hold`` need three axes, and ``vmap`` two.
        max_depth: how many levels a pipeline has, at most.

    Returns:
        A strategy of combinators.

    Raises:
        InvalidArgument: If there are no leaves, a combinator is not known, or the shape is not one
            of arrays, or has too few axes for ``scan`` or ``hold``.

    Example:
        >>> from flax_extra import combinator as cb, testing
        >>> from hypothesis import given, settings, strategies as st
        >>> @settings(max_examples=10, deadline=None)
        ... @given(testing.pipelines(), st.data())
        ... def test_dip_leaves_the_top_alone(p, data):
        ...     top, *beneath = data.draw(testing.inputs_for(cb.dip(p)))
        ...     shapes = cb.shape_signature(cb.dip(p), top, *beneath)
        ...     assert shapes.outputs[0].shape == top.shape
        >>> test_dip_leaves_the_top_alone()
    """
    _check_shape("pipelines", shape)
    if max_depth < 0:
        raise _errors.empty_range("pipelines", "levels", 0, max_depth)
    allowed = _allowed(combinators, shape)
    chosen = _leaves(leaves)
    return _Grammar(chosen, allowed, tuple(shape), max_depth).parts().map(_as_pipeline)


def _leaves(leaves: Iterable[Part] | Parts | None) -> Callable[[tuple[int, ...]], Parts]:
    if leaves is None:
        return functools.partial(_built_in, f"flax_extra.testing {next(_COUNTER)}")
    if isinstance(leaves, st.SearchStrategy):
        given = leaves
    elif isinstance(leaves, Iterable) and not isinstance(leaves, cb.Combinator | str):
        several = list(leaves)
        if not several:
            raise _errors.no_leaves("pipelines")
        for leaf in several:
            if not callable(leaf):
                raise _errors.not_leaves("pipelines", repr(leaf))
        given = st.sampled_from(several)
    else:
        raise _errors.not_leaves("pipelines", repr(leaves))
    return lambda shape: given


_COUNTER = iter(range(1_000_000_000))


def _built_in(key: str, shape: tuple[int, ...]) -> Parts:
    """Draws functions and layers that keep a shape. One layer is the same instance everywhere."""
    layers = st.one_of(
        st.builds(nn.Dense, st.just(shape[-1])),
        st.builds(nn.LayerNorm),
        st.builds(nn.Dropout, st.just(0.5), deterministic=st.just(True)),
    )
    return st.one_of(
        layers,
        st.shared(layers, key=key),
        signatures().flatmap(functools.partial(functions, shape=shape)),
        st.sampled_from([jnp.tanh, jnp.maximum]),
    )


def _allowed(combinators: Iterable[str] | None, shape: tuple[int, ...]) -> frozenset[str]:
    if combinators is None:
        return _drop_too_deep(COMBINATORS, shape)
    asked = frozenset(combinators)
    if asked - COMBINATORS:
        raise _errors.unknown_combinators("pipelines", asked - COMBINATORS, COMBINATORS)
    if asked - _drop_too_deep(asked, shape):
        name = max(asked - _drop_too_deep(asked, shape))
        raise _errors.too_few_axes("pipelines", name, LEAST_AXES[name], shape)
    return asked


LEAST_AXES = {"scan": TIME + 2, "hold": TIME + 2, "vmap": 2}
"""How many axes items need if their combinator takes one away: one more if it is time."""


def _drop_too_deep(names: frozenset[str], shape: tuple[int, ...]) -> frozenset[str]:
    """Returns the combinators that items of this shape have enough axes for."""
    return frozenset(name for name in names if LEAST_AXES.get(name, 0) <= len(shape))


def _check_shape(asked: str, shape: object) -> None:
    is_shape = isinstance(shape, tuple | list) and all(isinstance(s, int) and s > 0 for s in shape)
    if not is_shape or not shape:
        raise _errors.wrong_shape(asked, shape)


def _as_pipeline(part: Part) -> cb.Combinator:
    return part if isinstance(part, cb.Combinator) else cb.serial(part)


@dataclasses.dataclass(frozen=True)
class _Grammar:
    """The parts of pipelines whose items have one shape."""

    leaves: Callable[[tuple[int, ...]], Parts]
    allowed: frozenset[str]
    shape: tuple[int, ...]
    max_depth: int

    def parts(self) -> Parts:
        """Draws pipelines and bare leaves."""
        return _parts(self)

    @functools.cached_property
    def bases(self) -> Parts:
        """Parts without children."""
        single = [LEAVES[name](self) for name in LEAVES if name in self.allowed]
        several = [_one_of(single)] if single else []
        return _one_of([st.just(cb.identity()), self.leaves(self.shape), *several])

    @functools.cached_property
    def grown(self) -> Parts | None:
        """Parts with children of one level less; None if no level is left."""
        names = [name for name in GROWN if name in self.allowed]
        if not names or not self.max_depth:
            return None
        inner = dataclasses.replace(self, max_depth=self.max_depth - 1)
        return _one_of([GROWN[name](inner) for name in names])

    def without_axis(self, axis: int) -> _Grammar:
        """Returns the grammar of a cell or a member, whose items do not have an axis."""
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        allowed = _drop_too_deep(self.allowed, shape)
        return dataclasses.replace(self, shape=shape, allowed=allowed)


@st.composite
def _parts(draw: st.DrawFn, grammar: _Grammar) -> Part:
    # One strategy for all levels, so that a part can shrink to a part of its own.
    if grammar.grown is None or draw(st.integers(0, 3)) == 0:
        part: Part = draw(grammar.bases)
    else:
        part = draw(grammar.grown)
    return part


def _one_of(strategies: list[Parts]) -> Parts:
    """Draws from one of several strategies, each with the same probability."""
    return st.sampled_from(range(len(strategies))).flatmap(strategies.__getitem__)


# Combinators without children


def _selects(grammar: _Grammar) -> Parts:
    indices = st.lists(st.integers(0, 4), max_size=4)
    return st.builds(
        lambda indices, n_in: cb.select(indices, n_in=n_in), indices, st.none() | st.integers(0, 5)
    )


def _wires(grammar: _Grammar) -> Parts:
    def build(n: int, indices: list[int]) -> Part:
        names = [f"x{index}" for index in range(n)]
        outputs = [names[index % n] for index in indices] if n else []
        return cb.wire(" ".join([*names, "->", *outputs]))

    return st.builds(build, st.integers(0, 4), st.lists(st.integers(0, 3), max_size=4))


def _build_counted(
    build: Callable[[int], Part], least: int, most: int
) -> Callable[[_Grammar], Parts]:
    return lambda grammar: st.integers(least, most).map(build)


def _concatenate_then_split(grammar: _Grammar) -> Parts:
    """Concatenates and splits again, so that the shape stays."""
    numbers = st.integers(1, 3 if "split" in grammar.allowed else 1)

    def build(axis: int, n: int) -> Part:
        joined = cb.concatenate(axis, n_in=n)
        return joined >> cb.split(n, axis) if n > 1 else joined

    return st.builds(build, _axes(grammar), numbers)


def _split_then_concatenate(grammar: _Grammar) -> Parts:
    def build(axis: int, n: int) -> Part:
        if n == 1 or grammar.shape[axis] % n or "concatenate" not in grammar.allowed:
            return cb.split(1, axis)
        return cb.split(n, axis) >> cb.concatenate(axis, n_in=n)

    return st.builds(build, _axes(grammar), st.integers(1, 4))


def _axes(grammar: _Grammar) -> st.SearchStrategy[int]:
    return st.integers(-len(grammar.shape), -1)


LEAVES: Mapping[str, Callable[[_Grammar], Parts]] = {
    "identity": _build_counted(cb.identity, 0, 3),
    "dup": _build_counted(cb.dup, 0, 2),
    "drop": _build_counted(cb.drop, 0, 2),
    "swap": lambda grammar: st.builds(cb.swap),
    "select": _selects,
    "wire": _wires,
    "add": _build_counted(cb.add, 1, 3),
    "sub": _build_counted(cb.sub, 1, 3),
    "mul": _build_counted(cb.mul, 1, 3),
    "div": _build_counted(cb.div, 1, 3),
    "concatenate": _concatenate_then_split,
    "split": _split_then_concatenate,
}
"""Strategies for combinators without children, by name."""


# Combinators with children, which the grammar draws


def _build_from_several(build: Callable[..., Part]) -> Callable[[_Grammar], Parts]:
    return lambda grammar: st.lists(grammar.parts(), max_size=3).map(build)


def _residuals(grammar: _Grammar) -> Parts:
    one_output = st.builds(with_one_output, grammar.parts())
    return st.builds(
        lambda body, shortcut: cb.residual(body, shortcut=shortcut),
        one_output,
        st.just(cb.identity()) | one_output,
    )


def _keeps(grammar: _Grammar) -> Parts:
    def build(f: Part, n: int) -> Part:
        return cb.keep(f, min(n, cb.infer_signature(f).n_in))

    return st.builds(build, grammar.parts(), st.integers(0, 3))


def _dips(grammar: _Grammar) -> Parts:
    return st.builds(cb.dip, grammar.parts(), st.integers(0, 2))


def _folds(grammar: _Grammar) -> Parts:
    def binary(f: Part) -> Part:
        return with_one_output(with_n_in(with_one_output(f), 2))

    simplest = st.just(cb.select((0,), n_in=2))
    return st.builds(cb.fold, simplest | st.builds(binary, grammar.parts()), st.integers(1, 3))


def _fns(grammar: _Grammar) -> Parts:
    def build(f: Part, declared: bool) -> Part:
        signature = cb.infer_signature(f)
        return cb.fn(f, n_in=signature.n_in, n_out=signature.n_out) if declared else cb.fn(f)

    return st.builds(build, grammar.parts(), st.booleans())


def _repeats(grammar: _Grammar) -> Parts:
    def build(f: Part, n: int, n_carry: int | None, shared: bool, remat: bool) -> Part:
        body = not_growing(f) if n_carry is None else f
        # Copies that have parameters of their own cannot share a layer with what is outside.
        if not shared:
            (body,) = copy.deepcopy(cb.serial([body]))
        if n_carry is None:
            return cb.repeat(body, n, shared=shared, remat=remat)
        signature = cb.infer_signature(body)
        n_carry = min(n_carry, signature.n_in, signature.n_out)
        entries = [cb.fn(spread, n=n)] * (signature.n_in - n_carry)
        sums = [add_up] * (signature.n_out - n_carry)
        return cb.serial(
            cb.parallel(cb.identity(n_carry), entries),
            cb.repeat(body, n, n_carry=n_carry, shared=shared, remat=remat),
            cb.parallel(cb.identity(n_carry), sums),
        )

    return st.builds(
        build,
        grammar.parts(),
        st.integers(0, 3),
        st.none() | st.integers(0, 2),
        st.booleans(),
        st.booleans(),
    )


def _scans(grammar: _Grammar) -> Parts:
    def build(f: Part, reverse: bool) -> Part:
        cell = _as_cell(f)
        started = cb.parallel(first_step, cb.identity(cell.signature.n_in - 1))
        return started >> cb.scan(cell, n_carry=1, reverse=reverse, axis=TIME) >> cb.drop()

    return st.builds(build, grammar.without_axis(TIME).parts(), st.booleans())


def _conds(grammar: _Grammar) -> Parts:
    def build(f: Part, g: Part) -> Part:
        branches = _with_common_arity([f, g])
        return _choose_by(is_large, cb.cond(*branches))

    return st.builds(build, grammar.parts(), grammar.parts())


def _switches(grammar: _Grammar) -> Parts:
    def build(fs: list[Part]) -> Part:
        choose = cb.fn(count_large, most=len(fs) - 1)
        return _choose_by(choose, cb.switch(_with_common_arity(fs)))

    return st.lists(grammar.parts(), min_size=1, max_size=3).map(build)


def _choose_by(f: Part, choice: cb.Combinator) -> Part:
    """Computes what chooses from the item on top, so that all items are arrays of one shape."""
    return cb.parallel(f, cb.identity(choice.signature.n_in - 1)) >> choice


def _with_common_arity(fs: list[Part]) -> list[Part]:
    """Changes callables to take and to give the same number of items."""
    n_in = max(1, *(cb.infer_signature(f).n_in for f in fs))
    fs = [with_n_in(f, n_in) for f in fs]
    n_out = min(cb.infer_signature(f).n_out for f in fs)
    return [f if cb.infer_signature(f).n_out == n_out else _cut(f, n_out) for f in fs]


def _cut(f: Part, n_out: int) -> Part:
    """Changes a callable to give its first ``n_out`` items alone."""
    return cb.serial(f, cb.select(range(n_out), n_in=cb.infer_signature(f).n_out))


@st.composite
def _vmaps(draw: st.DrawFn, grammar: _Grammar) -> Part:
    axis = draw(st.integers(0, len(grammar.shape) - 2))
    f, shared = draw(grammar.without_axis(axis).parts()), draw(st.booleans())
    # Members that have parameters of their own cannot share a layer with what is outside.
    if not shared:
        (f,) = copy.deepcopy(cb.serial([f]))
    return cb.vmap(f, axis, shared=shared, n=grammar.shape[axis])


def _holds(grammar: _Grammar) -> Parts:
    """Holds recurrent cells, so that the result runs block by block."""

    def build(f: Part) -> Part:
        return cb.hold(cb.scan(_as_cell(f), n_carry=1, axis=TIME), first_step, axis=TIME)

    return st.builds(build, grammar.without_axis(TIME).parts())


def _as_cell(f: Part) -> cb.Combinator:
    """Makes a cell with one item of carry."""
    missing = max(0, 2 - cb.infer_signature(f).n_in)
    cell: cb.Combinator = cb.parallel(f, cb.identity(missing)) if missing else cb.fn(f)
    return cell if cell.signature.n_out else cell @ cb.identity()


GROWN: Mapping[str, Callable[[_Grammar], Parts]] = {
    "serial": _build_from_several(cb.serial),
    "parallel": _build_from_several(cb.parallel),
    "branch": _build_from_several(cb.branch),
    "keep": _keeps,
    "dip": _dips,
    "fn": _fns,
    "residual": _residuals,
    "fold": _folds,
    "repeat": _repeats,
    "scan": _scans,
    "hold": _holds,
    "remat": lambda grammar: st.builds(cb.remat, grammar.parts()),
    "cond": _conds,
    "switch": _switches,
    "vmap": _vmaps,
}
"""Strategies for combinators with children, by name."""

COMBINATORS = frozenset(LEAVES) | frozenset(GROWN)
"""The combinators that pipelines are built with."""

MOVING = frozenset({"identity", "dup", "drop", "swap", "select", "wire"})
SHUFFLING = MOVING | {"serial", "parallel", "branch", "keep", "dip", "fn", "fold"}
"""The combinators that only move items, whatever the items are."""


# Making parts fit


def first_step(x: Array) -> Array:
    """Returns the items at the first step, as the initial carry of a scan."""
    return x[:, 0]


def spread(x: Array, n: int) -> Array:
    """Returns ``n`` multiples of an item on a new leading axis, one for each copy."""
    multiples = 1 + jnp.arange(n, dtype=x.dtype) / 4
    return jnp.expand_dims(multiples, range(1, 1 + x.ndim)) * x[None]


def add_up(y: Array) -> Array:
    """Returns the sum of the entries on the leading axis."""
    return y.sum(0)


LARGE = 0.1234
"""No number that a program rounds in two ways is likely to be on two sides of it."""


def is_large(x: Array) -> Array:
    """Returns whether the first number of an item is large."""
    return x.ravel()[0] > LARGE


def count_large(x: Array, most: int = 2) -> Array:
    """Counts the large numbers among the first and the last of an item, up to the most."""
    ends = x.ravel()[jnp.array([0, -1])]
    return jnp.minimum((ends > LARGE).sum(), most)


def with_one_output(f: Part) -> Part:
    """Changes a callable to give one item: the top one, or an input if it gives none.

    Args:
        f: any callable with a signature.

    Returns:
        ``f`` itself, or a pipeline of it.

    Example:
        >>> from flax_extra import combinator as cb, testing
        >>> print(testing.with_one_output(cb.dup()), testing.with_one_output(abs))
        serial(dup(), select((0,), n_in=2)) <built-in function abs>
    """
    n_out = cb.infer_signature(f).n_out
    if n_out == 0:
        return cb.parallel(f, cb.identity())
    return f if n_out == 1 else cb.serial(f, cb.select((0,), n_in=n_out))


def with_n_in(f: Part, n_in: int) -> Part:
    """Changes a callable to take ``n_in`` items: it uses some twice, or passes some through.

    Args:
        f: any callable with a signature.
        n_in: how many items, at least 1.

    Returns:
        ``f`` itself, or a pipeline of it.

    Raises:
        InvalidArgument: If ``n_in`` is below 1.

    Example:
        >>> from flax_extra import combinator as cb, testing
        >>> testing.with_n_in(cb.sub(3), 2)(10, 4), testing.with_n_in(cb.add(1), 2)(10, 4)
        (-4, (10, 4))
    """
    if n_in < 1:
        raise _errors.too_few("with_n_in", n_in)
    taken = cb.infer_signature(f).n_in
    if n_in > taken:
        return cb.parallel(f, cb.identity(n_in - taken))
    return f if n_in == taken else cb.select([i % n_in for i in range(taken)], n_in=n_in) >> f


def not_growing(f: Part) -> Part:
    """Changes a callable to give at most as many items as it takes."""
    signature = cb.infer_signature(f)
    surplus = max(0, signature.n_out - signature.n_in)
    return cb.serial(f, cb.drop(surplus)) if surplus else f
