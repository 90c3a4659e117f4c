"""What holds for every public layer and function, tried on each entry of the conformance list."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import settings

from flax_extra import combinator as cb
from flax_extra import layer as xn
from flax_extra import testing
from tests.layer.entries import LAYER_ENTRIES, SETTINGS, Entry, sequence
from tests.layer.multimodal_entries import MULTIMODAL_ENTRIES

ENTRIES = [*LAYER_ENTRIES, *MULTIMODAL_ENTRIES]

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""To compile takes most of the time here: a third of it without optimisation."""

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
HALF = pytest.mark.parametrize(
    "half", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__
)


def test_no_public_name_is_missing_from_the_list() -> None:
    public = {name for name in xn.__all__ if callable(getattr(xn, name))} - SETTINGS
    public |= {f"io.{name}" for name in xn.io.__all__ if inspect.isfunction(getattr(xn.io, name))}
    assert public == {entry.name.partition(":")[0] for entry in ENTRIES}


def test_entries_have_names_of_their_own() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)


@every_entry
def test_golden_parameters(entry: Entry) -> None:
    assert _shapes(_initialised(entry, entry.make({}))) == entry.param_shapes


@every_entry
def test_parameters_are_float32(entry: Entry) -> None:
    params = _initialised(entry, entry.make({"dtype": jnp.bfloat16}))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} <= {jnp.dtype(jnp.float32)}


@every_entry
def test_output_shapes(entry: Entry) -> None:
    assert _described(_outputs(entry)) == entry.output_shapes


@every_entry
def test_shapes_are_known_without_arrays(entry: Entry) -> None:
    run = _runner(entry, entry.make({}))
    found = jax.eval_shape(run, _params(entry), _arrays(entry))
    assert _shapes(found) == _shapes(_leaves(_outputs(entry)))


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.shapes is not None], ids=lambda entry: entry.name
)
def test_shapes_are_as_annotated(entry: Entry) -> None:
    n = settings.default.max_examples  # of the profile
    testing.check_shapes(entry.make({}), max_size=3, max_examples=n, **(entry.shapes or {}))


def test_every_public_layer_is_held_against_its_annotations() -> None:
    checked = {entry.name for entry in ENTRIES if entry.shapes is not None}
    names = [name for name in xn.__all__ if name not in SETTINGS]
    layers = {name: getattr(xn, name) for name in names if callable(getattr(xn, name))}
    assert {id(layers[name]) for name in checked} == set(map(id, layers.values()))


@every_entry
def test_same_key_same_result(entry: Entry) -> None:
    run = _runner(entry, entry.make({}))
    _assert_equal(run(_params(entry), _arrays(entry)), _leaves(_outputs(entry)))


@every_entry
def test_jit(entry: Entry) -> None:
    found = quick_jit(_runner(entry, entry.make({})))(_params(entry), _arrays(entry))
    _assert_close(found, _leaves(_outputs(entry)), 1e-5)


@every_entry
def test_gradients_are_finite(entry: Entry) -> None:
    floats, loss = _loss(entry)
    if not floats and not entry.param_shapes:
        return
    leaves = jax.tree.leaves(quick_jit(jax.grad(loss, (0, 1)))(_params(entry), floats))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.any(leaf) for leaf in leaves)


@every_entry
def test_vmap(entry: Entry) -> None:
    run = _runner(entry, entry.make({}))

    def batch(x: Any) -> Any:
        return jnp.stack([x, x / 2 if _is_float(x) else x])

    params, arrays = jax.tree.map(batch, (_params(entry), _arrays(entry)))
    mapped = quick_jit(jax.vmap(run, axis_size=2))(params, arrays)
    for index in range(2):
        one = jax.tree.map(lambda x: x[index], (params, arrays))  # noqa: B023
        _assert_close([leaf[index] for leaf in mapped], run(*one), 1e-5)


@every_entry
@HALF
def test_half_precision(entry: Entry, half: Any) -> None:
    run = _runner(entry, entry.make({"dtype": half}))
    found = quick_jit(run)(_params(entry), _cast(_arrays(entry), half))
    expected = _leaves(_outputs(entry))
    assert {leaf.dtype for leaf in found if _is_float(leaf)} <= {jnp.dtype(half)}
    _assert_close(_cast(found, jnp.float32), expected, 0.05)


@every_entry
def test_float64(entry: Entry) -> None:
    with jax.enable_x64(True):
        run = _runner(entry, entry.make({"dtype": jnp.float64, "param_dtype": jnp.float64}))
        params, arrays = _cast((_params(entry), _arrays(entry)), jnp.float64)
        found = quick_jit(run)(params, arrays)
        assert {leaf.dtype for leaf in found if _is_float(leaf)} <= {jnp.dtype(jnp.float64)}
        if not entry.rngs:  # other bits are drawn for float64
            _assert_close(found, _leaves(_outputs(entry)), 1e-5)


@every_entry
def test_strict_promotion(entry: Entry) -> None:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        _initialised(entry, entry.make({}))
        floats, loss = _loss(entry)
        if floats or entry.param_shapes:  # promotion is decided when the program is traced
            jax.eval_shape(jax.grad(loss, (0, 1)), _params(entry), floats)


@every_entry
def test_in_a_pipeline(entry: Entry) -> None:
    layer = entry.make({})
    pipeline = cb.serial(layer)
    # What lies deeper on the stack passes through.
    outputs = pipeline.apply(
        {"params": _nested(entry, f"{_kind(layer)}_0")},
        *_flat(entry.inputs()),
        "beneath",
        rngs=_rngs(entry),
    )
    assert outputs[-1] == "beneath"
    _assert_same_structure(entry, outputs[:-1])


