"""``transfer``: the variables of a pipeline, for another that holds some of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_extra.combinator._core import linen, surgery_errors
from flax_extra.combinator._core.arrays import is_array
from flax_extra.combinator._core.describe import describe_item
from flax_extra.combinator._surgery.places import (
    Path,
    Place,
    find_owner,
    find_places,
    format_path,
    number_copies,
)

Key: TypeAlias = tuple[str, ...]
"""Where a variable is: the collection, and the path in it."""

Flat: TypeAlias = dict[Key, Any]


def transfer(
    variables: Mapping[str, Any],
    source: Callable[..., Any],
    target: Callable[..., Any],
    *,
    fresh: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> Any:
    """Gives a pipeline the variables of another, for all layers that both hold.

    Layers are told apart as instances, so a layer keeps its values wherever it now stands and
    whatever it is now called. Take the layers from the source: by slicing, by :func:`replace`, or
    by using the same instances. The copies of a ``repeat`` are told apart by their numbers, which
    a slice keeps.

    Args:
        variables: variables of the source, or a part of them: a dict of collections. The leaves may
            be arrays, ``jax.ShapeDtypeStruct``, or anything else that stands in for a parameter,
            such as a label or a sharding.
        source: the pipeline, or the layer, whose variables they are.
        target: the pipeline that the result is for.
        fresh: variables of the target, as its ``init`` returns them. Layers that are new in the
            target take their values from there. Without it, they have none.
        strict: whether it is an error if values of the source would be lost, or a layer that both
            hold has no values.

    Returns:
        Variables of the target, in a FrozenDict if ``variables`` is one.

    Raises:
        TypeError: If a pipeline is bound or was made in a method of a module, or the variables are
            no dict of collections.
        ValueError: If ``variables`` or ``fresh`` are those of another pipeline, a new layer or copy
            has no values in ``fresh``, a value has another shape or dtype than in ``fresh``, a
            layer is in a ``repeat`` on one side alone, or ``strict`` forbids what would happen.

    Example:
        The first three of six trained blocks, and a new head:

        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> blocks = cb.repeat(cb.residual(nn.Dense(8), nn.gelu), 6)
        >>> model = nn.Embed(99, 8) >> blocks >> nn.Dense(2)
        >>> tokens = jnp.zeros((1, 5), int)
        >>> trained = model.init(jax.random.key(0), tokens)
        >>> small = model[:1] >> blocks[:3] >> nn.Dense(7)
        >>> fresh = small.init(jax.random.key(1), tokens)
        >>> variables = cb.transfer(trained, model, small, fresh=fresh)
        >>> variables["params"]["Repeat_0"]["Dense_0"]["kernel"].shape
        (3, 8, 8)
        >>> small.apply(variables, tokens).shape
        (1, 5, 7)
    """
    given = _flatten("variables", variables)
    places = find_places("transfer", source)
    goals = find_places("transfer", target)
    known = None if fresh is None else _Fresh(_flatten("fresh", fresh), goals)
    groups: dict[tuple[Any, ...], list[_Piece]] = {}
    for key, place in _find_owners("variables", "source", given, places).items():
        rest = key[1 + len(place.path) :]
        groups.setdefault((place.original, key[0], rest), []).append(_Piece(key, given[key], place))
    moved: Flat = {}
    lost: list[str] = []
    for (original, collection, rest), pieces in groups.items():
        there = [goal for goal in goals if goal.original == original]
        for goal in there:
            key = (collection, *goal.path, *rest)
            moved[key] = _move(_choose_piece(pieces, goal), goal, key, known)
        lost += _find_lost(pieces, there)
    if strict and lost:
        raise surgery_errors.lost_values(sorted(lost))
    if known is not None:
        moved = known.complete(moved, {place.original for place in places}, strict)
    return _unflatten(moved, variables)


class _Fresh:
    """Variables of the target, for what the source does not have."""

    def __init__(self, values: Flat, places: Sequence[Place]) -> None:
        self.values = values
        self.places = places
        self.owners = _find_owners("fresh variables", "target", values, places)

    def complete(self, moved: Flat, shared: set[int], strict: bool) -> Flat:
        """Adds the values of what is new in the target.

        Raises:
            ValueError: If a new layer has no values.
        """
        for key, value in moved.items():
            self._check(key, value)
        is_complete = all(key in self.values for key in moved if key[0] == "params")
        has_values = {id(place.module) for place in self.owners.values()}
        missing = [
            f"{format_path(place.path)} ({type(place.module).__name__})"
            for place in self.places
            if place.is_layer
            and place.original not in shared
            and id(place.module) not in has_values
        ]
        if missing and not is_complete:
            raise surgery_errors.missing_fresh(missing)
        taken = {key: value for key, value in self.values.items() if key not in moved}
        if strict:
            empty = [key for key in taken if self.owners[key].original in shared]
            if empty:
                raise surgery_errors.missing_values(sorted(map(_format_key, empty)))
        return {**moved, **taken}

    def _check(self, key: Key, value: Any) -> None:
        """Raises an error if a value is of another kind than that of the target."""
        if key not in self.values:
            return
        pair = [_list_arrays(value), _list_arrays(self.values[key])]
        found, expected = (", ".join(map(describe_item, leaves)) for leaves in pair)
        if all(pair) and found != expected:
            name = _format_key(key)
            raise surgery_errors.other_value(name, found, name, expected)


def _list_arrays(value: Any) -> list[Any]:
    return [leaf for leaf in jax.tree_util.tree_leaves(nn.meta.unbox(value)) if is_array(leaf)]


# Copies


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A variable of one layer of the source: of some of the copies, if it is in a ``repeat``."""

    key: Key
    value: Any
    place: Place
    joined: tuple[int, ...] | None = None
    axis: int = 0

    @property
    def numbers(self) -> list[tuple[int, ...] | None]:
        """The numbers of the copies on each leading axis; None where they are not known."""
        numbers = _number_copies(self.place, self.key[0])
        if self.joined is not None:
            numbers[self.axis] = self.joined
        return numbers


