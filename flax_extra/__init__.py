"""A combinator DSL for sequence models on Flax linen.

``flax_extra.combinator`` composes callables and linen layers into pipelines, ``cb`` for short;
``flax_extra.layer`` has the layers, ``xn`` for short; ``flax_extra.testing`` tests what is made of
them, and is imported when it is first asked for, since it needs hypothesis.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flax_extra import combinator, layer

if TYPE_CHECKING:
    from flax_extra import testing

__all__ = ["combinator", "layer", "testing"]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("flax_extra.testing")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
