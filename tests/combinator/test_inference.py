"""What ``infer_signature`` reads from callables, and what it refuses."""

from __future__ import annotations

import functools
import operator
import re
import typing
from typing import Annotated, Any, NamedTuple, NewType, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typing_extensions
from flax import linen as nn
from jaxtyping import Array, Float

from flax_extra import combinator as cb
from flax_extra.combinator import infer_signature

Pair = tuple[int, int]
Carry = NewType("Carry", tuple[int, int])
Alias = typing_extensions.TypeAliasType("Alias", tuple[int, Pair])


class Point(NamedTuple):
    x: int
    y: int


def two(x: int) -> tuple[int, int]:
    return x, x


def nested(a: tuple[int, tuple[int, int]], b: int) -> tuple[int, tuple[int, Point]]:
    return a[0], (b, Point(1, 2))


def nothing(x: int) -> None:
    return None


def no_annotations(a, b, c=1, *, d=2, **rest):
    return a


def strings(a: Pair, b: tuple[int, Pair]) -> tuple[Pair, None]:
    return a, None


def aliases(a: Alias, b: Carry, c: Annotated[Pair, "meta"]) -> Pair | None:
    return None


def points(p: Point, q: Point | None) -> Point:
    return p


def unknown(a: Unknown, b: tuple[Unknown, unknown_module.Thing[int]]) -> Unknown | None:  # noqa: F821
    return a


def shaped(x: Float[Array, "batch time"]) -> tuple[Float[Array, " batch"], Float[Array, " time"]]:
    return x[:, 0], x[0]


def empty_output(x: int) -> tuple[()]:
    return ()


class Callable_:
    def __call__(self, a, b):
        return a

    def method(self, a: Pair) -> Pair:
        return a

    @classmethod
    def make(cls, a, b):
        return a

    @staticmethod
    def static(a, b, c):
        return a


class Declares:
    signature = cb.Signature(2, 3)

    def __call__(self, *args):
        return args


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "a b"], carry: Pair, mask=None) -> tuple[Pair, Array]:
        return carry, x


def wrapped(f):
    @functools.wraps(f)
    def inner(*args, **kwargs):
        return f(*args, **kwargs)

    return inner


CASES = [
    (lambda x: x, 1, 1),
    (lambda: 1, 0, 1),
    (lambda x, y, z=1: x, 2, 1),
    (two, 1, 2),
    (nested, 4, 3),
    (nothing, 1, 0),
    (no_annotations, 2, 1),
    (strings, 5, 3),
    (aliases, 7, 1),
    (points, 2, 1),
    (unknown, 3, 1),
    (shaped, 1, 2),
    (empty_output, 1, 0),
    (Callable_(), 2, 1),
    (Callable_().method, 2, 2),
    (Callable_.make, 2, 1),
    (Callable_.static, 3, 1),
    (Callable_().static, 3, 1),
    (Declares(), 2, 3),
    (Point, 2, 1),
    (LinenLayer(), 3, 3),
    (wrapped(nested), 4, 3),
    (abs, 1, 1),
    (len, 1, 1),
    (operator.add, 2, 1),
    (np.add, 2, 1),
    (np.divmod, 2, 2),
    (np.tanh, 1, 1),
    (jnp.add, 2, 1),
    (jnp.tanh, 1, 1),
    (jnp.matmul, 2, 1),
    (jax.nn.relu, 1, 1),
    (jax.nn.gelu, 1, 1),
    (jax.nn.softmax, 1, 1),
    (jax.nn.silu, 1, 1),
    (functools.partial(operator.add, 1), 1, 1),
    (functools.partial(no_annotations, b=2), 1, 1),
    (functools.partial(nested, (1, (2, 3))), 1, 3),
    (jax.jit(two), 1, 2),
    (jax.jit(nested), 4, 3),
    (jax.checkpoint(two), 1, 2),
    (jax.grad(lambda x: x), 1, 1),
    (nn.Dense(3), 1, 1),
    (nn.Dropout(0.1), 1, 1),
    (nn.BatchNorm(), 1, 1),
    (nn.MultiHeadDotProductAttention(2), 1, 1),
    (nn.Embed(3, 4).attend, 1, 1),
    (cb.dup(2), 2, 4),
    (cb.serial(two, operator.add), 1, 1),
]


@pytest.mark.parametrize(("f", "n_in", "n_out"), CASES)
def test_inferred(f, n_in, n_out):
    signature = infer_signature(f)
    assert (signature.n_in, signature.n_out) == (n_in, n_out)
    assert cb.serial(f).signature == cb.Signature(n_in, n_out)


def test_nested_parameters_are_regrouped():
    assert infer_signature(nested).in_shape == (((), ((), ())), ())
    p = cb.serial(nested)
    assert p(1, 2, 3, 4) == (1, 4, Point(1, 2))
    assert p((1, (2, 3)), 4) == (1, 4, Point(1, 2))


