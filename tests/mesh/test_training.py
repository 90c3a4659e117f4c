"""docs/examples/train_on_a_mesh.py: the losses of one device on every mesh, and checkpoints cross.

Processes find each other on loopback, as ``make mesh`` starts them.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import train_on_a_mesh
from train_on_a_mesh import Recipe, train

EXAMPLE = Path(train_on_a_mesh.__file__)
SMALL = Recipe(n_positions=32, n_layers=2)
MESHES = {
    "data": ((8, 1), False),
    "FSDP": ((8, 1), True),
    "tensor": ((1, 8), False),
    "data x tensor": ((4, 2), False),
    "FSDP x tensor": ((4, 2), True),
}


def mesh_of(*shape: int) -> Mesh:
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2, devices=devices)


@pytest.fixture(scope="session")
def of_one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Path]:
    """The losses of one device, and its checkpoints."""
    directory = tmp_path_factory.mktemp("one")
    return train(SMALL, mesh_of(1, 1), directory, fsdp=False), directory


def assert_same_losses(found: np.ndarray, expected: np.ndarray) -> None:
    assert expected[-1] < 0.7 * expected[0]  # it learns: losses that stand still are always equal
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_losses_are_those_of_one_device(name: str, of_one_device: Any, tmp_path: Path) -> None:
    shape, fsdp = MESHES[name]
    assert_same_losses(train(SMALL, mesh_of(*shape), tmp_path, fsdp), of_one_device[0])


def test_processes_go_on_after_one_device_and_a_kill(of_one_device: Any, tmp_path: Path) -> None:
    """Steps 1 to 5 on one device, then two processes, which are killed, go on to the end.

    Then 8 devices of one process read what they saved, sharded in another way.
    """
    losses, directory = of_one_device
    shutil.copytree(directory / "5", tmp_path / "5")
    killed = run_processes(
        f"""
        import os, signal
        read_texts = t.read_texts
        def read_or_die(corpus, number, like):
            if number == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return read_texts(corpus, number, like)
        t.read_texts = read_or_die
        t.train({SMALL}, mesh, Path({str(tmp_path)!r}), fsdp=True)
        """
    )
    assert -signal.SIGKILL in [code for code, _ in killed], killed
    assert not (tmp_path / "20").exists()
    found = run_processes(f"print(t.train({SMALL}, mesh, Path({str(tmp_path)!r}), fsdp=True))")
    assert [code for code, _ in found] == [0, 0], found
    assert_same_losses(train(SMALL, mesh_of(8, 1), tmp_path, fsdp=True), losses)


def test_processes_with_different_pipelines_are_refused(tmp_path: Path) -> None:
    program = f"""
    recipe = {SMALL}
    if jax.process_index():
        recipe = dataclasses.replace(recipe, n_layers=3)
    t.train(recipe, mesh, Path({str(tmp_path)!r}), fsdp=False)
    """
    for code, text in run_processes(program):
        assert code == 1
        assert "The processes would run different programs" in text


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    message = (
        r"1/texts is u8\[2, 16, 33\]: 16 does not divide among the 3 devices of 'data', as the rule "
        r"'texts' asks"
    )
    with pytest.raises(ValueError, match=message):
        train(SMALL, mesh_of(3, 1), tmp_path, fsdp=False)


def test_the_command_line(tmp_path: Path) -> None:
    flags = ["--mesh", "2", "1", "--checkpoints", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *flags],
        env=environment(n_devices=2),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "process 0: the loss fell from 5." in done.stdout
    assert (tmp_path / "20").is_dir()


# What the tests are written with.


def run_processes(program: str) -> list[tuple[int, str]]:
    """Runs a program in two processes of 4 devices: exit codes, and what they print."""
    port = find_port()
    start = functools.partial(
        subprocess.Popen,
        env=environment(n_devices=4),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    processes = [
        start([sys.executable, "-c", f"{HEAD.format(port=port, number=number)}\n{dedent(program)}"])
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]


HEAD = """
import dataclasses, jax
from pathlib import Path
from jax.sharding import AxisType
import train_on_a_mesh as t
from train_on_a_mesh import Recipe
jax.distributed.initialize("localhost:{port}", 2, {number})
mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
"""


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def environment(n_devices: int) -> dict[str, str]:
    paths = os.pathsep.join([str(EXAMPLE.parent), *filter(None, sys.path)])
    changed = {"JAX_NUM_CPU_DEVICES": str(n_devices), "XLA_FLAGS": "", "PYTHONPATH": paths}
    return os.environ | changed
