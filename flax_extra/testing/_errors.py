"""Every word that a check or a strategy says.

What was asked of a strategy and cannot be is an ``InvalidArgument``, as in hypothesis; what a check
finds is an ``AssertionError``, so that test runners report a failure and not a mishap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis.errors import InvalidArgument

# Strategies.


def empty_range(asked: str, name: str, least: int, most: int) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} was asked for {name} from {least} to {most}, and there is none. Give it a range "
        f"from 0 up, the least first."
    )


def too_few(asked: str, n_in: int) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} was asked for {n_in} inputs, and nothing can be made of none. Ask for 1 or more."
    )


def no_leaves(asked: str) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} was given no leaves to build from. Give it callables, or leave leaves out for "
        f"those built in."
    )


def not_leaves(asked: str, value: str) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} takes callables, or a strategy of them, as leaves; got {value}. Pass a list: "
        f"leaves=[nn.Dense(4), jnp.tanh]."
    )


def unknown_combinators(asked: str, names: Iterable[str], known: Iterable[str]) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} was asked for the combinators {_listing(names)}, which it cannot build. It "
        f"builds: {_listing(known)}."
    )


def wrong_shape(asked: str, shape: object) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} takes a shape of at least one axis, each of size 1 or more; got {shape!r}. Say "
        f"one: shape=(2, 3, 4)."
    )


def too_few_axes(asked: str, name: str, least: int, shape: tuple[int, ...]) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} was asked for {name}, which takes an axis away from items of at least {least} "
        f"axes; the shape of the items is {shape}. Give one with more axes, or leave {name} out."
    )


def not_a_signature(asked: str, kind: str) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} takes a cb.Signature; got {kind}. Write cb.Signature(n_in, n_out), or draw one "
        f"from signatures()."
    )


def context_without_specs(f: str) -> InvalidArgument:
    return InvalidArgument(
        f"inputs_for was given context for {f}, and no specs of its inputs, with which the context "
        f"shares its dimensions. Give both: specs=['f32[b, t, 8]'], context={{...}}."
    )


def wrong_number_of_specs(f: str, found: int, signature: str) -> InvalidArgument:
    return InvalidArgument(
        f"inputs_for was given {found} specs for {f}, whose signature is {signature}. Give one "
        f"for each input."
    )


# Annotations.


def unknown_names(
    asked: str, what: str, names: Iterable[str], known: Iterable[str]
) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} was told {what} of {_listing(names)}, which its annotations do not name. They "
        f"name: {_listing(known)}."
    )


def no_shape(asked: str, name: str, annotation: str) -> InvalidArgument:
    return InvalidArgument(
        f"What does {asked} take for {name!r}? Its annotation, {annotation}, says no shape. Say "
        f'it: annotations={{{name!r}: Float[Array, "batch time features"]}}, or a value.'
    )


def no_declared_output(asked: str, annotation: str) -> InvalidArgument:
    return InvalidArgument(
        f"What does {asked} give? Its return annotation, {annotation}, says no shape, so there is "
        f'nothing to check. Say it: annotations={{"return": Float[Array, "batch features"]}}.'
    )


def not_a_size(asked: str, name: str, value: str) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} takes sizes as integers or strategies of them; got {value} for axis {name!r}. "
        f"Write sizes={{{name!r}: st.integers(1, 8)}}."
    )


def no_strategy_for(asked: str, name: str, dtypes: Iterable[str]) -> InvalidArgument:
    return InvalidArgument(
        f"{asked} takes dtypes {_listing(dtypes)} for {name!r}, none of which jax has arrays of. "
        f"Name one that it has: dtypes={{{name!r}: 'float32'}}."
    )


# Checks.


def undeclared_pipeline(f: str) -> InvalidArgument:
    return InvalidArgument(
        f"check_shapes compares a callable with its annotations, and {f} is a pipeline, which has "
        f"none. Declare its shapes: check_shapes(cb.typed(pipeline, 'f32[b, t, 8] -> f32[b, t]'))."
    )


def undeclared_output(
    f: str, declared: str, found: str, inputs: str, sizes: Mapping[str, Any]
) -> AssertionError:
    return AssertionError(
        f"{f} declares that it gives {declared}, and gave {found}.\n"
        f"  inputs: {inputs or 'none'}\n"
        f"  sizes: {describe_sizes(sizes)}"
    )


def raised_on(f: str, inputs: str, sizes: Mapping[str, Any]) -> str:
    return (
        f"flax_extra.testing: {f} raised on inputs that its annotations allow\n"
        f"  inputs: {inputs or 'none'}\n"
        f"  sizes: {describe_sizes(sizes)}"
    )


def wrong_n_in(f: str, signature: str, found: int) -> AssertionError:
    return AssertionError(
        f"{f} has signature {signature}, and check_signature was given {found} inputs. Give it "
        f"one for each item that it takes, or correct its signature."
    )


def wrong_n_out(f: str, signature: str, found: int, returned: str) -> AssertionError:
    return AssertionError(
        f"{f} has signature {signature}, and gave {found}: {returned}. Correct its return "
        f"annotation, or say how many: cb.fn(f, n_out={found})."
    )


def broken_law(law: str, left: str, right: str, what: str, a: str, b: str) -> AssertionError:
    return AssertionError(
        f"{law} does not hold: the two sides differ in {what}.\n"
        f"  left:  {left}\n    {a}\n"
        f"  right: {right}\n    {b}"
    )


def different_parameters(f: str, g: str, a: str, b: str) -> AssertionError:
    return AssertionError(
        f"{f} and {g} cannot be one program: their variables differ.\n  {f}: {a}\n  {g}: {b}"
    )


def different_programs(f: str, g: str, index: int, a: str, b: str) -> AssertionError:
    return AssertionError(
        f"{f} and {g} are two programs, which part at equation {index}.\n  {f}: {a}\n  {g}: {b}"
    )


def different_constants(f: str, g: str, index: int, a: str, b: str) -> AssertionError:
    return AssertionError(
        f"{f} and {g} are two programs: their constant {index} differs.\n  {f}: {a}\n  {g}: {b}"
    )


def parted(f: str, found: str, plan: str) -> AssertionError:
    indented = plan.replace("\n", "\n  ")
    return AssertionError(
        f"{f} does not give block by block what it gives for the whole.\n"
        f"  {found}\n"
        f"  The plan: {indented}"
    )


def first_step(path: str, block: int, difference: str) -> str:
    return f"The first step that parts is {path}, at block {block}: {difference}."


def outputs_part(block: int, difference: str) -> str:
    return f"Its outputs part at block {block}: {difference}."


def values_part(row: int, step: int, whole: float, block: float) -> str:
    return f"row {row}, step {step}, is {whole:.6g} in the whole and {block:.6g} in the block"


def shapes_part(whole: str, block: str) -> str:
    return f"the block of the whole has shape {whole}, and the block {block}"


def gradient_parts(name: str, difference: float, largest: float) -> str:
    return (
        f"Its outputs agree, and the gradient with respect to {name} differs by {difference:.3g}, "
        f"where the largest is {largest:.3g}."
    )


def describe_sizes(sizes: Mapping[str, Any]) -> str:
    """Sizes by the names of their axes.

    >>> describe_sizes({"batch": 2, "*time": (3, 1)})
    'batch=2, *time=(3, 1)'
    """
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "none"


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, names))) or "none"
