"""Makes xlstm.npz: a tiny random xLSTM of the transformers package.

    python tests/golden/make_xlstm.py            (needs torch and transformers; made with 5.24.0)

Weights are recipes.weights(1) by published name (the package's own initialisation leaves gates and
the up-gate at 0), in float64; how far the package's own steps and whole text differ is printed. It
was 7e-6 of the largest logit in float32 with seed 1 of the tokens, because h is a quotient
whose denominator |n q| may cancel. Of the token seeds 1 to 6, 3 multiplies rounding least (by hand:
ours in float32 is off by 5e-6, 2e-5 with seed 6). Stored in float32: token ids [2, 53], logits of
the whole text, of steps after a prefill of 37 tokens, and then the first row's state of each layer.
"""

from pathlib import Path

import numpy as np
import torch
from recipes import weights
from transformers import xLSTMConfig, xLSTMForCausalLM

PREFIX, LENGTH = 37, 53


def model():
    """Two blocks of width 128."""
    config = xLSTMConfig(
        vocab_size=48,
        hidden_size=128,
        num_heads=2,
        num_hidden_layers=2,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        autocast_kernel_dtype="float32",
        norm_reduction_force_float32=False,
        mode="inference",
        chunk_size=16,
    )
    made = xLSTMForCausalLM(config).eval()
    shapes = {k: tuple(v.shape) for k, v in made.state_dict().items()}
    made.load_state_dict({k: torch.from_numpy(v) for k, v in weights(shapes, 1).items()})
    return made.double()


def main():
    net = model()
    ids = torch.randint(0, 48, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = net(ids, use_cache=False).logits
        out = net(ids[:, :PREFIX], use_cache=True)
        states = {}
        for layer, state in out.cache_params.rnn_state.items():
            for name, value in zip("Cnm", state):  # C [b, h, k, v], n [b, h, k], m [b, h]
                states[f"{name}{layer}"] = value[:1].float().numpy().copy()
        rest, cache = [out.logits[:, -1]], out.cache_params
        for t in range(PREFIX, LENGTH - 1):
            out = net(ids[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
            rest.append(out.logits[:, -1])
    steps = torch.stack(rest, 1)
    off = (steps - whole[:, PREFIX - 1 : -1]).abs().max() / whole.abs().max()
    print(f"steps and whole text differ by {off:.1e} of the largest logit")
    np.savez_compressed(
        Path(__file__).with_name("xlstm.npz"),
        ids=ids.numpy().astype(np.int32),
        logits=whole.float().numpy(),
        steps=steps.float().numpy(),
        **states,
    )


if __name__ == "__main__":
    main()
