r"""Multi-head attention layers.

Source of the formulas: Vaswani et al., "Attention Is All You Need" (2017), sections 3.2.1 and
3.2.2. Names differ from the paper's: ``d_qk`` and ``d_v`` count the features of all heads together.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float, Integer, Shaped

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._attend import (
    Mask,
    attend,
    check_chunk_size,
    check_logit_cap,
    check_mask_dtype,
    check_rate,
    check_window,
)
from flax_extra.layer._constructor import Constructor, check_constructor, make_named
from flax_extra.layer._initializers import LECUN_NORMAL, reshape_drawn
from flax_extra.layer._padding import zero_padding
from flax_extra.layer._rotary import RotaryEncoding

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


class _Operands(NamedTuple):
    """What attention is computed from.

    Args:
        query: ``[batch, time_q, heads, d_qk]``.
        key: ``[batch, time_kv, kv_heads, d_qk]``, or where a stream remembers it.
        value: ``[batch, time_kv, kv_heads, d_v]``, or where a stream remembers it.
        mask: which keys a query sees, or None.
        query_positions: ``[batch or 1, time_q]``.
        key_positions: ``[batch or 1, time_kv]``.
    """

    query: Array
    key: Any
    value: Any
    mask: Array | None
    query_positions: Array
    key_positions: Array


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
    With ``n_kv_heads``, the kernels of key and value have so many heads.

    In a stream (see :func:`flax_extra.combinator.stream`), attention with ``causal`` remembers the
    keys and values of all steps, or of those in the ``window``. Attention without ``causal`` goes
    from the steps of the stream to a memory, such as an encoder's outputs: it projects its keys and
    values once, and in later blocks ``inputs_kv`` may be None.

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
        out_use_bias: whether ``out`` has a bias; as ``use_bias`` says by default.
        causal: whether a position attends only to positions up to its own. With fewer queries than
            keys, the last query is at the position of the last key.
        window: how many positions a position attends to, its own included. It needs ``causal``.
        n_kv_heads: number of heads of key and value, each for a group of query heads; ``n_heads``
            by default.
        rotary: how queries and keys are turned by their positions; see :class:`RotaryEncoding`.
        position_bias: a constructor of a module that gives what to add to the logits from the
            positions of queries and keys, such as
            ``functools.partial(xn.RelativePositionBias, n_heads)``. It gets the name
            ``position_bias``, if it takes one.
        qk_norm: a constructor of the norms of queries and keys, such as ``nn.RMSNorm``, over the
            features of each head. They get the names ``query_norm`` and ``key_norm``, if it takes
            one.
        logit_cap: what the logits stay below, by a tanh; no cap by default.
        scale: factor of the logits; one over the square root of a head's features by default.
        sow_weights: whether to sow the attention weights, ``[batch, heads, time_q, time_kv]``,
            before dropout, as ``weights`` into the collection ``"intermediates"`` if it is mutable.
        cache_dtype: of the keys and values that a stream remembers; their own by default.
        attention_fn: what computes the vectors from query, key and value: :func:`attend`, or a
            function that takes the same arguments. It is given those that are not the default.

    Raises:
        ValueError: If ``n_heads`` does not divide ``d_qk`` or ``d_v``, or ``n_kv_heads`` does not
            divide ``n_heads``, ``dropout_rate`` is not in [0, 1), a number of heads, ``chunk_size``
            or ``window`` is below 1, ``window`` is given without ``causal``, ``logit_cap`` is not
            above 0, or ``position_bias`` or ``qk_norm`` is no constructor.
        TypeError: If ``rotary`` is no RotaryEncoding.

    Source: Vaswani et al. (2017), section 3.2.2. Ainslie et al., "GQA" (2023) for ``n_kv_heads``;
    Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023), section 2, for
    ``qk_norm``.

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
    out_use_bias: bool | None = None
    causal: bool = False
    window: int | None = None
    n_kv_heads: int | None = None
    rotary: RotaryEncoding | None = None
    position_bias: Constructor | None = None
    qk_norm: Constructor | None = None
    logit_cap: float | None = None
    scale: float | None = None
    sow_weights: bool = False
    cache_dtype: Dtype | None = None
    attention_fn: Callable[..., Array] = attend

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.n_heads < 1:
            raise _errors.too_small(name, "n_heads", 1, self.n_heads)
        if self.n_kv_heads is not None:
            if self.n_kv_heads < 1:
                raise _errors.too_small(name, "n_kv_heads", 1, self.n_kv_heads)
            if self.n_heads % self.n_kv_heads:
                raise _errors.indivisible_kv_heads(name, self.n_kv_heads, self.n_heads)
        check_rate(name, self.dropout_rate)
        check_chunk_size(name, self.chunk_size)
        check_window(name, self.window, self.causal)
        check_logit_cap(name, self.logit_cap)
        for field in ("d_qk", "d_v"):
            dimension = getattr(self, field)
            if not callable(dimension):
                self._split_heads(field, dimension)
        for field in ("position_bias", "qk_norm"):
            if getattr(self, field) is not None:
                check_constructor(name, field, getattr(self, field))
        if self.rotary is not None and not isinstance(self.rotary, RotaryEncoding):
            raise _errors.not_rotary(name, type(self.rotary).__name__)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "batch time_q features_q"],
        inputs_kv: Float[Array, "batch time_kv features_kv"],
        mask: Mask | None,
        *,
        deterministic: bool | None = None,
        decode: bool = False,
        lengths: Integer[Array, " batch"] | None = None,
    ) -> Float[Array, "batch time_q features"]:
        """Attends from the positions of ``inputs_q`` to those of ``inputs_kv``.

        Args:
            inputs_q: inputs for the query, ``[batch, time_q, features_q]``.
            inputs_kv: inputs for key and value, ``[batch, time_kv, features_kv]``. In a stream
                without ``causal``, None goes on with those given before.
            mask: booleans or integers, non-zero where a query attends to a key, or None. It
                broadcasts to ``[batch, time_q, time_kv]`` or
                ``[batch, heads, time_q, time_kv]``. In a stream with ``causal`` it says which steps
                of the block are keys, ``[batch, 1, time]``, now and in all later blocks.
            deterministic: whether to leave dropout out; the field's value by default.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.
            lengths: how many steps of ``inputs_q`` are valid, integers ``[batch]``. With ``causal``
                they hold for ``inputs_kv``, too.

        Returns:
            Attention vectors, ``[batch, time_q, d_output]``.

        Raises:
            StreamError: If ``decode`` is true, and there is no state, or ``inputs_kv`` is None and
                was not given before, or the mask hides more than steps of the block.
            ValueError: If the shapes do not agree; see :func:`attend`.
        """
        return self._run(
            inputs_q, inputs_kv, mask, deterministic, decode, lengths, is_memory=not self.causal
        )

    @nn.nowrap
    def _run(
        self,
        inputs_q: Array,
        inputs_kv: Array | None,
        mask: Array | None,
        deterministic: bool | None,
        decode: bool,
        lengths: Array | None,
        *,
        is_memory: bool,
    ) -> Array:
        """Attends to the steps of a sequence, or to a memory that a stream does not append to."""
        for name, inputs in (("inputs_q", inputs_q), ("inputs_kv", inputs_kv)):
            if inputs is not None and inputs.ndim != 3:
                raise _errors.wrong_rank(
                    type(self).__name__, name, inputs.shape, "[batch, time, features]"
                )
        cache = cb.Cache(self, inputs_q, decode=decode, lengths=lengths)
        if cache.has_padding:
            inputs_q = zero_padding(inputs_q, cache.is_valid)
        find_operands = self._find_memory if is_memory else self._find_steps
        operands = find_operands(cache, inputs_q, inputs_kv, mask)
        options: dict[str, Any] = {
            "precision": self.precision,
            "chunk_size": self.chunk_size,
            "causal": self.causal,
            "window": self.window,
            "logit_cap": self.logit_cap,
            "scale": self.scale,
        }
        if self.causal and cache.is_streaming:
            options["query_positions"] = operands.query_positions
            options["key_positions"] = operands.key_positions
        if self.position_bias is not None:
            find_bias = make_named(self.position_bias, "position_bias")
            options["bias"] = find_bias(operands.query_positions, operands.key_positions)
        options = {k: x for k, x in options.items() if x is not None and x is not False}
        if self.sow_weights and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", _compute_weights(*operands[:4], options))
        vectors = self.attention_fn(*operands[:4], **options, **self._choose_dropout(deterministic))
        d_qk, d_v = (self.n_heads * x.shape[3] for x in (operands.query, operands.value))
        out = nn.Dense(
            _resolve(self.d_output, inputs_q, inputs_kv, d_qk, d_v),
            name="out",
            kernel_init=self.kernel_init if self.out_kernel_init is None else self.out_kernel_init,
            bias_init=self.bias_init if self.out_bias_init is None else self.out_bias_init,
            use_bias=self.use_bias if self.out_use_bias is None else self.out_use_bias,
            **self._get_settings(),
        )
        return out(vectors)

    @nn.nowrap
    def _find_steps(
        self, cache: cb.Cache, inputs_q: Array, inputs_kv: Array | None, mask: Array | None
    ) -> _Operands:
        """Finds keys and values of steps, those before this block included."""
        if inputs_kv is None:
            raise _errors.no_keys(type(self).__name__)
        time_q, time_kv = inputs_q.shape[1], inputs_kv.shape[1]
        if cache.has_padding or cache.is_streaming:
            if time_q != time_kv:
                raise _errors.unequal_blocks(type(self).__name__, time_q, time_kv)
            inputs_kv = zero_padding(inputs_kv, cache.is_valid if cache.has_padding else None)
        query_positions = key_positions = cache.positions
        if not cache.is_streaming:
            key_positions = _count(time_kv)
            if self.causal:  # the last query is at the position of the last key
                query_positions = query_positions + (time_kv - time_q)
            elif cache.has_padding:
                mask = _hide_padding(mask, cache.is_valid)
        d_qk, d_v = self._resolve_dimensions(inputs_q, inputs_kv)
        query = self._project_query(inputs_q, d_qk, query_positions)
        key, value = self._project_keys(inputs_kv, d_qk, d_v, key_positions)
        if cache.decode:
            for name, steps in (("keys", key), ("values", value)):
                cache.append(name, steps, window=self.window, dtype=self.cache_dtype)
            mask = self._remember_mask(cache, mask, (inputs_q.shape[0], time_q))
        if cache.is_streaming:
            key, value = self._read(cache)
            key_positions = cache.locate("keys")
        return _Operands(query, key, value, mask, query_positions, key_positions)

    @nn.nowrap
    def _find_memory(
        self, cache: cb.Cache, inputs_q: Array, inputs_kv: Array | None, mask: Array | None
    ) -> _Operands:
        """Finds keys and values of a memory, given now or in an earlier block."""
        if inputs_kv is not None:
            d_qk, d_v = self._resolve_dimensions(inputs_q, inputs_kv)
            key, value = self._project_keys(inputs_kv, d_qk, d_v, _count(inputs_kv.shape[1]))
            cache.remember("keys", key, dtype=self.cache_dtype)
            cache.remember("values", value, dtype=self.cache_dtype)
        else:
            cache.remember("keys", None)
            cache.remember("values", None)
            d_qk = self.n_heads * cache.get_entry("keys").shape[3]
        if cache.is_streaming:
            key, value = self._read(cache)
        query = cache.lose_rows(self._project_query(inputs_q, d_qk, cache.positions))
        return _Operands(query, key, value, mask, cache.positions, _count(key.shape[1]))

    @nn.nowrap
    def _resolve_dimensions(self, inputs_q: Array, inputs_kv: Array) -> tuple[int, int]:
        d_qk = _resolve(self.d_qk, inputs_q, inputs_kv, None, None)
        return d_qk, _resolve(self.d_v, inputs_q, inputs_kv, d_qk, None)

    @nn.nowrap
    def _project_query(self, inputs: Array, d_qk: int, positions: Array) -> Array:
        query = self._project("query", inputs, "d_qk", d_qk, self.n_heads)
        return self._place("query_norm", query, positions)

    @nn.nowrap
    def _project_keys(
        self, inputs: Array, d_qk: int, d_v: int, positions: Array
    ) -> tuple[Array, Array]:
        n_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        key = self._project("key", inputs, "d_qk", d_qk, n_heads)
        value = self._project("value", inputs, "d_v", d_v, n_heads)
        return self._place("key_norm", key, positions), value

    @nn.nowrap
    def _project(
        self, name: str, inputs: Array, dimension_name: str, dimension: int, n_heads: int
    ) -> Array:
        """Projects inputs to the heads of a query, key or value."""
        heads = n_heads, self._split_heads(dimension_name, dimension)
        projection = nn.DenseGeneral(
            heads,
            name=name,
            kernel_init=reshape_drawn(self.kernel_init, (inputs.shape[-1], *heads)),
            bias_init=reshape_drawn(self.bias_init, heads),
            use_bias=self.use_bias,
            **self._get_settings(),
        )
        return projection(inputs)

    @nn.nowrap
    def _place(self, norm_name: str, x: Array, positions: Array) -> Array:
        """Normalizes a query or key, and turns it by its positions."""
        if self.qk_norm is not None:
            x = make_named(self.qk_norm, norm_name)(x)
        return x if self.rotary is None else self.rotary.rotate(x, positions)

    @nn.nowrap
    def _remember_mask(
        self, cache: cb.Cache, mask: Array | None, shape: tuple[int, int]
    ) -> Array | None:
        """Remembers which steps of the blocks are keys, and returns it for all that are read."""
        name = type(self).__name__
        batch, time = shape
        if mask is None:
            if not self.has_variable("cache", "is_key"):
                return None
            is_key = jnp.ones(shape, jnp.float32)
        else:
            check_mask_dtype(mask.dtype)
            if cache.is_streaming and not self.has_variable("cache", "is_key"):
                raise _errors.new_mask(name)
            row = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
            if row.ndim != 3 or row.shape[1:] != (1, time) or row.shape[0] not in (1, batch):
                raise _errors.wrong_block_mask(name, mask.shape, shape)
            is_key = jnp.broadcast_to(row[:, 0] != 0, shape).astype(jnp.float32)
        cache.append("is_key", is_key, window=self.window)
        if not cache.is_streaming:
            return mask
        # A row that ran over its room has NaN here, and in its keys: they are to be seen.
        seen: Array = (cache.read("is_key") != 0)[:, None]
        return seen

    @nn.nowrap
    def _read(self, cache: cb.Cache) -> tuple[Any, Any]:
        """Reads keys and values from a stream, or lets ``attend`` read those that it needs."""
        if self.attention_fn is attend:
            return cache.get_entry("keys"), cache.get_entry("values")
        return cache.read("keys"), cache.read("values")

    @nn.nowrap
    def _choose_dropout(self, deterministic: bool | None) -> dict[str, Any]:
        """Returns the arguments of :func:`attend` for dropout; none if it is left out."""
        if self.dropout_rate == 0:
            return {}
        if deterministic is None:
            deterministic = self.deterministic
            if deterministic and self.has_rng("dropout") and not self.is_initializing():
                _warn_of_dropout(type(self).__name__, self.dropout_rate)
        if deterministic:
            return {}
        return {"dropout_rngkey": self.make_rng("dropout"), "dropout_rate": self.dropout_rate}

    @nn.nowrap
    def _get_settings(self) -> dict[str, Any]:
        """Returns the fields that all projections share."""
        return {"precision": self.precision, "dtype": self.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def _split_heads(self, name: str, dimension: int) -> int:
        """Returns the features of one head, from those of all heads together."""
        if dimension < 1:
            raise _errors.too_small(type(self).__name__, name, 1, dimension)
        if dimension % self.n_heads:
            raise _errors.indivisible(type(self).__name__, name, dimension, self.n_heads)
        return dimension // self.n_heads


@functools.cache  # once
def _warn_of_dropout(layer: str, rate: float) -> None:
    warnings.warn(_errors.dropout_is_off(layer, rate), UserWarning, stacklevel=2)


def _count(time: int) -> Array:
    """Returns the positions of a sequence, ``[1, time]``."""
    return jnp.arange(time, dtype=jnp.int32)[None]


def _hide_padding(mask: Array | None, is_valid: Array) -> Array:
    """Hides keys that are padding, too."""
    is_key = is_valid[:, None]
    if mask is None:
        return is_key
    check_mask_dtype(mask.dtype)
    return (mask != 0) & (is_key if mask.ndim == 3 else is_key[:, None])


def _compute_weights(
    query: Array, key: Any, value: Any, mask: Array | None, options: dict[str, Any]
) -> Array:
    """Computes attention weights: the vectors of values that are one at their own key, else zero.

    Returns:
        ``[batch, heads, time_q, time_kv]``.
    """
    batch, time_kv, n_heads = key.shape[:3]
    identity = jnp.eye(time_kv, dtype=query.dtype)[None, :, None]
    values = jnp.broadcast_to(identity, (batch, time_kv, n_heads, time_kv))
    key = key if isinstance(key, Array) else key.unbox()
    weights = attend(query, key, values, mask, **options)
    return jnp.moveaxis(weights.reshape(*query.shape[:3], time_kv), 1, 2)


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
        decode: bool = False,
        lengths: Integer[Array, " batch"] | None = None,
    ) -> Float[Array, "batch time features"]:
        """Attends from the positions of ``inputs_qkv`` to one another.

        Args:
            inputs_qkv: inputs for query, key and value, ``[batch, time, features_in]``.
            mask: booleans or integers, non-zero where a query attends to a key, or None. It
                broadcasts to ``[batch, time, time]`` or ``[batch, heads, time, time]``. In a stream
                it says which steps of the block are keys, ``[batch, 1, time]``, now and later.
            deterministic: whether to leave dropout out; the field's value by default.
            decode: whether the inputs go on from those of the last call; see
                :func:`flax_extra.combinator.stream`.
            lengths: how many steps of the inputs are valid, integers ``[batch]``. No position
                attends to the others.

        Returns:
            Attention vectors, ``[batch, time, d_output]``.

        Raises:
            StreamError: If ``decode`` is true, and ``causal`` is not, or there is no state, or the
                mask hides more than steps of the block.
            ValueError: If the shapes do not agree; see :func:`attend`.
        """
        if decode and not self.causal:
            raise _errors.looks_ahead(type(self).__name__)
        return self._run(
            inputs_qkv, inputs_qkv, mask, deterministic, decode, lengths, is_memory=False
        )
