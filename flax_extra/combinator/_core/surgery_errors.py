"""The messages of errors in changes of a pipeline: what has no place, and what would be lost.

Each function makes one error, as those in ``errors.py`` do.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax_extra.combinator._core.errors import SignatureError

MAX_LISTED = 8
"""How many entries of a list are shown."""

# Replacing layers.


def not_a_pipeline(asked: str, found: str) -> TypeError:
    return TypeError(
        f"{asked} takes a pipeline; got {found}. Make one of a layer or a function: "
        f"cb.serial(layer)."
    )


def bound_pipeline(asked: str, label: str) -> TypeError:
    return TypeError(
        f"{asked} takes pipelines as they were built, whose layers can be told apart; {label} is "
        f"bound to variables. Use the pipeline that bind was called on."
    )


def made_in_method(asked: str, layer: str) -> TypeError:
    return TypeError(
        f"{asked} takes pipelines that belong to no module; {layer} was made in a method of one. "
        f"Build the pipeline outside of setup and of compact methods."
    )


def not_a_selection(found: str) -> TypeError:
    return TypeError(
        f"replace selects layers by a type, a predicate or a path, such as nn.Dense, "
        f"lambda layer: ..., or 'Repeat_0/Dense_0'; got {found}."
    )


def no_such_layer(path: str, known: Sequence[str]) -> ValueError:
    return ValueError(f"There is no layer at {path!r}. There are: {_list(known)}.")


def selected_without_scope(label: str) -> TypeError:
    return TypeError(
        f"replace selects what has a place in the parameter tree, and {label} has none. Select the "
        f"layers in it, or give it a scope: cb.serial(..., name=...)."
    )


def other_signature(path: str, old: str, old_text: str, new: str, new_text: str) -> SignatureError:
    return SignatureError(
        f"What replaces a layer takes and gives as many items: {path} is {old_text} with signature "
        f"{old}, and was replaced by {new_text} with signature {new}. Pass items through, or drop "
        f"them, for instance with cb.keep() or cb.drop()."
    )


def no_method(path: str, method: str, found: str) -> TypeError:
    return TypeError(
        f"The pipeline calls the method {method!r} of {path}, and was given {found} for it, which "
        f"has no such method. Replace it by a layer that has one."
    )


# Copies.


def copies_without_number(n: int, found: int) -> ValueError:
    return ValueError(
        f"repeat has {n} copies, so copies has as many entries; got {found}. Take a slice instead: "
        f"cb.repeat(f, n)[i:j]."
    )


def no_such_copy(label: str, index: int, n: int) -> IndexError:
    return IndexError(f"{label} has {n} copies, numbered from 0; there is no copy {index}.")


def slice_while_initializing(label: str) -> ValueError:
    return ValueError(
        f"{label} was asked for some of its copies while it is initialized, and has no variables "
        f"yet. Initialize the whole, then take copies of the bound pipeline, or of its value: "
        f"cb.repeat(f, n)[i:j]."
    )


# Transferring variables.


def not_variables(name: str, found: str) -> TypeError:
    return TypeError(
        f"transfer takes {name} as init returns them: a dict of collections, such as "
        f"{{'params': ...}}; got {found}."
    )


def unknown_variables(name: str, pipeline: str, paths: Sequence[str]) -> ValueError:
    return ValueError(
        f"The {name} hold values that belong to no layer of the {pipeline}: {_list(paths)}. Give "
        f"those of the {pipeline}, in their collections: {{'params': ...}}."
    )


def lost_values(paths: Sequence[str]) -> ValueError:
    return ValueError(
        f"The target does not hold all layers of the source. These values would be lost: "
        f"{_list(paths)}. Leave strict out if they may be."
    )


def missing_values(paths: Sequence[str]) -> ValueError:
    return ValueError(
        f"The source and the target share layers that have no values in the given variables: "
        f"{_list(paths)}. Give all variables of the source, or leave strict out to take those of "
        f"fresh."
    )


def missing_fresh(paths: Sequence[str]) -> ValueError:
    return ValueError(
        f"The target holds layers that are new, and fresh has no values for them: {_list(paths)}. "
        f"Give all variables of the target: fresh=target.init(key, ...)."
    )


def new_copies(path: str, label: str, numbers: Sequence[int]) -> ValueError:
    return ValueError(
        f"{path} has no values for copies {', '.join(map(str, numbers))} of {label}, which are new "
        f"in the target. Give their values: fresh=target.init(key, ...)."
    )


def other_depth(
    path: str, source: Sequence[str], target: str, target_axes: Sequence[str]
) -> ValueError:
    return ValueError(
        f"{path} has {_describe_axes(source)} in the source, and as {target} "
        f"{_describe_axes(target_axes)} in the target. Give each copy a scope of its own first "
        f"with cb.unstack_layers, or stack them with cb.stack_layers."
    )


def other_value(path: str, found: str, target: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} is {found}, and fresh has {expected} for {target}. A layer that both pipelines "
        f"hold keeps its shapes and dtypes: let its inputs be the same."
    )


def _describe_axes(labels: Sequence[str]) -> str:
    return f"an entry for each copy of {', '.join(labels)}" if labels else "one value"


def _list(texts: Sequence[str]) -> str:
    shown = ", ".join(texts[:MAX_LISTED])
    more = len(texts) - MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown or "none"
