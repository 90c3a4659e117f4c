"""Property tests for your own layers and pipelines, with hypothesis.

    >>> from flax import linen as nn
    >>> from flax_extra import layer as xn, testing
    >>> testing.check_shapes(xn.FeedForward(4), max_examples=20)
    >>> testing.check_laws(nn.Dense(4), max_examples=1)

Strategies draw signatures, pipelines and inputs. Checks are whole tests of a layer in one line.
Both need hypothesis, which ``pip install 'flax_extra[test]'`` brings.
"""

try:
    import hypothesis as _hypothesis
except ImportError as error:
    raise ImportError(
        "flax_extra.testing needs hypothesis, which is not installed. Install the extra that "
        "brings it: pip install 'flax_extra[test]'."
    ) from error

from flax_extra.testing._inputs import inputs_for
from flax_extra.testing._laws import LAWS, Law, assert_same_meaning, check_laws
from flax_extra.testing._programs import assert_same_program
from flax_extra.testing._shapes import check_shapes
from flax_extra.testing._signature import check_signature
from flax_extra.testing._strategies import (
    COMBINATORS,
    SHUFFLING,
    Function,
    functions,
    pipelines,
    signatures,
    with_n_in,
    with_one_output,
)
from flax_extra.testing._streaming import check_streaming

del _hypothesis

__all__ = [
    # strategies
    "signatures",
    "functions",
    "pipelines",
    "inputs_for",
    "Function",
    "COMBINATORS",
    "SHUFFLING",
    "with_n_in",
    "with_one_output",
    # checks of a layer
    "check_signature",
    "check_shapes",
    "check_streaming",
    # laws and comparisons
    "check_laws",
    "Law",
    "LAWS",
    "assert_same_meaning",
    "assert_same_program",
]
