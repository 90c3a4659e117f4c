"""The language models of transformers in our words: Llama, Mistral and GPT-2.

model, variables = LANGUAGE_MODELS.load("directory")  # that save_pretrained wrote
logits = model.apply(variables, tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from checkpoint_names import (
    ACTIVATIONS,
    TRANSPOSED_LINEAR,
    Architecture,
    Settings,
    Weight,
    linear,
    norm,
)
from checkpoints import Family
from flax_extra import combinator as cb
from flax_extra import layer as xn
from llama import Llama, gpt2, llama
from transformer import Tower

BLOCK = "model.layers.{layer}"

LLAMA_NAMES = {
    "embed/embedding": Weight("model.embed_tokens.weight"),
    **norm("layers/norm_attention", f"{BLOCK}.input_layernorm"),
    **linear("layers/attention/query", f"{BLOCK}.self_attn.q_proj"),
    **linear("layers/attention/key", f"{BLOCK}.self_attn.k_proj"),
    **linear("layers/attention/value", f"{BLOCK}.self_attn.v_proj"),
    **linear("layers/attention/out", f"{BLOCK}.self_attn.o_proj"),
    **norm("layers/norm_feed_forward", f"{BLOCK}.post_attention_layernorm"),
    **linear("layers/feed_forward/gate", f"{BLOCK}.mlp.gate_proj"),
    **linear("layers/feed_forward/up", f"{BLOCK}.mlp.up_proj"),
    **linear("layers/feed_forward/out", f"{BLOCK}.mlp.down_proj"),
    **norm("norm", "model.norm"),
    **linear("head", "lm_head"),
}

LAYER = "transformer.h.{layer}"

GPT2_NAMES = {
    "embed/embedding": Weight("transformer.wte.weight"),
    "positions/position_encoder/positional_encoding": Weight("transformer.wpe.weight"),
    **norm("layers/norm_attention", f"{LAYER}.ln_1"),
    **linear("layers/attention/query", f"{LAYER}.attn.c_attn", TRANSPOSED_LINEAR, part=(0, 3)),
    **linear("layers/attention/key", f"{LAYER}.attn.c_attn", TRANSPOSED_LINEAR, part=(1, 3)),
    **linear("layers/attention/value", f"{LAYER}.attn.c_attn", TRANSPOSED_LINEAR, part=(2, 3)),
    **linear("layers/attention/out", f"{LAYER}.attn.c_proj", TRANSPOSED_LINEAR),
    **norm("layers/norm_feed_forward", f"{LAYER}.ln_2"),
    **linear("layers/feed_forward/Dense_0", f"{LAYER}.mlp.c_fc", TRANSPOSED_LINEAR),
    **linear("layers/feed_forward/Dense_1", f"{LAYER}.mlp.c_proj", TRANSPOSED_LINEAR),
    **norm("norm", "transformer.ln_f"),
    **linear("head", "lm_head"),
}


def _build_llama(config: Settings) -> cb.Combinator:
    return llama(
        Llama(
            n_tokens=config.vocab_size,
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            d_hidden=config.intermediate_size,
            n_kv_heads=config.get("num_key_value_heads"),
            d_head=config.get("head_dim"),
            rotary=_read_rotary(config),
            window=config.get("sliding_window"),
            use_bias=(config.get("attention_bias", False), config.get("mlp_bias", False)),
            activation=config.choose("hidden_act", ACTIVATIONS),
            epsilon=config.rms_norm_eps,
            is_tied=config.get("tie_word_embeddings", False),
            dtype=config.compute_dtype,
        )
    )


def _read_rotary(config: Settings) -> xn.RotaryEncoding:
    """Reads the rotary positions as transformers 5 writes them, or as it wrote them before."""
    older = {"rope_theta": config.get("rope_theta", 10000.0), **config.get("rope_scaling", {})}
    rope = Settings({"rope_type": "default", **older, **config.get("rope_parameters", {})})
    make_scaling = rope.choose("rope_type", SCALINGS)
    return xn.RotaryEncoding(rope.rope_theta, scaling=make_scaling(rope))


def _scale_as_llama3(rope: Settings) -> xn.Llama3Scaling:
    return xn.Llama3Scaling(
        rope.factor,
        rope.low_freq_factor,
        rope.high_freq_factor,
        rope.original_max_position_embeddings,
    )


SCALINGS: Mapping[str, Callable[[Settings], Any]] = {
    "default": lambda rope: None,
    "linear": lambda rope: xn.LinearScaling(rope.factor),
    "llama3": _scale_as_llama3,
}
"""How rotary positions reach beyond the length of training, as transformers names it."""


def _build_gpt2(config: Settings) -> cb.Combinator:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        config.refuse(name, True)
    config.refuse("scale_attn_weights", False)
    tower = Tower(
        d_model=config.n_embd,
        n_layers=config.n_layer,
        n_heads=config.n_head,
        d_hidden=config.get("n_inner", 4 * config.n_embd),
        activation=config.choose("activation_function", ACTIVATIONS),
        epsilon=config.layer_norm_epsilon,
        dtype=config.compute_dtype,
    )
    is_tied = config.get("tie_word_embeddings", True)
    return gpt2(tower, config.vocab_size, config.n_positions, is_tied=is_tied)


def _text(config: Settings) -> list[Any]:
    del config  # the length of a text makes no parameter
    return [np.zeros((1, 1), np.int32)]


TIED, BUFFERS = ("lm_head.weight",), (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

LLAMA = Architecture(_build_llama, _text, LLAMA_NAMES, ignored=(*TIED, *BUFFERS))
GPT2 = Architecture(_build_gpt2, _text, GPT2_NAMES, (*TIED, *BUFFERS), prefix="transformer.")
LANGUAGE_MODELS = Family(
    {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA, "GPT2LMHeadModel": GPT2}
)
"""What loads and saves them, by the name of transformers' class."""
