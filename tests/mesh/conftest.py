"""Tests on a mesh of 8 host devices.

XLA reads how many devices to make of the host when JAX first uses it. So these tests run in a
process of their own, ``pytest tests/mesh``, and are skipped where JAX was in use before.
"""

from __future__ import annotations

import os

import jax
import pytest

N_DEVICES = 8

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={N_DEVICES}"]
).strip()


@pytest.fixture(autouse=True)
def _eight_devices() -> None:
    if jax.device_count() != N_DEVICES:
        pytest.skip(
            f"needs {N_DEVICES} devices, and JAX has {jax.device_count()}: "
            "it was in use before XLA_FLAGS was set. Run pytest tests/mesh by itself."
        )
