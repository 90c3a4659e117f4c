"""Trains a small language model on a mesh of devices: data parallel, tensor parallel, FSDP.

On 8 devices made of one processor, the batch in 4 parts and each layer in 2:

    JAX_NUM_CPU_DEVICES=8 python docs/examples/train_on_a_mesh.py --mesh 4 2 --fsdp

On two processes of 4 devices each, numbers 0 and 1 of 2, which meet at an address:

    JAX_NUM_CPU_DEVICES=4 python docs/examples/train_on_a_mesh.py --cluster localhost:1234 2 0

The losses are those of one device. A training that was stopped or killed goes on from its last
checkpoint, on the same mesh or another.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
from jax.experimental.multihost_utils import assert_equal
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from rich.progress import track

from flax_extra import combinator as cb
from flax_extra import layer as xn

OPTIMIZER = optax.adamw(3e-3)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained: all that the losses depend on."""

    n_steps: int = 20
    n_batches: int = 2  # of a step: their gradients are accumulated
    batch_size: int = 16
    n_positions: int = 64
    d_model: int = 64
    n_layers: int = 4

    def model(self) -> cb.Combinator:
        """A decoder of bytes: for each position, logits of the next byte."""
        layers = cb.fn(xn.SelfAttention(n_heads=8, causal=True), mask=None), xn.FeedForward(4)
        block = cb.serial(cb.residual(nn.LayerNorm(), f) for f in layers)
        positions = functools.partial(
            xn.TrainablePositionalEncoding, self.n_positions, self.d_model
        )
        return cb.serial(
            nn.Embed(256, self.d_model),
            xn.Encoding(positional_encoding=positions, aggregation=cb.add()),
            # Without this, XLA may shard activations in the loop as FSDP shards parameters.
            cb.fn(with_logical_constraint, logical_axis_resources=("batch",)),
            cb.repeat(block, self.n_layers),
            nn.LayerNorm(),
            nn.Dense(256, name="head"),
        )

    def initialize(self) -> Any:
        """Returns parameters, the state of the optimizer, and the losses of steps to come."""
        params = self.model().init(jax.random.key(0), jnp.zeros((1, self.n_positions), int))
        return params, OPTIMIZER.init(params), jnp.zeros(self.n_steps)

    def step(self, state: Any, number: int, texts: Any) -> Any:
        """Makes a step, from several batches of texts, ``[n_batches, batch, time + 1]``."""

        def get_loss(params: Any, batch: Any) -> Any:
            logits = self.model().apply(params, batch[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

        def accumulate(total: Any, batch: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(get_loss)(params, batch)), None

        params, optimizer, losses = state
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(accumulate, zeros, texts)
        loss, gradient = jax.tree.map(lambda x: x / self.n_batches, total)
        updates, optimizer = OPTIMIZER.update(gradient, optimizer, params)
        return optax.apply_updates(params, updates), optimizer, losses.at[number].set(loss)


def shard(recipe: Recipe, mesh: Mesh, fsdp: bool) -> Any:
    """Returns shapes and shardings: of the state, and of the texts of a step."""
    rules = [cb.ShardingRule("texts", P("data", None)), cb.ShardingRule("head/kernel", P("model"))]
    rules += xn.layer_rules(tensor="model", fsdp="data" if fsdp else None)
    shape = recipe.n_batches, recipe.batch_size, recipe.n_positions + 1
    shapes = jax.eval_shape(recipe.initialize), {"texts": jax.ShapeDtypeStruct(shape, np.uint8)}
    where = cb.shardings(shapes, mesh, rules)
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, where)


def read_texts(corpus: np.ndarray, number: int, like: jax.ShapeDtypeStruct) -> Any:
    """Returns the texts of a step. A process reads only those that its devices hold."""
    n_batches, n_texts, time = like.shape
    starts = np.random.default_rng(number).integers(0, len(corpus) - time, (n_batches, n_texts))
    held = like.sharding.addressable_devices_indices_map(like.shape).values()
    rows = sorted({row for _, rows, _ in held for row in range(n_texts)[rows]})
    local = corpus[starts[:, rows, None] + np.arange(time)]
    return jax.make_array_from_process_local_data(like.sharding, local, like.shape)


def train(recipe: Recipe, mesh: Mesh, directory: Path, fsdp: bool, save_every: int = 5) -> Any:
    """Trains, or goes on with a training, and returns the losses."""
    state, texts = shard(recipe, mesh, fsdp)
    program = np.uint32(zlib.crc32(f"{recipe} {recipe.model()} {state} {texts}".encode()))
    assert_equal(program, "The processes would run different programs")
    where = jax.tree.map(lambda leaf: leaf.sharding, state)  # else XLA chooses for what comes out
    initialize = jax.jit(recipe.initialize, out_shardings=where)
    step = jax.jit(recipe.step, out_shardings=where, donate_argnums=0)
    corpus = np.fromfile(argparse.__file__, np.uint8)  # a text that every machine has
    checkpoints = ocp.CheckpointManager(directory.absolute())
    saved = ocp.args.StandardRestore(state)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data")]), checkpoints:
        done = checkpoints.latest_step() or 0
        state = checkpoints.restore(done, args=saved) if done else initialize()
        todo, is_quiet = range(done, recipe.n_steps), jax.process_index() > 0
        for number in track(todo, "training", recipe.n_steps, done, disable=is_quiet):
            state = step(state, number, read_texts(corpus, number, texts["texts"]))
            if (number + 1) % save_every == 0 or number + 1 == recipe.n_steps:
                checkpoints.save(number + 1, args=ocp.args.StandardSave(state))
    return np.asarray(state[2].addressable_data(0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", type=int, nargs=2, default=(4, 2), metavar=("DATA", "MODEL"))
    parser.add_argument("--fsdp", action="store_true", help="shard parameters over DATA, too")
    parser.add_argument("--cluster", nargs=3, metavar=("ADDRESS", "PROCESSES", "NUMBER"))
    parser.add_argument("--checkpoints", type=Path, default=Path("build/train_on_a_mesh"))
    options = parser.parse_args()
    if options.cluster:
        address, n_processes, process = options.cluster
        jax.distributed.initialize(address, int(n_processes), int(process))
    devices = jax.make_mesh(options.mesh, ("data", "model"), (AxisType.Auto,) * 2)
    trained = train(Recipe(), devices, options.checkpoints, options.fsdp)
    print(
        f"process {jax.process_index()}: the loss fell from {trained[0]:.3f} to {trained[-1]:.3f}"
    )
