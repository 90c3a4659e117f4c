"""A voice: espeak-ng, from the wheel of espeakng-loader."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

RETRIEVE, UTF8, KEEP_GOING = 1, 1, 0
"""espeak-ng hands the samples to a function; the text is UTF-8; the function wants more."""

Receive = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def say(text: str) -> tuple[int, np.ndarray]:
    """Samples a second, and the samples ``int16[samples]`` of a sentence."""
    loader = pytest.importorskip(
        "espeakng_loader", reason="espeakng-loader comes with the extra flax_extra[parity]"
    )
    espeak = ctypes.CDLL(loader.get_library_path())
    rate = espeak.espeak_Initialize(RETRIEVE, 0, loader.get_data_path().encode(), 0)
    blocks: list[np.ndarray] = []

    @Receive
    def receive(samples, n_samples, events):
        if samples and n_samples:
            blocks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        return KEEP_GOING

    espeak.espeak_SetSynthCallback(receive)
    data = text.encode()
    assert espeak.espeak_Synth(data, len(data) + 1, 0, 0, 0, UTF8, None, None) == 0
    assert espeak.espeak_Synchronize() == 0
    return rate, np.concatenate(blocks)
