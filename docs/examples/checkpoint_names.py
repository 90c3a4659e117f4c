"""The words in which a model of transformers is described: its configuration, and its weights.

A model file has a table of what transformers calls its parameters, and a function that builds the
pipeline of a configuration. Both together are an :class:`Architecture`. The trees differ in three
ways, which the table says:

- Torch lays a weight out in another order, and does not split it by heads: a :class:`Layout`.
- Torch has a module for each layer, and ``repeat`` stacks them on a leading axis: ``{layer}`` in a
  name stands for the number of the layer.
- GPT-2 keeps query, key and value in one weight: a ``part`` of it is one parameter of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from flax import linen as nn
from jax import Array

from checkpoint_files import CheckpointError
from flax_extra import combinator as cb

T = TypeVar("T")


class Settings:
    """A configuration whose values are attributes, and that says what it lacks.

    Args:
        config: what ``config.json`` holds.
        compute_dtype: of what the model computes; that of its parameters by default.
    """

    def __init__(self, config: Mapping[str, Any], compute_dtype: Any = None) -> None:
        self._config = config
        self.compute_dtype = compute_dtype

    def __getattr__(self, name: str) -> Any:
        if name not in self._config:
            kind = self._config.get("model_type")
            raise CheckpointError(f"The configuration, of type {kind!r}, has no {name!r}.")
        value = self._config[name]
        return Settings(value, self.compute_dtype) if isinstance(value, dict) else value

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a value that may be left out, or null."""
        value = self._config.get(name)
        return default if value is None else value

    def refuse(self, name: str, value: Any) -> None:
        """Refuses a value that no model here has.

        Raises:
            CheckpointError: If the configuration has it.
        """
        if self._config.get(name) == value:
            raise CheckpointError(f"The configuration has {name}={value!r}, which is not known.")

    def choose(self, name: str, known: Mapping[str, T]) -> T:
        """Returns what a value of the configuration stands for.

        Raises:
            CheckpointError: If the value is not known; it lists those that are.
        """
        value = getattr(self, name)
        if value not in known:
            raise CheckpointError(
                f"The configuration has {name}={value!r}. Known are: {', '.join(map(repr, known))}."
            )
        return known[value]


def quick_gelu(x: Array) -> Array:
    """Approximates GELU as CLIP does."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[..., Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}
"""As transformers names them. Its plain GELU is the exact one, linen's is the tanh form."""


class Layout(NamedTuple):
    """How torch lays out a parameter, and back; the shape of ours is restored after that."""

    to_torch: Callable[[Any], Any]
    from_torch: Callable[[Any], Any]


SAME = Layout(lambda x: x, lambda y: y)
VECTOR = Layout(lambda x: x.reshape(-1), lambda y: y)
LINEAR = Layout(lambda x: x.reshape(len(x), -1).T, lambda y: y.T)
"""Of torch's Linear, ``[out, in]``. Ours is ``[in, out]`` or ``[in, heads, features]``."""
TRANSPOSED_LINEAR = Layout(lambda x: x.reshape(len(x), -1), lambda y: y)
"""Of GPT-2's Conv1D, ``[in, out]``."""
CONV = Layout(
    lambda x: x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)),
    lambda y: y.transpose(*range(2, y.ndim), 1, 0),
)
"""Of torch's convolutions, ``[out, in, *kernel]``. Ours is ``[*kernel, in, out]``."""


class Weight(NamedTuple):
    """What a parameter of ours is called in torch.

    Args:
        name: of the weight; ``{layer}`` stands for the number of a layer that ``repeat`` stacks.
        layout: how torch lays it out.
        part: which of how many equal parts of the weight's last axis it is.
        is_zero: whether torch has no such weight, and zeros serve. ``name`` is that of its module,
            and the parameter is left out on the way back.
    """

    name: str
    layout: Layout = SAME
    part: tuple[int, int] = (0, 1)
    is_zero: bool = False


def linear(ours: str, theirs: str, layout: Layout = LINEAR, **part: Any) -> dict[str, Weight]:
    """Names the parameters of a Dense or DenseGeneral; a model without a bias asks for none."""
    return {
        f"{ours}/kernel": Weight(f"{theirs}.weight", layout, **part),
        f"{ours}/bias": Weight(f"{theirs}.bias", VECTOR, **part),
    }


def norm(ours: str, theirs: str) -> dict[str, Weight]:
    """Names the parameters of a LayerNorm or an RMSNorm."""
    return {f"{ours}/scale": Weight(f"{theirs}.weight"), f"{ours}/bias": Weight(f"{theirs}.bias")}


class Architecture(NamedTuple):
    """A class of transformers.

    Args:
        build: makes the pipeline of a configuration.
        inputs: gives inputs that the pipeline takes: parameters are known once it has seen some.
        names: what torch calls each parameter, by its path in our tree.
        ignored: endings of names of weights that are no parameters: those that are the same as
            others (tied), and buffers.
        prefix: what some files leave out at the start of all names.
    """

    build: Callable[[Settings], cb.Combinator]
    inputs: Callable[[Settings], list[Any]]
    names: Mapping[str, Weight]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