def test_types_local_to_a_function():
    class Local(NamedTuple):
        x: int

    def with_local(a: tuple[Local, int], b: Local) -> tuple[Local, int]:
        return a

    assert infer_signature(with_local).in_shape == (((), ()), ())
    assert infer_signature(with_local).n_out == 2


def test_a_name_that_nothing_defines_is_not_guessed_to_be_a_tuple():
    def f(a: NowhereDefined) -> NowhereDefined:  # noqa: F821
        return a

    assert infer_signature(f) == cb.Signature(1, 1)


if hasattr(typing, "TypeAliasType"):  # Python 3.12

    def test_type_statements():
        namespace: dict[str, Any] = {}
        exec(
            "type P[T] = tuple[T, T]\ntype R = tuple[R, int]\ndef f(a: P[int]) -> P[P[int]]: ...\n",
            namespace,
        )
        assert str(infer_signature(namespace["f"])) == "2 -> 4"


def bare(xs: tuple): ...
def variadic(xs: tuple[int, ...]): ...
def unpacked(xs: tuple[int, typing_extensions.Unpack[tuple[int, ...]]]): ...
def bare_output(x) -> tuple: ...
def variadic_output(x) -> tuple[int, ...]: ...
def empty_parameter(x: tuple[()]): ...
def never(x) -> NoReturn: ...
def keyword_only(x, *, y): ...


FN = r"cb.fn\(f, n_in=..., n_out=..., key=value\)"


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda *xs: xs, rf"accepts any number \(\*xs\). Say how many: {FN}"),
        (bare, rf"parameter 'xs' of bare .* tuple of any length.*{FN}"),
        (variadic, rf"parameter 'xs' of variadic .* tuple\[int, ...\].*{FN}"),
        (unpacked, "tuple of any length"),
        (bare_output, rf"How many outputs does bare_output give\?.*{FN}"),
        (variadic_output, rf"How many outputs does variadic_output give\?.*{FN}"),
        (empty_parameter, r"Bind it: cb.fn\(f, x=\(\)\)"),
        (never, rf"never is annotated as never returning.*{FN}"),
        (max, rf"It has no Python signature to read it from. Say so: {FN}"),
        (dict, FN),
    ],
)
def test_refusals_name_the_remedy(f, message):
    with pytest.raises(cb.SignatureError, match=message):
        infer_signature(f)
    with pytest.raises(cb.SignatureError, match=message):
        cb.serial(f)


def test_the_remedies_work():
    assert cb.fn(lambda *xs: xs, n_in=2, n_out=2)(1, 2) == (1, 2)
    assert cb.fn(bare, n_in=3).signature == cb.Signature(3, 1, in_shape=(((), (), ()),))
    assert cb.fn(variadic_output, n_out=3).signature.n_out == 3
    assert cb.fn(empty_parameter, x=()).signature == cb.Signature(0, 1)
    assert cb.fn(keyword_only, n_in=2)(1, 2) is None
    assert cb.fn(keyword_only, y=1).signature == cb.Signature(1, 1)
    assert cb.fn(max, n_in=2, n_out=1)(1, 2) == 2


class TestFn:
    def test_a_variadic_parameter_takes_what_is_left(self):
        def f(xs: tuple[int, ...], y: int) -> int:
            return sum(xs) * y

        assert cb.fn(f, n_in=4)(1, 2, 3, 10) == 60

    def test_optional_parameters_become_inputs(self):
        def f(a, b=10, c=100):
            return (a, b, c)

        assert cb.fn(f, n_in=2, n_out=3)(1, 2) == (1, 2, 100)
        assert cb.fn(f, n_out=3)(1) == (1, 10, 100)

    def test_arguments_after_a_bound_parameter_go_by_name(self):
        def f(a, mask, b, c=0):
            return (a, mask, b, c)

        assert cb.fn(f, n_out=4, mask=None)(1, 2) == (1, None, 2, 0)
        assert cb.fn(f, n_out=4, a=9, c=7)(1, 2) == (9, 1, 2, 7)

    def test_keywords_of_a_pipeline_are_bound_for_all_its_parts(self):
        p = cb.fn(cb.serial(nn.Dropout(0.5), cb.serial(nn.Dropout(0.5))), deterministic=True)
        assert p.apply({}, 1.0) == 1.0
        with pytest.raises(TypeError, match="'training', and serial takes no such keyword"):
            cb.fn(cb.serial(nn.Dropout(0.5)), training=True)

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda: cb.fn(nested, n_in=2), cb.SignatureError, r"nested takes 4 items off"),
            (lambda: cb.fn(two, n_in=2), cb.SignatureError, r"two takes 1 item off"),
            (lambda: cb.fn(no_annotations, n_in=5), cb.SignatureError, r"takes 2 to 4 items off"),
            (lambda: cb.fn(np.add, n_in=3), cb.SignatureError, r"contradicts add.*n_in=2"),
            (lambda: cb.fn(cb.dup(), n_out=1), cb.SignatureError, r"contradicts dup.*n_out=2"),
            (lambda: cb.fn(two, y=1), TypeError, r"binds 'y', and two takes no such .*: 'x'\."),
            (lambda: cb.fn(abs, x=1), cb.SignatureError, r"cannot bind parameter 'x' of abs"),
            (lambda: cb.fn(two, n_in=-1), ValueError, r"n_in of at least 0; got -1"),
            (lambda: cb.fn(two, n_in=1.5), TypeError, r"an integer for n_in; got 1.5"),
            (lambda: cb.fn(3), TypeError, r"got 3 \(int\)"),
            (lambda: cb.fn(variadic, n_in=0), cb.SignatureError, r"takes at least 1 item"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, build, error, message):
        with pytest.raises(error, match=message):
            build()


