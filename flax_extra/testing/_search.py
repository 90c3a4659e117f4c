"""Finds the smallest counterexample with hypothesis, and lets the check report it.

Hypothesis would report the failing test; a check that a user calls must report what is wrong with
the layer. So hypothesis only searches, and the check runs once more on the example that it found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument, NoSuchExample

T = TypeVar("T")


def search(examples: st.SearchStrategy[T], check: Callable[[T], None], max_examples: int) -> None:
    """Runs a check on drawn examples, and raises its error for the smallest that fails."""

    def fails(example: T) -> bool:
        try:
            check(example)
        except InvalidArgument:
            raise
        except Exception:  # any error on inputs that a layer allows is a finding
            return True
        return False

    try:
        smallest = find(examples, fails, settings=_settings(max_examples))
    except NoSuchExample:
        return
    check(smallest)


def _settings(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
