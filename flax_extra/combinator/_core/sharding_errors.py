"""The messages of errors in shardings: rules that do not suit the variables or the mesh.

Each function makes one error, as those in ``errors.py`` do.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_LISTED = 8


def not_a_mesh(found: str) -> TypeError:
    return TypeError(
        f"shardings takes a mesh, such as jax.make_mesh((4, 2), ('data', 'model')); got {found}."
    )


def not_a_rule(found: str) -> TypeError:
    return TypeError(
        f"A sharding rule is a pattern and a jax.sharding.PartitionSpec, such as "
        f"('Dense_0/kernel', PartitionSpec(None, 'model')); got {found}."
    )


def not_a_pattern(pattern: str, why: str) -> ValueError:
    return ValueError(
        f"The pattern of a sharding rule is a regular expression; {pattern!r} is none: {why}."
    )


def unknown_axis(pattern: str, spec: str, axis: str, axes: Sequence[str]) -> ValueError:
    return ValueError(
        f"The sharding rule {pattern!r} has the spec {spec}, and the mesh has no axis {axis!r}. "
        f"It has {', '.join(map(repr, axes)) or 'none'}."
    )


def repeated_axis(pattern: str, spec: str, axis: str) -> ValueError:
    return ValueError(
        f"The sharding rule {pattern!r} has the spec {spec}, which uses the mesh axis {axis!r} "
        f"more than once. A mesh axis can shard one axis of an array."
    )


def unused_rules(patterns: Sequence[str], paths: Sequence[str]) -> ValueError:
    many = len(patterns) != 1
    return ValueError(
        f"{'These sharding rules match' if many else 'This sharding rule matches'} no array: "
        f"{_list(patterns)}. A pattern matches the end of a path. Correct "
        f"{'them' if many else 'it'}, or leave {'them' if many else 'it'} out. The paths are "
        f"{_list(paths)}."
    )


def shadowed_rule(pattern: str, path: str, earlier: str) -> ValueError:
    return ValueError(
        f"The sharding rule {pattern!r} is never used: earlier rules match all its arrays. "
        f"{path!r}, for one, has the rule {earlier!r}. Put the narrower rule first, or leave one "
        f"out."
    )


def unmatched_rules(n: int, paths: Sequence[str]) -> ValueError:
    return ValueError(
        f"None of the {n} sharding rules matches an array, so every device would hold all of "
        f"them. Add rules for these paths: {_list(paths)}."
    )


def misfits(reasons: Sequence[str]) -> ValueError:
    listed = "\n  ".join(_cut(reasons))
    return ValueError(
        f"Some arrays cannot be sharded as the rules say.\n  {listed}\n"
        f"  Change their sizes or the mesh, or put a rule first that leaves them whole: "
        f"(path, PartitionSpec())."
    )


def describe_indivisible(
    path: str, kind: str, size: object, n: int, axes: str, pattern: str
) -> str:
    return (
        f"{path} is {kind}: {size} does not divide among the {n} devices of {axes}, as the rule "
        f"{pattern!r} asks"
    )


def describe_rank(path: str, kind: str, n: int, spec: str, pattern: str) -> str:
    return f"{path} is {kind}, and the rule {pattern!r} has a spec for {n} axes: {spec}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(_cut(list(map(repr, names)))) or "none"


def _cut(lines: Sequence[str]) -> list[str]:
    return [*lines[:MOST_LISTED], *(["..."] if lines[MOST_LISTED:] else [])]
