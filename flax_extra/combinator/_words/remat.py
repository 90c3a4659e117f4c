"""``remat``: a callable whose intermediate values are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_extra.combinator._core.arrays import split_arrays
from flax_extra.combinator._core.children import make_only_child
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.stack import Stack, put, take
from flax_extra.combinator._words.lift import Lifted, Policy, check_policy, rematerialize


class Remat(Lifted):
    """A callable that is recomputed in the backward pass. See :func:`remat`."""

    policy: Policy | None = None

    def _check(self) -> None:
        super()._check()
        if self.policy is not None:
            check_policy("remat", "policy", self.policy)

    def _run(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        arrays, merge = split_arrays(taken)
        merge_outputs = merge

        def run_body(combinator: Remat, *arrays: Any) -> list[Any]:
            nonlocal merge_outputs
            outputs, merge_outputs = split_arrays(steps.on(combinator)(0, merge(arrays)))
            return outputs

        outputs = rematerialize(run_body, self, policy=self.policy)(self, *arrays)
        return put(merge_outputs(outputs), rest)


def remat(
    f: Callable[..., Any],
    policy: Policy | None = None,
    *,
    name: str | None = None,
) -> Remat:
    """Recomputes the intermediate values of a callable in the backward pass, to save memory.

    Args:
        f: a callable.
        policy: says which values are kept all the same: one of ``jax.checkpoint_policies``.
        name: the name of its scope; ``Remat_0``, ``Remat_1``, ... if left out.

    Returns:
        A combinator with the signature of ``f``.

    Raises:
        TypeError: If ``f`` or ``policy`` is not callable.

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> block = cb.remat(cb.serial(nn.Dense(4), nn.relu))
        >>> variables = block.init(jax.random.key(0), jax.numpy.ones((2, 3)))
        >>> jax.tree.map(jax.numpy.shape, variables)
        {'params': {'Dense_0': {'bias': (4,), 'kernel': (3, 4)}}}
    """
    return Remat(make_only_child("remat", f), policy=policy, name=name)
