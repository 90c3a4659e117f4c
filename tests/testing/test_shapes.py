"""``check_shapes`` finds planted faults, on the smallest inputs that show them, and says so."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from flax_extra import combinator as cb
from flax_extra import testing

Sequences = Float[Array, "batch time features"]


class WrongNumberOfOutputs(nn.Module):
    @nn.compact
    def __call__(self, x: Sequences) -> tuple[Sequences, Sequences]:
        return nn.Dense(x.shape[-1])(x)


class SwappedAxes(nn.Module):
    @nn.compact
    def __call__(self, x: Sequences) -> Sequences:
        return jnp.swapaxes(nn.LayerNorm()(x), 0, 1)


class OffByOne(nn.Module):
    @nn.compact
    def __call__(self, x: Sequences) -> Float[Array, "batch time-1 features"]:
        return x[:, 1:-1] if x.shape[1] > 3 else x[:, 1:]


class ForgottenMaskAxis(nn.Module):
    @nn.compact
    def __call__(
        self,
        logits: Float[Array, "batch heads time_q time_kv"],
        mask: Bool[Array, "batch time_q time_kv"],
    ) -> Float[Array, "batch heads time_q time_kv"]:
        return jnp.where(mask, logits, -1e9)  # the axis of the heads is missing


class Wider(nn.Module):
    d_output: int

    @nn.compact
    def __call__(self, x: Sequences) -> Float[Array, "batch time d_output"]:
        return nn.Dense(self.d_output + 1)(x)


FAULTS = {
    WrongNumberOfOutputs(): """\
WrongNumberOfOutputs declares that it gives Float[batch time features], Float[batch time features], \
and gave f32[1, 1, 1].
  inputs: f32[1, 1, 1]
  sizes: batch=1, time=1, features=1""",
    SwappedAxes(): """\
SwappedAxes declares that it gives Float[batch time features], and gave f32[2, 1, 1].
  inputs: f32[1, 2, 1]
  sizes: batch=1, time=2, features=1""",
    OffByOne(): """\
OffByOne declares that it gives Float[batch time-1 features], and gave f32[1, 2, 1].
  inputs: f32[1, 4, 1]
  sizes: batch=1, time=4, features=1""",
    ForgottenMaskAxis(): """\
ForgottenMaskAxis declares that it gives Float[batch heads time_q time_kv], \
and gave f32[2, 2, 1, 1].
  inputs: f32[2, 1, 1, 1], bool[2, 1, 1]
  sizes: batch=2, heads=1, time_q=1, time_kv=1""",
    Wider(3): """\