def _number_copies(place: Place, collection: str) -> list[tuple[int, ...] | None]:
    return [number_copies(owner) for owner in place.list_stacks(collection)]


def _choose_piece(pieces: Sequence[_Piece], goal: Place) -> _Piece:
    """Returns the values for one place of the target.

    If slices of one ``repeat`` stand in the source, a slice in the target has its own values if it
    is the same instance; any other takes each copy from the first slice that has it.
    """
    for piece in pieces:
        if piece.place.module is goal.module:
            return piece
    axis = _find_split_axis(pieces)
    if axis is None:
        return pieces[0]
    values = [piece.value for piece in pieces]
    numbers = [piece.numbers[axis] or () for piece in pieces]
    value = jax.tree.map(lambda *x: _join_entries(x, axis), *values)
    return dataclasses.replace(pieces[0], value=value, joined=sum(numbers, ()), axis=axis)


def _find_split_axis(pieces: Sequence[_Piece]) -> int | None:
    """Finds the one leading axis on which pieces have different copies, if there is one."""
    if len({len(piece.numbers) for piece in pieces}) > 1:
        return None
    columns = zip(*(piece.numbers for piece in pieces), strict=True)
    differing = [axis for axis, numbers in enumerate(columns) if len(set(numbers)) > 1]
    return differing[0] if len(differing) == 1 else None


def _join_entries(parts: Sequence[Any], axis: int) -> Any:
    first = parts[0]
    if not is_array(first):
        return first
    if isinstance(first, jax.ShapeDtypeStruct):
        size = sum(part.shape[axis] for part in parts)
        return _resize(first, (*first.shape[:axis], size, *first.shape[axis + 1 :]))
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts, axis)
    return jnp.concatenate(parts, axis)


def _find_lost(pieces: Sequence[_Piece], goals: Sequence[Place]) -> list[str]:
    """Lists values that no place of the target takes."""
    lost: list[str] = []
    seen: list[Any] = []
    modules = [goal.module for goal in goals]
    for piece in pieces:
        name = _format_key(piece.key)
        is_again = piece.numbers in seen and not any(m is piece.place.module for m in modules)
        seen.append(piece.numbers)
        if not goals or is_again:
            lost.append(name)
            continue
        kept = [_number_copies(goal, piece.key[0]) for goal in goals]
        for axis, numbers in enumerate(piece.numbers):
            others = [axes[axis] for axes in kept]
            if numbers is not None and None not in others:
                gone = set(numbers).difference(*(other or () for other in others))
                label = piece.place.list_stacks(piece.key[0])[axis]._label
                if gone:
                    lost.append(f"{name} of copies {', '.join(map(str, sorted(gone)))} of {label}")
    return lost


@dataclasses.dataclass(frozen=True)
class _Copies:
    """The copies in the source and in the target, on one leading axis of a variable.

    Args:
        label: how the target calls the combinator.
        before: the numbers of the copies in the source.
        after: those in the target.
    """

    label: str
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def is_same(self) -> bool:
        return self.before == self.after

    @property
    def positions(self) -> list[int | None]:
        """The position in the source of each copy of the target; None for one that is new."""
        if self.is_same:
            return list(range(len(self.after)))
        return [self.before.index(i) if i in self.before else None for i in self.after]

    @property
    def new(self) -> list[int]:
        return [number for number in self.after if number not in self.before]


