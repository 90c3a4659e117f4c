"""Published models at their sizes, as values: to print and to draw. Nothing is computed.

python docs/examples/published.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from flax import linen as nn

from checkpoint_names import ACTIVATIONS, quick_gelu
from clip import clip, image_tower, text_tower
from flax_extra import combinator as cb
from flax_extra import layer as xn
from llama import Llama, gpt2, llama
from transformer import Tower
from whisper import decoder, encoder, whisper

LLAMA_3_8B = Llama(
    n_tokens=128256,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    d_hidden=14336,
    rotary=xn.RotaryEncoding(base=500000.0, scaling=xn.Llama3Scaling()),
)
MISTRAL_7B = Llama(
    n_tokens=32000,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    d_hidden=14336,
    window=4096,
)
TINY_LLAMA = Llama(
    n_tokens=32000, d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, d_hidden=5632
)
GPT2 = Tower(d_model=768, n_layers=12, n_heads=12, d_hidden=3072, activation=nn.gelu)
WHISPER_TINY = Tower(384, 4, 6, 1536, ACTIVATIONS["gelu"])
CLIP_IMAGE = Tower(1024, 24, 16, 4096, quick_gelu)
CLIP_TEXT = Tower(768, 12, 12, 3072, quick_gelu)


def whisper_tiny() -> cb.Combinator:
    """Whisper's smallest model."""
    return whisper(
        encoder(WHISPER_TINY, n_positions=1500),
        decoder(WHISPER_TINY, n_tokens=51865, n_positions=448),
    )


def clip_large() -> cb.Combinator:
    """CLIP with the image tower ViT-L/14."""
    return clip(
        image_tower(CLIP_IMAGE, image_size=224, patch_size=14, d_shared=768),
        text_tower(CLIP_TEXT, n_tokens=49408, n_positions=77, d_shared=768),
    )


PUBLISHED: dict[str, tuple[Callable[[], cb.Combinator], tuple[str, ...]]] = {
    "Llama 3.1 8B": (functools.partial(llama, LLAMA_3_8B), ("i32[b, t]",)),
    "Mistral 7B": (functools.partial(llama, MISTRAL_7B), ("i32[b, t]",)),
    "TinyLlama 1.1B": (functools.partial(llama, TINY_LLAMA), ("i32[b, t]",)),
    "GPT-2": (
        functools.partial(gpt2, GPT2, n_tokens=50257, n_positions=1024),
        ("i32[b, t] where t <= 1024",),
    ),
    "Whisper tiny": (whisper_tiny, ("i32[b, t] where t <= 448", "f32[b, 3000, 80]")),
    "CLIP ViT-L/14": (clip_large, ("f32[i, 224, 224, 3]", "i32[b, t] where t <= 77")),
}
"""The models, and what each takes."""


def main() -> None:
    """Prints a summary of each model."""
    for name, (build, inputs) in PUBLISHED.items():
        print(f"{name}\n{cb.summary(build(), *inputs)}\n")


if __name__ == "__main__":
    main()
