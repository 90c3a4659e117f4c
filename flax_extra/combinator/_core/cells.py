"""The signature of linen's recurrent cells, whose calls have no annotations.

``nn.RNNCellBase`` promises a call (carry, x) -> (carry, y), and ``initialize_carry`` says what the
carry is.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from flax_extra.combinator._core.arrays import get_key_shape
from flax_extra.combinator._core.signature import Nesting, Signature
from flax_extra.combinator._core.stack import flatten


def read_cell(cell: nn.RNNCellBase) -> Signature | None:
    """Reads the signature of a cell from its initial carry; None if that cannot be made."""
    try:
        # The sizes do not matter, only the number of arrays.
        shape = (1,) * (cell.num_feature_axes + 1)
        carry = jax.eval_shape(lambda key: cell.initialize_carry(key, shape), get_key_shape())
    except Exception:  # a cell of the user's may raise anything
        return None
    n_carry = len(flatten(carry))
    return Signature(n_carry + 1, n_carry + 1, in_shape=(_get_nesting(carry), ()))


def _get_nesting(value: object) -> Nesting:
    return tuple(map(_get_nesting, value)) if type(value) is tuple else ()
