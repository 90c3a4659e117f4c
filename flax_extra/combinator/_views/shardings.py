"""``shardings``: where each array of a pytree lies on a mesh, by the end of its path.

A mesh is an arrangement of devices with named axes. GSPMD, the partitioner of ``jax.jit``, does
all the rest: it needs to be told where the arguments of a program lie.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_extra.combinator._core import sharding_errors as errors
from flax_extra.combinator._core.describe import describe_item, shorten


class ShardingRule(NamedTuple):
    """How arrays are sharded whose paths end alike. See :func:`shardings`.

    Args:
        pattern: a regular expression for the end of a path, which starts after a ``/``.
        spec: mesh axes for the last axes of the array.
        is_optional: whether the rule may match nothing, as in a collection of rules for all layers
            of a library.
    """

    pattern: str
    spec: PartitionSpec
    is_optional: bool = False


Rules: TypeAlias = Iterable[ShardingRule | tuple[str, PartitionSpec]]


def shardings(variables: Any, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> Any:
    """Returns the sharding of each array of a pytree, by rules for the end of its path.

    The path of an array is its keys, joined by ``/``: ``params/Repeat_0/Dense_0/kernel``. The first
    rule decides whose pattern matches the end of it. An array that no rule matches is whole on
    every device.

    A spec is aligned on the right: ``PartitionSpec(None, "model")`` is for the last two axes. So
    one rule serves a layer, its copies in a ``repeat``, which have a leading axis more, and the
    moments that an optimizer keeps of its parameters.

    Args:
        variables: a pytree of arrays or of ``jax.ShapeDtypeStruct``: variables, the state of an
            optimizer or of a stream, or a tuple of all of these. Partitioning metadata, such as
            that of ``nn.with_logical_partitioning``, is not read.
        mesh: a mesh, or a ``jax.sharding.AbstractMesh`` of any size, to find out what a device
            would hold.
        rules: pairs of a pattern, which is a regular expression, and a spec; or
            :class:`ShardingRule`, some of which may match nothing.

    Returns:
        A pytree of ``jax.sharding.NamedSharding``, for ``jax.device_put``, and for ``in_shardings``
        and ``out_shardings`` of ``jax.jit``. An array in a box of metadata has a sharding in place
        of the box, as from ``nn.get_sharding``.

    Raises:
        TypeError: If ``mesh`` is not a mesh, or a rule is not a pattern and a spec.
        ValueError: If a rule matches no array, earlier rules match all its arrays, it names an axis
            that the mesh does not have, or an array has fewer axes than its spec, or an axis whose
            size the number of devices does not divide.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import linen as nn
        >>> from jax.sharding import PartitionSpec as P
        >>> from flax_extra import combinator as cb
        >>> model = nn.Dense(8) >> cb.repeat(nn.Dense(8), 3)
        >>> def initialize(key):
        ...     params = model.init(key, jnp.ones((1, 8)))
        ...     return params, optax.adam(1e-3).init(params)
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> rules = [("Repeat_0/Dense_0/kernel", P(None, "model"))]
        >>> key = jax.random.key(0)
        >>> where = cb.shardings(jax.eval_shape(initialize, key), mesh, rules)
        >>> where[0]["params"]["Repeat_0"]["Dense_0"]["kernel"].spec == P(None, None, "model")
        True

        Made where they lie: no device ever holds more than its part.

        >>> params, state = jax.jit(initialize, out_shardings=where)(key)
        >>> moment = state[0].mu["params"]["Repeat_0"]["Dense_0"]["kernel"]
        >>> moment.sharding.spec == P(None, None, "model")
        True

        What a device of a larger mesh would hold, before there is one:

        >>> large = jax.sharding.AbstractMesh((64, 8), ("data", "model"))
        >>> where = cb.shardings(params, large, rules)
        >>> where["params"]["Repeat_0"]["Dense_0"]["kernel"].shard_shape((3, 8, 8))
        (3, 8, 1)
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise errors.not_a_mesh(shorten(repr(mesh)))
    compiled = [_Rule.of(rule, mesh) for rule in rules]
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_box)
    named = [(_format_path(path), _unbox(leaf)) for path, leaf in leaves]
    chosen = [next((r for r in compiled if r.matches(path)), None) for path, _ in named]
    _check_all_used(compiled, [path for path, _ in named], chosen)
    reasons = [
        reason
        for (path, array), rule in zip(named, chosen, strict=True)
        if rule is not None
        for reason in rule.list_misfits(path, array, mesh)
    ]
    if reasons:
        raise errors.misfits(reasons)
    found = [
        NamedSharding(mesh, _spec() if rule is None else rule.align(array))
        for (_, array), rule in zip(named, chosen, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, found)


@dataclasses.dataclass(frozen=True, eq=False)
class _Rule:
    """A rule whose parts are known to be right for a mesh."""

    pattern: str
    spec: PartitionSpec
    is_optional: bool
    expression: re.Pattern[str]

    @classmethod
    def of(cls, rule: Any, mesh: Mesh | AbstractMesh) -> _Rule:
        if not isinstance(rule, tuple) or len(rule) not in {2, 3}:
            raise errors.not_a_rule(shorten(repr(rule)))
        pattern, spec, is_optional = ShardingRule(*rule)
        if not isinstance(pattern, str) or not isinstance(spec, PartitionSpec):
            raise errors.not_a_rule(shorten(repr(rule)))
        try:
            expression = re.compile(f"(?:.*/)?(?:{pattern})")
        except re.error as error:
            raise errors.not_a_pattern(pattern, str(error)) from error
        axes = [axis for entry in spec for axis in _list_axes(entry)]
        for axis in axes:
            if axis not in mesh.shape:
                raise errors.unknown_axis(pattern, _format_spec(spec), axis, list(mesh.shape))
            if axes.count(axis) > 1:
                raise errors.repeated_axis(pattern, _format_spec(spec), axis)
        return cls(pattern, spec, is_optional, expression)

    def matches(self, path: str) -> bool:
        return self.expression.fullmatch(path) is not None

    def align(self, array: Any) -> PartitionSpec:
        """Returns the spec with an entry for each axis of an array."""
        missing = jnp.ndim(array) - len(self.spec)
        return _spec(*[None] * missing, *self.spec)

    def list_misfits(self, path: str, array: Any, mesh: Mesh | AbstractMesh) -> list[str]:
        """Lists why an array cannot be sharded so."""
        ndim, kind = jnp.ndim(array), describe_item(array)
        if ndim < len(self.spec):
            spec = _format_spec(self.spec)
            return [errors.describe_rank(path, kind, len(self.spec), spec, self.pattern)]
        reasons = []
        for size, entry in zip(jnp.shape(array), self.align(array), strict=True):
            axes = _list_axes(entry)
            n = 1
            for axis in axes:
                n *= mesh.shape[axis]
            if size % n:
                named = " x ".join(map(repr, axes))
                reasons.append(
                    errors.describe_indivisible(path, kind, size, n, named, self.pattern)
                )
        return reasons


def _check_all_used(
    rules: Sequence[_Rule], paths: Sequence[str], chosen: Sequence[_Rule | None]
) -> None:
    used = {id(rule) for rule in chosen}
    unused = [rule for rule in rules if id(rule) not in used and not rule.is_optional]
    for rule in unused:
        for path, first in zip(paths, chosen, strict=True):
            if first is not None and rule.matches(path):
                raise errors.shadowed_rule(rule.pattern, path, first.pattern)
    if unused:
        raise errors.unused_rules([rule.pattern for rule in unused], list(paths))
    if rules and used <= {id(None)}:
        raise errors.unmatched_rules(len(rules), list(paths))


def _spec(*entries: Any) -> PartitionSpec:
    return PartitionSpec(*entries)  # type: ignore[no-untyped-call]


def _list_axes(entry: Any) -> tuple[str, ...]:
    """Lists the mesh axes that shard one axis of an array."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _format_spec(spec: PartitionSpec) -> str:
    return f"P({', '.join(map(repr, spec))})"


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _unbox(leaf: Any) -> Any:
    """Returns the array in a box of metadata."""
    return jax.tree_util.tree_leaves(leaf)[0] if _is_box(leaf) else leaf


def _format_path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