class Declared:
    """Says its signature itself, and has parameters beyond it."""

    signature = cb.Signature(1, 1)

    def __call__(self, x, scale=1, *, pair: tuple[int, int] | None = None, shift):
        return [x, scale, pair, shift]


class Grouped(Declared):
    """Says how items are grouped where no annotation says it."""

    in_shapes = {"scale": ((), ((), ())), "pair": "no nesting"}  # noqa: RUF012


class TestADeclaredSignature:
    """It can be asked for more inputs: the parameters beyond it, in their order."""

    def test_parameters_beyond_it_become_inputs(self):
        f = Declared()
        assert cb.fn(f, n_in=5)(1, 2, 3, 4, 5) == [1, 2, (3, 4), 5]
        assert cb.fn(f, n_in=2)(1, 2, shift=5) == [1, 2, None, 5]
        assert cb.fn(f, n_in=3, scale=9)(1, 3, 4, shift=5) == [1, 9, (3, 4), 5]
        assert cb.fn(f, n_in=2, scale=9, pair=None)(1, 5) == [1, 9, None, 5]
        assert cb.fn(f, n_in=1)(1, scale=2, shift=5) == [1, 2, None, 5]

    def test_they_are_no_context_any_more(self):
        assert cb.fn(Declared()).keywords == {"scale", "pair", "shift"}
        assert cb.fn(Declared(), n_in=2).keywords == {"pair", "shift"}
        assert cb.fn(Declared(), n_in=5).keywords == frozenset()
        with pytest.raises(cb.SignatureError, match="but Declared takes it off the stack"):
            cb.fn(cb.serial(cb.fn(Declared(), n_in=2)), scale=2)

    def test_a_class_may_say_how_items_are_grouped(self):
        f = cb.fn(Grouped(), n_in=7)
        assert f.signature.in_shape == ((), ((), ((), ())), ((), ()), ())
        assert f(1, 2, 3, 4, 5, 6, 7) == [1, (2, (3, 4)), (5, 6), 7]

    @pytest.mark.parametrize(
        ("f", "n_in", "message"),
        [
            (Declared(), 0, "cb.fn(f, n_in=0) contradicts Declared, whose signature has n_in=1."),
            (Declared(), 3, "cb.fn(f, n_in=3): Declared takes 1 to 5 items off the stack."),
            (Declared(), 6, "cb.fn(f, n_in=6): Declared takes 1 to 5 items off the stack."),
            (Grouped(), 2, "cb.fn(f, n_in=2): Grouped takes 1 to 7 items off the stack."),
            (cb.swap(), 3, "cb.fn(f, n_in=3) contradicts swap, whose signature has n_in=2."),
        ],
    )
    def test_numbers_that_do_not_fit_are_refused(self, f, n_in, message):
        with pytest.raises(cb.SignatureError, match=re.escape(message)):
            cb.fn(f, n_in=n_in)

    def test_items_of_a_tuple_are_not_given_to_variadic_parameters(self):
        def f(a, b: tuple[int, int] = (0, 0), *rest):
            return [a, b, rest]

        assert cb.fn(f, n_in=4)(1, 2, 3, 4) == [1, (2, 3), (4,)]
        with pytest.raises(cb.SignatureError, match="takes at least 1 item"):
            cb.fn(f, n_in=2)


class TestSignature:
    def test_repr_is_as_documented(self):
        assert repr(cb.concatenate()) == (
            "Concatenate(signature=Signature(n_in=2, n_out=1, start_index=0, in_shape=((), ())), axis=-1)"
        )

    def test_by_value(self):
        assert cb.Signature(2, 1) == cb.Signature(2, 1, 0, ((), ()))
        assert hash(cb.Signature(2, 1)) == hash(cb.Signature(2, 1, 0, ((), ())))
        assert cb.Signature(2, 1).at(3).index_bounds == (3, 5)
        with pytest.raises(AttributeError):
            cb.Signature(2, 1).n_in = 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1, 0), "n_in is negative"),
            ((1.0, 0), "n_in is not an integer"),
            ((1, 2, -1), "start_index is negative"),
            ((2, 1, 0, ((),)), "in_shape holds 1 items and n_in is 2"),
            ((1, 1, 0, [()]), "in_shape is not made of tuples"),
        ],
    )
    def test_refuses_what_makes_no_sense(self, arguments, message):
        with pytest.raises(cb.SignatureError, match=message):
            cb.Signature(*arguments)
