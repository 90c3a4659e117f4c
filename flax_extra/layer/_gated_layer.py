"""What the layers that run a gated cell over time share: fields, parameters, and the call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Dtype, Initializer
from jax import Array

from flax_extra import combinator as cb
from flax_extra.layer import _errors
from flax_extra.layer._gated_recurrence import GatedCell, State, Weights, run_gated_cell
from flax_extra.layer._initializers import draw_in_float32
from flax_extra.layer._numerics import get_accumulation_dtype
from flax_extra.layer._padding import zero_padding
from flax_extra.layer._sharding import broadcast_like, shard_like

KERNEL_INIT: Initializer = nn.initializers.lecun_normal()
RECURRENT_KERNEL_INIT: Initializer = nn.initializers.orthogonal()
BIAS_INIT: Initializer = nn.initializers.zeros_init()


class Gate(NamedTuple):
    """The parameters of one gate, as a linen cell declares them."""

    name: str
    """Its scope: ``"hi"`` for the input gate's kernel of the hidden state, say."""
    has_bias: bool

    @property
    def is_recurrent(self) -> bool:
        """Whether its kernel is for the hidden state, and not for the inputs."""
        return self.name.startswith("h")


class GatedLayer(nn.Module):
    """The common part of :class:`LSTM` and :class:`GRU`, which document fields and methods."""

    d_hidden: int
    return_sequences: bool = False
    reverse: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    return_state: bool = False
    kernel_init: Initializer = KERNEL_INIT
    recurrent_kernel_init: Initializer = RECURRENT_KERNEL_INIT
    bias_init: Initializer = BIAS_INIT

    cell: ClassVar[GatedCell]
    state_names: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.d_hidden < 1:
            raise _errors.too_small(type(self).__name__, "d_hidden", 1, self.d_hidden)
        super().__post_init__()

    @property
    def signature(self) -> cb.Signature | None:
        """The signature with ``return_state``; without it, the annotations say it."""
        return cb.Signature(1, 1 + len(self.state_names)) if self.return_state else None

    @nn.nowrap
    def _zero_state(self, inputs: Array) -> State:
        param_dtype = jnp.zeros((), self.param_dtype)
        zero = jnp.zeros((), canonicalize_dtype(inputs, param_dtype, dtype=self.dtype))
        zeros = broadcast_like(zero, (inputs.shape[0], self.d_hidden), inputs, 1)
        return (zeros,) * len(self.state_names)

    @nn.nowrap
    def _check_inputs(self, inputs: Array) -> None:
        if inputs.ndim != 3:
            name = type(self).__name__
            raise _errors.wrong_rank(name, "inputs", inputs.shape, "[batch, time, features]")

    @nn.nowrap
    def _run(
        self,
        inputs: Array,
        weights: Weights,
        lengths: Array | None,
        initial_state: Sequence[Array] | None,
        decode: bool,
    ) -> Any:
        """Runs the cell over the inputs and returns what the fields ask for."""
        name = type(self).__name__
        cache = cb.Cache(self, inputs, decode=decode, lengths=lengths)
        valid = cache.is_valid if cache.has_padding else None
        state = self._zero_state(inputs)
        shape, dtype = state[0].shape, state[0].dtype
        if initial_state is not None:
            shapes = [jnp.shape(part) for part in initial_state]
            if shapes != [shape] * len(state):
                raise _errors.wrong_state(name, self.state_names, shapes, shape)
            state = tuple(shard_like(jnp.asarray(x, dtype), inputs, 1) for x in initial_state)
        inputs, *arrays = promote_dtype(inputs, *weights, dtype=self.dtype)
        if decode:
            if self.reverse:
                raise _errors.runs_backward(name)
            wide = get_accumulation_dtype(inputs, arrays[0])
            initial = (part.astype(wide) for part in state)
            state = tuple(map(cache.recall, self.state_names, initial))
        outputs, state = run_gated_cell(
            self.cell,
            zero_padding(inputs, valid),
            Weights(*arrays),
            state,
            valid,
            reverse=self.reverse,
            return_sequences=self.return_sequences,
        )
        for state_name, part in zip(self.state_names, state, strict=True):
            cache.keep(state_name, part)
        state = tuple(part.astype(dtype) for part in state)
        result = state[-1] if outputs is None else outputs
        return (result, *state) if self.return_state else result

    @nn.nowrap
    def _declare_parameters(
        self, cell_name: str, gates: Sequence[Gate], features: int
    ) -> Mapping[str, tuple[Array, Array | None]]:
        """Declares kernel and bias of each gate, in the scopes that a scan over a cell opens."""
        declare_cell = functools.partial(
            _CellParameters,
            tuple(gates),
            self.d_hidden,
            self.param_dtype,
            self.kernel_init,
            self.recurrent_kernel_init,
            self.bias_init,
            name=cell_name,
        )
        parameters: Mapping[str, tuple[Array, Array | None]]
        parameters = _ScanParameters(declare_cell, name="Scan_0")(features)
        return parameters


class _ScanParameters(nn.Module):
    """The scope of a scan, which holds that of the cell."""

    declare_cell: Callable[[], _CellParameters]

    @nn.compact
    def __call__(self, features: int) -> Mapping[str, tuple[Array, Array | None]]:
        parameters: Mapping[str, tuple[Array, Array | None]] = self.declare_cell()(features)
        return parameters


class _CellParameters(nn.Module):
    """The scope of a cell, which holds those of its gates."""

    gates: tuple[Gate, ...]
    d_hidden: int
    param_dtype: Dtype
    kernel_init: Initializer
    recurrent_kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, features: int) -> Mapping[str, tuple[Array, Array | None]]:
        parameters = {}
        for gate in self.gates:
            kernel_init = self.recurrent_kernel_init if gate.is_recurrent else self.kernel_init
            parameters[gate.name] = _GateParameters(
                (self.d_hidden if gate.is_recurrent else features, self.d_hidden),
                gate.has_bias,
                self.param_dtype,
                kernel_init,
                self.bias_init,
                name=gate.name,
            )()
        return parameters


class _GateParameters(nn.Module):
    """The kernel of a gate, and its bias if it has one."""

    shape: tuple[int, int]
    has_bias: bool
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        kernel_init, bias_init = map(draw_in_float32, (self.kernel_init, self.bias_init))
        kernel = self.param("kernel", kernel_init, self.shape, self.param_dtype)
        if not self.has_bias:
            return kernel, None
        return kernel, self.param("bias", bias_init, self.shape[1:], self.param_dtype)
