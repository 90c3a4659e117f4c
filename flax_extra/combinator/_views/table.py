"""The table that a summary prints as."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from flax_extra.combinator._core.arrays import is_array
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._core.stack import Stack
from flax_extra.combinator._views.steps import Step
from flax_extra.combinator._words.select import Identity

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

WIDTH = 120
"""How many columns the table has at most."""

MAX_ITEM_WIDTH = 40
"""How many columns one item of a stack takes at most."""


def draw_table(
    root: Step, totals: Mapping[str, tuple[int, int]], context: Mapping[str, Any]
) -> Table:
    """Draws the steps of a pipeline, and what each collection of variables holds in total."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_footer=True)
    is_whole = root.error is None
    n_total, n_bytes = totals.get("params", (0, 0))
    count, size = (f"{n_total:,}", _format_bytes(n_bytes)) if is_whole else ("", "")
    table.add_column("step", "total" if is_whole else "", no_wrap=True, max_width=60)
    table.add_column("signature", no_wrap=True, min_width=9)
    table.add_column("stack after")
    table.add_column("parameters", count, justify="right", no_wrap=True, min_width=len(count))
    table.add_column("size", size, justify="right", no_wrap=True, min_width=len(size))
    has_state = "cache" in totals
    if has_state:
        total = _format_bytes(totals["cache"][1])
        table.add_column("state", total, justify="right", no_wrap=True, min_width=len(total))
    table.add_row(Text("inputs", style="dim"), "", _Items(root.before, style="dim"))
    for name, value in context.items():
        if any(map(is_array, jax.tree.leaves(value))):
            table.add_row(Text(f"context {name}", style="dim"), "", _Items((value,), style="dim"))
    for depth, step in _walk_nested(root):
        table.add_row(
            Text("  " * depth + step.name, style="bold" if step.children else ""),
            str(step.signature),
            _draw_outcome(step),
            "shared" if step.shared else f"{step.parameters:,}" if step.parameters else "",
            _format_bytes(step.bytes) if step.parameters else "",
            *([_format_bytes(step.state)] if has_state and not _is_zero(step.state) else []),
        )
    for collection, (n, width) in totals.items():
        if collection not in ("params", "cache"):
            table.add_row(Text(collection, style="dim"), "", "", f"{n:,}", _format_bytes(width))
    return table


def print_text(table: Table) -> str:
    """Prints a table as plain text."""
    return _print(table).export_text()


def print_html(table: Table) -> str:
    """Prints a table as HTML."""
    style = "font-family:monospace;line-height:1.2"
    code = f'<pre style="{style}">{{code}}</pre>'
    return _print(table, html=True).export_html(inline_styles=True, code_format=code)


def _print(table: Table, html: bool = False) -> Console:
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=WIDTH, record=True, force_terminal=html, legacy_windows=False
    )
    console.print(table)
    return console


def _walk_nested(step: Step, depth: int = 0) -> Iterator[tuple[int, Step]]:
    yield depth, step
    for child in step.children:
        if not isinstance(child.target, Identity):  # such as the shortcut of a residual
            yield from _walk_nested(child, depth + 1)


class _Items:
    """A stack in a cell of the table. Lines break between its items."""

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
        return Measurement(min(max(widths), MAX_ITEM_WIDTH), sum(map(len, self._parts)))


def _draw_outcome(step: Step) -> Text | _Items:
    from rich.text import Text

    if step.after is not None:
        return _Items(step.after)
    if any(child.error is not None for child in step.children):
        return Text("failed", style="red")
    message = str(step.error).partition("\n")[0]
    return Text(f"{type(step.error).__name__}: {message}", style="bold red")


def _format_bytes(n: Any) -> str:
    from rich.filesize import decimal

    if not isinstance(n, int):  # it has names for sizes
        return f"{n} B"
    return decimal(n, precision=1).replace("bytes", "B").replace("1 byte", "1 B")


def _is_zero(n: Any) -> bool:
    return isinstance(n, int) and n == 0
