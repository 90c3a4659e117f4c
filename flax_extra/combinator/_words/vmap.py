"""``vmap``: a callable over one more axis, with one set of parameters or one for each member."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_extra.combinator._cache.cache import COLLECTION
from flax_extra.combinator._cache.entry import Unboxed, has_entries
from flax_extra.combinator._core import errors, linen
from flax_extra.combinator._core.arrays import split_arrays
from flax_extra.combinator._core.checks import as_integer, check_at_least
from flax_extra.combinator._core.children import make_only_child
from flax_extra.combinator._core.describe import describe_item, describe_stack
from flax_extra.combinator._core.linen import static_property
from flax_extra.combinator._core.run import Steps
from flax_extra.combinator._core.stack import Stack, put, take
from flax_extra.combinator._words.lift import Lifted, choose_axis_name
from flax_extra.combinator._words.loop import LAYERS_AXIS

NOT_PARAMS = linen.make_hashable(linen.DenyList("params"))
"""All collections, or all rng streams, but those of the parameters."""


class Vmap(Lifted):
    """A callable over one more axis. See :func:`vmap`."""

    axis: int | tuple[int | None, ...] = 0
    shared: bool = True
    n: int | None = None
    out_axis: int | None = None
    axis_name: str | None = LAYERS_AXIS

    @static_property
    def _axis_name(self) -> str | None:
        """The name of the members' axis, made different from those of the copies in it."""
        return choose_axis_name(self.axis_name, self.children)

    @static_property
    def _stacks_parameters(self) -> bool:
        return not self.shared

    @static_property
    def _in_axes(self) -> tuple[int | None, ...]:
        """The axis of each input that is mapped, None for an input that all members share."""
        return self.axis if isinstance(self.axis, tuple) else (self.axis,) * self.signature.n_in

    @static_property
    def _out_axis(self) -> int:
        """The axis of the outputs: that of the first input that is mapped, if none is given."""
        if self.out_axis is not None:
            return self.out_axis
        return next((axis for axis in self._in_axes if axis is not None), 0)

    def _check(self) -> None:
        super()._check()
        axis: Any = self.axis
        if isinstance(axis, Iterable) and not isinstance(axis, str):
            self.axis = tuple(a if a is None else as_integer("vmap", "axis", a) for a in axis)
            if len(self.axis) != self.signature.n_in:
                raise errors.wrong_number_of_axes(self.axis, str(self.signature))
        else:
            self.axis = as_integer("vmap", "axis", axis)
        if self.out_axis is not None:
            self.out_axis = as_integer("vmap", "out_axis", self.out_axis)
        if self.n is not None:
            self.n = as_integer("vmap", "n", self.n)
            check_at_least("vmap", "n", 1, self.n)

    def _run(self, stack: Stack, steps: Steps) -> Stack:
        taken, rest = take(stack, self.signature.n_in)
        arrays, merge = split_arrays(taken)
        axes = self._list_axes(taken, steps)
        size = self._find_size(arrays, axes, steps, taken)
        merge_outputs = merge

        def run_member(combinator: Vmap, *arrays: Any) -> list[Any]:
            nonlocal merge_outputs
            outputs = steps.on(combinator)(0, merge(arrays))
            for item in outputs:
                self._check_axis("output", item, self._out_axis, 1, steps, taken)
            leaves, merge_outputs = split_arrays(outputs)
            return leaves

        sizes: dict[str, Any] = {
            "in_axes": tuple(axes),
            "out_axes": self._out_axis,
            "axis_size": size,
        }
        if self.scope is None:
            outputs = jax.vmap(functools.partial(run_member, self), **sizes)(*arrays)
        else:
            self._check_members(size)
            metadata = {nn.PARTITION_NAME: None if self.shared else self._axis_name}
            options = {**sizes, **self._map_variables(), "metadata_params": metadata}
            outputs = self._lift(nn.vmap(run_member, **options))(self, *arrays)
        return put(merge_outputs(outputs), rest)

    @nn.nowrap
    def _list_axes(self, taken: Stack, steps: Steps) -> list[int | None]:
        """Returns the axis of each array in the items. Items that hold none are not mapped."""
        axes: list[int | None] = []
        for item, axis in zip(taken, self._in_axes, strict=True):
            if axis is not None:
                self._check_axis("input", item, axis, 0, steps, taken)
            axes += [axis] * len(split_arrays(item)[0])
        return axes

    @nn.nowrap
    def _find_size(
        self, arrays: list[Any], axes: list[int | None], steps: Steps, stack: Stack
    ) -> Any:
        """Returns the number of members, which all inputs have."""
        sizes = [x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None]
        if self.n is not None:
            sizes = [self.n, *sizes]
        if not sizes:
            raise errors.no_members(steps.path, describe_stack(stack))
        if any(size != sizes[0] for size in sizes):
            raise errors.unequal_members(steps.path, self.n, sizes, describe_stack(stack))
        return sizes[0]

    @nn.nowrap
    def _check_axis(
        self, role: str, item: Any, axis: int, extra: int, steps: Steps, stack: Stack
    ) -> None:
        """Raises an error if an item, with ``extra`` axes more, does not have an axis."""
        for leaf in split_arrays(item)[0]:
            rank = jnp.ndim(leaf) + extra
            if not -rank <= axis < rank:
                text = describe_item(item)
                raise errors.no_member_axis(steps.path, role, text, axis, describe_stack(stack))

    @nn.nowrap
    def _map_variables(self) -> dict[str, Any]:
        """Says how collections and rngs are mapped."""
        if not self.shared:
            return {"variable_axes": {True: 0}, "split_rngs": {True: True}}
        # A parameter that all share is drawn once, so the key that draws it is not split.
        lacks_parameters = not self.variables.get("params")
        makes_parameters = self.is_initializing() or (
            lacks_parameters and self.is_mutable_collection("params")
        )
        return {
            "variable_axes": {"params": None, NOT_PARAMS: 0},
            "split_rngs": {"params": not makes_parameters, NOT_PARAMS: True},
        }

    @nn.nowrap
    def _lift(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Gives members the state of a stream as arrays, if it is that of one copy in a repeat."""
        if not has_entries(self.variables.get(COLLECTION, {})):
            return run
        unboxed = Unboxed()
        lifted: Callable[..., Any] = nn.map_variables(
            run,
            COLLECTION,
            trans_in_fn=unboxed.enter,
            trans_out_fn=unboxed.leave,
            mutable=True,
        )
        return lifted

    @nn.nowrap
    def _check_members(self, size: Any) -> None:
        """Raises an error if variables are those of another number of members."""
        if self.shared:
            self._check_outside_state()
        for collection, tree in self.variables.items():
            if self.shared and collection == "params":
                continue
            for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree)):
                if jnp.shape(leaf)[:1] != (size,):
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    found = f"{collection}/{name}", describe_item(leaf)
                    raise errors.other_members(self._label, size, *found)

    @nn.nowrap
    def _check_outside_state(self) -> None:
        """Raises an error if a layer that belongs to another scope has a state.

        Each member has a state of its own, and such a layer has one for all.
        """
        for module in self._binding.modules:
            collections = [] if linen.is_inside(module, self) else [*module.variables]
            for collection in collections:
                if collection != "params":
                    kind = type(module).__name__
                    raise errors.state_of_members(self._label, kind, collection)


def vmap(
    f: Callable[..., Any],
    axis: int | Iterable[int | None] = 0,
    *,
    shared: bool = True,
    n: int | None = None,
    out_axis: int | None = None,
    axis_name: str | None = LAYERS_AXIS,
    name: str | None = None,
) -> Vmap:
    """Runs a callable on each member of an axis, all at once.

    Inside, the items do not have the axis. With ``shared=False`` each member has parameters of its
    own, on a new leading axis as those of :func:`repeat`: an ensemble. Random numbers are different
    for each member, and so is state, such as batch statistics or what is remembered in a
    :func:`stream`.

    Args:
        f: a callable.
        axis: the axis of the inputs. A sequence gives one for each input; None stands for an input
            that is the same for all members. Items that hold no arrays are the same for all.
        shared: whether all members use one set of parameters.
        n: how many members there are; needed if no input has the axis.
        out_axis: the axis of the outputs: by default that of the first input that has one, or 0.
        axis_name: the name of the members' axis in partitioning metadata, for ``shared=False``. A
            number is added if a :func:`repeat` in it has the same: ``"layers_1"``.
        name: the name of its scope; ``Vmap_0``, ``Vmap_1``, ... if left out.

    Returns:
        A combinator with the signature of ``f``.

    Raises:
        SignatureError: If ``axis`` has another number of entries than ``f`` has inputs; at the
            call, if an item does not have the axis, or sizes differ.
        SharingError: If a layer in ``f`` is also used outside of it and not ``shared``.
        TypeError: If an argument has the wrong type.
        ValueError: If ``n`` is below 1; at the call, if the variables are those of another number
            of members.

    Example:
        Five models on the same inputs:

        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> ensemble = cb.vmap(nn.Dense(3), axis=(None,), shared=False, n=5)
        >>> y, variables = ensemble.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
        >>> y.shape, jax.tree.map(jnp.shape, variables["params"]["Dense_0"])
        ((5, 2, 3), {'bias': (5, 3), 'kernel': (5, 4, 3)})

        One branch for each row, instead of one for the batch:

        >>> by_row = cb.vmap(cb.cond(jnp.tanh, jnp.square), axis=0)
        >>> by_row(jnp.array([True, False]), jnp.array([0.0, 3.0])).tolist()
        [0.0, 9.0]

    See Also:
        :func:`unstack_layers`, which gives each member of an ensemble a scope of its own.
    """
    return Vmap(
        make_only_child("vmap", f),
        axis=axis,  # type: ignore[arg-type]  # it makes a tuple of them
        shared=shared,
        n=n,
        out_axis=out_axis,
        axis_name=axis_name,
        name=name,
    )
