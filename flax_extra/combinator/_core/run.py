"""How a pipeline runs: a walk over the expression that carries the stack.

Structural combinators are only read. What is called is layers and functions, so a pipeline leaves
nothing of itself in the compiled program, and every error knows its path.

The walk is a loop, however deep the expression: jax walks Python's frames at every operation that
it traces, and Python allows a thousand of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Mapping
from typing import Any, TypeAlias

from flax import linen as nn

from flax_extra.combinator._core import errors
from flax_extra.combinator._core.binding import UNBOUND, Binding
from flax_extra.combinator._core.children import Child, Pipeline, find_takers
from flax_extra.combinator._core.context import resolve_fixed
from flax_extra.combinator._core.describe import describe_stack
from flax_extra.combinator._core.doubts import warn_of_context
from flax_extra.combinator._core.environment import (
    CallSite,
    Environment,
    Path,
    StepCall,
    StepHook,
    call_site,
    format_path,
)
from flax_extra.combinator._core.naming import get_name
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._core.stack import (
    Missing,
    Stack,
    flatten,
    has_missing,
    pad,
    put,
    regroup,
    take,
    unwrap_stack,
)

Flow: TypeAlias = Generator[tuple[int, Stack], Stack, Stack]
"""The run of a combinator with children.

It yields the index of a child with the stack for it, is sent the stack after, and returns the stack
that the combinator leaves.
"""


class Placeholder:
    """Stands for a child of a derived combinator in its expansion."""

    def __init__(self, owner: Pipeline, index: int, child: Child) -> None:
        self.owner = owner
        self.index = index
        self.child = child
        self.signature = child.signature
        self.__name__ = get_name(child.target)  # errors name what it stands for

    def __call__(self, *items: Any) -> Any:
        raise errors.no_expansion(self.owner._label)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Runs the children of one combinator: ``steps(index, stack)`` gives the stack after one.

    It is for combinators that need the result at once, inside a transformation. Others yield.
    """

    owner: Pipeline
    env: Environment

    def __call__(self, index: int, stack: Stack) -> Stack:
        child, env = _enter_child(self.owner, index, self.env)
        if env.hook is not None:
            return _run_with_hook(child, stack, env, env.hook)
        return _run_child(child, stack, env)

    def on(self, owner: Pipeline) -> Steps:
        """Returns the same steps inside a lifted transformation, on the owner as bound there."""
        return Steps(owner, self.env._replace(binding=owner._binding))

    @property
    def path(self) -> tuple[str, ...]:
        return (*format_path(self.env.path), self.owner._label)


def run_pipeline(
    pipeline: Pipeline, binding: Binding, inputs: Stack, context: Mapping[str, Any]
) -> Any:
    """Calls a pipeline. The inputs are the stack; it returns what is left of it at the end."""
    site = call_site.get()
    check_context(pipeline, context, is_outermost=site.root is None)
    stack = flatten(inputs)
    signature = pipeline.signature
    env = Environment(
        binding=binding,
        context=context,
        n_in=signature.n_in,
        n_given=len(stack),
        hook=site.hook,
        root=site.root or pipeline,
        path=site.path,
        position=site.position,
    )
    result = _evaluate(pipeline, pad(stack, signature.n_in), env)
    if env.n_given < env.n_in:  # no step took what is missing: it was moved, or dropped
        raise _too_few_inputs(env, (*env.path, pipeline._label), signature, stack)
    return unwrap_stack(result)


def check_context(
    pipeline: Pipeline, context: Mapping[str, Any], is_outermost: bool = True
) -> None:
    """Raises an error for keywords that are unknown or missing, and warns of doubtful ones."""
    unknown = context.keys() - pipeline.keywords
    if unknown:
        raise errors.unknown_context(pipeline._label, unknown, pipeline.keywords)
    missing = pipeline._required_keywords - context.keys()
    if missing:
        paths = {
            name: [" -> ".join(path) for path, _ in find_takers(pipeline, name)]
            for name in sorted(missing)
        }
        raise errors.missing_context(pipeline._label, paths)
    if is_outermost and context:
        warn_of_context(pipeline, context)


def _evaluate(pipeline: Pipeline, stack: Stack, env: Environment) -> Stack:
    """Returns the stack after a combinator. It runs those inside in a loop, not by recursion."""
    pipeline, env = _expand(pipeline, env)
    running = [(pipeline, env, _start_flow(pipeline, stack, env))]
    result: Any = None  # what a flow is sent: None at its start
    while running:
        pipeline, env, flow = running[-1]
        try:
            index, stack = flow.send(result)
        except StopIteration as finished:
            running.pop()
            result = finished.value
            continue
        child, env = _enter_child(pipeline, index, env)
        inlined = child.inlined
        if env.hook is not None:
            result = _run_with_hook(child, stack, env, env.hook)
        elif inlined is None:
            result = _call(child, stack, env)
        else:
            pipeline, env = _expand(inlined, _fix_keywords(child, env))
            running.append((pipeline, env, _start_flow(pipeline, stack, env)))
            result = None
    after: Stack = result
    return after


def _expand(pipeline: Pipeline, env: Environment) -> tuple[Pipeline, Environment]:
    """Expands a derived combinator, down to a primitive one."""
    expansion = pipeline._expansion
    while expansion is not None:
        if env.derived is None:
            env = env._replace(derived=pipeline)
        if not len(pipeline.children) and env.operation is None:
            env = env._replace(operation=pipeline._label)
        pipeline, expansion = expansion, expansion._expansion
    return pipeline, env


