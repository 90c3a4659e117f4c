"""A convolution over time that sees the past alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float, Integer

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._initializers import LECUN_NORMAL
from flax_extra.layer._numerics import get_accumulation_dtype
from flax_extra.layer._padding import zero_padding
from flax_extra.layer._sharding import broadcast_like


class CausalConv(nn.Module):
    r"""Convolves each step of a sequence with the steps before it.

    .. math:: y_t = b + \sum_{i=0}^{k-1} x_{s t - (k - 1 - i) d} \, w_i

    with kernel size k, strides s and dilation d; steps before the first are zeros. It equals
    ``flax.linen.Conv`` with ``padding="CAUSAL"``, and has its parameters ``kernel`` and ``bias``.
    In a stream it remembers the last :math:`(k - 1) d` steps.

    Args:
        features: features of the output; as many as the inputs have by default.
        kernel_size: how many steps each output sees, k.
        strides: how many steps there are from one output to the next, s. Blocks of a stream are as
            long as a multiple of it.
        dilation: how many steps apart the steps are that an output sees, d.
        groups: the features are split into so many groups, each convolved by itself. None for one
            group for each feature, a depthwise convolution.
        use_bias: whether there is a bias.
        kernel_init: initializer of the kernel, ``[kernel_size, features_in / groups, features]``.
        bias_init: initializer of the bias, ``[features]``.
        dtype: of the computation; the dtype to which inputs and parameters promote by default.
        param_dtype: of the parameters.
        precision: numerical precision of the products; see ``jax.lax.Precision``.

    Raises:
        ValueError: If ``features``, ``kernel_size``, ``strides``, ``dilation`` or ``groups`` is
            below 1.

    Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio" (2016), sections 2.1
    and 2.2.

    Shapes:
        ``xn.CausalConv(16, kernel_size=4)``: ``f32[b, t, 8] -> f32[b, t, 16]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> inputs = jnp.ones((2, 9, 8))
        >>> conv = xn.CausalConv(16, kernel_size=3, dilation=2)
        >>> outputs, variables = conv.init_with_output(jax.random.key(0), inputs)
        >>> outputs.shape, variables["params"]["kernel"].shape
        ((2, 9, 16), (3, 8, 16))

        A depthwise one runs on blocks of a stream:

        >>> conv = xn.CausalConv(kernel_size=4, groups=None)
        >>> stream = cb.stream(conv, "f32[b, t, 8]")
        >>> jax.tree.map(jnp.shape, stream.start(2).cache)
        {'past': (2, 3, 8), 'position': (2,)}
    """

    features: int | None = None
    kernel_size: int = 3
    strides: int = 1
    dilation: int = 1
    groups: int | None = 1
    use_bias: bool = True
    kernel_init: Initializer = LECUN_NORMAL
    bias_init: Initializer = nn.initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    def __post_init__(self) -> None:
        for name in ("features", "kernel_size", "strides", "dilation", "groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _errors.too_small(type(self).__name__, name, 1, value)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch time features_in"],
        *,
        lengths: Integer[Array, " batch"] | None = None,
        decode: bool = False,
    ) -> Float[Array, "batch time_out features"]:
        """Convolves a sequence, or the next block of it.

        Args:
            inputs: a sequence, ``[batch, time, features_in]``.
            lengths: how many steps of each sequence are valid, integers ``[batch]`` from 0 to time.
                The steps after them are padding, which may hold anything.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.

        Returns:
            ``[batch, time / strides, features]``, rounded up.

        Raises:
            ValueError: If the inputs do not have three axes, ``groups`` does not divide both
                numbers of features, or lengths are not integers ``[batch]`` in range.
            StreamError: If ``decode`` is true, and there is no state, ``strides`` does not divide
                the length of the block, or there are lengths and strides.
        """
        name = type(self).__name__
        if inputs.ndim != 3:
            raise _errors.wrong_rank(name, "inputs", inputs.shape, "[batch, time, features]")
        cache = cb.Cache(self, inputs, decode=decode, lengths=lengths)
        self._check_strides(inputs, cache)
        features_in = inputs.shape[-1]
        features = self.features or features_in
        groups = self.groups or features_in
        if features_in % groups or features % groups:
            raise _errors.indivisible_groups(name, features_in, features, groups)
        shape = (self.kernel_size, features_in // groups, features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs = zero_padding(inputs, cache.is_valid if cache.has_padding else None)
        n_past = (self.kernel_size - 1) * self.dilation
        if decode:
            inputs = cache.extend("past", inputs, n_past)
        else:
            inputs = jnp.pad(inputs, ((0, 0), (n_past, 0), (0, 0)))
        is_depthwise = groups == features_in == features
        convolve = self._sum_shifted if is_depthwise else self._convolve
        outputs = convolve(inputs, kernel, groups)
        if bias is None:
            return outputs
        return outputs + broadcast_like(bias, outputs.shape, outputs, n_axes=2)

    @nn.nowrap
    def _convolve(self, inputs: Array, kernel: Array, groups: int) -> Array:
        outputs: Array = jax.lax.conv_general_dilated(
            inputs,
            kernel,
            (self.strides,),
            "VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
            precision=self.precision,
        )
        return outputs

    @nn.nowrap
    def _sum_shifted(self, inputs: Array, kernel: Array, groups: int) -> Array:
        """Adds up shifted inputs, each times its row of a depthwise kernel.

        XLA has no fast depthwise convolution on every platform.
        """
        time: Any = inputs.shape[1] - (self.kernel_size - 1) * self.dilation
        shifted = (
            jax.lax.slice_in_dim(
                inputs, i * self.dilation, i * self.dilation + time, self.strides, axis=1
            )
            for i in range(self.kernel_size)
        )
        dtype = get_accumulation_dtype(inputs, kernel)
        terms = [x.astype(dtype) * kernel[i].astype(dtype)[None] for i, x in enumerate(shifted)]
        return sum(terms[1:], start=terms[0]).astype(inputs.dtype)

    @nn.nowrap
    def _check_strides(self, inputs: Array, cache: cb.Cache) -> None:
        if not cache.is_streaming or self.strides == 1:
            return
        if inputs.shape[1] % self.strides:
            raise _errors.block_and_strides(type(self).__name__, inputs.shape[1], self.strides)
        if cache.has_padding:
            raise _errors.lengths_and_strides(type(self).__name__, self.strides)
