"""LSTM and GRU against torch's, with their weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_extra import layer as xn

torch = pytest.importorskip("torch", reason="torch comes with the extra flax_extra[parity]")

BATCH, TIME, FEATURES, HIDDEN = 4, 7, 5, 6
LENGTHS = [7, 1, 4, 6]


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(BATCH, TIME, FEATURES, seed=0)
STATE = normal(BATCH, HIDDEN, seed=1), normal(BATCH, HIDDEN, seed=2)
"""The memory and the hidden state; a GRU has the latter only."""
WEIGHT = normal(BATCH, TIME, HIDDEN, seed=3)
"""What the outputs are multiplied by, so that each has a gradient of its own."""

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_torch_layer(kind: Any) -> Any:
    torch.manual_seed(0)
    layer = kind(FEATURES, HIDDEN, batch_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def convert_lstm(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Torch stacks the gates i, f, g, o and transposes; linen has one bias where torch has two."""
    cell = {}
    for index, gate in enumerate("ifgo"):
        rows = slice(index * HIDDEN, (index + 1) * HIDDEN)
        cell[f"i{gate}"] = {"kernel": weights["weight_ih_l0"][rows].T}
        cell[f"h{gate}"] = {
            "kernel": weights["weight_hh_l0"][rows].T,
            "bias": weights["bias_hh_l0"][rows],
        }
    return {"Scan_0": {"LSTMCell_0": cell}}


def convert_gru(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Torch stacks the gates r, z, n and transposes; only the last has two biases in linen, too."""
    cell = {}
    for index, gate in enumerate("rzn"):
        rows = slice(index * HIDDEN, (index + 1) * HIDDEN)
        cell[f"i{gate}"] = {
            "kernel": weights["weight_ih_l0"][rows].T,
            "bias": weights["bias_ih_l0"][rows],
        }
        cell[f"h{gate}"] = {"kernel": weights["weight_hh_l0"][rows].T}
    cell["hn"]["bias"] = weights["bias_hh_l0"][rows]
    return {"Scan_0": {"GRUCell_0": cell}}


def read_parameters(layer: Any) -> dict[str, np.ndarray]:
    """Torch's parameters, with its second bias added to the first where linen has one."""
    weights = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    both = weights["bias_hh_l0"] + weights["bias_ih_l0"]
    if isinstance(layer, torch.nn.LSTM):
        return weights | {"bias_hh_l0": both}
    summed = 2 * HIDDEN
    return weights | {"bias_ih_l0": np.concatenate([both[:summed], weights["bias_ih_l0"][summed:]])}


def reverse_within(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Each sequence from its last valid step to its first; the padding stays."""
    return torch.stack(
        [
            torch.cat([one[:length].flip(0), one[length:]])
            for one, length in zip(x, lengths, strict=True)
        ]
    )


@pytest.mark.parametrize("has_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("has_lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_values_and_gradients(name: str, has_lengths: bool, reverse: bool, has_state: bool) -> None:
    is_lstm = name == "LSTM"
    convert = convert_lstm if is_lstm else convert_gru
    theirs = make_torch_layer(getattr(torch.nn, name))
    x = torch.tensor(X, requires_grad=True)
    c, h = (torch.tensor(state, requires_grad=True) for state in STATE)
    lengths = LENGTHS if has_lengths else [TIME] * BATCH
    ordered = reverse_within(x, lengths) if reverse else x
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        ordered, torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    state = (h[None], c[None]) if is_lstm else h[None]
    outputs, last = theirs(packed, state if has_state else None)
    last_h, last_c = last if is_lstm else (last, torch.zeros(1))
    states, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=TIME)
    states = reverse_within(states, lengths) if reverse else states
    ((states * torch.tensor(WEIGHT)).sum() + last_h.sum() + last_c.sin().sum()).backward()

    layer = getattr(xn, name)(HIDDEN, return_sequences=True, return_state=True, reverse=reverse)
    options: dict[str, Any] = {"lengths": np.array(LENGTHS)} if has_lengths else {}

    def run(params: Any, x: Any, state: Any) -> Any:
        if has_state:
            options["initial_state"] = state if is_lstm else state[1]
        return layer.apply({"params": params}, x, **options)

    def loss(*arguments: Any) -> Any:
        every, *memory, hidden = run(*arguments)
        return jnp.sum(every * WEIGHT) + jnp.sum(hidden) + sum(jnp.sum(jnp.sin(c)) for c in memory)

    arguments = convert(read_parameters(theirs)), X, STATE
    every, *memory, hidden = quick_jit(run)(*arguments)
    np.testing.assert_allclose(every, states.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hidden, last_h[0].detach(), rtol=1e-5, atol=1e-6)
    for found in memory:
        np.testing.assert_allclose(found, last_c[0].detach(), rtol=1e-5, atol=1e-6)

    gradients = quick_jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    weights = {name: value.grad.numpy() for name, value in theirs.named_parameters()}
    expected_state = tuple(
        np.zeros((BATCH, HIDDEN), np.float32) if part.grad is None else part.grad.numpy()
        for part in (c, h)
    )
    jax.tree.map(assert_relative, gradients, (convert(weights), x.grad.numpy(), expected_state))


def assert_relative(found: Any, expected: Any) -> None:
    """Within 1e-4 of the largest."""
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(float(scale), 1e-6))
