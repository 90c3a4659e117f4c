"""The summary of a pipeline: what flows between its steps, as data, and as a table.

>>> from flax import linen as nn
>>> from flax_extra import combinator as cb
>>> encoder = nn.Embed(256, 64) >> cb.repeat(cb.residual(nn.Dense(64), nn.relu), 6)
>>> summary = cb.summary(encoder, "i32[b, t]")
>>> [(step.name, step.parameters) for step in summary.root.children]
[('Embed(num_embeddings=256, features=64)', 16384), ('repeat x6', 24960)]
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn

from flax_extra.combinator._base import Combinator
from flax_extra.combinator._expression import expression
from flax_extra.combinator._inference import name_of, shorten
from flax_extra.combinator._leaf import Fn
from flax_extra.combinator._lift import Repeat
from flax_extra.combinator._record import Record, record
from flax_extra.combinator._shuffle import Identity
from flax_extra.combinator._signature import Signature
from flax_extra.combinator._stack import Stack, describe_item

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

WIDTH = 120
LONGEST_NAME = 44
LONGEST_ITEM = 40
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a pipeline.

    Args:
        position: the indices of children that lead to it from the outermost pipeline.
        path: the same for people to read, as in errors.
        target: the callable.
        name: its expression, or the kind of combinator.
        signature: how many items it takes and gives.
        before: the whole stack that it finds, top first: ``jax.ShapeDtypeStruct`` for arrays.
        after: the whole stack that it leaves; None if it failed.
        parameters: how many numbers its parameters hold, those of an earlier step not counted.
        bytes: how many bytes they take.
        shared: whether its parameters are those of an earlier step.
        error: what it raised, if it did.
        children: the steps within.

    See :func:`summary`.
    """

    position: tuple[int, ...]
    path: tuple[str, ...]
    target: Callable[..., Any]
    name: str
    signature: Signature
    before: Stack
    after: Stack | None
    parameters: int = 0
    bytes: int = 0
    shared: bool = False
    error: Exception | None = None
    children: tuple[Step, ...] = ()

    def steps(self) -> Iterator[Step]:
        """The steps within, each before those within it."""
        for child in self.children:
            yield child
            yield from child.steps()


@dataclasses.dataclass(frozen=True)
class Summary:
    """What flows between the steps of a pipeline. See :func:`summary`.

    Args:
        root: the pipeline as a step, with the steps within.
        totals: of each collection of variables, how many numbers it holds and their bytes.
    """

    root: Step
    totals: Mapping[str, tuple[int, int]]

    @property
    def error(self) -> Exception | None:
        """What the pipeline raises on these inputs, if it does."""
        return self.root.error

    def __str__(self) -> str:
        lines = [line.rstrip() for line in self._printed().splitlines()]
        return "\n".join(lines).strip("\n")

    def __rich__(self) -> Table:
        return _table(self)

    def _repr_html_(self) -> str:
        return self._printed(html=True)

    def _printed(self, html: bool = False) -> str:
        from rich.console import Console

        console = Console(
            file=io.StringIO(), width=WIDTH, record=True, force_terminal=html, legacy_windows=False
        )
        console.print(self)
        if html:
            style = "font-family:monospace;line-height:1.2"
            return console.export_html(
                inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>'
            )
        return console.export_text()


def summary(f: Callable[..., Any], *inputs: Any, **context: Any) -> Summary:
    """What flows between the steps of a pipeline, and where its parameters are.

    Nothing is computed, and random numbers need no key. Where a step fails, the summary ends with
    it, and holds the error.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        inputs: the items of the stack, top first, as for :func:`shape_signature`: texts such as
            ``"f32[b, t, 64]"``, arrays, ``jax.ShapeDtypeStruct``, None.
        context: keywords for every step that takes them, such as ``deterministic``.

    Returns:
        A tree of steps. Printed, it is a table; in a notebook it shows itself.

    Raises:
        ValueError: where an input is not a spec.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> model = nn.Embed(9, 8) >> cb.residual(nn.LayerNorm(), nn.Dense(8))
        >>> print(cb.summary(model, "i32[b, t]"))
          step                                    signature   stack after    parameters    size
         ───────────────────────────────────────────────────────────────────────────────────────
          inputs                                              i32[b, t]
          serial                                  1 -> 1      f32[b, t, 8]          160   640 B
            Embed(num_embeddings=9, features=8)   1 -> 1      f32[b, t, 8]           72   288 B
            residual                              1 -> 1      f32[b, t, 8]           88   352 B
              LayerNorm()                         1 -> 1      f32[b, t, 8]           16    64 B
              Dense(features=8)                   1 -> 1      f32[b, t, 8]           72   288 B
        <BLANKLINE>
          total                                                                     160   640 B
    """
    recording = record(f, inputs, context)
    variables = {collection: _leaves(tree) for collection, tree in recording.variables.items()}
    counter = _Counter(variables.get(PARAMS, {}))
    root = counter.step(recording.root)
    return Summary(root, {c: _measured(leaves.values()) for c, leaves in variables.items()})


