"""Sound as Whisper takes it: samples from a file, and their log-mel features.

    >>> samples = np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)[None]
    >>> features = log_mel(samples)
    >>> features.shape  # of one second, 10 ms apart
    (1, 100, 80)
    >>> int(features[0].mean(axis=0).argmax())  # the band of 440 Hz
    11

The numbers are those of transformers' ``WhisperFeatureExtractor``.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), section
2.2; Slaney, "Auditory Toolbox" (1998), for the mel scale.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.io import wavfile
from scipy.signal import resample_poly

from model_commands import InputError

RATE = 16_000
"""Samples a second."""

WINDOW, HOP = 400, 160
"""Samples of a frame, and from one frame to the next: 25 and 10 ms."""

LINEAR_MELS, LINEAR_HERTZ, OCTAVE_RATIO = 15, 1000.0, 27 / math.log(6.4)
"""Where the mel scale turns from linear to logarithmic, and how steep it is from there."""


def log_mel(sound: Array, n_mels: int = 80) -> Array:
    """Computes the features of a sound: the power in bands that lie as hearing has them.

    Args:
        sound: samples in [-1, 1] at 16 kHz, ``[batch, samples]``, a multiple of 160 of them.
        n_mels: the number of bands.

    Returns:
        The logarithm of the power, ``[batch, samples / 160, n_mels]``, at most 80 dB below the
        loudest, scaled to a range of 2.
    """
    window = jnp.asarray(np.hanning(WINDOW + 1)[:-1], jnp.float32)[None, None]
    spectrum = jnp.abs(jnp.fft.rfft(split_frames(jnp.asarray(sound)) * window)) ** 2
    power = jnp.log10(jnp.maximum(spectrum @ mel_bands(n_mels), 1e-10))
    loudest = jnp.max(power, axis=(1, 2), keepdims=True)
    return (jnp.maximum(power, loudest - 8) + 4) / 4


def split_frames(sound: Array) -> Array:
    """``[batch, samples]`` -> windows that overlap, ``[batch, samples / 160, 400]``.

    Each is centred at its time; the sound is mirrored at its ends.
    """
    n_frames, unit = sound.shape[1] // HOP, math.gcd(WINDOW, HOP)
    padded = jnp.pad(sound, ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    units = padded.reshape(padded.shape[0], -1, unit)
    end = n_frames * HOP // unit
    return jnp.concatenate(
        [units[:, i : i + end : HOP // unit] for i in range(WINDOW // unit)], axis=2
    )


def mel_bands(n_mels: int) -> np.ndarray:
    """How much of each frequency is in each band, ``[201, n_mels]``: triangles of area 1."""
    edges = _mels_to_hertz(np.linspace(0, _hertz_to_mels(RATE / 2), n_mels + 2))
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies - lower) / (centre - lower)
    falling = (upper - frequencies) / (upper - centre)
    triangles = np.maximum(0, np.minimum(rising, falling)) * 2 / (upper - lower)
    bands: np.ndarray = triangles.astype(np.float32)
    return bands


def _hertz_to_mels(hertz: float) -> float:
    return LINEAR_MELS + OCTAVE_RATIO * math.log(hertz / LINEAR_HERTZ)


def _mels_to_hertz(mels: np.ndarray) -> np.ndarray:
    above = LINEAR_HERTZ * np.exp((mels - LINEAR_MELS) / OCTAVE_RATIO)
    return np.where(mels < LINEAR_MELS, mels * LINEAR_HERTZ / LINEAR_MELS, above)


def read_sound(path: Path, seconds: int) -> np.ndarray:
    """Reads a WAV file, at any rate and of any number of channels.

    Args:
        path: the file.
        seconds: how long the result is; a shorter sound is followed by silence.

    Returns:
        Samples in [-1, 1] at 16 kHz, ``[1, seconds * 16000]``.

    Raises:
        InputError: If it is no WAV file that can be read, holds no sound, or is too long.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=wavfile.WavFileWarning):
            rate, samples = wavfile.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as WAV: {error}.") from error
    if not samples.size:
        raise InputError(f"{path} holds no sound.")
    if len(samples) > seconds * rate:
        raise InputError(
            f"{path} is {len(samples) / rate:.1f} s long; the model takes {seconds} s at most."
        )
    if samples.dtype.kind != "f":  # integers of 8 bits have no sign
        limits = np.iinfo(samples.dtype)
        samples = (samples - (limits.max + limits.min + 1) / 2) / (
            (limits.max - limits.min + 1) / 2
        )
    mono = samples.reshape(len(samples), -1).mean(axis=1)
    common = math.gcd(RATE, rate)
    sound = resample_poly(mono, RATE // common, rate // common) if rate != RATE else mono
    padded = np.zeros((1, seconds * RATE), np.float32)
    padded[0, : len(sound)] = sound[: seconds * RATE]
    return padded
