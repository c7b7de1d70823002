"""Makes xlstm.npz: a tiny random xLSTM of the transformers package.

    python tests/golden/make_xlstm.py            (needs torch and transformers; made with VERSION)

The weights under their published names ("w:" + name, float16 values; gates drawn afresh, since the
package initialises them and the up-gate to 0), token ids [2, 53], float32 logits of the whole text,
and the state of every layer after 37 tokens ("C0", "n0", "m0", ...) with the logits from there on.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import xLSTMConfig, xLSTMForCausalLM

PREFIX, LENGTH = 37, 53


def model():
    """Two blocks of width 128; weights that fit into float16."""
    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=48,
        hidden_size=128,
        num_heads=2,
        num_hidden_layers=2,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        autocast_kernel_dtype="float32",
        mode="inference",
        chunk_size=16,
    )
    made = xLSTMForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * weight.shape[1] ** -0.5)
            elif "igate_preact.bias" in name:
                weight.copy_(torch.randn_like(weight) - 2)
            elif "fgate_preact.bias" in name:
                weight.copy_(torch.randn_like(weight) + 3)
            else:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            weight.copy_(weight.half().float())
    return made


def main():
    net = model()
    ids = torch.randint(0, 48, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = net(ids, use_cache=False).logits
        out = net(ids[:, :PREFIX], use_cache=True)
        states = {}
        for layer, state in out.cache_params.rnn_state.items():
            for name, value in zip("Cnm", state):
                # Ours are C [b, h, k, v], n [b, h, k], m [b, h].
                states[f"{name}{layer}"] = (
                    value.float().numpy().reshape(value.shape[:-1] if name == "m" else value.shape)
                )
        rest, cache = [out.logits[:, -1]], out.cache_params
        for t in range(PREFIX, LENGTH - 1):
            out = net(ids[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
            rest.append(out.logits[:, -1])
    weights = {f"w:{k}": v.half().numpy() for k, v in net.state_dict().items()}
    np.savez_compressed(
        Path(__file__).with_name("xlstm.npz"),
        ids=ids.numpy().astype(np.int32),
        logits=whole.float().numpy(),
        steps=torch.stack(rest, 1).float().numpy(),
        **states,
        **weights,
    )


if __name__ == "__main__":
    main()
