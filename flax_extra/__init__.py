"""A combinator DSL for sequence models on Flax linen.

``flax_extra.combinator`` composes callables and linen layers into pipelines, ``cb`` for short.
"""

from flax_extra import combinator

__all__ = ["combinator"]
