"""Combinators: pipelines as values.

A pipeline is a tree of combinators, each with a :class:`Signature`, that is at once a Flax linen
module, a Python expression to slice and print, and one XLA program with nothing left over.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from flax_extra import combinator as cb
    >>> block = cb.residual(nn.LayerNorm(), nn.Dense(8), nn.gelu)
    >>> encoder = nn.Embed(256, 8) >> cb.repeat(block, 6) >> nn.LayerNorm()
    >>> tokens = jnp.zeros((2, 5), int)
    >>> variables = encoder.init(jax.random.key(0), tokens)
    >>> jax.jit(encoder.apply)(variables, tokens).shape
    (2, 5, 8)

The stack is a tuple with its top on the left. A callable ``n_in -> n_out`` takes ``n_in`` items off
the top and puts its ``n_out`` there; what it does not take passes through untouched. That is all:
every word below says where items go.
"""

from flax_extra.combinator._cache.cache import Cache
from flax_extra.combinator._cache.entry import CacheEntry
from flax_extra.combinator._core.combinator import Combinator
from flax_extra.combinator._core.context import ContextKeyword, context
from flax_extra.combinator._core.errors import ShapeError, SharingError, SignatureError, StreamError
from flax_extra.combinator._core.inference import infer_signature
from flax_extra.combinator._core.signature import Signature
from flax_extra.combinator._diagram.svg import Diagram, diagram
from flax_extra.combinator._stream.stream import Stream, StreamState, stream
from flax_extra.combinator._surgery.layers import Layer, layers
from flax_extra.combinator._surgery.replace import replace
from flax_extra.combinator._surgery.transfer import transfer
from flax_extra.combinator._views.shape_signature import ShapeSignature, shape_signature
from flax_extra.combinator._views.shardings import ShardingRule, shardings
from flax_extra.combinator._views.steps import Step
from flax_extra.combinator._views.summary import Summary, summary
from flax_extra.combinator._views.typed import Typed, typed
from flax_extra.combinator._words.branch import (
    Branch,
    Dip,
    Keep,
    Residual,
    branch,
    dip,
    keep,
    residual,
)
from flax_extra.combinator._words.choose import Cond, Switch, cond, switch
from flax_extra.combinator._words.compose import Parallel, Serial, parallel, serial
from flax_extra.combinator._words.copies import stack_layers, unstack_layers
from flax_extra.combinator._words.fn import Fn, fn
from flax_extra.combinator._words.hold import Hold, hold
from flax_extra.combinator._words.merge import (
    Add,
    Concatenate,
    Div,
    Fold,
    Mul,
    Split,
    Sub,
    add,
    concatenate,
    div,
    fold,
    mul,
    split,
    sub,
)
from flax_extra.combinator._words.remat import Remat, remat
from flax_extra.combinator._words.repeat import Repeat, repeat
from flax_extra.combinator._words.scan import Scan, scan
from flax_extra.combinator._words.select import (
    Drop,
    Dup,
    Identity,
    Select,
    Swap,
    drop,
    dup,
    identity,
    select,
    swap,
)
from flax_extra.combinator._words.vmap import Vmap, vmap
from flax_extra.combinator._words.wire import Wire, wire

__all__ = [
    # what a callable is on the stack
    "Signature",
    "infer_signature",
    "fn",
    "context",
    # where data flows
    "serial",
    "parallel",
    "branch",
    "residual",
    "keep",
    "dip",
    # moving items
    "select",
    "wire",
    "dup",
    "drop",
    "swap",
    "identity",
    # many into one, one into many
    "fold",
    "add",
    "sub",
    "mul",
    "div",
    "concatenate",
    "split",
    # loops and memory
    "repeat",
    "scan",
    "remat",
    "vmap",
    "cond",
    "switch",
    "stack_layers",
    "unstack_layers",
    # changing a pipeline, and its variables with it
    "layers",
    "Layer",
    "replace",
    "transfer",
    # piece by piece
    "stream",
    "hold",
    "Cache",
    "CacheEntry",
    # shapes, before there are arrays
    "shape_signature",
    "typed",
    "ShapeSignature",
    "summary",
    "Summary",
    "diagram",
    "Diagram",
    "Step",
    # more than one device
    "shardings",
    "ShardingRule",
    # what they build
    "Combinator",
    "Serial",
    "Parallel",
    "Branch",
    "Residual",
    "Keep",
    "Dip",
    "Select",
    "Wire",
    "Dup",
    "Drop",
    "Swap",
    "Identity",
    "Fold",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Concatenate",
    "Split",
    "Repeat",
    "Scan",
    "Remat",
    "Hold",
    "Stream",
    "StreamState",
    "Vmap",
    "Cond",
    "Switch",
    "Fn",
    "ContextKeyword",
    "Typed",
    # what goes wrong
    "SignatureError",
    "ShapeError",
    "SharingError",
    "StreamError",
]
