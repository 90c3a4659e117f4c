"""Context keywords: values that a call of a pipeline hands to layers at any depth."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from flax_extra.combinator._core import errors


class Default(enum.Enum):
    """Stands for a default in a signature; a member of an enum stays itself when it is copied."""

    REQUIRED = enum.auto()


REQUIRED = Default.REQUIRED
"""The default of a context keyword that a call must give."""


@dataclasses.dataclass(frozen=True)
class ContextKeyword:
    """Stands for a context keyword as a fixed value of ``fn``. See :func:`context`.

    Args:
        name: the keyword at the call of the pipeline.
        default: the value if the call does not give it.
    """

    name: str
    default: Any = REQUIRED

    @property
    def is_required(self) -> bool:
        """Whether a call must give it."""
        return self.default is REQUIRED

    def __repr__(self) -> str:
        default = "" if self.is_required else f", default={self.default!r}"
        return f"context({self.name!r}{default})"


def context(name: str, default: Any = REQUIRED) -> ContextKeyword:
    """Binds a parameter of a callable to a context keyword of another name.

    A bare keyword at the call of a pipeline goes to every layer that takes a parameter of that
    name, and layers may mean different things by it: ``mask`` is an attention mask to
    ``xn.SelfAttention``, and a mask for statistics to ``nn.LayerNorm``. As a fixed value of
    :func:`fn`, ``context`` gives the parameter of one layer a keyword of its own.

    Args:
        name: the keyword at the call of the pipeline.
        default: the value if the call does not give the keyword. Without a default, every call
            must give it.

    Returns:
        A value to pass to :func:`fn`, for a required or an optional parameter.

    Raises:
        TypeError: If ``name`` is not a string that can be a keyword.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb, layer as xn
        >>> attention = cb.fn(
        ...     xn.SelfAttention(n_heads=2), mask=cb.context("padding_mask", default=None)
        ... )
        >>> block = cb.residual(nn.LayerNorm(), attention)
        >>> str(block.signature), "padding_mask" in block.keywords
        ('1 -> 1', True)
        >>> x, mask = jnp.ones((1, 3, 4)), jnp.array([[[True, True, False]]])
        >>> block.init_with_output(jax.random.key(0), x, padding_mask=mask)[0].shape
        (1, 3, 4)
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise errors.not_a_keyword(repr(name))
    return ContextKeyword(name, default)


def resolve_fixed(fixed: Mapping[str, Any], context: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replaces the context keywords among fixed values by their values in the context."""
    if not any(isinstance(value, ContextKeyword) for value in fixed.values()):
        return fixed
    return {
        name: context.get(value.name, value.default) if isinstance(value, ContextKeyword) else value
        for name, value in fixed.items()
    }


def list_context(fixed: Mapping[str, Any]) -> list[ContextKeyword]:
    """Lists the context keywords among fixed values."""
    return [value for value in fixed.values() if isinstance(value, ContextKeyword)]
