"""A text that every machine has: the sources of Python's own library.

>>> text = read_corpus(held_out=True)
>>> text.dtype, b"def " in text.tobytes()
(dtype('uint8'), True)
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
"""Folders that not every machine has."""


def standard_library(*, held_out: bool) -> list[Path]:
    """Lists sources of Python's own library: nine files of ten, or every tenth, held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)
    )
    return [path for index, path in enumerate(files) if (index % 10 == 9) == held_out]


def read_corpus(*, held_out: bool) -> np.ndarray:
    """Reads these files as one text, one after the other: bytes, ``uint8[n]``."""
    files = standard_library(held_out=held_out)
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)
