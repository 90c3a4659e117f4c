"""Warnings about context keywords that may not do what the user means. Each is given once."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable

from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.children import Child, Pipeline, find_takers, walk_leaves
from flax_extra.combinator._core.naming import get_name

NORMS = (
    nn.BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    nn.WeightNorm,
    nn.SpectralNorm,
)
"""The norms of linen. They take a ``mask`` for their statistics."""

_given: set[Hashable] = set()


def warn_once(key: Hashable, message: str) -> None:
    """Warns the user, if no warning with this key was given before."""
    if key not in _given:
        _given.add(key)
        warnings.warn(message, UserWarning, stacklevel=2)


def warn_of_context(pipeline: Pipeline, context: Iterable[str]) -> None:
    """Warns of keywords that mean two things, and of layers that they do not reach."""
    for name in context:
        if name in pipeline.children.checked_context:
            continue
        pipeline.children.checked_context.add(name)
        bare = [leaf for _, leaf in find_takers(pipeline, name) if _takes_bare(leaf, name)]
        norms = sorted({get_name(f.target) for f in bare if isinstance(f.target, NORMS)})
        others = sorted({get_name(f.target) for f in bare if not isinstance(f.target, NORMS)})
        if norms and others:
            key = ("shared", name, *norms, *others)
            warn_once(key, errors.keyword_shared_with_norm(name, norms[0], others))
        for _, leaf in walk_leaves(pipeline):
            if _hides_keyword(leaf, name):
                layer = get_name(leaf.target)
                warn_once(("hidden", name, layer), errors.keyword_not_passed(name, layer))


def _takes_bare(leaf: Child, name: str) -> bool:
    """Whether a keyword reaches a leaf under the name that its parameter has."""
    return name in leaf.call_spec.bare


def _hides_keyword(leaf: Child, name: str) -> bool:
    """Whether a layer takes any keyword, so that nobody knows whether it needs this one."""
    spec = leaf.call_spec
    is_known = name in spec.keywords or name in leaf.fixed
    return leaf.module is not None and spec.takes_any and not is_known
