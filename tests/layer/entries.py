"""The conformance list: one entry, or more, for every public layer and function.

``tests/layer/test_conformance.py`` puts each entry through every test, and fails when a public
name is missing from the list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Dtypes = Mapping[str, Any]
"""Fields to build a layer with: ``{}`` or ``{"dtype": jnp.bfloat16}``, say."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One public layer or function, and what is documented of it.

    Attributes:
        name: the public name in ``flax_extra.layer``; ``io.input_encoding`` for one in a submodule.
            What follows a colon tells entries of one name apart: ``"LSTM: return_sequences"``.
        make: builds a fresh layer, or gives the function, from dtype fields. What has no such
            fields ignores them.
        inputs: the positional arguments of a call. Floating point ones are float32.
        output_shapes: a shape, or a tuple or list of them, as the call returns it; a plain number
            that the call returns stands for itself.
        param_shapes: the golden parameter tree, a documented API; empty where there are none.
        repeatable: whether the first output has the shape of the first input, for ``cb.repeat``.
        rngs: the names of the rng streams that a call needs, other than ``params``.
    """

    name: str
    make: Callable[[Dtypes], Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    output_shapes: Any
    param_shapes: Mapping[str, Any]
    repeatable: bool = False
    rngs: tuple[str, ...] = ()
