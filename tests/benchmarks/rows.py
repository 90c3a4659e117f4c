"""What is compared with what. Each row says in its claim what should hold of its ratios."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_extra import combinator as cb
from flax_extra import layer as xn
from perceiver_io import Core
from perceiver_models import masked_language_model
from tests.benchmarks import by_hand
from tests.benchmarks.measuring import Implementation, Row

Implementations = Mapping[str, Implementation]
THREADS = 2

DEPTHS = range(0, 120, 6)
"""How many of Python's frames there are around a trace, in turn.

CPython keeps frames in chunks of 16 kB, and calls to and fro over the end of one are slow: handwritten
linen, 40 frames further in, takes a quarter longer. Which trace that hits is chance; over the depths of
a whole chunk, it hits each as often.
"""


def rows() -> list[Row]:
    """All of them."""
    return list(
        itertools.chain(
            _abstraction(), _attention(), _attention_layers(), _lstm(), _depth(), _perceiver()
        )
    )


def _compiled(f: Callable[..., Any], *inputs: Any) -> Implementation:
    program = jax.jit(f).lower(*inputs).compile()
    memory = program.memory_analysis()
    return Implementation(
        lambda: jax.block_until_ready(program(*inputs)),
        memory.temp_size_in_bytes if memory else None,
    )


def _squares(f: Callable[..., Any], n: int) -> Callable[..., Any]:
    """The gradient of a sum of squares in the first n arguments."""
    return jax.grad(lambda *inputs: jnp.sum(f(*inputs) ** 2), argnums=tuple(range(n)))


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _torch() -> Any:
    import torch

    torch.set_num_threads(THREADS)
    return torch


# The abstraction


def _abstraction() -> Iterator[Row]:
    core = Core(n_latents=64, d_latents=128, n_layers=4, d_qk=128, d_v=128)
    sizes: dict[str, int] = {
        "n_positions": 256, "d_model": 64, "n_heads_decoder": 8, "d_qk_decoder": 64
    }  # fmt: skip
    tokens = jnp.zeros((2, 256), jnp.int32)
    models: dict[str, Any] = {
        "demo": (
            lambda: (by_hand.demo().autoencoder(label_mask_rate=1.0), by_hand.Demo()),
            (jnp.zeros((64, 8, 8)), jnp.zeros(64, jnp.int32)),
        ),
        "perceiver": (
            lambda: (masked_language_model(core, **sizes), by_hand.Language(core, **sizes)),
            (tokens, jnp.ones((2, 256), bool)),
        ),
        "stack-300": (
            lambda: (by_hand.stack(300, 64), by_hand.Stack(300, 64)),
            (jnp.ones((32, 64)),),
        ),
    }
    for name, (build, inputs) in models.items():
        trace = functools.partial(_traced, build, inputs)
        yield Row(f"trace-{name}", "linen by hand / ours >= 0.91", trace, rounds=2 * len(DEPTHS))
        run = functools.partial(_run, build, inputs)
        yield Row(f"run-{name}", "linen by hand / ours 1.00 +- 0.03", run, rounds=31)


def _traced(build: Callable[[], Any], inputs: Any) -> Implementations:
    ours, theirs = build()
    variables = ours.init(jax.random.key(0), *inputs)

    def trace(model: Any) -> Implementation:
        depths = itertools.cycle(DEPTHS)

        def run() -> Any:
            return jax.make_jaxpr(lambda *inputs: model.apply(variables, *inputs))(*inputs)

        return Implementation(lambda: _deep_down(next(depths), run), clock=time.process_time)

    return {"ours": trace(ours), "linen by hand": trace(theirs)}


def _deep_down(n_frames: int, f: Callable[[], Any]) -> Any:
    return f() if n_frames == 0 else _deep_down(n_frames - 1, f)


def _run(build: Callable[[], Any], inputs: Any) -> Implementations:
    ours, theirs = build()
    variables = ours.init(jax.random.key(0), *inputs)
    return {
        "ours": _compiled(ours.apply, variables, *inputs),
        "linen by hand": _compiled(theirs.apply, variables, *inputs),
    }


# Attention, with 8 heads of 64


def _attention() -> Iterator[Row]:
    claims = {
        256: "jax.nn / ours >= 0.95",
        512: "jax.nn / ours >= 0.95",
        4096: "jax.nn / ours >= 2; torch / ours >= 0.95 forward, 0.87 with the gradient",
        16384: "jax.nn / ours >= 2.5 forward, 3 with the gradient; 1/50 of the temporaries",
        65536: "jax.nn / ours >= 2.5 forward, 3 with the gradient; 1/50 of the temporaries",
    }
    for keys, claim in claims.items():
        yield from _attention_rows(f"attention-{keys}", claim, 512, keys)
    yield from _attention_rows("attention-self-2048", "jax.nn / ours >= 2", 2048, 2048)


def _attention_rows(name: str, claim: str, queries: int, keys: int) -> Iterator[Row]:
    rounds = 5 if keys > 2**15 else 9
    for mode in ("forward", "gradient"):
        prepare = functools.partial(_attend, queries, keys, mode)
        yield Row(f"{name}-{mode}", claim, prepare, rounds)


def _attend(queries: int, keys: int, mode: str) -> Implementations:
    inputs = [_normal(1, n, 8, 64, seed=i) for i, n in enumerate((queries, keys, keys))]
    torch = _torch()
    theirs = [torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in inputs]
    fused = torch.nn.functional.scaled_dot_product_attention

    def run() -> None:
        if mode == "forward":
            with torch.no_grad():
                fused(*theirs)
        else:
            leaves = [x.detach().requires_grad_() for x in theirs]
            (fused(*leaves) ** 2).sum().backward()

    changed = (lambda f: f) if mode == "forward" else functools.partial(_squares, n=3)
    return {
        "ours": _compiled(changed(xn.attend), *inputs),
        "jax.nn": _compiled(changed(jax.nn.dot_product_attention), *inputs),
        "torch": Implementation(run, spins=True),
    }


def _attention_layers() -> Iterator[Row]:
    for length in (128, 1024):
        prepare = functools.partial(_attention_layer, length)
        yield Row(f"attention-layer-{length}", "linen / ours >= 0.95", prepare)


def _attention_layer(length: int) -> Implementations:
    x = _normal(4, length, 256)
    mask = jnp.ones((4, 1, length), bool)
    ours = xn.SelfAttention(n_heads=4)
    theirs = nn.MultiHeadDotProductAttention(4)
    variables = ours.init(jax.random.key(0), x, mask)
    theirs_variables = theirs.init(jax.random.key(0), x)
    return {
        "ours": _compiled(ours.apply, variables, x, mask),
        "linen": _compiled(
            lambda variables, x, mask: theirs.apply(variables, x, mask=mask),
            theirs_variables,
            x,
            mask[:, None],
        ),
    }


# The LSTM


def _lstm() -> Iterator[Row]:
    sizes = (32, 128, 256, 256), (8, 512, 128, 128), (64, 64, 512, 512), (1, 1024, 256, 256)
    for size in sizes:
        for mode in ("forward", "gradient"):
            name = f"lstm-{'x'.join(map(str, size))}-{mode}"
            yield Row(name, "linen / ours >= 0.95", functools.partial(_recur, *size, mode))


def _recur(batch: int, steps: int, features: int, hidden: int, mode: str) -> Implementations:
    x = _normal(batch, steps, features)
    rnn = nn.RNN(nn.OptimizedLSTMCell(hidden))
    ours = xn.LSTM(hidden)
    cell = rnn.init(jax.random.key(0), x)["params"]["cell"]
    torch = _torch()
    lstm = torch.nn.LSTM(features, hidden, batch_first=True)
    inputs = torch.tensor(np.asarray(x))

    def run_ours(cell: Any, x: Any) -> Any:
        return ours.apply({"params": {"Scan_0": {"LSTMCell_0": cell}}}, x)

    def run_linen(cell: Any, x: Any) -> Any:
        return rnn.apply({"params": {"cell": cell}}, x)[:, -1]

    def run_torch() -> None:
        if mode == "forward":
            with torch.no_grad():
                lstm(inputs)
        else:
            leaf = inputs.detach().requires_grad_()
            (lstm(leaf)[0][:, -1] ** 2).sum().backward()

    changed = (lambda f: f) if mode == "forward" else functools.partial(_squares, n=2)
    return {
        "ours": _compiled(changed(run_ours), cell, x),
        "linen": _compiled(changed(run_linen), cell, x),
        "torch": Implementation(run_torch, spins=True),
    }


# Depth


def _depth() -> Iterator[Row]:
    claim = "repeat x2 / ours >= 0.77, 64 blocks unrolled / ours >= 8"
    yield Row("compile-repeat-64", claim, _compile_depth, rounds=5)


def _compile_depth() -> Implementations:
    def block() -> cb.Combinator:
        return cb.residual(nn.LayerNorm(), cb.fn(xn.SelfAttention(n_heads=4), mask=None)) >> (
            cb.residual(nn.LayerNorm(), xn.FeedForward(4))
        )

    x = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
    models = {
        "ours": cb.repeat(block(), 64),
        "repeat x2": cb.repeat(block(), 2),
        "64 blocks unrolled": cb.serial(block() for _ in range(64)),
    }

    def compile_once(model: Any) -> Implementation:
        variables = jax.eval_shape(model.init, jax.random.key(0), x)

        def run() -> None:  # a function that is new to jit, so that nothing is cached
            jax.jit(lambda variables, x: model.apply(variables, x)).lower(variables, x).compile()

        return Implementation(run)

    return {name: compile_once(model) for name, model in models.items()}


# Perceiver IO's language model: 8 blocks, 256 latents of 512, 1,024 bytes, batch 2


def _perceiver() -> Iterator[Row]:
    for mode in ("forward", "training"):
        prepare = functools.partial(_language_model, mode)
        yield Row(f"perceiver-{mode}", "transformers / ours >= 1.3", prepare, rounds=7)


def _language_model(mode: str) -> Implementations:
    import optax
    import transformers

    from perceiver_checkpoints import PERCEIVERS

    torch = _torch()
    config = transformers.PerceiverConfig(
        num_latents=256, d_latents=512, d_model=256, num_self_attends_per_block=8,
        max_position_embeddings=1024, qk_channels=256, v_channels=512,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = transformers.PerceiverForMaskedLM(config)
    named = {**theirs.config.to_dict(), "architectures": ["PerceiverForMaskedLM"]}
    ours, variables = PERCEIVERS.build(named), PERCEIVERS.read(theirs.state_dict(), named)
    tokens = np.random.default_rng(0).integers(6, 262, (2, 1024)).astype(np.int32)
    mask = np.ones_like(tokens)
    t_tokens, t_mask = torch.tensor(tokens).long(), torch.tensor(mask)
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                theirs.eval()(t_tokens, attention_mask=t_mask)

        return {
            "ours": _compiled(ours.apply, variables, tokens, mask),
            "transformers": Implementation(forward, spins=True),
        }
    adam = optax.adamw(1e-4)
    torch_adam = torch.optim.AdamW(theirs.parameters(), 1e-4)

    def loss(variables: Any, tokens: Any, mask: Any) -> Any:
        logits = ours.apply(variables, tokens, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    def step(variables: Any, state: Any, tokens: Any, mask: Any) -> Any:
        updates, state = adam.update(jax.grad(loss)(variables, tokens, mask), state, variables)
        return optax.apply_updates(variables, updates), state

    trained = [variables, adam.init(variables)]
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*trained, tokens, mask).compile()

    def our_step() -> None:  # in place, as torch's
        trained[:] = jax.block_until_ready(program(*trained, tokens, mask))

    def torch_step() -> None:
        logits = theirs.train()(t_tokens, attention_mask=t_mask).logits
        torch_adam.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), t_tokens.flatten()).backward()
        torch_adam.step()

    return {
        "ours": Implementation(our_step),
        "transformers": Implementation(torch_step, spins=True),
    }
