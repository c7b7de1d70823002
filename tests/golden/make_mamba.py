"""Makes mamba.npz: tiny random Mamba and Mamba-2 models of the transformers package.

    python tests/golden/make_mamba.py            (needs torch and transformers; made with 5.24.0)

Weights are recipes.weights(1) by published name. Stored: token ids [2, 40], float32 logits of each,
and the last 8 steps after a prefill of 32 tokens (through the package's own caches).
"""

from pathlib import Path

import numpy as np
import torch
from recipes import weights
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

PREFIX, LENGTH = 32, 40
SIZES = dict(vocab_size=48, hidden_size=32, num_hidden_layers=3, expand=2, conv_kernel=4)
MODELS = dict(
    mamba=(MambaForCausalLM, MambaConfig(**SIZES, state_size=8, time_step_rank=2)),
    mamba2=(
        Mamba2ForCausalLM,
        Mamba2Config(
            **SIZES, state_size=8, head_dim=16, num_heads=4, n_groups=2, chunk_size=16,
            tie_word_embeddings=True,
        ),
    ),
)  # fmt: skip


def main():
    ids = torch.randint(0, 48, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found = dict(ids=ids.numpy().astype(np.int32))
    for name, (model, config) in MODELS.items():
        net = model(config).eval()
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items() if k != "lm_head.weight"}
        made = {k: torch.from_numpy(v) for k, v in weights(shapes, 1).items()}
        result = net.load_state_dict(made, strict=False)
        assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
        with torch.no_grad():
            found[name] = net(ids, use_cache=False).logits.float().numpy()
            out = net(ids[:, :PREFIX], use_cache=True)
            steps = []
            for t in range(PREFIX, LENGTH):
                out = net(
                    ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True,
                    cache_position=torch.tensor([t]),
                )  # fmt: skip
                steps.append(out.logits[:, -1])
        found[f"{name}_steps"] = torch.stack(steps, 1).float().numpy()
        print(name, np.abs(found[f"{name}_steps"] - found[name][:, PREFIX:]).max())
    np.savez_compressed(Path(__file__).with_name("mamba.npz"), **found)


if __name__ == "__main__":
    main()
