"""The summary of a pipeline: the stack between its steps, as data and as a table.

>>> from flax import linen as nn
>>> from flax_extra import combinator as cb
>>> encoder = nn.Embed(256, 64) >> cb.repeat(cb.residual(nn.Dense(64), nn.relu), 6)
>>> summary = cb.summary(encoder, "i32[b, t]")
>>> [(step.name, step.parameters) for step in summary.root.children]
[('Embed(num_embeddings=256, features=64)', 16384), ('repeat x6', 24960)]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flax_extra.combinator._core.tracebacks import api_boundary
from flax_extra.combinator._views import table
from flax_extra.combinator._views.record import record_run
from flax_extra.combinator._views.specs import parse_call
from flax_extra.combinator._views.steps import Step, count_variables, flatten_variables, measure

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Summary:
    """The stack between the steps of a pipeline. See :func:`summary`.

    Args:
        root: the pipeline as a step, with the steps within.
        totals: for each collection of variables, how many numbers it holds, and their bytes.
            What a stream remembers is in ``"cache"``.
        context: the context keywords, with shapes for arrays.
    """

    root: Step
    totals: Mapping[str, tuple[int, int]]
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> Exception | None:
        """The exception that the pipeline raises on these inputs, if it does."""
        return self.root.error

    def __str__(self) -> str:
        lines = [line.rstrip() for line in table.print_text(self.__rich__()).splitlines()]
        return "\n".join(lines).strip("\n")

    def __rich__(self) -> Table:
        return table.draw_table(self.root, self.totals, self.context)

    def _repr_html_(self) -> str:
        return table.print_html(self.__rich__())


@api_boundary
def summary(f: Callable[..., Any], *inputs: Any, **context: Any) -> Summary:
    """Shows the stack between the steps of a pipeline, and where its parameters are.

    With ``decode=True`` it also shows what each step remembers in a stream (see :func:`stream`) for
    the batch and the capacity that the inputs have.

    It computes nothing, and random numbers need no key. If a step fails, the summary ends with that
    step, and holds the error.

    Args:
        f: a pipeline, or any callable that could be a step of one.
        inputs: the items of the stack, top first, as for :func:`shape_signature`: texts such as
            ``"f32[b, t, 64]"``, arrays, ``jax.ShapeDtypeStruct``, None.
        context: keywords for every step that takes them, such as ``deterministic``. For an array,
            a spec serves: ``padding_mask="bool[b, 1, t]"``.

    Returns:
        A tree of steps. It prints as a table, and a notebook shows it.

    Raises:
        ValueError: If an input is not a spec.

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
    run = record_run(f, parse_call(inputs, context))
    variables = {c: flatten_variables(tree) for c, tree in run.variables.items()}
    root = count_variables(run.root, variables.get("params", {}), variables.get("cache", {}))
    totals = {c: measure(leaves.values()) for c, leaves in variables.items()}
    return Summary(root, totals, run.call.context)
