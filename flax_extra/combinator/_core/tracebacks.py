"""Hides the frames of this library in tracebacks, as JAX and flax hide theirs.

``JAX_TRACEBACK_FILTERING=off`` shows all frames, those of this library included.
"""

from __future__ import annotations

from pathlib import Path

from flax import traceback_util

api_boundary = traceback_util.api_boundary
"""Decorates a function that users call: it removes hidden frames from exceptions that leave it."""

traceback_util.register_exclusion(str(Path(__file__).parents[1]))  # type: ignore[no-untyped-call]
