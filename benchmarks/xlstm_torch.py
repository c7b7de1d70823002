"""The other side of xlstm_peers: mlstm_kernels in torch and in JAX, transformers' xLSTM in torch.

Driven over stdin and stdout like torch_peer.py: {"op": "build", "kind": ...}, then {"op": "clock"}
and {"op": "values"} with the name of a method. Runs in any interpreter that has torch, transformers
and mlstm_kernels, and jax for "jax"; imports nothing of ours.
"""

import functools
import importlib
import sys
import time
import types
from importlib import metadata

import numpy as np
import torch
from safetensors.torch import load_file
from torch_peer import serve

NAMES = ("q", "k", "v", "i", "f")  # [b, h, t, k] twice, [b, h, t, v], [b, h, t] twice


class TorchCell:
    """A chunkwise mLSTM of mlstm_kernels.torch.chunkwise.native: native_autograd, native_custbw."""

    def __init__(self, inputs: str, chunk: int, kernel: str):
        module = importlib.import_module("mlstm_kernels.torch.chunkwise.native.fwbw")
        kernel = getattr(module, f"mlstm_chunkwise__{kernel}")
        self.kernel, arrays = functools.partial(kernel, chunk_size=chunk, eps=1e-6), np.load(inputs)
        self.inputs = [torch.from_numpy(arrays[name]).requires_grad_() for name in NAMES]
        self.cotangent = torch.from_numpy(arrays["dh"])

    def gradients(self):
        """h [b, h, t, v] and the gradients of all inputs, for the cotangent dh of h."""
        h = self.kernel(*self.inputs)
        return {"h": h, **dict(zip(NAMES, torch.autograd.grad(h, self.inputs, self.cotangent)))}


class JaxCell:
    """mlstm_kernels.jax's native chunkwise mLSTM, jitted; its gradient is JAX's own."""

    def __init__(self, inputs: str, chunk: int):
        import jax

        # The package imports jax_triton, which needs a GPU; the native code does not call it.
        sys.modules.setdefault("jax_triton", types.ModuleType("jax_triton"))
        kernel = importlib.import_module("mlstm_kernels.jax.chunkwise.native.fwbw")
        run = functools.partial(kernel.mlstm_chunkwise__native_autograd, chunk_size=chunk, eps=1e-6)

        def both(inputs, cotangent):
            h, pullback = jax.vjp(run, *inputs)
            return {"h": h, **dict(zip(NAMES, pullback(cotangent)))}

        arrays = np.load(inputs)
        self.inputs = jax.device_put(([arrays[name] for name in NAMES], arrays["dh"]))
        self.compiled = jax.jit(both).lower(*self.inputs).compile()
        self.wait = jax.block_until_ready

    def gradients(self):
        """As TorchCell's."""
        return self.wait(self.compiled(*self.inputs))

    def temp_bytes(self):
        """Bytes of temporaries of the compiled program."""
        return {"bytes": self.compiled.memory_analysis().temp_size_in_bytes}


class LanguageModel:
    """transformers' xLSTMForCausalLM in float32: training, and a copy in inference mode."""

    def __init__(self, config: dict, weights: str, arrays: str):
        arrays = np.load(arrays)
        self.tokens = torch.from_numpy(arrays["tokens"]).long()
        self.prompt = torch.from_numpy(arrays["prompt"]).long()
        self.new = int(arrays["new"])
        # Its training mode runs the chunkwise kernel alone, without the copies of inference.
        self.model = self._load(config, weights, "train").train()
        self.reader = self._load(config, weights, "inference").eval()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        self.states = {}

    def _load(self, config, weights, mode):
        from transformers import xLSTMConfig, xLSTMForCausalLM

        model = xLSTMForCausalLM(xLSTMConfig(**config, mode=mode))
        model.load_state_dict(load_file(weights))
        return model

    def _backward(self):
        """Mean cross-entropy of the next tokens; gradients are left in the parameters."""
        logits = self.model(self.tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        return loss

    def train(self):
        """One AdamW step."""
        loss = self._backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {"loss": loss}

    def gradients(self):
        """Loss and gradients by published name, before any step."""
        loss = self._backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.optimiser.zero_grad(set_to_none=True)
        return {"loss": loss, **found}

    @torch.inference_mode()
    def prefill(self, rows: int, length: int):
        """Scores [rows, V] behind the first `length` tokens of the prompt.

        The package's forward pass computes those of all positions: it has no logits_to_keep.
        """
        from transformers.models.xlstm.modeling_xlstm import xLSTMCache

        cache = xLSTMCache(self.reader.config, rows, dtype=torch.float32)
        # It rounds the keys' width up to 64 in its cache, and not in its layer.
        config = self.reader.config
        width = int(config.hidden_size * config.qk_dim_factor) // config.num_heads
        for layer, (C, n, m) in cache.rnn_state.items():
            cache.rnn_state[layer] = (C[:, :, :width].contiguous(), n[..., :width].contiguous(), m)
        ids = self.prompt[:rows, :length]
        self.states[rows, length] = cache
        return {"logits": self.reader(ids, cache=cache, use_cache=True).logits[:, -1]}

    @torch.inference_mode()
    def decode(self, rows: int, length: int):
        """Greedy tokens [rows, new] after one more token, behind an earlier `prefill`."""
        cache = self.states[rows, length]
        before = {k: tuple(x.clone() for x in state) for k, state in cache.rnn_state.items()}
        ids, found = self.prompt[:rows, -1:], []
        for _ in range(self.new):
            out = self.reader(ids, cache=cache, use_cache=True)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
        cache.rnn_state = before
        return {"tokens": torch.cat(found, dim=1)}


KINDS = {
    "native_autograd": (functools.partial(TorchCell, kernel="native_autograd"), "mlstm_kernels"),
    "native_custbw": (functools.partial(TorchCell, kernel="native_custbw"), "mlstm_kernels"),
    "jax": (JaxCell, "mlstm_kernels"),
    "model": (LanguageModel, "transformers"),
}


class Side:
    """What stdin talks to."""

    def __init__(self, kinds=KINDS):
        self.kinds = kinds

    def build(self, kind: str, threads: int, **options):
        """One of the kinds; returns its packages' versions."""
        torch.set_num_threads(threads)
        make, package = self.kinds[kind]
        self.peer = make(**options)
        framework = "jax" if kind == "jax" else "torch"
        return {name: metadata.version(name) for name in (framework, package)}

    def clock(self, what: str, **options):
        """Seconds of one call."""
        begin = time.perf_counter()
        getattr(self.peer, what)(**options)
        return {"seconds": time.perf_counter() - begin}

    def values(self, what: str, out: str, **options):
        """One call, whose arrays go to the .npz file `out`."""
        found = getattr(self.peer, what)(**options)
        found = {k: x.detach() if torch.is_tensor(x) else x for k, x in found.items()}
        np.savez(out, **{name: np.asarray(x) for name, x in found.items()})
        return {}


if __name__ == "__main__":
    serve(Side())
