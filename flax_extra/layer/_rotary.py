"""Rotary positions: queries and keys are turned by an angle that grows with their position."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from flax_extra.layer import _errors
from flax_extra.layer._numerics import get_accumulation_dtype


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Scales rotary frequencies so that a longer sequence has the angles of a shorter one.

    Args:
        factor: how many times longer the sequence may be.

    Raises:
        ValueError: If ``factor`` is not above 0.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation" (2023), equation 4.

    Example:
        >>> from flax_extra import layer as xn
        >>> xn.LinearScaling(4.0)(1.0)
        0.25
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise _errors.not_positive(type(self).__name__, "factor", self.factor)

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Divides the frequencies by the factor."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    r"""Scales low rotary frequencies and keeps high ones, as Llama 3.1 does.

    .. math::
        f' = \begin{cases}
        f / factor & \text{if } L f / 2 \pi < low \\
        f & \text{if } L f / 2 \pi > high \\
        (1 - s) f / factor + s f & \text{otherwise, with } s = \frac{L f / 2 \pi - low}{high - low}
        \end{cases}

    with :math:`L f / 2 \pi` the number of turns within the original length L.

    Args:
        factor: how many times longer the sequence may be.
        low_turns: frequencies with fewer turns are divided by the factor
            (``low_freq_factor`` of the published configurations).
        high_turns: frequencies with more turns are kept (``high_freq_factor``).
        original_length: the length of the sequences before scaling.

    Raises:
        ValueError: If ``factor`` is not above 0, or ``low_turns`` is not below ``high_turns``.

    Source: Llama Team, "The Llama 3 Herd of Models" (2024), section 3.4.2, and the code of
    Llama 3.1.

    Example:
        >>> import numpy as np
        >>> from flax_extra import layer as xn
        >>> xn.Llama3Scaling(factor=8.0)(np.array([1.0, 1e-5])).tolist()
        [1.0, 1.25e-06]
    """

    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise _errors.not_positive(type(self).__name__, "factor", self.factor)
        if not self.low_turns < self.high_turns:
            raise _errors.wrong_turns(type(self).__name__, self.low_turns, self.high_turns)

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Scales the frequencies, in radians for each position."""
        turns = self.original_length * frequencies / (2 * math.pi)
        share = (turns - self.low_turns) / (self.high_turns - self.low_turns)
        share = np.clip(share, 0, 1)
        scaled: np.ndarray = (1 - share) * frequencies / self.factor + share * frequencies
        return scaled


@dataclasses.dataclass(frozen=True)
class RotaryEncoding:
    r"""Turns pairs of features of queries and keys by angles that grow with their position.

    .. math::
        \begin{pmatrix} x_1' \\ x_2' \end{pmatrix} =
        \begin{pmatrix} \cos p f & -\sin p f \\ \sin p f & \cos p f \end{pmatrix}
        \begin{pmatrix} x_1 \\ x_2 \end{pmatrix}, \quad f_i = base^{-2 i / d}

    for the i-th pair of features at position p. The product of a query and a key then depends on
    the distance of their positions alone. It is a value, not a layer: :class:`Attention` takes it
    as its field ``rotary``.

    Args:
        base: the frequencies go from 1 down to nearly 1 / base.
        fraction: the share of the features of each head that is turned; the others stay. 0.25 in
            GPT-NeoX, 0.5 in Phi.
        interleaved: which features are pairs: neighbours (0, 1), (2, 3), ..., as in the paper, in
            GPT-J and in Meta's own weights of Llama; or, by default, each feature of the first half
            with one of the second, as in GPT-NeoX and in the weights of Llama, Mistral and Qwen
            that transformers loads.
        scaling: a function of the frequencies, in radians for each position, such as
            :class:`LinearScaling` and :class:`Llama3Scaling`.

    Raises:
        ValueError: If ``base`` is not above 0, or ``fraction`` is not in (0, 1].

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021),
    section 3.2.

    Shapes:
        ``xn.RotaryEncoding().rotate``: ``f32[b, t, h, 64], i32[1, t] -> f32[b, t, h, 64]``

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> x = jnp.ones((1, 2, 1, 2))
        >>> turned = xn.RotaryEncoding().rotate(x, jnp.array([[0, 1]]))
        >>> [[round(float(y), 3) for y in step[0]] for step in turned[0]]
        [[1.0, 1.0], [-0.301, 1.382]]
    """

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.base > 0:
            raise _errors.not_positive(type(self).__name__, "base", self.base)
        if not 0 < self.fraction <= 1:
            raise _errors.wrong_fraction(type(self).__name__, self.fraction)

    def rotate(
        self, x: Float[Array, "batch time heads features"], positions: Int[Array, "#batch time"]
    ) -> Float[Array, "batch time heads features"]:
        """Turns queries or keys.

        Args:
            x: queries or keys, ``[batch, time, heads, features]``.
            positions: the position of each, ``[batch, time]`` or ``[1, time]``.

        Returns:
            An array of the same shape and dtype. Angles are computed in float32 or better.

        Raises:
            ValueError: If the number of features that are turned is odd.
        """
        size = round(x.shape[-1] * self.fraction)
        if size % 2:
            raise _errors.odd_features(type(self).__name__, size, x.shape[-1], self.fraction)
        dtype = get_accumulation_dtype(x)
        angles = positions.astype(dtype)[..., None, None] * self._compute_frequencies(size, dtype)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        turned, kept = x[..., :size].astype(dtype), x[..., size:]
        if self.interleaved:
            x1, x2 = turned[..., ::2], turned[..., 1::2]
        else:
            x1, x2 = turned[..., : size // 2], turned[..., size // 2 :]
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        if self.interleaved:
            turned = jnp.stack([y1, y2], axis=-1).reshape(turned.shape)
        else:
            turned = jnp.concatenate([y1, y2], axis=-1)
        return jnp.concatenate([turned.astype(x.dtype), kept], axis=-1)

    def _compute_frequencies(self, size: int, dtype: Any) -> Array:
        """Computes the angle for each position and pair, ``[1, 1, 1, size / 2]``."""
        frequencies = self.base ** -(np.arange(0, size, 2) / max(1, size))
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        return jnp.asarray(frequencies[None, None, None], dtype)
