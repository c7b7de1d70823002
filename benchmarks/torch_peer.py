"""The torch side of cpu_peers: transformers' Gemma2ForCausalLM, driven over stdin and stdout.

One JSON object per line in, one out: {"op": "build", ...}, {"op": "train"}, {"op": "decode"},
{"op": "profile"}. Runs in any interpreter that has torch and transformers; imports nothing of ours.
"""

import contextlib
import json
import os
import sys
import time
import warnings

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM


def model_of(config, attention):
    """Gemma2ForCausalLM with eager or sdpa attention.

    transformers refuses sdpa for Gemma-2, because torch's kernel has no soft-cap. Here it runs
    without the cap: less work than ours, and scores of random weights are far from it.
    """
    if attention == "sdpa":
        config = config | {"attn_logit_softcapping": None}
    model = Gemma2ForCausalLM(Gemma2Config(**config, attn_implementation="eager"))
    model.config._attn_implementation = attention
    return model


class Peer:
    """A model, its optimiser and the arrays of a benchmark."""

    def build(self, config, weights, tokens, prompt, new, dtype, attention, threads):
        """Model with the given weights; float32 parameters for training, `dtype` for decoding."""
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.dtype, self.new = getattr(torch, dtype), new
        self.model = model_of(config, attention)
        missing, unexpected = self.model.load_state_dict(load_file(weights), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        self.model.train()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        self.decoder = model_of(config, attention).eval()
        self.decoder.load_state_dict(self.model.state_dict())
        self.decoder = self.decoder.to(self.dtype)
        self.tokens, self.prompt = torch.tensor(tokens), torch.tensor(prompt)
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "torch": torch.__version__}

    def train(self):
        """One AdamW step on next-token cross-entropy; bfloat16 runs under autocast."""
        low = self.dtype != torch.float32
        begin = time.perf_counter()
        context = torch.autocast("cpu", self.dtype) if low else contextlib.nullcontext()
        with context:
            logits = self.model(self.tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), self.tokens[:, 1:].flatten()
        )
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        value = loss.item()
        return {"seconds": time.perf_counter() - begin, "loss": value}

    @torch.inference_mode()
    def decode(self):
        """Greedy: prompt at once, then one token at a time through transformers' cache."""
        begin = time.perf_counter()
        cache, ids, found = DynamicCache(config=self.decoder.config), self.prompt, []
        for _ in range(self.new):
            out = self.decoder(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
        tokens = torch.cat(found, dim=1).tolist()
        return {"seconds": time.perf_counter() - begin, "tokens": tokens}

    def profile(self, what, rows=14):
        """Share of the operators' own time, largest first."""
        with torch.profiler.profile() as prof:
            getattr(self, what)()
        events = sorted(prof.key_averages(), key=lambda e: -e.self_cpu_time_total)[:rows]
        total = sum(e.self_cpu_time_total for e in prof.key_averages())
        table = [[e.key, e.count, round(e.self_cpu_time_total / total, 4)] for e in events]
        return {"seconds": total / 1e6, "operators": table}


def serve(peer) -> None:
    """Call methods of `peer` by name until the input ends; what libraries print goes to stderr."""
    warnings.simplefilter("ignore", FutureWarning)  # names of arguments change between versions
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(peer, request.pop("op"))(**request)
        except Exception as error:  # the other side turns it into its own error
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Peer())
