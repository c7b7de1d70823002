"""Makes t5.npz: tiny random T5EncoderModels of the transformers package, in float64.

    python tests/golden/make_t5.py               (needs torch and transformers; made with 5.24.0)

Weights are recipes.weights(60) over the published names, token ids `tokens` (rows padded with 0 to
the longest). Holds the embeddings of the real tokens of each row one after another; the root mean
square of what the same model in bfloat16 is away from them; for each distance of -600..600 the row
of the bias table (published sizes); the parameter counts of Flan-T5's encoders.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.golden import recipes

TINY = dict(vocab_size=40, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3)
TINY |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=16)
FLAN = dict(
    small=(512, 1024, 8, 6),
    base=(768, 2048, 12, 12),
    large=(1024, 2816, 24, 16),
    xl=(2048, 5120, 24, 32),
    xxl=(4096, 10240, 24, 64),
)
COMMON = dict(feed_forward_proj="gated-gelu", attn_implementation="eager")
LENGTHS = (37, 1, 22)


def count(width, mlp, layers, heads):
    """Parameters of one size, the embedding once."""
    sizes = dict(vocab_size=32128, d_model=width, d_ff=mlp, num_layers=layers, num_heads=heads)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(d_kv=64, **sizes, **COMMON))
    return sum(x.numel() for x in model.parameters())


def main():
    model = T5EncoderModel(T5Config(**TINY, **COMMON)).double().eval()
    names = [name for name in model.state_dict() if name != "encoder.embed_tokens.weight"]
    weights = recipes.weights({k: tuple(model.state_dict()[k].shape) for k in names}, 60)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    model.load_state_dict({k: torch.from_numpy(v).double() for k, v in weights.items()})
    rng = np.random.default_rng(61)
    tokens = rng.integers(2, TINY["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    valid = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens = np.where(valid, tokens, 0)

    def run(model):
        with torch.no_grad():
            out = model(torch.from_numpy(tokens), torch.from_numpy(valid.astype(np.int64)))[0]
        return out.double().numpy()[valid]

    out = run(model)
    narrow = run(model.bfloat16())
    buckets = T5Attention._relative_position_bucket(torch.arange(-600, 601))
    path = Path(__file__).parent / "t5.npz"
    np.savez_compressed(
        path,
        tokens=tokens.astype(np.int32),
        lengths=np.array(LENGTHS, np.int32),
        embeddings=out.astype(np.float32),
        bfloat16_error=np.sqrt(np.mean((narrow - out) ** 2)),
        buckets=buckets.numpy().astype(np.int8),
        **{f"count_{name}": count(*sizes) for name, sizes in FLAN.items()},
    )
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
