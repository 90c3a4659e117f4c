"""A sum over tiles, as a primitive of JAX whose derivatives are sums over tiles again.

A function of one tile reads parts of arrays, and its results are added to parts of other arrays.
Its tangent reads the same parts. Its transpose reads cotangents where results were added, and adds
cotangents where tangents were read. So a derivative of any order, in forward and in reverse mode,
holds these arrays and one tile. If JAX differentiated a loop over tiles in reverse, it would keep
something of every tile.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_extra.layer._causal import Schedule, run_chunks
from flax_extra.layer._numerics import get_accumulation_dtype
from flax_extra.layer._tiles import Axes, Grid, Index, TileIndex, loop

Tiles: TypeAlias = Sequence[Any]
"""The parts of the operands that belong to a tile; None for one that is not read yet."""


class Layout(NamedTuple):
    """How an output is added up along a row of tiles, if not in its own layout.

    Attributes:
        zeros: where the sum begins.
        finish: brings the sum into the layout of the output.
    """

    zeros: Array
    finish: Callable[[Array], Array]


class Row(NamedTuple):
    """What a function does with a row of tiles.

    Attributes:
        compute: takes the index of a tile, the operands that have an axis of keys, and whether
            the chunk is full; returns what the tile adds to each output.
        layouts: layouts of outputs that have no axis of keys, by the number of the output.
    """

    compute: Callable[[TileIndex, Tiles, bool], Sequence[Array]]
    layouts: Mapping[int, Layout]


class TileFunction(abc.ABC):
    """A function of one tile. A subclass defines ``start_row`` or ``compute``.

    It has to be hashable, as a parameter of the primitive.
    """

    @abc.abstractmethod
    def schedule(self, grid: Grid, operands: Sequence[Any]) -> Schedule | None:
        """Returns which chunks each row visits; None for all of them."""

    def start_row(self, grid: Grid, row: TileIndex, rows: Tiles) -> Row:
        """Prepares a row of tiles, from the operands that have no axis of keys."""
        del row

        def compute(index: TileIndex, columns: Tiles, is_full: bool) -> Sequence[Array]:
            return self.compute(grid, index, merge_tiles(rows, columns), is_full)

        return Row(compute, {})

    def compute(self, grid: Grid, index: TileIndex, tiles: Tiles, is_full: bool) -> Sequence[Array]:
        """Computes what one tile adds to each output."""
        row = self.start_row(grid, index, tiles)
        terms = list(row.compute(index, tiles, is_full))
        for i, layout in row.layouts.items():
            terms[i] = layout.finish(terms[i])
        return terms

    def get_cuda_kernel(self) -> Callable[..., Sequence[Array]] | None:
        """Returns what computes the sum from the operands on CUDA, if there is a kernel."""
        return None

    def transpose_tangent(
        self, tangent: Tangent, linear: tuple[int, ...], outputs: tuple[int, ...]
    ) -> TileFunction | None:
        """Returns a transpose of the tangent of this function that is faster than JAX's, if any.

        See :class:`Transpose` for what it takes and returns.
        """
        del tangent, linear, outputs
        return None


def merge_tiles(rows: Tiles, columns: Tiles) -> list[Any]:
    """Merges the operands that were read for a row with those that were read for a chunk."""
    pairs = zip(rows, columns, strict=True)
    return [column if row is None else row for row, column in pairs]


@dataclasses.dataclass(frozen=True)
class TiledSum:
    """What is summed, and over which tiles.

    Attributes:
        function: of one tile.
        grids: the tiles on a CPU, and those on other platforms.
        axes: for each operand, which of its axes are tiled.
        primal_of: for each operand, the number of the operand that it is a tangent or cotangent
            of, or its own number. The two have the same shape, dtype and axes.
        outputs: for each output, the number of an operand of the same shape, dtype and axes.
        mapped: for each ``jax.vmap`` around the sum, the innermost first, whether it maps each
            operand over its first axis.
    """

    function: TileFunction
    grids: tuple[Grid, Grid]
    axes: tuple[Axes, ...]
    primal_of: tuple[int, ...]
    outputs: tuple[int, ...]
    mapped: tuple[tuple[bool, ...], ...] = ()

    def select_operands(self, numbers: Sequence[int]) -> TiledSum:
        """Takes the operands of these numbers, each as often as it is listed."""
        return dataclasses.replace(
            self,
            axes=tuple(self.axes[i] for i in numbers),
            primal_of=tuple(self.primal_of[i] for i in numbers),
            mapped=tuple(tuple(layer[i] for i in numbers) for layer in self.mapped),
        )


tiled_sum_p = Primitive("tiled_sum")
tiled_sum_p.multiple_results = True


def sum_tiles(spec: TiledSum, operands: Sequence[Array]) -> list[Array]:
    """Sums a function over all tiles. Returns its outputs."""
    outputs: list[Array] = tiled_sum_p.bind(*operands, spec=spec)  # type: ignore[no-untyped-call]
    return outputs


def sum_tangents(
    spec: TiledSum, operands: Sequence[Array], tangents: Mapping[int, Array]
) -> list[Array]:
    """Sums the tangent of a function over all tiles, from tangents of some operands."""
    n = len(operands)
    tangent = Tangent(spec.function, n, tuple(tangents))
    spec = dataclasses.replace(spec.select_operands([*range(n), *tangents]), function=tangent)
    return sum_tiles(spec, [*operands, *tangents.values()])


def run_on_platform(
    run: Callable[..., Any],
    grids: tuple[Grid, Grid],
    operands: Sequence[Any],
    cuda_kernel: Callable[..., Any] | None,
) -> Any:
    """Runs over the tiles of the platform that the program is compiled for, or its kernel."""
    on_cpu, elsewhere = (functools.partial(run, grid) for grid in grids)
    if cuda_kernel is None and grids[0] == grids[1]:
        return on_cpu(*operands)
    kernels = {} if cuda_kernel is None else {"cuda": cuda_kernel}
    return lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere, **kernels)


@functools.partial(jax.jit, static_argnames="spec")
def _run(*operands: Array, spec: TiledSum) -> list[Array]:
    def run(*operands: Array) -> list[Array]:
        kernel = spec.function.get_cuda_kernel()
        run_grid = functools.partial(_run_grid, spec)
        outputs: list[Array] = run_on_platform(run_grid, spec.grids, operands, kernel)
        return outputs

    for layer in spec.mapped:
        run = jax.vmap(run, in_axes=tuple(0 if is_mapped else None for is_mapped in layer))
    return run(*operands)


def _run_grid(spec: TiledSum, grid: Grid, *operands: Array) -> list[Array]:
    function, schedule = spec.function, spec.function.schedule(grid, operands)
    like = {i: operands[number] for i, number in enumerate(spec.outputs)}
    axes = {i: spec.axes[number] for i, number in enumerate(spec.outputs)}
    row_outputs = [i for i in axes if axes[i].keys is None]

    def read(index: TileIndex, *, keys: bool) -> Tiles:
        return [
            grid.read(x, axes, index) if (axes.keys is not None) == keys else None
            for x, axes in zip(operands, spec.axes, strict=True)
        ]

    def run_row(number: Index, totals: dict[int, Array]) -> dict[int, Array]:
        first = grid.find_row(number)
        row = function.start_row(grid, first, read(first, keys=False))

        def run_chunk(chunk: Index, is_full: bool, sums: dict[int, Array]) -> dict[int, Array]:
            index = first._replace(keys=chunk)
            terms = row.compute(index, read(index, keys=True), is_full)
            return {
                i: x + terms[i].astype(x.dtype)
                if i in row_outputs
                else grid.add(x, terms[i], axes[i], index)
                for i, x in sums.items()
            }

        sums = dict(totals)
        for i in row_outputs:
            zeros = jnp.zeros_like(totals[i], shape=grid.get_tile_shape(like[i], axes[i]))
            sums[i] = row.layouts[i].zeros if i in row.layouts else zeros
        sums = run_chunks(grid, schedule, first, run_chunk, sums)
        for i in row_outputs:
            x = row.layouts[i].finish(sums[i]) if i in row.layouts else sums[i]
            sums[i] = grid.add(totals[i], x, axes[i], first)
        return sums

    totals = {i: jnp.zeros_like(x, get_accumulation_dtype(x)) for i, x in like.items()}
    totals = loop(grid.n_rows, run_row, totals)
    return [x.astype(like[i].dtype) for i, x in totals.items()]


def _infer_avals(*operands: Any, spec: TiledSum) -> list[Any]:
    avals: list[Any] = jax.make_jaxpr(functools.partial(_run, spec=spec))(*operands).out_avals
    return avals


def _jvp(
    operands: Sequence[Array], tangents: Sequence[Any], *, spec: TiledSum
) -> tuple[list[Array], list[Array]]:
    active = {i: x for i, x in enumerate(tangents) if not isinstance(x, ad.Zero)}
    return sum_tiles(spec, operands), sum_tangents(spec, operands, active)


@dataclasses.dataclass(frozen=True)
class Tangent(TileFunction):
    """The tangent of a function of one tile: how its outputs change with its active operands.

    It takes the operands of the function, and then the tangents of the active ones.

    Attributes:
        function: of one tile.
        n_operands: number of operands of the function.
        active: numbers of those that have a tangent.
    """

    function: TileFunction
    n_operands: int
    active: tuple[int, ...]

    def schedule(self, grid: Grid, operands: Sequence[Any]) -> Schedule | None:
        return self.function.schedule(grid, operands[: self.n_operands])

    def compute(self, grid: Grid, index: TileIndex, tiles: Tiles, is_full: bool) -> Sequence[Array]:
        operands, tangents = tiles[: self.n_operands], tiles[self.n_operands :]

        def compute(*active: Array) -> tuple[Array, ...]:
            merged = list(operands)
            for i, x in zip(self.active, active, strict=True):
                merged[i] = x
            return tuple(self.function.compute(grid, index, merged, is_full))

        active = tuple(operands[i] for i in self.active)
        terms: tuple[Array, ...] = jax.jvp(compute, active, tuple(tangents))[1]
        return terms


def _transpose(cotangents: Sequence[Any], *operands: Any, spec: TiledSum) -> list[Array | None]:
    linear = tuple(i for i, x in enumerate(operands) if isinstance(x, ad.UndefinedPrimal))
    outputs = tuple(i for i, x in enumerate(cotangents) if not isinstance(x, ad.Zero))
    kept = [i for i in range(len(operands)) if i not in linear]
    function: TileFunction | None = None
    if isinstance(spec.function, Tangent):
        function = spec.function.function.transpose_tangent(spec.function, linear, outputs)
    if function is None:
        function = Transpose(spec.function, spec.primal_of, linear, outputs)
    selected = spec.select_operands([*kept, *(spec.outputs[i] for i in outputs)])
    transposed = dataclasses.replace(
        selected,
        function=function,
        primal_of=tuple(kept.index(i) for i in selected.primal_of),
        outputs=tuple(kept.index(spec.primal_of[i]) for i in linear),
        # Each vmap maps the outputs, and so their cotangents.
        mapped=tuple((*layer[: len(kept)], *[True] * len(outputs)) for layer in selected.mapped),
    )
    grads = sum_tiles(transposed, [operands[i] for i in kept] + [cotangents[i] for i in outputs])
    results: list[Array | None] = [None] * len(operands)
    for i, grad in zip(linear, grads, strict=True):
        results[i] = _sum_unmapped(grad, [layer[i] for layer in reversed(spec.mapped)])
    return results


def _sum_unmapped(x: Array, is_mapped: Sequence[bool]) -> Array:
    """Sums over the leading axes of the vmaps that did not map the operand."""
    axes = tuple(axis for axis, mapped in enumerate(is_mapped) if not mapped)
    return jnp.sum(x, axis=axes) if axes else x


@dataclasses.dataclass(frozen=True)
class Transpose(TileFunction):
    """The transpose of a function of one tile: from cotangents of outputs to those of operands.

    It takes the operands of the function that are not linear, and then the cotangents. It returns
    the cotangents of the linear ones.

    Attributes:
        function: of one tile.
        primal_of: of the operands of the function; see :class:`TiledSum`.
        linear: numbers of the operands in which the function is linear.
        outputs: numbers of the outputs that have a cotangent.
    """

    function: TileFunction
    primal_of: tuple[int, ...]
    linear: tuple[int, ...]
    outputs: tuple[int, ...]

    def schedule(self, grid: Grid, operands: Sequence[Any]) -> Schedule | None:
        return self.function.schedule(grid, self._split(operands)[0])

    def compute(self, grid: Grid, index: TileIndex, tiles: Tiles, is_full: bool) -> Sequence[Array]:
        operands, cotangents = self._split(tiles)

        def compute(*linear: Array) -> tuple[Array, ...]:
            merged = list(operands)
            for i, x in zip(self.linear, linear, strict=True):
                merged[i] = x
            terms = self.function.compute(grid, index, merged, is_full)
            pairs = zip(self.outputs, cotangents, strict=True)
            return tuple(terms[i].astype(cotangent.dtype) for i, cotangent in pairs)

        zeros = [jnp.zeros_like(operands[self.primal_of[i]]) for i in self.linear]
        grads: tuple[Array, ...] = jax.linear_transpose(compute, *zeros)(tuple(cotangents))
        return grads

    def _split(self, operands: Sequence[Any]) -> tuple[list[Any], Sequence[Any]]:
        """Returns the operands of the function, with None for linear ones, and the cotangents."""
        kept = [i for i in range(len(self.primal_of)) if i not in self.linear]
        split: list[Any] = [None] * len(self.primal_of)
        for i, x in zip(kept, operands[: len(kept)], strict=True):
            split[i] = x
        return split, operands[len(kept) :]


def _batch(
    operands: Sequence[Array], axes: Sequence[int | None], *, spec: TiledSum
) -> tuple[list[Array], list[int]]:
    pairs = list(zip(operands, axes, strict=True))
    layer = tuple(axis is not None for axis in axes)
    moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in pairs]
    outputs = sum_tiles(dataclasses.replace(spec, mapped=(*spec.mapped, layer)), moved)
    return outputs, [0] * len(outputs)


tiled_sum_p.def_impl(_run)  # type: ignore[no-untyped-call]
tiled_sum_p.def_abstract_eval(_infer_avals)  # type: ignore[no-untyped-call]
mlir.register_lowering(tiled_sum_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[tiled_sum_p] = _jvp
ad.primitive_transposes[tiled_sum_p] = _transpose
batching.primitive_batchers[tiled_sum_p] = _batch
