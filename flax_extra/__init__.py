"""A combinator DSL for sequence models on Flax linen.

``flax_extra.combinator`` composes callables and linen layers into pipelines, ``cb`` for short;
``flax_extra.layer`` has the layers, ``xn`` for short.
"""

from flax_extra import combinator, layer

__all__ = ["combinator", "layer"]
