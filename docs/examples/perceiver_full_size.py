"""What the published language model costs here: memory and time of each stage.

    python docs/examples/perceiver_full_size.py
    python docs/examples/perceiver_full_size.py --layers 2 --compile-only

The weights are drawn, not loaded: 26 layers, 256 latents of 1,280 features, texts of 2,048 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from perceiver_models import LANGUAGE, masked_language_model

T = TypeVar("T")


def main(arguments: list[str] | None = None) -> int:
    """Builds, compiles and runs the model, and says what each took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=LANGUAGE.n_layers)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--compile-only", action="store_true", help="without any weights")
    options = parser.parse_args(arguments)

    core = dataclasses.replace(LANGUAGE, n_layers=options.layers)
    model = masked_language_model(core, n_positions=options.positions)
    tokens = np.zeros((1, options.positions), np.int32)
    mask = np.ones_like(tokens, bool)
    key = jax.random.key(0)
    abstract = measured("parameters' shapes", lambda: jax.eval_shape(model.init, key, tokens, mask))
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    print(f"  {options.layers} layers, {n_parameters / 1e6:.1f} million parameters")
    lowered = measured("trace", lambda: jax.jit(model.apply).lower(abstract, tokens, mask))
    compiled = measured("compile", lowered.compile)
    temporaries = getattr(compiled.memory_analysis(), "temp_size_in_bytes", float("nan"))
    print(f"  {temporaries / 2**20:.0f} MiB of temporaries")
    if options.compile_only:
        return 0
    variables = measured("initialise", lambda: jax.jit(model.init)(key, tokens, mask))
    for run in ("first forward", "second forward"):
        logits: Any = measured(run, lambda: compiled(variables, tokens, mask))
    print(f"  logits {logits.shape}, all finite: {bool(np.isfinite(logits).all())}")
    return 0


def measured(stage: str, do: Callable[[], T]) -> T:
    """What it gives, once it is there; prints the time and the most memory until now."""
    start = time.perf_counter()
    result = do()
    jax.block_until_ready(result)  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"{stage:20} {seconds:7.2f} s   peak memory {peak:5.2f} GiB", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
