"""Makes gemma1.npz, gemma2.npz and gemma3.npz: tiny random models of the transformers package.

    python tests/golden/make_gemma.py            (needs torch and transformers; made with 5.24.0)

Each file: the weights under their published names ("w:" + name, float16 values), token ids, the
prefix lengths, and float64 logits (stored as float32) of a causal and of a prefix-LM forward pass.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

BATCH, LENGTH, WINDOW = 2, 13, 4
PREFIX = np.array([3, 7])
COMMON = dict(
    vocab_size=48,
    hidden_activation="gelu_pytorch_tanh",
    head_dim=8,
    attn_implementation="eager",
    max_position_embeddings=64,
)


def models():
    """Name -> model; small caps and a query scale unlike head_dim^-1/2, so that they matter."""
    yield (
        "gemma1",
        GemmaForCausalLM(
            GemmaConfig(
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=3,
                num_key_value_heads=1,
                **COMMON,
            )
        ),
    )
    yield (
        "gemma2",
        Gemma2ForCausalLM(
            Gemma2Config(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=5,
                num_attention_heads=4,
                num_key_value_heads=2,
                query_pre_attn_scalar=6,
                sliding_window=WINDOW,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                **COMMON,
            )
        ),
    )
    yield (
        "gemma3",
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=13,
                num_attention_heads=2,
                num_key_value_heads=1,
                query_pre_attn_scalar=6,
                sliding_window=WINDOW,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                **COMMON,
            )
        ),
    )


def randomise(model, rng):
    """Random float16 values everywhere, norm scales included."""
    with torch.no_grad():
        for parameter in model.parameters():
            norm = parameter.ndim == 1
            scale = 0.3 if norm else parameter.shape[-1] ** -0.5
            value = (scale * rng.standard_normal(parameter.shape)).astype(np.float16)
            parameter.copy_(torch.from_numpy(value.astype(np.float64)))


def additive(visible):
    """[B, T, T] booleans -> the additive mask that transformers takes."""
    masked = torch.from_numpy(np.where(visible, 0.0, -1e30))
    return masked[:, None]


def prefix_masks():
    """Prefix-LM masks of the global and of the local layers."""
    q, k = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None, :]
    everywhere = (k <= q) | (k < PREFIX[:, None, None])
    local = everywhere & (q - k < WINDOW)
    return {"full_attention": additive(everywhere), "sliding_attention": additive(local)}


def main():
    for name, model in models():
        rng = np.random.default_rng(len(name) + int(name[-1]))
        model = model.double().eval()
        randomise(model, rng)
        ids = rng.integers(0, COMMON["vocab_size"], (BATCH, LENGTH))
        masks = prefix_masks()
        with torch.no_grad():
            tokens = torch.from_numpy(ids)
            causal = model(tokens).logits.numpy()
            mask = masks["full_attention"] if name == "gemma1" else masks
            prefix = model(tokens, attention_mask=mask).logits.numpy()
        weights = {
            "w:" + key: value.numpy().astype(np.float16)
            for key, value in model.state_dict().items()
            if key != "lm_head.weight"
        }
        path = Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(
            path,
            ids=ids.astype(np.int32),
            prefix=PREFIX.astype(np.int32),
            causal_logits=causal.astype(np.float32),
            prefix_logits=prefix.astype(np.float32),
            **weights,
        )
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
