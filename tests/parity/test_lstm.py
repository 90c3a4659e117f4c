"""The LSTM against torch.nn.LSTM, with its weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from flax_extra import layer as xn

BATCH, TIME, FEATURES, HIDDEN = 4, 7, 5, 6
LENGTHS = [7, 1, 4, 6]


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(BATCH, TIME, FEATURES, seed=0)
STATE = normal(BATCH, HIDDEN, seed=1), normal(BATCH, HIDDEN, seed=2)
WEIGHT = normal(BATCH, TIME, HIDDEN, seed=3)
"""What the outputs are multiplied by, so that each has a gradient of its own."""


def torch_lstm(seed: int = 0) -> torch.nn.LSTM:
    torch.manual_seed(seed)
    lstm = torch.nn.LSTM(FEATURES, HIDDEN, batch_first=True)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.normal_(std=0.5)
    return lstm


def as_params(weights: dict[str, np.ndarray]) -> dict[str, Any]:
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


def parameters_of(lstm: torch.nn.LSTM) -> dict[str, Any]:
    weights = {name: value.detach().numpy() for name, value in lstm.named_parameters()}
    weights["bias_hh_l0"] = weights["bias_hh_l0"] + weights["bias_ih_l0"]
    return as_params(weights)


def reversed_within(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
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
def test_lstm(has_lengths: bool, reverse: bool, has_state: bool) -> None:
    lstm = torch_lstm()
    x = torch.tensor(X, requires_grad=True)
    c, h = (torch.tensor(state, requires_grad=True) for state in STATE)
    lengths = LENGTHS if has_lengths else [TIME] * BATCH
    ordered = reversed_within(x, lengths) if reverse else x
    packed = pack_padded_sequence(
        ordered, torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    outputs, (last, _) = lstm(packed, (h[None], c[None]) if has_state else None)
    states, _ = pad_packed_sequence(outputs, batch_first=True, total_length=TIME)
    states = reversed_within(states, lengths) if reverse else states
    ((states * torch.tensor(WEIGHT)).sum() + last.sum()).backward()

    options: dict[str, Any] = {"lengths": np.array(LENGTHS)} if has_lengths else {}

    def run(params: Any, x: Any, state: Any, *, return_sequences: bool) -> Any:
        layer = xn.LSTM(HIDDEN, return_sequences=return_sequences, reverse=reverse)
        given = state if has_state else None
        return layer.apply({"params": params}, x, initial_state=given, **options)

    def loss(*arguments: Any) -> Any:
        every = run(*arguments, return_sequences=True)
        return jnp.sum(every * WEIGHT) + jnp.sum(run(*arguments, return_sequences=False))

    arguments = parameters_of(lstm), X, STATE
    for return_sequences, expected in ((True, states), (False, last[0])):
        found = run(*arguments, return_sequences=return_sequences)
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=1e-6)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    weights = {name: value.grad.numpy() for name, value in lstm.named_parameters()}
    expected_state = (c.grad, h.grad) if has_state else tuple(map(np.zeros_like, STATE))
    jax.tree.map(assert_relative, gradients, (as_params(weights), x.grad.numpy(), expected_state))


def assert_relative(found: Any, expected: Any) -> None:
    """Within 1e-4 of the largest."""
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(float(scale), 1e-6))
