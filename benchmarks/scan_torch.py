"""The other side of scan_peers: transformers' Mamba and Mamba-2 paths, torch's attention.

Driven like xlstm_torch.py. Inputs come from an .npz file in our layouts, `dy` among them; a peer
answers with y and the gradients of all inputs in these layouts.
"""

import functools
import importlib

import numpy as np
import torch
from torch_peer import serve
from xlstm_torch import Side


class Graded:
    """A function of named arrays; `gradients` gives y and what dy makes of every input."""

    def __init__(self, inputs: str, run):
        arrays = {k: torch.from_numpy(x) for k, x in np.load(inputs).items()}
        self.dy = arrays.pop("dy")
        self.inputs = {k: x.requires_grad_() for k, x in arrays.items()}
        self.run = run

    def gradients(self):
        """y and the gradients by name."""
        y = self.run(**self.inputs)
        found = torch.autograd.grad(y, list(self.inputs.values()), self.dy)
        return {"y": y, **dict(zip(self.inputs, found))}


def mamba(u, delta, A, B, C, D, z, bias):
    """[B, T, E] in, [B, T, E] out."""
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    swap = lambda x: x.transpose(1, 2)  # noqa: E731
    y = module.mamba_selective_scan(
        swap(u), swap(delta), A, swap(B), swap(C), D, z=swap(z), delta_bias=bias,
        delta_softplus=True,
    )  # fmt: skip
    return swap(y)


def mamba2(x, delta, A, B, C, D, bias, chunk: int):
    """[B, T, H, P] in and out."""
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    found = module.mamba2_chunk_scan(
        x, delta, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True, return_final_states=False
    )
    return found[0] if isinstance(found, tuple) else found


def attention(q, k, v):
    """Causal, [B, T, H, K] in and out; grouped key heads."""
    swap = lambda x: x.transpose(1, 2)  # noqa: E731
    return swap(
        torch.nn.functional.scaled_dot_product_attention(
            swap(q), swap(k), swap(v), is_causal=True, enable_gqa=True
        )
    )


def of(function):
    """A kind that takes the inputs' file and, for Mamba-2, the chunk."""

    def make(inputs: str, **options):
        return Graded(inputs, functools.partial(function, **options))

    return make


KINDS = {
    "mamba": (of(mamba), "transformers"),
    "mamba2": (of(mamba2), "transformers"),
    "attention": (of(attention), "torch"),
}

if __name__ == "__main__":
    serve(Side(KINDS))
