"""Exceptions, and the wording of all messages.

    ValueError
    ├── SignatureError    a callable takes or gives another number of items than it should
    ├── ShapeError        a shape is not as declared, or cannot be known for every size
    ├── SharingError      one layer instance would need two sets of parameters
    └── StreamError       a pipeline cannot run piece by piece, or a stream cannot go on

An argument of the wrong type, or a keyword that no layer takes, is a plain ``TypeError``.

Each function below makes one exception or one note. A message says what was asked, what was
found and what to do, in that order, with the real values. Nothing here computes anything: callers
hand over text, so that all wording can be read and changed in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class SignatureError(ValueError):
    """A callable takes or gives another number of items than it should.

    Example:
        >>> from flax_extra import combinator as cb
        >>> cb.select((-1,))
        Traceback (most recent call last):
            ...
        flax_extra.combinator.SignatureError: select takes indices counted from the \
top of the stack, which is index 0; got -1. Use a non-negative index.
    """


class ShapeError(ValueError):
    """A shape is not as declared, or cannot be known for every size at once.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> cb.typed(nn.Dense(3), "f32[b, 8] -> f32[b, 4]")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        flax_extra.combinator.ShapeError: Declared and computed shapes differ.
          declared: f32[b, 8] -> f32[b, 4]
          computed: f32[b, 8] -> f32[b, 3]
        ...
    """


class SharingError(ValueError):
    """One layer instance is used where it would need two sets of parameters.

    Example:
        >>> from flax import linen as nn
        >>> from flax_extra import combinator as cb
        >>> dense = nn.Dense(4)
        >>> cb.serial(dense, cb.repeat(dense, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        flax_extra.combinator.SharingError: One instance of Dense is used both ...
    """


class StreamError(ValueError):
    """A pipeline cannot run piece by piece, or a stream cannot go on.

    Example:
        >>> from flax_extra import combinator as cb, layer as xn
        >>> cb.stream(xn.LSTM(4, return_sequences=True, reverse=True), "f32[b, t, 8]")
        Traceback (most recent call last):
            ...
        flax_extra.combinator.StreamError: LSTM with reverse=True cannot run piece by piece: it \
starts at the last step. Leave reverse out, or call it without decode.
    """


for _exception in (SignatureError, ShapeError, SharingError, StreamError):
    _exception.__module__ = "flax_extra.combinator"  # where people find them

NOTE_PREFIX = "flax_extra: in "
REMEDY_FN = "cb.fn(f, n_in=..., n_out=..., key=value)"


# Building: what cannot be a child, and signatures that cannot be inferred.


def not_svg(path: str) -> ValueError:
    return ValueError(
        f"A diagram is saved as SVG, in a file whose name ends in .svg; got {path!r}. Save it "
        "under such a name, and convert it with another program."
    )


def not_callable(value: str, kind: str) -> TypeError:
    return TypeError(
        f"A pipeline is made of callables and (nested) iterables of callables; got {value} "
        f"({kind}). Pass a function, a linen module or a combinator."
    )


def module_class(name: str) -> TypeError:
    return TypeError(
        f"A pipeline is made of layers; got the class {name}. Make a layer of it: {name}(...)."
    )


def not_one_child(asked: str, found: int) -> TypeError:
    return TypeError(
        f"{asked} takes one callable; got {found}. Put several in series: cb.serial(...)."
    )


def not_an_integer(asked: str, name: str, value: str) -> TypeError:
    return TypeError(f"{asked} takes an integer for {name}; got {value}.")


def not_integers(asked: str, name: str, value: str) -> TypeError:
    return TypeError(f"{asked} takes a sequence of integers for {name}; got {value}.")


def too_small(asked: str, name: str, least: int, value: int) -> ValueError:
    return ValueError(f"{asked} takes {name} of at least {least}; got {value}.")


def not_a_name(module: str, name: str) -> TypeError:
    return TypeError(f"The name of a layer is a string; {module} has name={name}.")


def reserved_name(module: str, name: str) -> ValueError:
    return ValueError(
        f"Linen does not apply variables with a layer called {name!r}; {module} has that name. "
        f"Give it another."
    )


def name_taken(name: str, first: str, second: str) -> ValueError:
    return ValueError(
        f"Two layers of one scope are called {name!r}: a {first} and a {second}. Linen keeps their "
        f"variables under that name, so each needs a name of its own. Rename one, or put it in a "
        f"scope: cb.serial(layer, name=...)."
    )


def bad_signature(asked: str, why: str) -> SignatureError:
    return SignatureError(f"{asked} is not a signature: {why}.")


def no_python_signature(f: str) -> SignatureError:
    return SignatureError(
        f"How many inputs does {f} take? It has no Python signature to read it from. "
        f"Say so: {REMEDY_FN}."
    )


def variable_positional(f: str, name: str) -> SignatureError:
    return SignatureError(
        f"How many inputs does {f} take? It accepts any number (*{name}). Say how many: "
        f"{REMEDY_FN}."
    )


def variable_tuple(f: str, name: str, annotation: str) -> SignatureError:
    return SignatureError(
        f"How many items does parameter {name!r} of {f} take off the stack? Its annotation is "
        f"{annotation}, a tuple of any length. Annotate each item, as in tuple[Array, Array], "
        f"or say how many: {REMEDY_FN}."
    )


def empty_tuple(f: str, name: str) -> SignatureError:
    return SignatureError(
        f"Parameter {name!r} of {f} is annotated as the empty tuple, which takes nothing off the "
        f"stack. Bind it: cb.fn(f, {name}=())."
    )


def variable_output(f: str, annotation: str) -> SignatureError:
    return SignatureError(
        f"How many outputs does {f} give? Its return annotation is {annotation}, a tuple of any "
        f"length. Annotate each item, as in tuple[Array, Array], or say how many: {REMEDY_FN}."
    )


def never_returns(f: str) -> SignatureError:
    return SignatureError(
        f"{f} is annotated as never returning, so it cannot be a step of a pipeline. Correct the "
        f"annotation, or say how many outputs it gives: {REMEDY_FN}."
    )


def not_a_keyword(name: str) -> TypeError:
    return TypeError(f"context takes the name of a keyword, such as 'padding_mask'; got {name}.")


def nnx_module(kind: str) -> TypeError:
    return TypeError(
        f"A pipeline is made of linen modules and functions; {kind} is an NNX module, which holds "
        f"its own parameters: they would become constants of the program. Wrap it: "
        f"nnx.bridge.to_linen({kind}, ...)."
    )


def fixed_is_input(name: str, label: str, parts: Sequence[str]) -> SignatureError:
    return SignatureError(
        f"cb.fn binds {name!r} for all parts of {label}, but {_choice_and(parts)} "
        f"{'takes' if len(parts) == 1 else 'take'} it off the stack. Bind it there: "
        f"cb.fn(layer, {name}=...)."
    )


def missing_context(label: str, needed: Mapping[str, Sequence[str]]) -> TypeError:
    listed = "; ".join(f"{name!r} ({', '.join(paths)})" for name, paths in needed.items())
    return TypeError(
        f"{label} was called without context that its layers need: {listed}. Pass it by keyword, "
        f"as in pipeline(x, {next(iter(needed))}=...), or bind it: "
        f"cb.fn(layer, {next(iter(needed))}=...)."
    )


def keyword_shared_with_norm(name: str, norm: str, others: Sequence[str]) -> str:
    return (
        f"The keyword {name!r} goes to {_choice_and([norm, *others])}, and may mean different "
        f"things to them. Bind it where it is meant: cb.fn(layer, "
        f"{name}=cb.context('another_name')), or keep it away: cb.fn({norm}(...), {name}=None)."
    )


def keyword_not_passed(name: str, layer: str) -> str:
    return (
        f"{layer} accepts any keyword (**kwargs), so the context keyword {name!r} does not reach "
        f"it. Pass it on: cb.fn({layer}(...), {name}=cb.context({name!r}, default=None)), or bind "
        f"a value."
    )


def keyword_went_to(name: str, others: Sequence[str]) -> str:
    return (
        f"The keyword {name!r} also went to {_choice_and(others)}. If it means something else "
        f"there, keep it away: cb.fn({others[0]}(...), {name}=None)."
    )


def unknown_fixed(f: str, name: str, taken: Iterable[str]) -> TypeError:
    return TypeError(
        f"cb.fn binds {name!r}, and {f} takes no such keyword. It takes: {_listing(taken)}."
    )


def unbindable(f: str, name: str) -> SignatureError:
    return SignatureError(
        f"cb.fn cannot bind parameter {name!r} of {f}: a positional-only parameter takes its "
        f"value by position. Wrap it: lambda x: f(x, value)."
    )


def wrong_n_in(f: str, asked: int, least: int, most: int | None) -> SignatureError:
    if most is None:
        range_ = f"at least {_count(least, 'item')}"
    elif least == most:
        range_ = _count(least, "item")
    else:
        range_ = f"{least} to {_count(most, 'item')}"
    return SignatureError(
        f"cb.fn(f, n_in={asked}): {f} takes {range_} off the stack. Correct n_in, or bind a "
        f"parameter: cb.fn(f, name=value)."
    )


def contradicted(f: str, name: str, asked: int, known: int) -> SignatureError:
    return SignatureError(
        f"cb.fn(f, {name}={asked}) contradicts {f}, whose signature has {name}={known}. Leave "
        f"{name} out."
    )


def too_many_items(asked: str, name: str, most: int, value: int) -> SignatureError:
    return SignatureError(
        f"{asked} takes {name} of at most {most}; got {value}. Put many values in one item: a "
        f"list, a dict or an array."
    )


# Building: combinators.


def negative_index(index: int) -> SignatureError:
    return SignatureError(
        f"select takes indices counted from the top of the stack, which is index 0; got {index}. "
        f"Use a non-negative index."
    )


def no_wiring_text(names: str) -> TypeError:
    return TypeError(
        f"wire takes names as one text, such as 'x memory mask -> memory x mask'; got {names}."
    )


def no_arrow(names: str) -> ValueError:
    return ValueError(
        f"wire takes the names of items before and after one arrow, such as "
        f"'x memory mask -> memory x mask'; got {names!r}."
    )


def not_a_wire(names: str, name: str) -> ValueError:
    return ValueError(
        f"wire({names!r}) names an item {name!r}. A name is one word, and names have spaces "
        f"between them, as in 'x memory mask -> memory x mask'."
    )


def wire_twice(names: str, name: str) -> ValueError:
    return ValueError(
        f"wire({names!r}) takes two items called {name!r}. Give each item before the arrow a name "
        f"of its own; to copy an item, repeat its name after the arrow."
    )


def no_such_wire(names: str, name: str, taken: Iterable[str]) -> ValueError:
    return ValueError(
        f"wire({names!r}) gives {name!r}, and takes no item of that name. It takes: "
        f"{_listing(taken)}."
    )


def residual_arity(side: str, signature: str, text: str) -> SignatureError:
    return SignatureError(
        f"residual adds one output of its body to one output of its shortcut; the {side} {text} "
        f"has signature {signature}. Drop or merge the outputs you do not add, for instance with "
        f"cb.drop() or cb.add()."
    )


def keep_too_deep(n: int, signature: str, text: str) -> SignatureError:
    return SignatureError(
        f"keep(f, n={n}) keeps the last {n} of f's inputs; f is {text} with signature {signature}. "
        f"Keep at most its inputs."
    )


def not_binary(signature: str, text: str) -> SignatureError:
    return SignatureError(
        f"fold takes a function of two items that gives one; got {text} with signature "
        f"{signature}. Say how it meets the stack: cb.fn(f, n_in=2, n_out=1)."
    )


def more_out_than_in(signature: str, text: str) -> SignatureError:
    return SignatureError(
        f"repeat feeds the outputs of f to its next copy, so f gives at most as many items as it "
        f"takes; got {text} with signature {signature}. Drop the outputs that are not handed on, "
        f"with cb.drop(), or keep those of all copies: cb.repeat(f, n, n_carry=...)."
    )


def repeat_arity(signature: str, text: str, n_carry: int) -> SignatureError:
    return SignatureError(
        f"repeat hands {_count(n_carry, 'item')} from copy to copy, so f takes and gives at least "
        f"as many; got {text} with signature {signature}. Let it give back every item that is "
        f"handed on, or say how many there are: cb.repeat(f, n, n_carry=...)."
    )


def not_for_each_copy(
    path: Sequence[str], n: int, index: int, found: str, stack: str
) -> SignatureError:
    return SignatureError(
        f"{_path(path)} runs {_count(n, 'copy', 'copies')}, and each takes an entry of item "
        f"{index}, which has a leading axis of size {n}; got {found}.\n"
        f"  stack: {stack}\n"
        f"  Stack one entry for each copy. An item that is the same for all goes through the "
        f"carry: cb.repeat(f, n, n_carry=...)."
    )


def scan_arity(signature: str, text: str, n_carry: int) -> SignatureError:
    return SignatureError(
        f"scan takes a cell from (carry.., x) to (carry.., y), here with "
        f"{_count(n_carry, 'carry item')}; got {text} with signature {signature}. Let it give back "
        f"every carry item, or say how many there are: cb.scan(cell, n_carry=...)."
    )


def no_sequence(text: str, signature: str, n_carry: int) -> SignatureError:
    return SignatureError(
        f"scan takes a cell with at least one input beyond its carry, the sequence to run over; "
        f"got {text} with signature {signature} and {_count(n_carry, 'carry item')}. Give the cell "
        f"an input for the sequence, or say how many items it carries: cb.scan(cell, n_carry=...)."
    )


def not_two_branches(found: int) -> TypeError:
    return TypeError(
        f"cond takes two callables, one for true and one for false; got {found}. For another "
        f"number of branches: cb.switch(...)."
    )


def no_branches() -> ValueError:
    return ValueError("switch takes at least one callable to choose from; got none.")


def different_branches(label: str, branches: Sequence[tuple[str, str]]) -> SignatureError:
    listed = ", ".join(f"{text} has {signature}" for text, signature in branches[:MOST_LISTED])
    return SignatureError(
        f"{label} runs one of its branches, so all take and give the same number of items: "
        f"{listed}. Pass items through, or drop them, for instance with cb.keep() or cb.drop()."
    )


def not_a_policy(asked: str, name: str, value: str) -> TypeError:
    return TypeError(
        f"{asked} takes a callable for {name}, one of jax.checkpoint_policies; got {value}."
    )


def foreign_module(name: str, module: str) -> TypeError:
    return TypeError(
        f"{name}.expand may only arrange the children that it is given; it also uses the layer "
        f"{module}, which is not one of them, so its parameters have no place. Pass that layer to "
        f"{name} as a child."
    )


def no_expansion(name: str) -> TypeError:
    return TypeError(
        f"{name} does not say what it means. Define expand(self, *children), which returns a "
        f"combinator made of its children."
    )


def index_out_of_range(label: str, index: int, length: int) -> IndexError:
    return IndexError(
        f"{label} has {_count(length, 'child', 'children')}; there is no child {index}."
    )


def would_lose(f: str, declared: str) -> TypeError:
    return TypeError(
        f"The child of fn({f}, {declared}) is {f} alone, without {declared}. Use the fn as a whole "
        f"to build another pipeline."
    )


def shared_across_copies(module: str, copies: str) -> SharingError:
    return SharingError(
        f"One instance of {module} is used both inside and outside of {copies}, whose copies have "
        f"parameters of their own, stacked on a leading axis: it would need two sets of them. Make "
        f"a second instance, or use shared=True."
    )


# Running.


def too_few_inputs(
    path: Sequence[str],
    signature: str,
    takes: int,
    found: int,
    stack: str,
    n_in: int,
    given: int,
    flags: Sequence[str],
) -> SignatureError:
    is_mode = (
        f"\n  Its parameter {flags[0]!r} is annotated bool, and is an input as it stands. If it is "
        f"a mode, make it context: cb.fn(layer, {flags[0]}=cb.context({flags[0]!r}))."
        if flags
        else ""
    )
    return SignatureError(
        f"{_path(path)} takes {_count(takes, 'item')} off the stack, and "
        f"{_is_there(found)}.\n"
        f"  signature: {signature}\n"
        f"  stack: {stack}\n"
        f"  The pipeline takes {_count(n_in, 'input')} and was called with {given}. Give it the "
        f"missing {'input' if n_in - given == 1 else 'inputs'}, copy an item with cb.dup() or "
        f"cb.select() before this step, or bind a parameter that is no input: "
        f"cb.fn(f, name=value).{is_mode}"
    )


def wrong_n_out(
    path: Sequence[str], signature: str, asked: int, found: int, returned: str, stack: str
) -> SignatureError:
    return SignatureError(
        f"{_path(path)} is declared to give {_count(asked, 'item')}, and gave {found}: "
        f"{returned or 'nothing'}.\n"
        f"  signature: {signature}\n"
        f"  stack: {stack}\n"
        f"  Correct its return annotation, or say how many: cb.fn(f, n_out={found})."
    )


def changed_carry(
    path: Sequence[str], signature: str, index: int, before: str, after: str, stack: str
) -> SignatureError:
    return SignatureError(
        f"{_path(path)} must give each item back as it took it, since every copy or step is fed "
        f"the last one's: item {index} went in as {before} and came out as {after}.\n"
        f"  signature: {signature}\n"
        f"  stack: {stack}\n"
        f"  Keep its shape and dtype, for instance with a final projection or a cast."
    )


def no_steps(path: Sequence[str], stack: str) -> SignatureError:
    return SignatureError(
        f"{_path(path)} runs over the steps of its sequences, and they hold no array.\n"
        f"  stack: {stack}\n"
        f"  Give the cell a sequence: an array with a time axis."
    )


def unequal_lengths(
    path: Sequence[str], axis: int, lengths: Sequence[int], stack: str
) -> SignatureError:
    return SignatureError(
        f"{_path(path)} runs over axis {axis} of its sequences, whose lengths differ: "
        f"{', '.join(map(str, lengths))}.\n"
        f"  stack: {stack}\n"
        f"  Pad the sequences to one length, or choose another axis: cb.scan(cell, axis=...)."
    )


def other_copies(label: str, n: int, name: str, found: str) -> ValueError:
    return ValueError(
        f"{label} runs {_count(n, 'copy', 'copies')}, each with variables of its own on a leading "
        f"axis of size {n}; {name} is {found}. The variables are those of another number of "
        f"copies: initialise again, or convert them with cb.transfer."
    )


def other_members(label: str, n: Any, name: str, found: str) -> ValueError:
    return ValueError(
        f"{label} runs {n} members, each with variables of its own on a leading axis of size {n}; "
        f"{name} is {found}. The variables are those of another number of members: initialise "
        f"again, or give it inputs for as many members as there are."
    )


def state_of_members(label: str, layer: str, collection: str) -> ValueError:
    return ValueError(
        f"In {label}, each member has a state of its own, and {layer}, which is also used outside "
        f"of it, has one state for all in the collection {collection!r}. Make a second instance."
    )


def mixed_collection(label: str, collection: str, appended: str, other: str) -> ValueError:
    return ValueError(
        f"In {label}, each step or copy appends to {appended!r} in the collection {collection!r}, "
        f"and replaces {other!r} there. A loop stacks the one and carries the other, and treats a "
        f"collection as a whole. Use two collections."
    )


def wrong_number_of_axes(axes: Sequence[int | None], signature: str) -> SignatureError:
    return SignatureError(
        f"vmap takes an axis for each input, or one for all; got axis={tuple(axes)} for a callable "
        f"with signature {signature}. Give one entry for each input."
    )


def no_members(path: Sequence[str], stack: str) -> SignatureError:
    return SignatureError(
        f"{_path(path)} runs on each member of an axis, and no input has that axis.\n"
        f"  stack: {stack}\n"
        f"  Say how many members there are: cb.vmap(f, axis, n=...)."
    )


def unequal_members(
    path: Sequence[str], n: int | None, sizes: Sequence[Any], stack: str
) -> SignatureError:
    asked = f", with n={n}," if n is not None else ""
    found = sizes if n is None else sizes[1:]
    return SignatureError(
        f"{_path(path)}{asked} runs on each member of an axis, whose sizes differ: "
        f"{', '.join(map(str, found))}.\n"
        f"  stack: {stack}\n"
        f"  Give all inputs one number of members, or None as the axis of those that all members "
        f"share: cb.vmap(f, axis=(0, None))."
    )


def no_member_axis(
    path: Sequence[str], role: str, item: str, axis: int, stack: str
) -> SignatureError:
    return SignatureError(
        f"{_path(path)} runs over axis {axis}, and its {role} {item} has no room for one.\n"
        f"  stack: {stack}\n"
        f"  Choose another axis, or None for an input that all members share: "
        f"cb.vmap(f, axis=(0, None)); for the outputs, cb.vmap(f, out_axis=...)."
    )


def no_predicate(path: Sequence[str], found: str, stack: str) -> SignatureError:
    return SignatureError(
        f"{_path(path)} takes from the top of the stack one boolean, which says what runs; got "
        f"{found}.\n"
        f"  stack: {stack}\n"
        f"  Compare the item (x > 0), or move the boolean to the top with cb.select(). For a "
        f"boolean for each row, run it for each row: cb.vmap(cb.cond(f, g), axis=0)."
    )


def no_index(path: Sequence[str], found: str, stack: str) -> SignatureError:
    return SignatureError(
        f"{_path(path)} takes from the top of the stack one integer, the number of the branch that "
        f"runs; got {found}.\n"
        f"  stack: {stack}\n"
        f"  Move the integer to the top with cb.select(). For a number for each row, run it for "
        f"each row: cb.vmap(cb.switch(...), axis=0)."
    )


def no_such_branch(path: Sequence[str], n: int, index: int) -> ValueError:
    return ValueError(
        f"{_path(path)} has {_count(n, 'branch', 'branches')}, numbered from 0; got number {index}."
    )


def different_outputs(
    path: Sequence[str], index: int, first: str, branch: str, found: str, stack: str
) -> SignatureError:
    return SignatureError(
        f"{_path(path)} runs one of its branches, so all give items of the same shape and dtype: "
        f"item {index} is {first} from the first branch, and {found} from {branch}.\n"
        f"  stack: {stack}\n"
        f"  Project or cast the outputs of one branch."
    )


def made_in_branch(label: str, branch: str, collection: str, path: str) -> ValueError:
    return ValueError(
        f"{label} runs one of its branches, and which one is not known when they are traced, so "
        f"all keep the same variables: {branch} makes or appends to {path!r} in the collection "
        f"{collection!r}, and another does not. Initialise first; and leave {collection!r} "
        f"immutable if it records what a layer saw."
    )


def no_time_axis(
    path: Sequence[str], role: str, item: str, axis: int, stack: str
) -> SignatureError:
    return SignatureError(
        f"{_path(path)} runs over axis {axis}, and its {role} {item} has no room for one.\n"
        f"  stack: {stack}\n"
        f"  Choose the axis that holds time: cb.scan(cell, axis=...)."
    )


def unknown_context(label: str, unknown: Iterable[str], taken: Iterable[str]) -> TypeError:
    return TypeError(
        f"{label} was called with {_listing(unknown)}, which none of its parts takes as a keyword. "
        f"They take: {_listing(taken)}."
    )


def write_note(path: Sequence[str], signature: str, stack: str, advice: str) -> str:
    facts = f"{NOTE_PREFIX}{_path(path)}\n  signature: {signature}\n  stack: {stack}"
    return f"{facts}\n  {advice}" if advice else facts


def advise_on(error: Exception, is_bound: bool) -> str:
    """Advises on an error that linen raises in layers. Empty for other errors.

    ``is_bound`` says whether the pipeline that runs has variables.
    """
    if is_bound and type(error).__name__ == "CallCompactUnboundModuleError":
        return (
            "The function calls a layer that is no step of the pipeline, so it has no variables. "
            "Make the layer a step: cb.serial(layer, function)."
        )
    if str(error).startswith('Parameter "deterministic" must be passed'):
        return "Say at the call which it is: apply(variables, ..., deterministic=True)."
    return _ADVICE.get(type(error).__name__, "")


_ADVICE = {
    "InvalidRngError": "Give apply a key for that stream, as in rngs={'dropout': key}, or switch "
    "the layer off, as with deterministic=True.",
    "ScopeParamShapeError": "The variables were made for other inputs, or for another pipeline: "
    "give it the inputs that they were made for, or initialise again.",
    "ScopeParamNotFoundError": "The variables hold no such parameter: they were made for another "
    "pipeline. A part of a trained pipeline has its own: part, variables = "
    "pipeline.bind(variables)[1:].unbind().",
    "CallCompactUnboundModuleError": "A pipeline with layers is called with variables: "
    "pipeline.apply(variables, ...), where variables = pipeline.init(key, ...).",
}


def advise_on_sum() -> str:
    return "The items must have one shape, or broadcast to one."


def advise_on_residual() -> str:
    return (
        "The body and the shortcut of a residual are added, so both give one shape. Project one: "
        "cb.residual(f, shortcut=nn.Dense(features))."
    )


def advise_on_concatenate(axis: int) -> str:
    return f"The items may differ along axis {axis} alone. Name another: cb.concatenate(axis=...)."


def advise_on_split(n: int, axis: int) -> str:
    return f"The size of axis {axis} must divide by {n}. Name another: cb.split({n}, axis=...)."


# Shapes.


def bad_spec(text: str) -> ValueError:
    return ValueError(
        f"{text!r} is not a spec. Write an array as jaxprs print it, such as 'f32[b, t, 64]' or "
        f"'bool[]', and None for an absent item; or pass an array or a jax.ShapeDtypeStruct."
    )


def bad_declaration(text: str) -> ValueError:
    return ValueError(
        f"{text!r} declares no shapes. Write inputs, one arrow and outputs, such as "
        f"'i32[b, t] -> f32[b, t, 64]'."
    )


def unknown_dtype(text: str, dtype: str, known: Iterable[str]) -> ValueError:
    return ValueError(
        f"{text!r} is not a spec: {dtype!r} is no type of numbers. Jaxprs name these: "
        f"{', '.join(sorted(known))}."
    )


def bad_constraints(text: str, why: str) -> ValueError:
    return ValueError(
        f"{text!r} does not constrain dimensions: {why}. Write conditions such as 't <= 64' or "
        f"'mod(t, 8) == 0', joined by 'and'."
    )


def bad_dimensions(text: str, why: str) -> ValueError:
    return ValueError(
        f"{text!r} is not a spec: {why}. A dimension is a number, a name, or an expression of "
        f"these, such as '8*t + 1'."
    )


def too_precise(text: str, narrow: str) -> ValueError:
    return ValueError(
        f"{text} has more bits than JAX keeps by default. Ask for {narrow.removesuffix('[]')}, or "
        f"enable jax_enable_x64."
    )


def symbolic_parameter(parameter: str, shape: str, names: Sequence[str]) -> ShapeError:
    return ShapeError(
        f"Parameter {parameter} would be {shape}, so that {_listing(names)} sizes it, and the "
        f"parameters of a model have one size. Make {'it' if len(names) == 1 else 'each'} a "
        f"number in the spec."
    )


def undecidable(operation: str, where: str, names: Sequence[str]) -> ShapeError:
    found = f"\n{where}" if where else ""
    return ShapeError(
        f"An operation cannot be decided for every size at once: {operation}{found}\n"
        f"  Make {_choice(names)} a number in the spec."
    )


def other_shapes(declared: str, computed: str, step: str) -> ShapeError:
    parted = f"\n  They part at {step}" if step else ""
    return ShapeError(
        f"Declared and computed shapes differ.\n"
        f"  declared: {declared}\n"
        f"  computed: {computed}{parted}\n"
        f"  Correct the declaration, or the step."
    )


def describe_step(path: Sequence[str], before: str, after: str) -> str:
    return f"{_path(path)}: {before} -> {after}"


def _path(path: Sequence[str]) -> str:
    return " -> ".join(path)


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, names))) or "none"


def _choice_and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _choice(names: Sequence[str]) -> str:
    quoted = list(map(repr, names))
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _is_there(n: int) -> str:
    return "none is there" if n == 0 else f"only {n} {'is' if n == 1 else 'are'} there"


# Variables of copies

MOST_LISTED = 8


def no_number(asked: str, name: str, value: str) -> ValueError:
    return ValueError(
        f"{asked} takes for {name} the name of a scope with {{}} for its number, such as "
        f"'layers_{{}}'; got {value!r}."
    )


def no_such_scope(asked: str, path: str, scopes: list[str]) -> ValueError:
    listed = ", ".join(
        [*map(repr, scopes[:MOST_LISTED]), *(["..."] if scopes[MOST_LISTED:] else [])]
    )
    return ValueError(
        f"{asked} finds no variables in {path!r}. There are some in {listed or 'no scope'}."
    )


def not_stacked(path: str, sizes: Mapping[str, int | None]) -> ValueError:
    listed = ", ".join(
        f"{name}: {'no axis' if size is None else size}"
        for name, size in list(sizes.items())[:MOST_LISTED]
    )
    return ValueError(
        f"unstack_layers takes the variables of a repeat, whose leading axes are one number of "
        f"copies; those in {path!r} are {listed}."
    )


def taken_scope(asked: str, into: str, name: str) -> ValueError:
    return ValueError(f"{asked} would put {name!r} where there is something. Change into={into!r}.")


def missing_copy(layers: str, name: str, missing: int, n: int) -> ValueError:
    return ValueError(
        f"stack_layers finds {n} of {layers!r} with {name!r}, and none with number {missing}. "
        "Copies are numbered from 0, and each has the same variables."
    )


def different_copies(layers: str, name: str, first: str, i: int, found: str) -> ValueError:
    return ValueError(
        f"stack_layers stacks copies of one layer; {name!r} is {first} in "
        f"{layers.format(0)!r} and {found} in {layers.format(i)!r}."
    )
