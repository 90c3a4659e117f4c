"""Feed-forward layers: a small network that is applied to each position by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float

from flax_extra.layer import _errors
from flax_extra.layer._initializers import LECUN_NORMAL


class FeedForward(nn.Module):
    r"""Applies two dense layers, with an activation between them, to each position.

    .. math:: \operatorname{activation}(x w_h + b_h)\, w_o + b_o

    with :math:`w_h \in R^{d \times d_{hidden}}` and :math:`w_o \in R^{d_{hidden} \times d}` in the
    sub-layers ``Dense_0`` and ``Dense_1``. With ``gated=True``,

    .. math:: (\operatorname{activation}(x w_g + b_g) \odot (x w_u + b_u))\, w_o + b_o

    with :math:`w_g, w_u \in R^{d \times d_{hidden}}` in the sub-layers ``gate`` and ``up``, and
    :math:`w_o` in ``out``: SwiGLU with ``activation=nn.silu``, GeGLU with ``activation=nn.gelu``.

    Args:
        widening_factor: how many times wider the hidden layer is than the inputs.
        activation: a nonlinear function, or a linen module.
        kernel_init: initializer of the kernels.
        dtype: of the computation; the dtype to which inputs and parameters promote by default.
        param_dtype: of the parameters.
        precision: numerical precision of the products; see ``jax.lax.Precision``.
        bias_init: initializer of the biases.
        out_kernel_init: initializer of the last kernel; ``kernel_init`` by default.
        out_bias_init: initializer of the last bias; ``bias_init`` by default.
        use_bias: whether there are biases.
        d_hidden: features of the hidden layer, instead of a ``widening_factor``.
        gated: whether the hidden layer is a product of two, as above.

    Raises:
        ValueError: If ``widening_factor`` or ``d_hidden`` is below 1, or both are given.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.3; Shazeer, "GLU Variants
    Improve Transformer" (2020), section 2, for the gated form. The default activation is linen's
    GELU, in its tanh form: Hendrycks and Gimpel (2016), section 2.

    Shapes:
        ``xn.FeedForward(widening_factor=4)``: ``f32[b, t, 64] -> f32[b, t, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import layer as xn
        >>> key, inputs = jax.random.key(0), jnp.ones((2, 3))
        >>> variables = xn.FeedForward(widening_factor=4).init(key, inputs)
        >>> variables["params"]["Dense_0"]["kernel"].shape
        (3, 12)
        >>> swiglu = xn.FeedForward(activation=nn.silu, d_hidden=8, gated=True, use_bias=False)
        >>> jax.tree.map(jnp.shape, swiglu.init(key, inputs)["params"])
        {'gate': {'kernel': (3, 8)}, 'out': {'kernel': (8, 3)}, 'up': {'kernel': (3, 8)}}
    """

    widening_factor: int = 1
    activation: Callable[..., Array] = nn.gelu
    kernel_init: Initializer = LECUN_NORMAL
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    bias_init: Initializer = nn.initializers.zeros
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    d_hidden: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.widening_factor < 1:
            raise _errors.too_small(name, "widening_factor", 1, self.widening_factor)
        if self.d_hidden is not None:
            if self.d_hidden < 1:
                raise _errors.too_small(name, "d_hidden", 1, self.d_hidden)
            if self.widening_factor != 1:
                raise _errors.two_widths(name, self.widening_factor, self.d_hidden)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Applies the layer to each position.

        Args:
            inputs: an array, ``[..., features]``.

        Returns:
            An array of the same shape.
        """
        features = inputs.shape[-1]
        dense = functools.partial(
            nn.Dense,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        widen = functools.partial(
            dense,
            features * self.widening_factor if self.d_hidden is None else self.d_hidden,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        narrow = functools.partial(
            dense,
            features,
            kernel_init=self.kernel_init if self.out_kernel_init is None else self.out_kernel_init,
            bias_init=self.bias_init if self.out_bias_init is None else self.out_bias_init,
        )
        outputs: Array
        if self.gated:
            hidden = self.activation(widen(name="gate")(inputs)) * widen(name="up")(inputs)
            outputs = narrow(name="out")(hidden)
        else:
            hidden = self.activation(widen(name="Dense_0")(inputs))
            outputs = narrow(name="Dense_1")(hidden)
        return outputs
