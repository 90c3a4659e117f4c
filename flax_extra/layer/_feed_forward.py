"""The layer between attentions: each position by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float

from flax_extra import combinator as cb
from flax_extra.layer import _errors


class FeedForward(nn.Module):
    r"""Learns a dense vector representation, of each position by itself.

    .. math:: \operatorname{activation}(x w_h + b_h)\, w_o + b_o

    with :math:`w_h \in R^{d \times d \cdot factor}` and :math:`w_o \in R^{d \cdot factor \times d}`
    in the sublayers ``Dense_0`` and ``Dense_1``.

    Args:
        widening_factor: how many times wider the hidden layer is than the inputs.
        activation: a nonlinear function.
        kernel_init: initializer of the weights.
        dtype: of the computation; that of inputs and parameters by default.
        param_dtype: of the parameters.
        precision: numerical precision of the products; see ``jax.lax.Precision``.

    Raises:
        ValueError: where ``widening_factor`` is below 1.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.3; the activation is
    linen's GELU, in its tanh form: Hendrycks and Gimpel (2016), section 2.

    Shapes:
        ``xn.FeedForward(widening_factor=4)``: ``f32[b, t, 64] -> f32[b, t, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> variables = xn.FeedForward(widening_factor=4).init(jax.random.key(0), jnp.ones((2, 3)))
        >>> variables["params"]["Dense_0"]["kernel"].shape
        (3, 12)
    """

    widening_factor: int = 1
    activation: Callable[..., Array] = nn.gelu
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    def __post_init__(self) -> None:
        if self.widening_factor < 1:
            raise _errors.too_small(type(self).__name__, "widening_factor", 1, self.widening_factor)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Applies the layer.

        Args:
            inputs: an array, ``[..., features]``.

        Returns:
            An array of the same shape.
        """
        dense = functools.partial(
            nn.Dense,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        d = inputs.shape[-1]
        outputs: Array = cb.serial(dense(d * self.widening_factor), self.activation, dense(d))(
            inputs
        )
        return outputs
