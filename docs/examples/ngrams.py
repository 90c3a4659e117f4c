"""A model of bytes that counts: how often each byte followed the few before it.

>>> text = np.frombuffer(b"abracadabra", np.uint8)
>>> model = NgramModel.fit(text, order=2)
>>> bits = model.count_bits(np.frombuffer(b"abr", np.uint8))
>>> bits.shape, bool(bits[1] < bits[0])  # an a came often, and a b mostly after it
((3,), True)

Source: Kneser and Ney, "Improved backing-off for m-gram language modeling" (1995); the interpolated
form is that of Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling"
(1999), section 3.
"""

from __future__ import annotations

import dataclasses

import numpy as np

N_BYTES = 256
MAX_ORDER = 7
"""So many bytes are one integer of 64 bits."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often each n-gram was seen, for one n.

    Args:
        grams: the n-grams, sorted, each as one integer: its bytes are its digits.
        counts: how often each was seen.
        contexts: the n-grams without their last byte, sorted.
        totals: how often each context was seen.
        n_next: how many bytes were seen after it.
        discount: what is taken from each count, for bytes that were not seen.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    n_next: np.ndarray
    discount: float

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray) -> Counts:
        """Sums up by context."""
        contexts, starts = np.unique(grams // N_BYTES, return_index=True)
        once, twice = (int((counts == n).sum()) for n in (1, 2))
        return cls(
            grams,
            counts,
            contexts,
            totals=np.add.reduceat(counts, starts),
            n_next=np.diff(np.append(starts, len(grams))),
            discount=once / (once + 2 * twice) if once else 0.5,
        )

    def smooth(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Computes the probability of the last byte of n-grams.

        Args:
            grams: the n-grams.
            shorter: its probability after the shorter context, which is all there is to go by if
                the context was not seen.
        """
        contexts = grams // N_BYTES
        counts = _look_up(self.grams, self.counts, grams)
        totals = _look_up(self.contexts, self.totals, contexts)
        n_next = _look_up(self.contexts, self.n_next, contexts)
        kept = np.maximum(counts - self.discount, 0) + self.discount * n_next * shorter
        return np.where(totals > 0, kept / np.maximum(totals, 1), shorter)


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """An n-gram model of bytes, with interpolated Kneser-Ney smoothing.

    With an order of 1 it is a count of frequencies.

    Args:
        orders: the counts for each n, from 1.
    """

    orders: tuple[Counts, ...]

    @classmethod
    def fit(cls, text: np.ndarray, order: int) -> NgramModel:
        """Counts the n-grams of a text, ``uint8[n]``.

        Raises:
            ValueError: If the order is not from 1 to 7, or the text is shorter.
        """
        if not 1 <= order <= min(MAX_ORDER, len(text)):
            raise ValueError(
                f"The order must be from 1 to {MAX_ORDER}, and not above the length of the text, "
                f"{len(text)}; got {order}."
            )
        grams, counts = np.unique(_encode(text, order), return_counts=True)
        orders = [Counts.of(grams, counts)]
        for n in range(order - 1, 0, -1):
            # Kneser and Ney: after a shorter context counts how many contexts a byte completes.
            grams, counts = np.unique(grams % N_BYTES**n, return_counts=True)
            orders.append(Counts.of(grams, counts))
        return cls(tuple(reversed(orders)))

    def count_bits(self, text: np.ndarray) -> np.ndarray:
        """Counts the bits that each byte of a text takes, after the bytes before it: ``[n]``."""
        probabilities = np.full(len(text), 1 / N_BYTES)
        for n, counts in enumerate(self.orders[: len(text)], start=1):
            grams = _encode(text, n)
            probabilities[n - 1 :] = counts.smooth(grams, probabilities[n - 1 :])
        bits: np.ndarray = -np.log2(probabilities)
        return bits


def _encode(text: np.ndarray, n: int) -> np.ndarray:
    """Makes one integer of each n-gram of a text."""
    n_grams = len(text) - n + 1
    grams = np.zeros(n_grams, np.int64)
    for index in range(n):
        grams = grams * N_BYTES + text[index : index + n_grams]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Looks up the values of sorted keys; zero for a key that there is not."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
