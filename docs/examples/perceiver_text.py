"""Text as the byte-level language model takes it: bytes, and six tokens that are none.

    >>> as_bytes(as_tokens(b"Perceiver"))
    b'Perceiver'
    >>> tokens, mask = padded(parse("Perc[MASK][MASK]ver"), n_positions=16)
    >>> (tokens == MASK).sum().item(), mask.sum().item()  # with [CLS] and [SEP]
    (2, 11)

The numbers are those of transformers' ``PerceiverTokenizer``, which the published weights need.
"""

from __future__ import annotations

import re

import numpy as np

PAD, MASK, CLS, SEP = 0, 3, 4, 5
N_SPECIAL = 6
"""Bytes come after these."""

MASK_IN_TEXT = re.compile(r"\[MASK(?::([0-9]{1,6}))?\]")
"""``[MASK]`` stands for one masked byte, ``[MASK:5]`` for five."""


class TextError(ValueError):
    """A text that the model cannot take."""


def as_tokens(text: bytes) -> np.ndarray:
    """The token of each byte."""
    return np.frombuffer(text, np.uint8).astype(np.int32) + N_SPECIAL


def as_bytes(tokens: np.ndarray) -> bytes:
    """The byte of each token that is one; others are left out."""
    return (tokens[tokens >= N_SPECIAL] - N_SPECIAL).astype(np.uint8).tobytes()


def parse(text: str) -> np.ndarray:
    """The tokens of a text, with those that are masked.

    Raises:
        TextError: where there is no text, or nothing masked in it.
    """
    if not text:
        raise TextError("The text is empty. Give one with [MASK] where a byte is to be filled in.")
    parts, end = [], 0
    for match in MASK_IN_TEXT.finditer(text):
        parts.append(_encoded(text[end : match.start()]))
        parts.append(np.full(int(match[1] or 1), MASK, np.int32))
        end = match.end()
    parts.append(_encoded(text[end:]))
    tokens = np.concatenate(parts)
    if not (tokens == MASK).any():
        raise TextError(
            "Nothing is masked in the text. Write [MASK] where a byte is to be filled in, "
            "[MASK:5] for five."
        )
    return tokens


def _encoded(text: str) -> np.ndarray:
    """Bytes of the command line that are no UTF-8 stay what they were."""
    return as_tokens(text.encode(errors="surrogateescape"))


def padded(tokens: np.ndarray, n_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask ``[1, n_positions]``, between [CLS] and [SEP] as transformers does it.

    Raises:
        TextError: where they are too many.
    """
    room = n_positions - 2
    if len(tokens) > room:
        raise TextError(f"The text has {len(tokens)} bytes; the model takes {room} at most.")
    row = np.full(n_positions, PAD, np.int32)
    row[: len(tokens) + 2] = [CLS, *tokens, SEP]
    return row[None], is_text(np.array([len(tokens)]), n_positions)


def is_text(lengths: np.ndarray, n_positions: int) -> np.ndarray:
    """Where texts of some lengths, with [CLS] and [SEP], are not padding: ``[batch, time]``."""
    return np.arange(n_positions) < lengths[:, None] + 2
