"""A multimodal autoencoder on handwritten digits, written as one pipeline.

Two modalities: an image, as a sequence of 16 patches, and its label, as a sequence of one. The
encoder joins both into one sequence and squeezes it into a code; the decoder rebuilds both from
the code. In training the label is often hidden; in evaluation it always is, so that the label
that comes back was read off the image.

    python docs/examples/digits_autoencoder.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits

from flax_extra import combinator as cb

SIDE, PATCH = 8, 2
N_PATCHES, D_PATCH = (SIDE // PATCH) ** 2, PATCH**2
N_LABELS = 10
HIDDEN = N_LABELS  # the label that stands for "not given"


# The model: images [batch, 8, 8], labels [batch] -> pixels [batch, 8, 8], logits [batch, 10]


def autoencoder(d_model: int = 64, d_code: int = 48, n_blocks: int = 2) -> cb.Combinator:
    """The whole model: two inputs, two outputs, one XLA program."""
    encode_image = cb.serial(to_patches, nn.Dense(d_model), Positions(name="image_positions"))
    encode_label = cb.serial(nn.Embed(N_LABELS + 1, d_model), as_sequence_of_one)
    decode_image = cb.serial(nn.Dense(D_PATCH), to_pixels)
    decode_label = cb.serial(nn.Dense(N_LABELS), without_time)
    n_positions = N_PATCHES + 1
    return cb.serial(
        cb.parallel(encode_image, encode_label),
        cb.concatenate(axis=1),
        cb.repeat(block(d_model), n_blocks, name="encoder"),
        cb.serial(flatten, nn.Dense(d_code), jnp.tanh, name="code"),
        nn.Dense(n_positions * d_model),
        cb.fn(jnp.reshape, shape=(-1, n_positions, d_model)),
        cb.repeat(block(d_model), n_blocks, name="decoder"),
        split_modalities,
        cb.parallel(decode_image, decode_label),
    )


def block(d_model: int) -> cb.Combinator:
    """A transformer block."""
    return cb.residual(nn.LayerNorm(), nn.MultiHeadDotProductAttention(4)) >> cb.residual(
        nn.LayerNorm(), nn.Dense(4 * d_model), nn.gelu, nn.Dense(d_model)
    )


class Positions(nn.Module):
    """Adds a learned vector to each position of a sequence."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return x + self.param("positions", init, (1, *x.shape[1:]))


def to_patches(images: jax.Array) -> jax.Array:
    """[batch, 8, 8] -> [batch, 16, 4]."""
    n = SIDE // PATCH
    grid = images.reshape(-1, n, PATCH, n, PATCH).swapaxes(2, 3)
    return grid.reshape(-1, N_PATCHES, D_PATCH)


def to_pixels(patches: jax.Array) -> jax.Array:
    """[batch, 16, 4] -> [batch, 8, 8]."""
    n = SIDE // PATCH
    grid = patches.reshape(-1, n, n, PATCH, PATCH).swapaxes(2, 3)
    return grid.reshape(-1, SIDE, SIDE)


def as_sequence_of_one(x: jax.Array) -> jax.Array:
    """[batch, features] -> [batch, 1, features]."""
    return x[:, None]


def without_time(x: jax.Array) -> jax.Array:
    """[batch, 1, features] -> [batch, features]."""
    return x[:, 0]


def flatten(x: jax.Array) -> jax.Array:
    """[batch, time, features] -> [batch, time * features]."""
    return x.reshape(x.shape[0], -1)


def split_modalities(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The positions of the image, and that of the label."""
    return x[:, :N_PATCHES], x[:, N_PATCHES:]


# Training it


class Data(NamedTuple):
    """Images [n, 8, 8] with values in [0, 1], and labels [n]."""

    images: np.ndarray
    labels: np.ndarray


def load(n_held_out: int = 360) -> tuple[Data, Data]:
    """The 1,797 scans that ship with scikit-learn: for training, and held out."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images / 16).astype(np.float32)[order]
    labels = digits.target.astype(np.int32)[order]
    return (
        Data(images[n_held_out:], labels[n_held_out:]),
        Data(images[:n_held_out], labels[:n_held_out]),
    )


def loss(model: cb.Combinator, params: Any, key: jax.Array, batch: Data) -> jax.Array:
    """How badly both modalities are rebuilt, the label hidden in three of four examples."""
    hidden = jax.random.bernoulli(key, 0.75, batch.labels.shape)
    shown = jnp.where(hidden, HIDDEN, batch.labels)
    pixels, logits = model.apply(params, batch.images, shown)
    image_error = jnp.mean((pixels - batch.images) ** 2)
    label_error = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    total: jax.Array = image_error + 0.1 * label_error.mean()
    return total


def train(model: cb.Combinator, data: Data, n_steps: int, batch_size: int, console: Console) -> Any:
    """The parameters after ``n_steps`` of Adam."""
    params = model.init(jax.random.key(0), data.images[:1], data.labels[:1])
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, n_steps // 20, n_steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array, batch: Data) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(lambda p: loss(model, p, key, batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    draw = np.random.default_rng(1)
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=n_steps, loss=float("nan"))
        for i in range(n_steps):
            picked = draw.integers(0, len(data.labels), batch_size)
            batch = Data(data.images[picked], data.labels[picked])
            params, state, value = step(params, state, jax.random.key(i), batch)
            if i % 20 == 0 or i == n_steps - 1:
                progress.update(task, completed=i + 1, loss=float(value))
    return params


class Result(NamedTuple):
    """What is rebuilt from held-out images alone."""

    pixels: np.ndarray
    labels: np.ndarray
    accuracy: float
    image_error: float


def evaluate(model: cb.Combinator, params: Any, data: Data) -> Result:
    """Rebuilds both modalities with every label hidden."""
    pixels, logits = jax.jit(model.apply)(params, data.images, np.full_like(data.labels, HIDDEN))
    labels = np.asarray(logits.argmax(-1))
    return Result(
        pixels=np.asarray(pixels),
        labels=labels,
        accuracy=float((labels == data.labels).mean()),
        image_error=float(np.sqrt(np.mean((pixels - data.images) ** 2))),
    )


def draw(data: Data, result: Result, path: Path, n: int = 12) -> None:
    """Originals above what was rebuilt from them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, n, figsize=(n, 2.6), layout="constrained")
    titles = (data.labels, result.labels)
    for row, images, labels in zip(rows, (data.images, result.pixels), titles, strict=True):
        for axes, image, label, truth in zip(row, images, labels, data.labels, strict=False):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(str(label), color="black" if label == truth else "red", fontsize=10)
            axes.set_axis_off()
    figure.suptitle("held-out digits, and what the autoencoder rebuilds from the image alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Trains, evaluates, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=800, help="training steps (default: 800)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples a step (default: 64)")
    parser.add_argument("--picture", type=Path, default=Path("build/digits_autoencoder.png"))
    options = parser.parse_args(arguments)

    console = Console()
    model = autoencoder()
    console.print(str(model), highlight=False, soft_wrap=True)
    training, held_out = load()
    params = train(model, training, options.steps, options.batch_size, console)
    result = evaluate(model, params, held_out)
    draw(held_out, result, options.picture)
    console.print(
        f"{len(held_out.labels)} held-out images, label hidden\n"
        f"  label read off the image: {result.accuracy:.1%} right\n"
        f"  image rebuilt: error {result.image_error:.3f} a pixel (root mean square; ink is 1)\n"
        f"  picture: {options.picture}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