def _pair_copies(piece: _Piece, goal: Place) -> list[_Copies]:
    """Pairs the leading axes of a variable in the source with those in the target."""
    before, after = (place.list_stacks(piece.key[0]) for place in (piece.place, goal))
    if len(before) != len(after):
        labels, others = ([owner._label for owner in owners] for owners in (before, after))
        name, there = _format_key(piece.key), format_path(goal.path)
        raise surgery_errors.other_depth(name, labels, there, others)
    pairs = []
    for numbers, owner in zip(piece.numbers, after, strict=True):
        others_ = number_copies(owner)
        known = numbers if others_ is None else others_  # where one is not known, all are kept
        known = () if known is None else known
        pairs.append(_Copies(owner._label, known if numbers is None else numbers, known))
    return pairs


def _move(piece: _Piece, goal: Place, key: Key, fresh: _Fresh | None) -> Any:
    """Returns a variable with the copies of the target."""
    stacks, value = _pair_copies(piece, goal), piece.value
    if all(stack.is_same for stack in stacks):
        return value
    if not any(stack.new for stack in stacks):
        return jax.tree.map(lambda x: _take_entries(x, stacks), value)
    if fresh is None or key not in fresh.values:
        stack = next(stack for stack in stacks if stack.new)
        raise surgery_errors.new_copies(_format_key(piece.key), stack.label, stack.new)
    boxed = fresh.values[key]
    plain, others = nn.meta.unbox(value), nn.meta.unbox(boxed)
    return nn.meta.replace_boxed(
        boxed, jax.tree.map(lambda x, y: _put_entries(piece.key, x, key, y, stacks), plain, others)
    )


def _take_entries(x: Any, stacks: Sequence[_Copies]) -> Any:
    """Takes the entries of some copies, on leading axes. What has no axes is left as it is."""
    if not is_array(x):
        return x
    positions = [np.array(stack.positions, int) for stack in stacks]
    if isinstance(x, jax.ShapeDtypeStruct):
        sizes = tuple(map(len, positions))
        return _resize(x, (*sizes, *x.shape[len(sizes) :]))
    for axis, (stack, at) in enumerate(zip(stacks, positions, strict=True)):
        if not stack.is_same:
            x = x[(*[slice(None)] * axis, at)]
    return x


def _put_entries(key: Key, x: Any, new_key: Key, fresh: Any, stacks: Sequence[_Copies]) -> Any:
    """Puts the entries that the source has into those of the target."""
    if not is_array(fresh) or not is_array(x):
        return fresh
    n = len(stacks)
    if x.shape[n:] != fresh.shape[n:] or x.dtype != fresh.dtype:
        found, expected = describe_item(x), describe_item(fresh)
        raise surgery_errors.other_value(_format_key(key), found, _format_key(new_key), expected)
    if isinstance(fresh, jax.ShapeDtypeStruct) or isinstance(x, jax.ShapeDtypeStruct):
        return fresh
    pairs = [
        [(i, at) for i, at in enumerate(stack.positions) if at is not None] for stack in stacks
    ]
    to = np.ix_(*[[i for i, _ in pair] for pair in pairs])
    entries = x[np.ix_(*[[at for _, at in pair] for pair in pairs])]
    if isinstance(fresh, np.ndarray):
        whole = fresh.copy()
        whole[to] = entries
        return whole
    return fresh.at[to].set(entries)


def _resize(x: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns a stand-in of another shape, with the same sharding if that divides it."""
    sharding = x.sharding
    try:
        if sharding is not None:
            sharding.shard_shape(shape)
    except ValueError:
        sharding = None
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)  # type: ignore[no-untyped-call]


# Trees of variables


def _find_owners(
    name: str, pipeline: str, values: Flat, places: Sequence[Place]
) -> dict[Key, Place]:
    """Finds the place that each variable belongs to.

    Raises:
        ValueError: If a variable belongs to no layer.
    """
    owners: dict[Key, Place] = {}
    unknown: list[str] = []
    for key in values:
        place = find_owner(places, key[1:])
        # What linen captures of the call of a pipeline is there, too.
        if place is None or not (place.has_variables_itself or key[0] == "intermediates"):
            unknown.append(_format_key(key))
        else:
            owners[key] = place
    if unknown:
        raise surgery_errors.unknown_variables(name, pipeline, sorted(unknown))
    return owners


def _flatten(name: str, variables: Any) -> Flat:
    """Returns variables by collection and path, without empty scopes."""
    is_tree = isinstance(variables, Mapping) and all(
        isinstance(tree, Mapping) for tree in variables.values()
    )
    if not is_tree:
        raise surgery_errors.not_variables(name, describe_item(variables))
    flat: Flat = flatten_dict(linen.unfreeze(variables))  # type: ignore[no-untyped-call]
    return flat


def _unflatten(flat: Flat, like: Any) -> Any:
    """Returns a tree of the same type as another. What is empty there is empty here."""
    tree: dict[str, Any] = unflatten_dict(flat)  # type: ignore[no-untyped-call]
    for collection, values in like.items():
        if not values:
            tree.setdefault(collection, {})
    return linen.freeze_like(tree, like)


def _format_key(key: Path) -> str:
    return "/".join(map(str, key))
