"""``layers``: the layers of a pipeline, and where they have their variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from flax_extra.combinator._core.children import is_pipeline, make_child, walk_leaves
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._surgery.places import find_places, format_path


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a pipeline. See :func:`layers`.

    Args:
        path: the names of the scopes that lead to its variables.
        layer: the linen module.
        signature: how many items it takes and gives, where the pipeline uses it first.
        n_stacked: how many leading axes its parameters have for copies of a ``repeat``, or members
            of a ``vmap`` that does not share them.
    """

    path: tuple[str, ...]
    layer: nn.Module
    signature: Signature
    n_stacked: int = 0

    def __str__(self) -> str:
        stacked = f", {self.n_stacked} stacked" if self.n_stacked else ""
        return f"{format_path(self.path)}: {type(self.layer).__name__} {self.signature}{stacked}"


def layers(f: Callable[..., Any]) -> list[Layer]:
    r"""Lists the layers of a pipeline, at any depth, in the order of the expression.

    A layer that is used in several places is listed once. The layers that another layer holds are
    its own affair, and are not listed.

    Args:
        f: a pipeline, not bound to variables.

    Returns:
        For each layer its path in the parameter tree, the layer itself, its signature, and how many
        leading axes its parameters have for copies.

    Raises:
        TypeError: If ``f`` is bound to variables, or was made in a method of a module.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> block = cb.residual(nn.LayerNorm(), nn.Dense(8), nn.gelu)
        >>> print(*cb.layers(nn.Embed(256, 8) >> cb.repeat(block, 6)), sep="\n")
        Embed_0: Embed 1 -> 1
        Repeat_0/LayerNorm_0: LayerNorm 1 -> 1, 1 stacked
        Repeat_0/Dense_0: Dense 1 -> 1, 1 stacked
    """
    signatures: dict[int, Signature] = {}
    if is_pipeline(f):
        for _, child in walk_leaves(f):
            if child.module is not None:
                signatures.setdefault(id(child.module), child.signature)
    else:
        child = make_child(f)
        signatures[id(child.module)] = child.signature
    return [
        Layer(
            place.path,
            place.module,
            signatures[id(place.module)],
            len(place.list_stacks("params")),
        )
        for place in find_places("layers", f)
        if place.is_layer
    ]
