"""How long a training step takes to compile on 1, 2 and 8 devices, and how large its program is.

    python -m tests.mesh.compile_times

Seconds are those of all cores together, which depend less on what else runs.
"""

from __future__ import annotations

import time

import jax

N_LAYERS = 24


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    from tests.mesh.test_programs import compile_gradient

    meshes = [
        *[((1, 1), "data"), ((2, 1), "data"), ((8, 1), "data")],
        *[((8, 1), "FSDP"), ((1, 8), "tensor"), ((4, 2), "FSDP x tensor")],
    ]
    compile_gradient((1, 1), "data", 1)  # what JAX does once
    for shape, kind in meshes:
        for n_layers in (2, N_LAYERS):
            start = time.process_time()
            program = compile_gradient(shape, kind, n_layers)
            seconds, n_lines = time.process_time() - start, program.as_text().count("\n")
            print(
                f"{shape[0]} x {shape[1]} {kind}, {n_layers} blocks: {seconds:.2f} s, {n_lines} lines"
            )


if __name__ == "__main__":
    main()
