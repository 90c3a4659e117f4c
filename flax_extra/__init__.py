"""A combinator DSL for sequence models on Flax linen.

``flax_extra.combinator`` composes callables and linen layers into pipelines, ``cb`` for short;
``flax_extra.layer`` has the layers, ``xn`` for short; ``flax_extra.testing`` tests what is made of
them, and is imported when it is first asked for, since it needs hypothesis.
"""

import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_extra import combinator, layer

if TYPE_CHECKING:
    from flax_extra import testing

    __version__: str

__all__ = ["combinator", "layer", "testing"]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("flax_extra.testing")
    if name == "__version__":
        return _installed_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _installed_version() -> str:
    try:
        return importlib.metadata.version("flax_extra")
    except importlib.metadata.PackageNotFoundError as error:
        checkout = Path(__file__).parents[1]
        raise ImportError(
            "flax_extra.__version__ is read from the metadata of the installed package. There is "
            f"none, since flax_extra was imported from {checkout} without being installed. Install "
            f"it: pip install --editable {checkout}"
        ) from error
