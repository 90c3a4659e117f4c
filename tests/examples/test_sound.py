"""Sound files: what is read of them, and what is said of those that cannot be read."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.io import wavfile

from model_commands import InputError
from sound import RATE, log_mel, mel_bands, read_sound, split_frames


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def as_integers(samples: np.ndarray, dtype: type) -> np.ndarray:
    limits = np.iinfo(dtype)
    middle, scale = (limits.max + limits.min + 1) / 2, (limits.max - limits.min + 1) / 2
    return (samples * scale + middle).round().astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.uint8, 1e-2), (np.int16, 1e-4), (np.int32, 1e-6)]
)
def test_integers(dtype, tolerance, tmp_path):
    wavfile.write(tmp_path / "a.wav", RATE, as_integers(tone(RATE), dtype))
    sound = read_sound(tmp_path / "a.wav", 1)
    assert sound.shape == (1, RATE)
    np.testing.assert_allclose(sound[0, : RATE // 2], tone(RATE), rtol=0, atol=tolerance)
    assert not sound[0, RATE // 2 :].any()


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_other_rates(rate, tmp_path):
    wavfile.write(tmp_path / "a.wav", rate, tone(rate).astype(np.float32))
    sound = read_sound(tmp_path / "a.wav", 1)[0]
    inside = slice(RATE // 10, 4 * RATE // 10)
    np.testing.assert_allclose(sound[inside], tone(RATE)[inside], rtol=0, atol=5e-3)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone(RATE), np.zeros(RATE // 2)], axis=1).astype(np.float32)
    wavfile.write(tmp_path / "a.wav", RATE, stereo)
    sound = read_sound(tmp_path / "a.wav", 1)[0]
    np.testing.assert_allclose(sound[: RATE // 2], tone(RATE) / 2, rtol=0, atol=1e-6)


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "a.wav"
    with pytest.raises(InputError, match=r"a\.wav cannot be read as WAV: .*No such file"):
        read_sound(path, 1)
    path.write_bytes(b"ID3 an mp3")
    with pytest.raises(InputError, match=r"a\.wav cannot be read as WAV: "):
        read_sound(path, 1)
    wavfile.write(path, RATE, np.zeros(0, np.int16))
    with pytest.raises(InputError, match=r"a\.wav holds no sound\.$"):
        read_sound(path, 1)
    wavfile.write(path, 8000, np.zeros(12_000, np.int16))
    message = f"{path} is 1.5 s long; the model takes 1 s at most."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read_sound(path, 1)


def test_frames_overlap_and_are_centred():
    sound = np.arange(1600, dtype=np.float32)[None]
    frames = split_frames(sound)
    assert frames.shape == (1, 10, 400)
    np.testing.assert_array_equal(frames[0, 5], np.arange(600, 1000))
    np.testing.assert_array_equal(frames[0, 0], np.abs(np.arange(-200, 200)))


def test_bands_have_the_same_area():
    bands = mel_bands(40)
    assert bands.shape == (201, 40)
    assert (bands >= 0).all()
    hertz = RATE / 2 / 200
    np.testing.assert_allclose(bands[:, 10:].sum(axis=0) * hertz, 1, atol=0.05)


@pytest.mark.parametrize("hertz", [200.0, 1000.0, 5000.0])
def test_a_tone_is_loudest_in_its_band(hertz):
    features = log_mel(tone(RATE, 1.0, hertz)[None].astype(np.float32))
    band = int(np.asarray(features)[0, 10:-10].mean(axis=0).argmax())
    assert mel_bands(80)[round(hertz / 40), band] > 0
