"""Three Perceivers that were published: for text, for images, and for video with sound.

Each is the architecture of perceiver_io.py, with what its inputs need in front and what its outputs
need behind. With the published weights, which perceiver_checkpoints.py loads, the numbers are those
of Hugging Face's implementation (tests/parity/test_perceiver.py). The defaults are the published
sizes; smaller ones are an argument away:

    >>> import jax
    >>> core = Core(n_latents=8, d_latents=16, n_layers=2)
    >>> model = masked_language_model(core, n_positions=32, d_model=24)
    >>> tokens, mask = jnp.zeros((2, 32), int), jnp.ones((2, 32), bool)
    >>> model.init_with_output(jax.random.key(0), tokens, mask)[0].shape
    (2, 32, 262)

What flows between the steps of the published ones, and how they are wired, is printed and drawn by

    python docs/examples/perceiver_models.py

Source: Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs", 2021,
section 4 and appendices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from flax_extra import combinator as cb
from flax_extra import layer as xn
from perceiver_io import Core, Function, learned, perceiver_io
from tied_scores import TiedScores

LANGUAGE = Core(n_latents=256, d_latents=1280, n_layers=26, n_heads_encoder=8, d_qk=256, d_v=1280)
"""The core of the published language model."""

IMAGE = Core(n_latents=512, d_latents=1024, n_layers=6, n_shards=8)
"""The core of the published image classifier."""

MULTIMODAL = Core(n_latents=784, d_latents=512, n_layers=8)
"""The core of the published autoencoder."""


# Text: scores for every byte, so that those that are masked can be filled in


def masked_language_model(
    core: Core = LANGUAGE,
    *,
    n_tokens: int = 262,
    n_positions: int = 2048,
    d_model: int = 768,
    n_heads_decoder: int = 8,
    d_qk_decoder: int = 256,
) -> cb.Combinator:
    """Scores each token at each position of a text, with the embedding that the text came in by.

    Args:
        core: what reads and thinks.
        n_tokens: how many bytes and special tokens there are.
        n_positions: how long texts are, padding included.
        d_model: features of a token.
        n_heads_decoder: heads of the attention that answers.
        d_qk_decoder: features of its queries and keys.

    Returns:
        A pipeline (tokens, mask) -> logits ``[batch, n_positions, n_tokens]``. Tokens and mask are
        ``[batch, n_positions]``; the mask is not zero where there is text and no padding, or None.

    Source: Jaegle et al. (2021), section 4.1, Perceiver IO on UTF-8 bytes.
    """
    like_positions = nn.initializers.truncated_normal(0.02)
    embed = nn.Embed(n_tokens, d_model, embedding_init=like_positions, name="embed")
    text = cb.branch(embed, learned(n_positions, d_model, name="positions")) >> cb.add()
    queries = learned(n_positions, d_model, name="queries")
    return cb.serial(
        cb.branch(core.latents(), text, cb.select([1]) >> for_all_queries, queries),
        perceiver_io(
            core.encoder(masked=True),
            core.processor(),
            core.decoder(n_heads=n_heads_decoder, d_qk=d_qk_decoder, d_v=d_model),
        ),
        TiedScores(embed, name="scores"),
    )


def for_all_queries(mask: Array | None) -> Array | None:
    """Which inputs there are, ``[batch, time]``, as a mask for attention: ``[batch, 1, time]``."""
    return None if mask is None else mask[:, None, :]


# Images: one label for each


def image_classifier(
    core: Core = IMAGE,
    *,
    image_shape: tuple[int, int] = (224, 224),
    max_resolution: tuple[int, int] = (224, 224),
    n_bands: int = 64,
    n_labels: int = 1000,
) -> cb.Combinator:
    """Labels images by their pixels, each told apart by the Fourier features of its place.

    Args:
        core: what reads and thinks.
        image_shape: rows and columns.
        max_resolution: twice the highest frequency along each.
        n_bands: how many frequencies there are along each.
        n_labels: how many labels there are.

    Returns:
        A pipeline images ``[batch, rows, columns, colours]`` -> logits ``[batch, n_labels]``.

    Source: Jaegle et al. (2021), the section on ImageNet, with 2D Fourier features.
    """
    places = functools.partial(
        xn.FourierPositionEncoding, image_shape, n_bands, max_resolution=max_resolution
    )
    pixels = xn.Encoding(positional_encoding=places, name="pixels")
    query = learned(1, core.d_latents, name="queries")
    return cb.serial(
        cb.branch(core.latents(), pixels, query),
        perceiver_io(core.encoder(), core.processor(), core.decoder(query_residual=True)),
        nn.Dense(n_labels, name="logits"),
        the_only_position,
    )


def the_only_position(x: Array) -> Array:
    """``[batch, 1, features]`` -> ``[batch, features]``."""
    return x[:, 0]


# Sound, video and a label: all three are given back


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a clip is made of: how each modality goes in, is asked for, and comes out.

    Args:
        n_samples: of sound.
        samples_per_patch: samples in one position of the sound.
        n_bands_sound: how many frequencies tell positions of the sound apart.
        video_shape: frames, rows and columns.
        side: rows and columns of a patch of the video that goes in; single pixels come out.
        n_bands_video: how many frequencies tell places in the video apart, along each axis.
        max_resolution: twice the highest of them along each axis.
        n_labels: how many labels there are.
        d_label_query: features of the query for the label.
        mask_rates: how probably a position of sound, video and label is masked. The label always
            is, so that the model has to listen and look for it.
    """

    n_samples: int = 30720
    samples_per_patch: int = 16
    n_bands_sound: int = 192
    video_shape: tuple[int, int, int] = (16, 224, 224)
    side: int = 4
    n_bands_video: int = 32
    max_resolution: tuple[int, int, int] = (16, 56, 56)
    n_labels: int = 700
    d_label_query: int = 1024
    mask_rates: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def encoding(self) -> cb.Combinator:
        """(sound, video, label) -> one sequence."""
        frames, rows, columns = self.video_shape
        patches = (frames, rows // self.side, columns // self.side)
        modalities = [
            _encoded(functools.partial(sound_patches, size=self.samples_per_patch), self._times()),
            _encoded(functools.partial(video_patches, side=self.side), self._places(patches)),
            _encoded(sequence_of_one),
        ]
        encoding = xn.MultimodalEncoding(
            modalities, mask_rates=self.mask_rates, d_reserved=4, name="inputs"
        )
        return cb.serial(together, encoding, cb.dip(cb.drop()))

    def queries(self) -> cb.Combinator:
        """(latents, sound positions, video positions) -> queries and how many each modality has."""
        modalities = [
            functools.partial(self._times(), deepmind_subset=True),
            functools.partial(self._places(self.video_shape), deepmind_subset=True),
            functools.partial(xn.TrainablePositionalEncoding, 1, self.d_label_query),
        ]
        encoding = xn.MultimodalPositionalEncoding(modalities, d_reserved=2, name="queries")
        return cb.serial(asked, cb.fn(encoding, n_in=2))  # the positions are no option here

    def decoding(self) -> nn.Module:
        """Outputs, and how many each modality has -> a list of sound, video and logits."""
        modalities = [
            _decoded(self.samples_per_patch, as_sound),
            _decoded(3),
            _decoded(self.n_labels, the_only_position),
        ]
        return xn.MultimodalDecoding(modalities, name="modalities")

    def _times(self) -> Function:
        axis = (self.n_samples // self.samples_per_patch,)
        return functools.partial(
            xn.FourierPositionEncoding, axis, self.n_bands_sound, max_resolution=(self.n_samples,)
        )

    def _places(self, grid: tuple[int, ...]) -> Function:
        return functools.partial(
            xn.FourierPositionEncoding,
            grid,
            self.n_bands_video,
            max_resolution=self.max_resolution,
        )


def multimodal_autoencoder(
    core: Core = MULTIMODAL, clip: Clip | None = None, *, d_output: int = 512
) -> cb.Combinator:
    """Gives back the clips it was shown, at the positions that are asked for.

    A clip has more positions than there is memory for answers. So positions come in chunks, and the
    decoder is a loop over them: one program with the memory of one chunk. The label is asked for
    with every chunk; each time the answer is the same.

    Args:
        core: what reads and thinks.
        clip: what a clip is made of; the published one where None.
        d_output: features of an output before it becomes sound, pixel or label.

    Returns:
        A pipeline (sound ``[batch, n_samples]``, video ``[batch, frames, rows, columns, 3]``, label
        ``[batch, n_labels]``, sound positions ``[chunks, m]``, video positions ``[chunks, n]``) ->
        (sound ``[batch, chunks * m * samples_per_patch]``, video ``[batch, chunks * n, 3]``, logits
        ``[batch, n_labels]``).

    Source: Jaegle et al. (2021), the section on multimodal autoencoding.
    """
    clip = clip or Clip()
    chunk = cb.serial(
        cb.branch(cb.identity(), clip.queries()),  # latents, queries, lengths
        core.decoder(),
        nn.Dense(d_output, name="outputs"),
        clip.decoding(),
    )
    chunks = cb.scan(cb.branch(cb.identity(), chunk), axis=0, n_carry=1, name="chunks")
    return cb.serial(
        cb.branch(core.latents(), clip.encoding()),
        perceiver_io(core.encoder(), core.processor(), chunks >> cb.drop()),
        joined,
    )


def in_chunks(n_positions: int, n_chunks: int) -> Array:
    """All positions, row by row: ``[n_chunks, n_positions / n_chunks]``.

    Raises:
        ValueError: where they cannot be shared out evenly.
    """
    if n_positions % n_chunks:
        raise ValueError(
            f"{n_positions} positions cannot be shared out to {n_chunks} chunks of one size. "
            "Take a number of chunks that divides them."
        )
    return jnp.arange(n_positions).reshape(n_chunks, n_positions // n_chunks)


def _encoded(preprocess: Function, positions: Function | None = None) -> Function:
    """A constructor of what makes a sequence of one modality."""
    return functools.partial(
        xn.Encoding, preprocessing=lambda: preprocess, positional_encoding=positions
    )


def _decoded(n_features: int, postprocess: Function | None = None) -> Function:
    """A constructor of what makes one modality of outputs."""
    return functools.partial(
        xn.Decoding,
        embedding_decoding=functools.partial(nn.Dense, n_features),
        postprocessing=lambda: postprocess or cb.identity(),
    )


def sound_patches(sound: Array, size: int) -> Array:
    """``[batch, samples]`` -> ``[batch, samples / size, size]``."""
    return sound.reshape(sound.shape[0], -1, size)


def video_patches(video: Array, side: int) -> Array:
    """Squares of pixels, each flat: ``[batch, frames, rows / side, columns / side, features]``."""
    batch, frames, rows, columns, colours = video.shape
    squares = video.reshape(
        batch, frames, rows // side, side, columns // side, side, colours
    ).swapaxes(3, 4)
    return squares.reshape(*squares.shape[:4], side * side * colours)


def sequence_of_one(x: Array) -> Array:
    """``[batch, features]`` -> ``[batch, 1, features]``."""
    return x[:, None]


def as_sound(patches: Array) -> Array:
    """``[batch, n, size]`` -> ``[batch, n * size]``."""
    return patches.reshape(patches.shape[0], -1)


def together(sound: Array, video: Array, label: Array) -> list[Array]:
    """The modalities as one item of the stack."""
    return [sound, video, label]


def asked(
    latents: Array, sound_positions: Array, video_positions: Array
) -> tuple[int, list[Array | None]]:
    """What is asked for: how many times, and which positions of each modality."""
    return latents.shape[0], [sound_positions, video_positions, None]


def joined(chunks: list[Array]) -> tuple[Array, Array, Array]:
    """Chunks ``[chunks, batch, n, ..]`` as one: ``[batch, chunks * n, ..]``; of the labels, one."""
    sound, video, label = chunks
    return _in_a_row(sound), _in_a_row(video), label[-1]


def _in_a_row(chunks: Array) -> Array:
    n_chunks, batch, n, *features = chunks.shape
    return chunks.swapaxes(0, 1).reshape(batch, n_chunks * n, *features)


# What they look like


PUBLISHED: dict[str, tuple[Callable[[], cb.Combinator], tuple[str, ...]]] = {
    "language": (masked_language_model, ("i32[b, 2048]", "bool[b, 2048]")),
    "image": (image_classifier, ("f32[b, 224, 224, 3]",)),
    "multimodal": (
        multimodal_autoencoder,
        (
            "f32[b, 30720]",
            "f32[b, 16, 224, 224, 3]",
            "f32[b, 700]",
            "i32[128, 15]",
            "i32[128, 6272]",
        ),
    ),
}
"""The published models, and what each takes; clips are given back in 128 chunks of positions."""


def main(folder: Path = Path("build/perceiver")) -> None:
    """Prints a summary of each published model, and draws its diagram. Nothing is computed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (build, inputs) in PUBLISHED.items():
        model = build()
        print(f"{cb.summary(model, *inputs)}\n")
        picture = folder / f"{name}.svg"
        cb.diagram(model, *inputs).save(picture)
        print(f"{name}: wiring in {picture}\n")


if __name__ == "__main__":
    main()