@every_entry
def test_in_setup(entry: Entry) -> None:
    class Model(nn.Module):
        def setup(self) -> None:
            self.inner = entry.make({})

        def __call__(self, *inputs: Any) -> Any:
            return self.inner(*inputs)

    outputs = Model().apply({"params": _nested(entry, "inner")}, *entry.inputs(), rngs=_rngs(entry))
    _assert_same_structure(entry, outputs)


@every_entry
def test_in_compact(entry: Entry) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, *inputs: Any) -> Any:
            return entry.make({})(*inputs)

    params = _nested(entry, f"{_kind(entry.make({}))}_0")
    if entry.field_shapes is not None:
        params = _random(entry.field_shapes)
    outputs = Model().apply({"params": params}, *entry.inputs(), rngs=_rngs(entry))
    _assert_same_structure(entry, outputs)
    created = jax.eval_shape(lambda: Model().init(_rngs(entry), *entry.inputs()))
    assert _shapes(created.get("params", {})) == _shapes(params)


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.repeatable], ids=lambda entry: entry.name
)
def test_in_repeat(entry: Entry) -> None:
    layer = entry.make({})
    first, *others = entry.inputs()
    repeated = cb.repeat(layer, 2)
    output, variables = quick_jit(repeated.init_with_output)(_rngs(entry), first, *others)
    params = variables.get("params", {})
    stacked = jax.tree.map(lambda shape: (2, *shape), entry.param_shapes, is_leaf=_is_shape)
    assert _shapes(params) == ({f"{_kind(layer)}_0": stacked} if stacked else {})
    if entry.rngs:
        return
    expected = first
    for index in range(2):
        copy = jax.tree.map(lambda leaf: leaf[index], params)  # noqa: B023
        inner = copy.get(f"{_kind(layer)}_0", {})
        (expected,) = _runner(entry, layer)(inner, _arrays_of((expected, *others)))
    _assert_close([output], [expected], 1e-5)


# What the tests are written with.


def _rngs(entry: Entry) -> dict[str, Any]:
    return {name: jax.random.key(seed) for seed, name in enumerate(("params", *entry.rngs))}


def _initialised(entry: Entry, layer: Callable[..., Any]) -> Any:
    """The shapes and dtypes of the parameters that a layer makes."""
    if not isinstance(layer, nn.Module):
        return {}
    return jax.eval_shape(lambda: layer.init(_rngs(entry), *entry.inputs())).get("params", {})


@functools.cache
def _params(entry: Entry) -> Any:
    """Parameters of the documented shapes: random ones, for zeros would make a test blind."""
    return _random(entry.param_shapes)


def _random(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: sequence(*shape) / 2, shapes, is_leaf=_is_shape)


@functools.cache
def _outputs(entry: Entry) -> Any:
    return _call(entry, entry.make({}), _params(entry), entry.inputs())


def _call(entry: Entry, layer: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    if isinstance(layer, nn.Module):
        return layer.apply({"params": params}, *inputs, rngs=_rngs(entry))
    return layer(*inputs)


def _runner(entry: Entry, layer: Callable[..., Any]) -> Callable[[Any, list[Any]], list[Any]]:
    """(params, arrays among the inputs) -> arrays among the outputs, to be transformed."""
    leaves, tree = jax.tree.flatten(entry.inputs())

    def run(params: Any, arrays: list[Any]) -> list[Any]:
        remaining = iter(arrays)
        inputs = [next(remaining) if _is_array(leaf) else leaf for leaf in leaves]
        outputs = _call(entry, layer, params, jax.tree.unflatten(tree, inputs))
        return _leaves(outputs)

    return run


def _loss(entry: Entry) -> tuple[list[Any], Callable[[Any, list[Any]], Any]]:
    """The floating point inputs, and (params, those inputs) -> a number."""
    run, arrays = _runner(entry, entry.make({})), _arrays(entry)

    def loss(params: Any, floats: list[Any]) -> Any:
        remaining = iter(floats)
        outputs = run(params, [next(remaining) if _is_float(x) else x for x in arrays])
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in outputs if _is_float(leaf))

    return [x for x in arrays if _is_float(x)], loss


def _arrays(entry: Entry) -> list[Any]:
    return _arrays_of(entry.inputs())


def _arrays_of(inputs: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(inputs) if _is_array(leaf)]


def _leaves(outputs: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(outputs) if _is_array(leaf)]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _is_float(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if _is_float(x) else x, tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def _described(outputs: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape if _is_array(leaf) else leaf, outputs)


def _flat(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs)


def _kind(layer: Any) -> str:
    return type(layer).__name__


def _nested(entry: Entry, name: str) -> Any:
    return {name: _params(entry)} if entry.param_shapes else {}


def _assert_same_structure(entry: Entry, outputs: Any) -> None:
    """The same numbers as the layer by itself, and the same plain values beside them."""
    found, expected = jax.tree.leaves(outputs), jax.tree.leaves(_outputs(entry))
    assert [_is_array(leaf) for leaf in found] == [_is_array(leaf) for leaf in expected]
    if not entry.rngs:  # a stream depends on the path of the layer that draws from it
        _assert_close(found, expected, 1e-6)


def _assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def _assert_close(found: list[Any], expected: list[Any], tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
