"""The n-gram model that a language model has to beat, against its formula word for word."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngrams import NgramModel

some_text = st.lists(st.sampled_from(b"abc\xff"), min_size=5, max_size=40).map(
    lambda text: np.array(text, np.uint8)
)


def fit(text: list[int], order: int) -> list[dict[tuple[int, ...], Counter[int]]]:
    """For each n, how often each byte came after each context; Kneser and Ney's for shorter ones."""
    grams = Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))
    tables = []
    for _ in range(order):
        table = defaultdict(Counter)
        for *context, last in grams:
            table[tuple(context)][last] += grams[*context, last]
        tables.append(table)
        grams = Counter(gram[1:] for gram in grams)
    return tables[::-1]


def find_probability(tables, context: tuple[int, ...], byte: int) -> float:
    if not tables:
        return 1 / 256
    *shorter_tables, table = tables
    context = context[-len(shorter_tables) :] if shorter_tables else ()
    shorter = find_probability(shorter_tables, context[1:], byte)
    if len(context) < len(shorter_tables) or context not in table:
        return shorter
    counts = [count for after in table.values() for count in after.values()]
    n1, n2 = counts.count(1), counts.count(2)
    discount = n1 / (n1 + 2 * n2) if n1 else 0.5
    after = table[context]
    kept = max(after[byte] - discount, 0) + discount * len(after) * shorter
    return kept / after.total()


@given(some_text, some_text, st.integers(1, 5))
def test_bits_are_those_of_the_formula(seen, unseen, order):
    tables = fit(seen.tolist(), order)
    bytes_ = unseen.tolist()
    expected = [
        -np.log2(
            find_probability(
                tables[: index + 1], tuple(bytes_[max(0, index - order + 1) : index]), x
            )
        )
        for index, x in enumerate(bytes_)
    ]
    np.testing.assert_allclose(NgramModel.fit(seen, order).count_bits(unseen), expected, rtol=1e-9)


@settings(max_examples=20)
@given(some_text, st.integers(1, 5))
def test_probabilities_of_all_bytes_sum_to_one(seen, order):
    model = NgramModel.fit(seen, order)
    context = seen[: order - 1]
    texts = [np.append(context, np.uint8(byte)) for byte in range(256)]
    total = sum(2.0 ** -model.count_bits(text)[-1] for text in texts)
    assert total == pytest.approx(1)


@pytest.mark.parametrize("order", [0, 8, 6])
def test_orders_that_cannot_be_counted_are_refused(order):
    message = f"from 1 to 7, and not above the length of the text, 5; got {order}."
    with pytest.raises(ValueError, match=re.escape(message)):
        NgramModel.fit(np.arange(5, dtype=np.uint8), order)
