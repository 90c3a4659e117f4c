"""A traceback shows the lines of the user, and not those of this library."""

import os
import subprocess
import sys

import pytest

SETUP = "import jax, flax.linen as nn, flax_extra.combinator as cb; x = jax.numpy.ones((2, 8))\n"
MISTAKES = {
    "init": "cb.repeat(cb.residual(nn.Dense(4)), 2).init(jax.random.key(0), x)",
    "unbound": "cb.serial(cb.select((1, 0)), cb.add())(x, x[:, :3])",
    "typed": "cb.typed(cb.serial(nn.Dense(4), nn.Dense(3)), 'f32[b, 8] -> f32[b, 4]')",
    "shape_signature": "cb.shape_signature(cb.residual(nn.Dense(4)), 'f32[b, 8]')",
    "diagram": "cb.diagram(cb.serial(cb.residual(nn.Dense(4))), x)",
}


def find_files_in_traceback(code: str, filtering: str) -> list[str]:
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": filtering, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    return [line for line in run.stderr.splitlines() if line.startswith('  File "')]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_our_frames_are_hidden_unless_asked_for(mistake):
    hidden = find_files_in_traceback(MISTAKES[mistake], "quiet_remove_frames")
    assert any('"<string>"' in file for file in hidden)
    filtered = [file for file in hidden if "flax_extra" in file]
    shown = find_files_in_traceback(MISTAKES[mistake], "off")
    assert any("flax_extra" in file for file in shown)
    assert filtered == []
