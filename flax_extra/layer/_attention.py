r"""Multi-head attention layers.

Source of the formulas: Vaswani et al., "Attention Is All You Need" (2017), sections 3.2.1 and
3.2.2. Names differ from the paper's: ``d_qk`` and ``d_v`` count the features of all heads together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float, Shaped

from flax_extra.layer import _errors
from flax_extra.layer._attend import Mask, attend, check_chunk_size, check_rate
from flax_extra.layer._initializers import LECUN_NORMAL, reshape_drawn

SelfMask: TypeAlias = (
    Shaped[Array, "#batch #time #time"] | Shaped[Array, "#batch #heads #time #time"]
)
"""A :data:`Mask` between the positions of one sequence."""

Dimension: TypeAlias = int | Callable[[Array, Array, int | None, int | None], int]
"""A number of features, or a function that computes it from (inputs_q, inputs_kv, d_qk, d_v).

The functions are called in the order d_qk, d_v, d_output. A dimension that is computed later is
passed as None: d_qk and d_v to the function for d_qk, d_v to the function for d_v.
"""


def _like_shape(*references: Any, index: int) -> int:
    """Gives the number of features of one of the inputs."""
    return int(references[index].shape[-1])


def _like_value(*references: Any, index: int) -> int:
    """Gives a dimension that is known already."""
    return int(references[index])


def _resolve(dimension: Dimension, *references: Any) -> int:
    return dimension(*references) if callable(dimension) else dimension


class Attention(nn.Module):
    r"""Attends from each position of one sequence to all unmasked positions of another.

    .. math::
        \begin{aligned}
        q &= x_q w_q + b_q, \quad k = x_{kv} w_k + b_k, \quad v = x_{kv} w_v + b_v \\
        y &= \operatorname{attend}(q, k, v, mask)\, w_o + b_o
        \end{aligned}

    with :math:`w_q \in R^{d_{x_q} \times n_{heads} \times d_{qk} / n_{heads}}`,
    :math:`w_k \in R^{d_{x_{kv}} \times n_{heads} \times d_{qk} / n_{heads}}`,
    :math:`w_v \in R^{d_{x_{kv}} \times n_{heads} \times d_v / n_{heads}}` and
    :math:`w_o \in R^{d_v \times d_o}`, in the sub-layers ``query``, ``key``, ``value`` and ``out``.

    Args:
        n_heads: number of attention heads.
        d_qk: features of query and key, all heads together; those of ``inputs_q`` by default.
            ``d_qk``, ``d_v`` and ``d_output`` are each an integer, or a function of (inputs_q,
            inputs_kv, d_qk, d_v) that returns one.
        d_v: features of the value, all heads together; ``d_qk`` by default.
        d_output: features of the output; ``d_v`` by default.
        kernel_init: initializer of the kernels. For query, key and value it is called with the
            shape ``(features, heads * features of one head)``.
        bias_init: initializer of the biases.
        use_bias: whether there are biases.
        dropout_rate: probability that an attention weight is dropped, in [0, 1). Dropout draws
            from the rng stream ``dropout``.
        deterministic: whether to leave dropout out. The same keyword of a call overrides it.
        precision: numerical precision of all products; see ``jax.lax.Precision``.
        dtype: of the computation; the dtype to which inputs and parameters promote by default.
        param_dtype: of the parameters.
        chunk_size: how many keys to attend to at a time; chosen from the sizes by default. See
            :func:`attend`.
        out_kernel_init: initializer of the kernel of ``out``; ``kernel_init`` by default.
        out_bias_init: initializer of the bias of ``out``; ``bias_init`` by default.

    Raises:
        ValueError: If ``n_heads`` does not divide ``d_qk`` or ``d_v``, ``dropout_rate`` is not in
            [0, 1), or ``n_heads`` or ``chunk_size`` is below 1.

    Source: Vaswani et al. (2017), section 3.2.2.

    Shapes:
        ``xn.Attention(n_heads=4)``: ``f32[b, q, 64], f32[b, k, 32], bool[b, q, k] -> f32[b, q,
        64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import combinator as cb, layer as xn
        >>> latents, inputs = jnp.ones((2, 5, 8)), jnp.ones((2, 7, 3))
        >>> attention = xn.Attention(n_heads=2)
        >>> y, variables = attention.init_with_output(jax.random.key(0), latents, inputs, None)
        >>> y.shape, variables["params"]["key"]["kernel"].shape
        ((2, 5, 8), (3, 2, 4))
        >>> print(cb.infer_signature(attention))
        3 -> 1
    """

    n_heads: int = 8
    d_qk: Dimension = functools.partial(_like_shape, index=0)
    d_v: Dimension = functools.partial(_like_value, index=2)
    d_output: Dimension = functools.partial(_like_value, index=3)
    kernel_init: Initializer = LECUN_NORMAL
    bias_init: Initializer = nn.initializers.zeros
    use_bias: bool = True
    dropout_rate: float = 0.0
    deterministic: bool = True
    precision: PrecisionLike = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    chunk_size: int | None = None
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None

    def __post_init__(self) -> None:
        if self.n_heads < 1:
            raise _errors.too_small(type(self).__name__, "n_heads", 1, self.n_heads)
        check_rate(type(self).__name__, self.dropout_rate)
        check_chunk_size(type(self).__name__, self.chunk_size)
        for name in ("d_qk", "d_v"):
            dimension = getattr(self, name)
            if not callable(dimension):
                self._split_heads(name, dimension)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "batch time_q features_q"],
        inputs_kv: Float[Array, "batch time_kv features_kv"],
        mask: Mask | None,
        *,
        deterministic: bool | None = None,
    ) -> Float[Array, "batch time_q features"]:
        """Attends from the positions of ``inputs_q`` to those of ``inputs_kv``.

        Args:
            inputs_q: inputs for the query, ``[batch, time_q, features_q]``.
            inputs_kv: inputs for key and value, ``[batch, time_kv, features_kv]``.
            mask: booleans or integers, non-zero where a query attends to a key, or None. It
                broadcasts to ``[batch, time_q, time_kv]`` or
                ``[batch, heads, time_q, time_kv]``.
            deterministic: whether to leave dropout out; the field's value by default.

        Returns:
            Attention vectors, ``[batch, time_q, d_output]``.

        Raises:
            ValueError: If the shapes do not agree; see :func:`attend`.
        """
        for name, inputs in (("inputs_q", inputs_q), ("inputs_kv", inputs_kv)):
            if inputs.ndim != 3:
                raise _errors.wrong_rank(
                    type(self).__name__, name, inputs.shape, "[batch, time, features]"
                )
        d_qk = _resolve(self.d_qk, inputs_q, inputs_kv, None, None)
        d_v = _resolve(self.d_v, inputs_q, inputs_kv, d_qk, None)
        d_output = _resolve(self.d_output, inputs_q, inputs_kv, d_qk, d_v)
        if deterministic is None:
            deterministic = self.deterministic
        has_dropout = self.dropout_rate > 0 and not deterministic
        dropout_rngkey = self.make_rng("dropout") if has_dropout else None
        heads_qk, heads_v = self._split_heads("d_qk", d_qk), self._split_heads("d_v", d_v)
        settings: dict[str, Any] = {
            "use_bias": self.use_bias,
            "precision": self.precision,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

        def project(name: str, inputs: Array, heads: tuple[int, int]) -> Array:
            projection = nn.DenseGeneral(
                heads,
                name=name,
                kernel_init=reshape_drawn(self.kernel_init, (inputs.shape[-1], *heads)),
                bias_init=reshape_drawn(self.bias_init, heads),
                **settings,
            )
            return projection(inputs)

        vectors = attend(
            project("query", inputs_q, heads_qk),
            project("key", inputs_kv, heads_qk),
            project("value", inputs_kv, heads_v),
            mask,
            dropout_rngkey=dropout_rngkey,
            dropout_rate=self.dropout_rate,
            deterministic=deterministic,
            precision=self.precision,
            chunk_size=self.chunk_size,
        )
        out = nn.Dense(
            d_output,
            name="out",
            kernel_init=self.kernel_init if self.out_kernel_init is None else self.out_kernel_init,
            bias_init=self.bias_init if self.out_bias_init is None else self.out_bias_init,
            **settings,
        )
        return out(vectors)

    @nn.nowrap
    def _split_heads(self, name: str, dimension: int) -> tuple[int, int]:
        """Splits the features of all heads together into (heads, features of one head)."""
        if dimension < 1:
            raise _errors.too_small(type(self).__name__, name, 1, dimension)
        if dimension % self.n_heads:
            raise _errors.indivisible(type(self).__name__, name, dimension, self.n_heads)
        return self.n_heads, dimension // self.n_heads


QKVAttention = Attention
"""Attention whose key and output have, by default, as many features as the query's inputs."""


class KVQAttention(Attention):
    """Attention whose key has, by default, as many features as the inputs of key and value.

    Its output has, by default, as many features as the inputs of the query, so that the two can be
    added. Everything else is as in :class:`Attention`.

    Args:
        n_heads: number of attention heads; see :class:`Attention` for the fields not listed here.
        d_qk: features of query and key, all heads together; those of ``inputs_kv`` by default.
        d_output: features of the output; those of ``inputs_q`` by default.

    Raises:
        ValueError: If ``n_heads`` does not divide ``d_qk`` or ``d_v``, ``dropout_rate`` is not in
            [0, 1), or ``n_heads`` or ``chunk_size`` is below 1.

    Source: Jaegle et al., "Perceiver IO" (2021), appendix E; its cross-attention has this form.

    Shapes:
        ``xn.KVQAttention(n_heads=4)``: ``f32[b, q, 64], f32[b, k, 32], bool[b, q, k] -> f32[b,
        q, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_extra import layer as xn
        >>> latents, inputs = jnp.ones((2, 5, 8)), jnp.ones((2, 7, 6))
        >>> attention = xn.KVQAttention(n_heads=2)
        >>> y, variables = attention.init_with_output(jax.random.key(0), latents, inputs, None)
        >>> y.shape, variables["params"]["key"]["kernel"].shape
        ((2, 5, 8), (6, 2, 3))
    """

    d_qk: Dimension = functools.partial(_like_shape, index=1)
    d_output: Dimension = functools.partial(_like_shape, index=0)


class SelfAttention(Attention):
    r"""Attends from each position of a sequence to all its unmasked positions.

    .. math:: \operatorname{SelfAttention}(x, mask) = \operatorname{Attention}(x, x, mask)

    It holds no norm and no residual connection: pipelines add those.

    Args:
        n_heads: number of attention heads; see :class:`Attention` for the other fields.

    Raises:
        ValueError: If ``n_heads`` does not divide ``d_qk`` or ``d_v``, ``dropout_rate`` is not in
            [0, 1), or ``n_heads`` or ``chunk_size`` is below 1.

    Source: Vaswani et al. (2017), section 3.2.3.

    Shapes:
        ``xn.SelfAttention(n_heads=4)``: ``f32[b, t, 64], bool[b, t, t] -> f32[b, t, 64]``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb, layer as xn
        >>> attention = cb.fn(xn.SelfAttention(n_heads=2), mask=None)
        >>> tower = cb.repeat(cb.residual(nn.LayerNorm(), attention), 6)
        >>> tower.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
        (2, 5, 8)
    """

    # The public API makes it a subclass of Attention and gives it one sequence instead of two.
    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        inputs_qkv: Float[Array, "batch time features_in"],
        mask: SelfMask | None,
        *,
        deterministic: bool | None = None,
    ) -> Float[Array, "batch time features"]:
        """Attends from the positions of ``inputs_qkv`` to one another.

        Args:
            inputs_qkv: inputs for query, key and value, ``[batch, time, features_in]``.
            mask: booleans or integers, non-zero where a query attends to a key, or None. It
                broadcasts to ``[batch, time, time]`` or ``[batch, heads, time, time]``.
            deterministic: whether to leave dropout out; the field's value by default.

        Returns:
            Attention vectors, ``[batch, time, d_output]``.

        Raises:
            ValueError: If the shapes do not agree; see :func:`attend`.
        """
        return super().__call__(inputs_qkv, inputs_qkv, mask, deterministic=deterministic)
