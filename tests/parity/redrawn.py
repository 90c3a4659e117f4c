"""Models of transformers with weights to tell differences by, and what compares ours with them.

Weights are drawn anew at sigma 0.2: at the 0.02 that transformers starts from, most of a model could
be wrong without a difference showing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import Family

PARITY = "comes with the extra flax_extra[parity]"
torch = pytest.importorskip("torch", reason=f"torch {PARITY}")
transformers = pytest.importorskip("transformers", reason=f"transformers {PARITY}")

NORMS = ("norm", "ln_")
KEPT = ("logit_scale",)
"""Weights that stay as they are: at sigma 0.2, CLIP's scale would hide the differences."""


def redraw(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in KEPT:
                continue
            is_scale = any(part in name for part in NORMS) and name.endswith("weight")
            parameter.normal_(mean=1.0 if is_scale else 0.0, std=0.2)
    return model.eval()


def config_of(model: Any) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def ours(family: Family, theirs: Any, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    config = config_of(theirs)
    return family.build(config, dtype=dtype), family.read(theirs.state_dict(), config, dtype=dtype)


def assert_close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 0.5, "outputs this small show no difference"
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def assert_gradients(family: Family, theirs: Any, found: Any) -> None:
    """After ``backward``: within 1e-4 of the largest gradient of each parameter.

    The bias of a key has none without rotary positions: it moves all logits of a softmax alike.
    """
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    expected = family.read(gradients, config_of(theirs))

    def check(path: Any, one: Any, other: Any) -> None:
        name, scale = jax.tree_util.keystr(path), float(np.abs(other).max())
        if name.endswith("['key']['bias']") and scale < 1e-5:
            scale = 0.1
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale, err_msg=name)

    jax.tree_util.tree_map_with_path(check, found, expected)


def assert_varied(tokens: Any) -> None:
    changes = np.diff(np.asarray(tokens), axis=1) != 0
    assert changes.mean() > 0.2, "a model that repeats itself shows no difference"


def assert_half_precision(found: Any, theirs_in_half: Any, expected: Any) -> None:
    """As close to float32 as transformers' own half precision is, but for the luck of rounding.

    Linen rounds before a bias is added, and in an activation; torch rounds once.
    """
    expected = np.asarray(expected)

    def error(outputs: Any) -> float:
        return float(np.sqrt(np.mean((np.asarray(outputs, np.float32) - expected) ** 2)))

    assert error(theirs_in_half) > 1e-3, "half precision this exact shows no difference"
    assert error(found) < 1.5 * error(theirs_in_half)


def assert_round_trip(
    family: Family, theirs: Any, directory: Path, shard: str, is_same: Any
) -> None:
    """Loads what transformers saved, and lets it load what we save."""
    theirs.save_pretrained(directory / "theirs", max_shard_size=shard)
    is_one_file = (directory / "theirs" / "model.safetensors").exists()
    assert is_one_file == (shard == "1GB")
    model, variables = family.load(directory / "theirs")
    expected_model, expected = ours(family, theirs)
    assert str(model) == str(expected_model)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    family.save(directory / "ours", variables, config_of(theirs))
    again, report = type(theirs).from_pretrained(directory / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, weight in again.eval().state_dict().items():
        np.testing.assert_array_equal(weight, theirs.state_dict()[name], err_msg=name)
    is_same(again)
