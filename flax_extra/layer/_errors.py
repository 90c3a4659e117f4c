"""The messages of all errors of the layers.

Each function makes one ``ValueError`` that says what the layer takes, what it got, and what to do.
Callers check the arguments and pass the values, so that all wording is in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax_extra import combinator as cb


def wrong_rank(layer: str, name: str, shape: Sequence[Any], axes: str) -> ValueError:
    return ValueError(
        f"{layer} takes {name} with axes {axes}; got shape {_shape(shape)}, which has "
        f"{len(shape)} {'axis' if len(shape) == 1 else 'axes'}."
    )


def too_small(layer: str, name: str, least: int, value: Any) -> ValueError:
    return ValueError(f"{layer} takes {name} of at least {least}; got {value}.")


# Attention.


def indivisible(layer: str, name: str, value: Any, n_heads: int) -> ValueError:
    return ValueError(
        f"{layer} splits {name} evenly among its heads; {name} is {value} and n_heads is "
        f"{n_heads}. Choose a {name} that is a multiple of {n_heads}."
    )


def mismatched_heads(query: Sequence[Any], key: Sequence[Any], value: Sequence[Any]) -> ValueError:
    return ValueError(
        f"attend takes a query [batch, time_q, heads, d_qk], a key [batch, time_kv, kv_heads, "
        f"d_qk] and a value [batch, time_kv, kv_heads, d_v]; got shapes {_shape(query)}, "
        f"{_shape(key)} and {_shape(value)}, which do not agree."
    )


def indivisible_heads(heads: Any, kv_heads: Any) -> ValueError:
    return ValueError(
        f"attend shares each head of keys and values among as many heads of the query; the query "
        f"has {heads} heads, which is no multiple of the {kv_heads} of the key."
    )


def wrong_logits_shape(name: str, shape: Sequence[Any], logits: Sequence[Any]) -> ValueError:
    batch, _, time_q, time_kv = logits
    return ValueError(
        f"attend takes a {name} that broadcasts to [batch, time_q, time_kv], here "
        f"{_shape((batch, time_q, time_kv))}, or to [batch, heads, time_q, time_kv], here "
        f"{_shape(logits)}; got shape {_shape(shape)}. Give a {name} of three or four axes, each "
        f"of that size or 1."
    )


def wrong_bias_dtype(dtype: Any) -> ValueError:
    return ValueError(
        f"attend takes a bias of floating point numbers, which is added to the logits; got "
        f"{dtype}. If it says which keys a query sees, give it as mask."
    )


def wrong_mask_dtype(dtype: Any) -> ValueError:
    return ValueError(
        f"attend takes a mask of booleans or integers, non-zero where a query attends to a key; "
        f"got {dtype}. Compare it first, as in mask > 0."
    )


def wrong_padding_masks(mask_q: Sequence[Any], mask_kv: Sequence[Any]) -> ValueError:
    return ValueError(
        f"cross_attention_mask takes padding masks [batch, time_q] and [batch, time_kv]; got "
        f"shapes {_shape(mask_q)} and {_shape(mask_kv)}."
    )


def wrong_rate(layer: str, rate: Any) -> ValueError:
    return ValueError(f"{layer} takes a dropout_rate of at least 0 and below 1; got {rate}.")


def no_dropout_key(rate: float) -> ValueError:
    return ValueError(
        f"attend needs a dropout_rngkey for dropout at rate {rate}; got None. Give a key, or say "
        f"deterministic=True."
    )


def looks_ahead(layer: str) -> cb.StreamError:
    return cb.StreamError(
        f"{layer} with causal=False cannot run piece by piece: its positions attend to later ones. "
        f"Say causal=True, or call it without decode."
    )


def no_keys(layer: str) -> ValueError:
    return ValueError(
        f"{layer} with causal=True takes inputs_kv in every block; got None. Without causal it "
        f"remembers them from the first block."
    )


def unequal_blocks(layer: str, time_q: Any, time_kv: Any) -> ValueError:
    return ValueError(
        f"{layer} with causal=True takes as many steps of inputs_q as of inputs_kv in a stream, or "
        f"with lengths; got {time_q} and {time_kv}. Attend to a sequence that stays with "
        f"causal=False."
    )


def wrong_block_mask(layer: str, shape: Sequence[Any], block: Sequence[Any]) -> cb.StreamError:
    return cb.StreamError(
        f"In a stream, {layer} takes a mask that says which steps of the block are keys, of shape "
        f"{_shape((block[0], 1, block[1]))}; got shape {_shape(shape)}. The fields causal and "
        f"window hide steps by their positions."
    )


def new_mask(layer: str) -> cb.StreamError:
    return cb.StreamError(
        f"{layer} got a mask, and the stream was made with the mask None, so that it does not "
        f"remember which steps are keys. Give the stream a spec of the mask, such as "
        f"'bool[b, 1, t]'."
    )


def indivisible_kv_heads(layer: str, n_kv_heads: int, n_heads: int) -> ValueError:
    return ValueError(
        f"{layer} takes n_kv_heads that divide n_heads; got {n_kv_heads} and n_heads {n_heads}."
    )


def not_rotary(layer: str, given: str) -> TypeError:
    return TypeError(
        f"{layer} takes a RotaryEncoding as rotary, such as xn.RotaryEncoding(base=10000.0); got "
        f"{given}."
    )


def dropout_is_off(layer: str, rate: float) -> str:
    return (
        f"{layer} leaves out its dropout of rate {rate}, although there is an rng for it: "
        f"deterministic is True unless a call says otherwise. Call the model with "
        f"deterministic=False in training, and with deterministic=True in evaluation."
    )


# Feed-forward.


def two_widths(layer: str, widening_factor: int, d_hidden: int) -> ValueError:
    return ValueError(
        f"{layer} takes the width of its hidden layer from d_hidden or from widening_factor, not "
        f"from both; got d_hidden {d_hidden} and widening_factor {widening_factor}. Give one of "
        f"them."
    )


def window_without_causal(layer: str, window: int) -> ValueError:
    return ValueError(
        f"{layer} takes a window as the last positions that a query sees, its own included; got "
        f"window={window} and causal=False. Give causal=True, too."
    )


def positions_without_causal() -> ValueError:
    return ValueError(
        "attend takes query_positions and key_positions to decide which keys come after a query; "
        "got positions and causal=False. Give causal=True, or leave the positions out."
    )


def key_positions_alone() -> ValueError:
    return ValueError(
        "attend compares key_positions with query_positions; got key_positions alone. Give the "
        "position of each query, too."
    )


def wrong_attend_positions(
    name: str, dtype: Any, shape: Sequence[Any], expected: Sequence[Any]
) -> ValueError:
    return ValueError(
        f"attend takes {name} as integers of shape {_shape(expected)} or "
        f"{_shape((1, expected[1]))}; got {dtype}{_shape(shape)}."
    )


def not_a_number(layer: str, name: str, given: str) -> ValueError:
    return ValueError(
        f"{layer} takes {name} as a Python number, which is part of the program; got {given}."
    )


def not_positive(layer: str, name: str, value: Any) -> ValueError:
    return ValueError(f"{layer} takes {name} above 0; got {value}.")


# Recurrence.


def wrong_state(
    layer: str,
    names: Sequence[str],
    shapes: Sequence[Sequence[Any]],
    expected: Sequence[Any],
) -> ValueError:
    found = " and ".join(map(_shape, shapes)) or "nothing"
    described = f"{names[0]}, an array" if len(names) == 1 else f"({', '.join(names)}), two arrays"
    return ValueError(
        f"{layer} takes an initial_state {described} of shape {_shape(expected)}; got {found}."
    )


def wrong_carry(layer: str, cell: str, expected: Any, found: Any) -> ValueError:
    return ValueError(
        f"{layer} takes an initial_state like the carry of its {cell}, with shapes {expected}; got "
        f"{found}."
    )


def not_a_cell(layer: str, given: str) -> ValueError:
    return ValueError(
        f"{layer} takes a cell, a flax.linen.RNNCellBase such as nn.GRUCell(64); got {given}. Run "
        f"any other function (carry, inputs) -> (carry, outputs) over time by cb.scan."
    )


def indivisible_blocks(layer: str, features: Any, n_blocks: int) -> ValueError:
    return ValueError(
        f"{layer} splits the features of its inputs evenly among its blocks; the inputs have "
        f"{features} features, which n_blocks {n_blocks} does not divide."
    )


def no_state_size(cell: str) -> ValueError:
    return ValueError(
        f"{cell} cannot make a carry of unknown size: its field features is None. Say "
        f"{cell}(features=...)."
    )


def runs_backward(layer: str) -> cb.StreamError:
    return cb.StreamError(
        f"{layer} with reverse=True cannot run piece by piece: it starts at the last step. Leave "
        f"reverse out, or call it without decode."
    )


# Convolution.


def indivisible_groups(layer: str, features_in: Any, features: Any, groups: Any) -> ValueError:
    return ValueError(
        f"{layer} splits the features of inputs and outputs evenly into groups; the inputs have "
        f"{features_in}, the outputs {features}, and groups is {groups}. Choose numbers of "
        f"features that are multiples of {groups}."
    )


def block_and_strides(layer: str, time: Any, strides: int) -> cb.StreamError:
    return cb.StreamError(
        f"{layer} with strides {strides} takes blocks whose length is a multiple of {strides}; got "
        f"a block of {time} steps."
    )


def lengths_and_strides(layer: str, strides: int) -> cb.StreamError:
    return cb.StreamError(
        f"{layer} with strides {strides} takes blocks of a stream without lengths, since rows "
        f"would come out of step; got lengths. Give every row a whole block."
    )


# Positions.


def wrong_turns(layer: str, low: Any, high: Any) -> ValueError:
    return ValueError(f"{layer} takes low_turns below high_turns; got {low} and {high}.")


def wrong_fraction(layer: str, fraction: Any) -> ValueError:
    return ValueError(f"{layer} takes a fraction above 0 and at most 1; got {fraction}.")


def odd_features(layer: str, size: int, features: Any, fraction: Any) -> ValueError:
    return ValueError(
        f"{layer} turns pairs of features; of {features} features, the fraction {fraction} is "
        f"{size}, which is odd. Choose an even number of features for each head, or another "
        f"fraction."
    )


def wrong_positions(layer: str, dtype: Any, shape: Sequence[Any]) -> ValueError:
    return ValueError(
        f"{layer} takes output positions as integers on one axis, [time]; got {dtype}"
        f"{_shape(shape)}."
    )


def position_out_of_range(layer: str, position: int, seqlen: Any) -> ValueError:
    return ValueError(
        f"{layer} takes output positions from 0 to {seqlen - 1}, in a sequence of length {seqlen}; "
        f"got {position}."
    )


def no_subset(layer: str) -> ValueError:
    return ValueError(
        f"{layer} gives the vectors of a whole sequence, not of output positions; got output "
        f"positions. Leave them out, or use FourierPositionEncoding."
    )


def too_long(layer: str, length: Any, seqlen: Any) -> ValueError:
    return ValueError(
        f"{layer} has {seqlen} positions; got a sequence of length {length}. Shorten the sequence, "
        f"or build the layer with {length} positions; xn.interpolate_positions resizes a table "
        f"that is trained already."
    )


def part_of_grid(layer: str, length: Any, seqshape: Sequence[int], seqlen: int) -> ValueError:
    return ValueError(
        f"{layer} encodes a grid of several axes as a whole, here {_shape(seqshape)} with {seqlen} "
        f"positions; got a sequence of length {length}. Build it with the seqshape of the inputs, "
        f"or give output positions."
    )


def length_and_positions(layer: str, length: Any) -> ValueError:
    return ValueError(
        f"{layer} takes a length or output positions, not both; got length {length} and output "
        f"positions. Give one of them."
    )


def other_batch(layer: str, batch_size: Any, shape: Sequence[Any]) -> ValueError:
    return ValueError(
        f"{layer} takes for like an array whose first axis is the batch, here of size "
        f"{batch_size}; got shape {_shape(shape)}."
    )


def no_common_batch(layer: str, shapes: Sequence[Sequence[Any]]) -> ValueError:
    found = " and ".join(f"shape {_shape(shape)}" for shape in shapes) or "no array"
    return ValueError(
        f"{layer} takes an array [batch, ...], or a pytree of arrays with the same batch size; got "
        f"{found}."
    )


def wrong_table(dtype: Any, shape: Sequence[Any]) -> ValueError:
    return ValueError(
        f"interpolate_positions takes a table of floats, [positions, features]; got {dtype}"
        f"{_shape(shape)}."
    )


def different_grids(seqshape: Sequence[int], table_seqshape: Sequence[int]) -> ValueError:
    return ValueError(
        f"interpolate_positions keeps the number of axes; got seqshape {_shape(seqshape)} for a "
        f"table of shape {_shape(table_seqshape)}. Say what grid the rows of the table stand for: "
        f"table_seqshape=(...)."
    )


def wrong_grid(table_seqshape: Sequence[int], found: int, positions: int) -> ValueError:
    return ValueError(
        f"interpolate_positions takes as table_seqshape the grid that the rows of the table stand "
        f"for; got {_shape(table_seqshape)}, which has {found} positions, for a table of "
        f"{positions} rows."
    )


def no_block_length(layer: str) -> ValueError:
    return ValueError(
        f"{layer} needs the length of each block of a stream; got decode=True without length. Call "
        f"it with length=..., or in an xn.Encoding, which tells it."
    )


def stream_too_long(layer: str, position: int, seqlen: int) -> cb.StreamError:
    return cb.StreamError(
        f"{layer} has {seqlen} positions, and a row of the stream came to position {position}. "
        f"Build it with more, or start the row anew: stream.reset(state, rows)."
    )


def positions_in_stream(layer: str) -> ValueError:
    return ValueError(
        f"{layer} goes on from the last block in a stream, at positions of its own; got output "
        f"positions. Leave them out, or call it without decode."
    )


def no_order_in_time(layer: str) -> cb.StreamError:
    return cb.StreamError(
        f"{layer} cannot run piece by piece: it puts one modality after another, not one block "
        f"after another. Stream the part of the pipeline after it; or, if its inputs are the same "
        f"for all blocks, keep decode away: cb.fn({layer}(...), decode=False)."
    )


def traced_number(layer: str, name: str) -> ValueError:
    return ValueError(
        f"{layer} takes Python numbers for {name}, because they set the shape of its result; got a "
        f"traced array. Take them from an array's shape, or make them static arguments of jax.jit."
    )


def mismatched_axes(layer: str, name: str, found: int, n_axes: int) -> ValueError:
    return ValueError(
        f"{layer} takes a {name} with one number for each axis of its seqshape; got "
        f"{found} {'number' if found == 1 else 'numbers'} for {n_axes} "
        f"{'axis' if n_axes == 1 else 'axes'}."
    )


def wrong_bounds(layer: str, bounds: Sequence[Any]) -> ValueError:
    return ValueError(
        f"{layer} takes spatial_coordinate_bounds as (lower, upper) with lower < upper; got "
        f"{bounds}."
    )


def too_wide(layer: str, features: int, d_max: int) -> ValueError:
    return ValueError(
        f"{layer} pads features up to d_max; the inputs have {features} features, which is more "
        f"than d_max {d_max}."
    )


def not_a_probability(layer: str, name: str, rate: Any) -> ValueError:
    return ValueError(f"{layer} takes {name} from 0 to 1; got {rate}.")


def no_masking_stream(layer: str, rate: float, stream: str) -> ValueError:
    return ValueError(
        f"{layer} masks positions at rate {rate} and draws them from the rng stream {stream!r}; "
        f"got no such stream. Give one: apply(variables, inputs, rngs={{{stream!r}: key}})."
    )


# Encoding, decoding and modalities.


def not_a_constructor(layer: str, name: str, given: str) -> ValueError:
    return ValueError(
        f"{layer} takes a constructor for {name}, which it calls to make its own module; got "
        f"{given}. Give functools.partial(Module, ...) or lambda: Module(...)."
    )


def mismatched_positions(layer: str, inputs: Any, positions: Any) -> ValueError:
    return ValueError(
        f"{layer} aggregates the inputs and their positional encoding, which must have the same "
        f"length; the inputs have length {inputs} and the positional encoding has length "
        f"{positions}."
    )


def wrong_embedding(shape: Sequence[Any], features: Any) -> ValueError:
    return ValueError(
        f"EmbedDecoding takes an embedding of shape [n_embeddings, features] for outputs of shape "
        f"[..., features], here {features} features; got an embedding of shape {_shape(shape)}."
    )


def no_embedding(given: str) -> ValueError:
    return ValueError(
        f"EmbedDecoding takes an embedding as an array [n_embeddings, features]; got {given}. If "
        f"it is a layer nn.Embed, give its array: EmbedDecoding(embed.embedding)."
    )


def no_modalities(layer: str) -> ValueError:
    return ValueError(f"{layer} takes at least 1 modality; got 0.")


def not_a_list(layer: str, name: str, given: str) -> ValueError:
    return ValueError(
        f"{layer} takes {name} as a list with one item for each modality; got {given}."
    )


def wrong_number(layer: str, name: str, found: int, n_modalities: int) -> ValueError:
    return ValueError(
        f"{layer} takes {name} with one item for each modality; got {found} for {n_modalities} "
        f"{'modality' if n_modalities == 1 else 'modalities'}."
    )


def wrong_total(layer: str, lengths: Sequence[Any], total: Any, seqlen: Any) -> ValueError:
    return ValueError(
        f"{layer} splits its outputs by seqlen_outputs, {_shape(lengths)}, which sum to {total}; "
        f"the outputs have length {seqlen}."
    )


def nothing_to_share(asked: str) -> ValueError:
    return ValueError(
        f"{asked} takes a multimodal_embedding_decoding only if several modalities share it; got "
        f"1 modality. Give that modality its own embedding_decoding instead."
    )


def no_mesh_axis(asked: str, axis: str, axes: Sequence[str]) -> ValueError:
    found = f"the mesh has {', '.join(map(repr, axes))}" if axes else "there is no mesh"
    return ValueError(
        f"{asked} splits time over the mesh axis {axis!r}, and {found}. Run it in a context: "
        f"with jax.set_mesh(mesh)."
    )


def indivisible_time(asked: str, name: str, time: Any, n: int, axis: str) -> ValueError:
    return ValueError(
        f"{asked} splits {name} over the {n} devices of {axis!r}; {time} does not divide among "
        f"them. Pad the sequence."
    )


def _shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"