Wider declares that it gives Float[batch time d_output], and gave f32[1, 1, 4].
  inputs: f32[1, 1, 1]
  sizes: d_output=3, batch=1, time=1, features=1""",
}


@pytest.mark.parametrize("layer", FAULTS, ids=lambda layer: type(layer).__name__)
def test_planted_faults_are_found_and_shrunk(layer):
    with jax.numpy_rank_promotion("allow"), pytest.raises(AssertionError) as error:
        testing.check_shapes(layer)
    assert str(error.value) in (FAULTS[layer], _transposed(FAULTS[layer]))


def _transposed(text):
    """What is as small, with the sizes of two axes exchanged."""
    return (
        text.replace("f32[2, 1, 1]", "f32[1, 2, 1]", 1)
        .replace("inputs: f32[1, 2, 1]", "inputs: f32[2, 1, 1]")
        .replace("batch=1, time=2", "batch=2, time=1")
    )


def test_what_a_layer_raises_keeps_its_type_and_gains_a_note():
    def add(
        x: Float[Array, "batch time"], y: Float[Array, " batch #time"]
    ) -> Float[Array, " batch"]:
        return (x[:, 1:] * y[:, 1:]).sum(1)

    with pytest.raises((TypeError, ValueError)) as error:
        testing.check_shapes(add)
    assert error.value.__notes__[-1] == (
        "flax_extra.testing: add raised on inputs that its annotations allow\n"
        "  inputs: f32[1, 3], f32[1, 1]\n"
        "  sizes: batch=1, time=3"
    )


@pytest.mark.parametrize(
    ("text", "shape", "fits"),
    [
        ("batch 3", (2, 3), True),
        ("batch 3", (2, 4), False),
        ("batch rows=3", (2, 3), True),
        ("... features", (5, 6, 4), True),
        ("*axes features", (4,), True),
        ("_ batch", (9, 2), True),
        ("#batch", (1,), True),
        ("batch 2*batch", (2, 4), True),
        ("batch 2*batch", (2, 5), False),
        ("", (), True),
        ("batch batch", (2, 3), False),
    ],
)
def test_axes_are_those_of_jaxtyping(text, shape, fits):
    def f(x: Float[Array, "2"]) -> Float[Array, text]:
        return jnp.zeros(shape)

    declared = {"return": Float[Array, text]}
    if fits:
        testing.check_shapes(f, annotations=declared, max_examples=5)
    else:
        with pytest.raises(AssertionError, match="declares that it gives"):
            testing.check_shapes(f, annotations=declared, max_examples=5)


def test_unions_optionals_lists_and_numbers_are_drawn():
    seen = set()

    def f(
        x: Float[Array, " batch *axes"] | Int[Array, " batch"],
        items: list[Shaped[Array, "batch _"]],
        batch: int,
        mask: Bool[Array, "#batch"] | None,
        *,
        scale: Float[Array, ""] | None = None,
    ) -> tuple[Shaped[Array, " batch *any"], None]:
        assert x.shape[0] == batch
        assert all(item.shape[0] == batch for item in items)
        seen.add((x.dtype.name, len(items), mask is None, scale is None))
        return x, None

    testing.check_shapes(f, max_examples=300)
    assert {dtype for dtype, *_ in seen} == {"float32", "int32"}
    assert {n for _, n, *_ in seen} == {0, 1, 2, 3}
    assert {rest for *_, a, b in seen for rest in [(a, b)]} == {
        (a, b) for a in (True, False) for b in (True, False)
    }


def test_fields_are_sizes_and_braces_read_them():
    class Project(nn.Module):
        d: int
        table: Float[Array, "rows features"]

        @nn.compact
        def __call__(
            self, x: Float[Array, "batch features"]
        ) -> tuple[Float[Array, "batch {self.d}"], Float[Array, "batch rows"]]:
            return nn.Dense(self.d)(x), x @ self.table.T

    testing.check_shapes(Project(3, jnp.ones((5, 2))))


def test_a_declared_step_of_a_pipeline_is_read_through_fn():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x: Sequences, mask: Bool[Array, "batch time"]) -> Sequences:
            return x if mask is None else x * mask

    testing.check_shapes(cb.fn(Masked(), mask=None))
    with jax.numpy_rank_promotion("allow"), pytest.raises((AssertionError, TypeError)):
        testing.check_shapes(Masked())


def plain(x):
    return x


def annotated(x: Float[Array, "batch time"]) -> Float[Array, "batch time"]:
    return x


@pytest.mark.parametrize(
    ("f", "options", "message"),
    [
        (plain, {}, "What does plain give\\? Its return annotation, none, says no shape"),
        (plain, {"annotations": {"return": Sequences}}, "What does plain take for 'x'\\?"),
        (annotated, {"sizes": {"tiem": 3}}, "the size of 'tiem', .* They name: 'batch', 'time'"),
        (annotated, {"sizes": {"time": "3"}}, "got '3' for axis 'time'"),
        (annotated, {"dtypes": {"y": "bool"}}, "the dtype of 'y'"),
        (annotated, {"annotations": {"y": None}}, "the annotation of 'y'"),
    ],
)
def test_impossible_requests_are_refused_at_once(f, options, message):
    with pytest.raises(InvalidArgument, match=message):
        testing.check_shapes(f, **options)


def test_sizes_are_as_asked():
    seen = set()

    def f(x: Float[Array, "batch time"]) -> Float[Array, "batch time"]:
        seen.add(x.shape)
        return x

    testing.check_shapes(f, sizes={"batch": 3, "time": st.sampled_from([2, 4])})
    assert seen == {(3, 2), (3, 4)}
