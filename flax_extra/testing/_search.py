"""The smallest counterexample, looked for by hypothesis and told by the check itself.

Hypothesis reports a failure as the test that it found; a check that a user calls reports what is
wrong with the layer. So the search only finds the example, and the check, run on it once more,
speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument, NoSuchExample

T = TypeVar("T")


def search(examples: st.SearchStrategy[T], check: Callable[[T], None], max_examples: int) -> None:
    """Runs a check on drawn examples; raises what it raises on the smallest that fails."""

    def fails(example: T) -> bool:
        try:
            check(example)
        except InvalidArgument:
            raise
        except Exception:  # whatever a layer raises on inputs that it allows is a finding
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
