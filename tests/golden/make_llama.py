"""Makes llama.npz: tiny random Llama, Qwen 2 and OLMo 2 models of the transformers package.

    python tests/golden/make_llama.py            (needs torch and transformers; made with 5.24.0)

Weights are recipes.weights(1) by published name. Stored: token ids [2, 40] and float32 logits of
each; llama has Llama 3.1's rotary frequencies with an original context of 16.
"""

from pathlib import Path

import numpy as np
import torch
from recipes import weights
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = dict(
    vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None,
)  # fmt: skip
ROPE3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
MODELS = dict(
    llama=(LlamaForCausalLM, LlamaConfig, dict(rope_parameters=ROPE3, rms_norm_eps=1e-5)),
    qwen=(
        Qwen2ForCausalLM,
        Qwen2Config,
        dict(
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        ),
    ),
    olmo=(
        Olmo2ForCausalLM,
        Olmo2Config,
        dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), rms_norm_eps=1e-6),
    ),
)


def logits(name: str, ids) -> np.ndarray:
    """Of one model with the recipe's weights."""
    model, config, special = MODELS[name]
    net = model(config(**SIZES | special)).eval()
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    if net.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    found = net.load_state_dict(
        {k: torch.from_numpy(v) for k, v in weights(shapes, 1).items()}, strict=False
    )
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    with torch.no_grad():
        return net(ids, use_cache=False).logits.float().numpy()


def main():
    ids = torch.randint(0, 48, (2, 40), generator=torch.Generator().manual_seed(1))
    np.savez_compressed(
        Path(__file__).with_name("llama.npz"),
        ids=ids.numpy().astype(np.int32),
        **{name: logits(name, ids) for name in MODELS},
    )


if __name__ == "__main__":
    main()
