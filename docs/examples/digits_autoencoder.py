"""A multimodal autoencoder on handwritten digits: a small Perceiver, written as one pipeline.

Two modalities: an image, as a grid of patches, and its label, as a sequence of one. Both are
encoded into one sequence, which a few latent vectors read by cross-attention and think over. Then
queries, one for each patch and one for the label, ask the latents for both modalities back. In
training the label is often masked; in evaluation it always is, so that the label that comes back
was read off the image.

    python docs/examples/digits_autoencoder.py

Source: Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs", 2021.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
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
from flax_extra import layer as xn

SIDE, PATCH = 8, 2
GRID = (SIDE // PATCH, SIDE // PATCH)
N_PATCHES, D_PATCH = GRID[0] * GRID[1], PATCH**2
N_LABELS = 10
INPUTS = ("f32[b, 8, 8]", "i32[b]")
"""What the model takes: images, and labels."""


# The model: images [batch, 8, 8], labels [batch] -> pixels [batch, 8, 8], logits [batch, 10]


def autoencoder(
    label_mask_rate: float,
    n_latents: int = 8,
    d_latent: int = 64,
    n_blocks: int = 3,
) -> cb.Combinator:
    """The whole model: two inputs, two outputs, one XLA program."""
    image = partial(
        xn.Encoding,
        preprocessing=lambda: cb.serial(to_patches, nn.Dense(d_latent)),
        positional_encoding=partial(xn.FourierPositionEncoding, GRID, n_bands=4),
    )
    label = partial(
        xn.Encoding,
        preprocessing=lambda: cb.serial(as_sequence_of_one, nn.Embed(N_LABELS, d_latent)),
    )
    encode = xn.MultimodalEncoding([image, label], mask_rates=[None, label_mask_rate])
    pixels = partial(xn.Decoding, postprocessing=lambda: cb.serial(nn.Dense(D_PATCH), to_pixels))
    logits = partial(
        xn.Decoding, postprocessing=lambda: cb.serial(nn.Dense(N_LABELS), without_time)
    )
    return cb.serial(
        together,
        encode,  # -> the sequence and, beneath it, how long each modality is
        ask(n_latents, d_latent, name="latents"),
        cb.repeat(think(), n_blocks),
        ask(N_PATCHES + 1, d_latent, name="queries"),
        xn.MultimodalDecoding([pixels, logits]),
        apart,
    )


def ask(n_queries: int, d_model: int, name: str) -> cb.Combinator:
    """Learned queries, [batch, n_queries, d_model], that read a sequence by cross-attention."""
    queries = cb.serial(batch_size, xn.TrainablePositionalEncoding(n_queries, d_model))
    attention = cb.fn(xn.Attention(n_heads=4), mask=None)
    read = cb.residual(cb.parallel(nn.LayerNorm(), nn.LayerNorm()), attention)
    return cb.serial(cb.branch(queries, cb.identity()), read, feed_forward(), name=name)


def think() -> cb.Combinator:
    """A transformer block."""
    attention = cb.fn(xn.SelfAttention(n_heads=4), mask=None)
    return cb.residual(nn.LayerNorm(), attention) >> feed_forward()


def feed_forward() -> cb.Combinator:
    """What each position makes of it for itself."""
    return cb.residual(nn.LayerNorm(), xn.FeedForward(widening_factor=2))


def together(images: jax.Array, labels: jax.Array) -> list[jax.Array]:
    """The modalities as one item of the stack."""
    return [images, labels]


def apart(modalities: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The modalities as items of the stack."""
    pixels, logits = modalities
    return pixels, logits


def batch_size(x: jax.Array) -> int:
    """How many examples there are."""
    return x.shape[0]


def to_patches(images: jax.Array) -> jax.Array:
    """[batch, 8, 8] -> [batch, 4, 4, 4]: a grid of patches of four pixels."""
    grid = images.reshape(-1, GRID[0], PATCH, GRID[1], PATCH).swapaxes(2, 3)
    return grid.reshape(-1, *GRID, D_PATCH)


def to_pixels(patches: jax.Array) -> jax.Array:
    """[batch, 16, 4] -> [batch, 8, 8]."""
    grid = patches.reshape(-1, *GRID, PATCH, PATCH).swapaxes(2, 3)
    return grid.reshape(-1, SIDE, SIDE)


def as_sequence_of_one(labels: jax.Array) -> jax.Array:
    """[batch] -> [batch, 1]."""
    return labels[:, None]


def without_time(x: jax.Array) -> jax.Array:
    """[batch, 1, features] -> [batch, features]."""
    return x[:, 0]


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
    """How badly both modalities are rebuilt."""
    pixels, logits = model.apply(params, *batch, rngs={"masking": key})
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
    """Rebuilds both modalities."""
    pixels, logits = jax.jit(model.apply)(params, *data)
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
    parser.add_argument("--steps", type=int, default=1200, help="training steps (default: 1200)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples a step (default: 64)")
    parser.add_argument("--picture", type=Path, default=Path("build/digits_autoencoder.png"))
    options = parser.parse_args(arguments)

    console = Console()
    model = autoencoder(label_mask_rate=0.75)
    print(cb.summary(model, *INPUTS))
    wiring = options.picture.with_suffix(".svg")
    wiring.parent.mkdir(parents=True, exist_ok=True)
    cb.diagram(model, *INPUTS).save(wiring)
    training, held_out = load()
    params = train(model, training, options.steps, options.batch_size, console)
    result = evaluate(autoencoder(label_mask_rate=1.0), params, held_out)
    draw(held_out, result, options.picture)
    console.print(
        f"{len(held_out.labels)} held-out images, label masked\n"
        f"  label read off the image: {result.accuracy:.1%} right\n"
        f"  image rebuilt: error {result.image_error:.3f} a pixel (root mean square; ink is 1)\n"
        f"  picture: {options.picture}\n"
        f"  wiring of the model: {wiring}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