class _Counter:
    """Says of each step, in the order in which they run, which parameters it is first to use."""

    def __init__(self, parameters: Mapping[tuple[str, ...], Any]) -> None:
        self._parameters = parameters
        self._within: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for path in parameters:
            for length in range(len(path) + 1):
                self._within.setdefault(path[:length], []).append(path)
        self._seen: set[tuple[str, ...]] = set()

    def step(self, record: Record) -> Step:
        children = tuple(map(self.step, record.children))
        uses = {path for module in record.modules for path in self._within.get(module, ())}
        new = uses - self._seen
        self._seen |= new
        count, size = _measured(self._parameters[path] for path in new)
        count += sum(child.parameters for child in children)
        size += sum(child.bytes for child in children)
        return Step(
            position=record.position,
            path=record.path,
            target=record.target,
            name=_name(record.target),
            signature=record.signature,
            before=record.before,
            after=record.after,
            parameters=count,
            bytes=size,
            shared=bool(uses) and not new and not count,
            error=record.error,
            children=children,
        )


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    return {tuple(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def _measured(leaves: Any) -> tuple[int, int]:
    sizes = [(math.prod(leaf.shape), leaf.dtype.itemsize) for leaf in leaves]
    return sum(n for n, _ in sizes), sum(n * width for n, width in sizes)


def _name(target: Callable[..., Any]) -> str:
    if not isinstance(target, Combinator) or not len(target.children):
        return _short(target)
    if not target.is_visible:  # a declaration: the name is that of what it is about
        inner = target.children[0].target
        holds_steps = isinstance(inner, Combinator) and len(inner.children)
        return _name(inner) if holds_steps else _short(target)
    if isinstance(target, Repeat):
        return f"{target.label} x{target.n}{', shared' if target.shared else ''}"
    return target.label


def _short(target: Callable[..., Any]) -> str:
    """The expression, or the most telling part of it where that is long."""
    text = shorten(expression(target))
    if len(text) <= LONGEST_NAME:
        return text
    if isinstance(target, Fn):
        return _short(target.children[0].target)
    name = getattr(target, "name", None) if isinstance(target, nn.Module) else None
    named = f"{name_of(target)}(name={name!r}, ...)"
    return named if name and len(named) <= LONGEST_NAME else f"{name_of(target)}(...)"


def _table(summary: Summary) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_footer=True)
    known = summary.error is None
    totals = summary.totals.get(PARAMS, (0, 0))
    count, size = (f"{totals[0]:,}", _bytes(totals[1])) if known else ("", "")
    table.add_column("step", "total" if known else "", no_wrap=True, max_width=60)
    table.add_column("signature", no_wrap=True, min_width=9)
    table.add_column("stack after")
    table.add_column("parameters", count, justify="right", no_wrap=True, min_width=len(count))
    table.add_column("size", size, justify="right", no_wrap=True, min_width=len(size))
    table.add_row(Text("inputs", style="dim"), "", _Items(summary.root.before, style="dim"))
    for depth, step in _nested(summary.root):
        table.add_row(
            Text("  " * depth + step.name, style="bold" if step.children else ""),
            str(step.signature),
            _outcome(step),
            "shared" if step.shared else f"{step.parameters:,}" if step.parameters else "",
            _bytes(step.bytes) if step.parameters else "",
        )
    for collection, (n, width) in summary.totals.items():
        if collection != PARAMS:
            table.add_row(Text(collection, style="dim"), "", "", f"{n:,}", _bytes(width))
    return table


def _nested(step: Step, depth: int = 0) -> Iterator[tuple[int, Step]]:
    yield depth, step
    for child in step.children:
        if not isinstance(child.target, Identity):  # such as the shortcut of a residual
            yield from _nested(child, depth + 1)


class _Items:
    """A stack in a cell of the table, which is broken between its items where it has to be."""

    def __init__(self, stack: Stack, style: str = "") -> None:
        items = [describe_item(item) for item in stack]
        self._parts = [f"{item}, " for item in items[:-1]] + items[-1:] or ["()"]
        self._style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        lines = [""]
        for part in self._parts:
            if lines[-1] and len(lines[-1] + part.rstrip()) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(map(str.rstrip, lines)), style=self._style, overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        widths = [len(part.rstrip()) for part in self._parts]
        return Measurement(min(max(widths), LONGEST_ITEM), sum(map(len, self._parts)))


def _outcome(step: Step) -> Text | _Items:
    from rich.text import Text

    if step.after is not None:
        return _Items(step.after)
    if any(child.error is not None for child in step.children):
        return Text("failed", style="red")
    message = str(step.error).partition("\n")[0]
    return Text(f"{type(step.error).__name__}: {message}", style="bold red")


def _bytes(n: int) -> str:
    from rich.filesize import decimal

    return decimal(n, precision=1).replace("bytes", "B").replace("1 byte", "1 B")