def _start_flow(pipeline: Pipeline, stack: Stack, env: Environment) -> Flow:
    flow = pipeline._run(stack, Steps(pipeline, env))
    return _return_stack(flow) if isinstance(flow, tuple) else flow


def _return_stack(stack: Stack) -> Flow:
    """Is the flow of a combinator that ran without yielding a child."""
    yield from ()
    return stack


def _enter_child(owner: Pipeline, index: int, env: Environment) -> tuple[Child, Environment]:
    """Returns a child, or what a placeholder stands for, and the environment in which it runs."""
    child = owner.children[index]
    if env.derived is None:
        env = env.enter(owner, index)
    while isinstance(child.target, Placeholder):
        placeholder = child.target
        child = placeholder.child
        if placeholder.owner is env.derived:
            env = env.enter(placeholder.owner, placeholder.index)
    return child, env


def _run_with_hook(child: Child, stack: Stack, env: Environment, hook: StepHook) -> Stack:
    step = StepCall(
        position=env.position,
        path=format_path(env.get_path(child)),
        child=child,
        module=_find_module(child, env),
        stack=stack,
        is_wiring=env.derived is not None,
    )
    return hook(step, functools.partial(_run_child, child, stack, env))


def _find_module(child: Child, env: Environment) -> nn.Module | None:
    if child.inlined is not None or child.module is None:
        return None
    return env.binding.find(child.module)


def _run_child(child: Child, stack: Stack, env: Environment) -> Stack:
    """Returns the stack after a child: one that has no scope of its own is read, not called."""
    inlined = child.inlined
    if inlined is None:
        return _call(child, stack, env)
    return _evaluate(inlined, stack, _fix_keywords(child, env))


def _fix_keywords(child: Child, env: Environment) -> Environment:
    """Returns the environment with the keywords that are fixed for a child."""
    if not child.fixed:
        return env
    return env._replace(context={**env.context, **resolve_fixed(child.fixed, env.context)})


def _call(child: Child, stack: Stack, env: Environment) -> Stack:
    signature = child.signature
    items, rest = take(stack, signature.n_in)
    path = env.get_path(child)
    if has_missing(items):
        raise _too_few_inputs(env, path, signature, stack, child.call_spec.flags)
    f = child.target
    if child.module is not None:
        f = child.bind(env.binding.find(child.module))
    if child.pipeline is not None:  # it puts its own label on the path, at its first step
        site = CallSite(path[:-1], env.position, env.hook, env.root)
    else:
        site = CallSite(path, root=env.root)
    positional, keywords = _choose_arguments(child, items, env.context)
    token = call_site.set(site)
    try:
        returned = f(*positional, **keywords)
    except Exception as error:
        _annotate(error, child, env, stack, keywords)
        raise
    finally:
        call_site.reset(token)
    outputs = () if returned is None and signature.n_out == 0 else flatten(returned)
    if len(outputs) != signature.n_out:
        raise errors.wrong_n_out(
            format_path(path),
            str(signature),
            signature.n_out,
            len(outputs),
            describe_stack(outputs) if outputs else "",
            describe_stack(stack),
        )
    return put(outputs, rest)


def _choose_arguments(
    child: Child, items: Stack, context: Mapping[str, Any]
) -> tuple[Stack, Mapping[str, Any]]:
    """Returns the arguments of a call, by position and by keyword."""
    spec = child.call_spec
    keywords = {k: v for k, v in context.items() if k in spec.bare}
    keywords.update(resolve_fixed(child.fixed, context))
    if spec.is_plain:
        return items, keywords
    named = list(zip(regroup(items, spec.signature.in_shape), spec.names, strict=True))
    keywords.update((name, argument) for argument, name in named if name is not None)
    return tuple(argument for argument, name in named if name is None), keywords


def _too_few_inputs(
    env: Environment,
    path: Path,
    signature: Signature,
    stack: Stack,
    flags: tuple[str, ...] = (),
) -> errors.SignatureError:
    present = sum(not isinstance(item, Missing) for item in take(stack, signature.n_in)[0])
    return errors.too_few_inputs(
        format_path(path),
        str(signature),
        signature.n_in,
        present,
        describe_stack(stack),
        env.n_in,
        env.n_given,
        flags,
    )


def _annotate(
    error: Exception, child: Child, env: Environment, stack: Stack, keywords: Mapping[str, Any]
) -> None:
    """Adds a note with path and stack, once: the innermost pipeline knows most."""
    if isinstance(error, errors.SignatureError) and " -> " in str(error):
        return
    notes = getattr(error, "__notes__", ())
    if any(str(note).startswith(errors.NOTE_PREFIX) for note in notes):
        return
    error.add_note(
        errors.write_note(
            format_path(env.get_path(child)),
            str(child.signature),
            describe_stack(stack),
            _advise(error, child, env, keywords),
        )
    )


def _advise(error: Exception, child: Child, env: Environment, keywords: Mapping[str, Any]) -> str:
    """Says what to do about an error, if that is known."""
    if env.derived is not None and env.derived._advice:
        return env.derived._advice
    known = errors.advise_on(error, is_bound=env.binding is not UNBOUND)
    if known:
        return known
    for name in keywords.keys() & env.context.keys():
        others = {get_name(leaf.target) for _, leaf in find_takers(env.root, name)}
        others.discard(get_name(child.target))
        if others:
            return errors.keyword_went_to(name, sorted(others))
    return ""
