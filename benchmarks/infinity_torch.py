"""The other side of infinity_peers: Infinity's transformer as it is published, in plain torch.

Driven like xlstm_torch.py. Dense attention under a mask of L x L, every bit's two logits held, one
operator after the other. Weights come under their published names (blocks in no groups), inputs in
an .npz file. Runs in any interpreter that has torch and safetensors; imports nothing of ours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch_peer import serve
from xlstm_torch import Side

LARGEST_SCALE = float(np.log(100.0))


def turned(x, cos, sin):
    """Rotary positions of x [b, h, l, k] by cos, sin [l, k / 2]: pairs (2 j, 2 j + 1)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Transformer:
    """Training and drawing of one set of weights."""

    def __init__(self, weights: str, arrays: str, depth: int, heads: int, pool_heads: int):
        self.w = {k: x.requires_grad_() for k, x in load_file(weights).items()}
        found = {k: torch.from_numpy(x) for k, x in np.load(arrays).items()}
        self.text, self.cos, self.sin = found["text"], found["cos"], found["sin"]
        self.inputs, self.labels = found["inputs"], found["labels"].long()
        self.weight, self.guidance = found["weight"], float(found["guidance"])
        self.lengths = found["lengths"].long()
        self.schedule = [tuple(grid) for grid in found["schedule"].tolist()]
        self.depth, self.heads, self.pool_heads = depth, heads, pool_heads
        sizes = torch.tensor([h * w for h, w in self.schedule])
        self.ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self.optimiser = torch.optim.AdamW(
            self.w.values(), lr=1e-4, betas=(0.9, 0.97), eps=1e-8, fused=True
        )

    # ------------------------------------------------------------ parts

    def linear(self, name, x):
        """x W^T + b."""
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def split(self, x, heads):
        """[b, l, h k] -> [b, h, l, k]."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(self, name, q, k, v, mask=None, scale=None):
        """Heads -> projected [b, l, c]."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.linear(f"{name}.proj", out.transpose(1, 2).flatten(2))

    def keys_values(self, name, x, heads):
        """Of the text."""
        k, v = F.linear(x, self.w[f"{name}.mat_kv.weight"]).chunk(2, -1)
        return self.split(k, heads), self.split(v + self.w[f"{name}.v_bias"], heads)

    def condition(self, text, valid):
        """(pooled, modulation [b, 6, c], memory, mask of the text)."""
        width, mask = text.shape[-1], valid[:, None, None]
        text = F.rms_norm(text, (width,), self.w["text_norm.weight"], 1e-6)
        pool = "text_proj_for_sos.ca"
        k, v = self.keys_values(pool, text, self.pool_heads)
        q = self.w[f"{pool}.mat_q"].reshape(1, self.pool_heads, 1, -1).expand(len(text), -1, -1, -1)
        pooled = self.attend(pool, q, k, v, mask)[:, 0]
        hidden = F.gelu(self.linear("text_proj_for_ca.0", text), approximate="tanh")
        memory = self.linear("text_proj_for_ca.2", hidden)
        six = self.linear("shared_ada_lin.1", F.silu(pooled)).unflatten(-1, (6, -1))
        return pooled, six, memory, mask

    def block(self, i, x, condition, cos, sin, mask, cache):
        """One block; cache: [k, v] so far, which grows, or None."""
        name, (_, six, memory, valid) = f"blocks.{i}", condition
        m = six + self.w[f"{name}.ada_gss"].reshape(6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (t[:, None] for t in m.unbind(1))
        y, shape = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1, x.shape[-1:]
        q, k, v = F.linear(y, self.w[f"{name}.sa.mat_qkv.weight"]).chunk(3, -1)
        q, v = q + self.w[f"{name}.sa.q_bias"], v + self.w[f"{name}.sa.v_bias"]
        q, k, v = (self.split(t, self.heads) for t in (q, k, v))
        factor = self.w[f"{name}.sa.scale_mul_1H11"].clamp_max(LARGEST_SCALE).exp()
        q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        if cache is not None:
            cache[:] = [torch.cat(pair, 2) for pair in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache
        x = x + self.attend(f"{name}.sa", q, k, v, mask, 1.0) * gamma1
        weight, bias = (self.w[f"{name}.ca_norm.{part}"] for part in ("weight", "bias"))
        y = F.layer_norm(x, shape, weight, bias, 1e-6)
        q = self.split(self.linear(f"{name}.ca.mat_q", y), self.heads)
        k, v = self.keys_values(f"{name}.ca", memory, self.heads)
        x = x + self.attend(f"{name}.ca", q, k, v, valid)
        y = F.layer_norm(x, shape, eps=1e-6) * (1 + scale2) + shift2
        y = F.gelu(self.linear(f"{name}.ffn.fc1", y), approximate="tanh")
        return x + self.linear(f"{name}.ffn.fc2", y) * gamma2

    def logits(self, x, condition):
        """[b, l, d, 2]."""
        scale, shift = self.linear("head_nm.ada_lin.1", F.silu(condition[0])).chunk(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return self.linear("head", x).unflatten(-1, (-1, 2))

    def start(self, condition):
        """The first scale's input."""
        return (condition[0] + self.w["pos_start"].reshape(-1))[:, None]

    def valid(self):
        """[b, p]."""
        return torch.arange(self.text.shape[1]) < self.lengths[:, None]

    # ------------------------------------------------------------ what is asked for

    def backward(self):
        """Weighted bitwise cross-entropy; gradients are left in the parameters."""
        condition = self.condition(self.text, self.valid())
        x = torch.cat((self.start(condition), self.linear("word_embed", self.inputs)), 1)
        x = x + self.w["lvl_embed.weight"][self.ids]
        mask = self.ids[:, None] >= self.ids
        for i in range(self.depth):
            x = self.block(i, x, condition, self.cos, self.sin, mask, None)
        logits = self.logits(x, condition)
        nll = F.cross_entropy(logits.flatten(0, 2), self.labels.flatten(), reduction="none")
        nll = nll.reshape(self.labels.shape).mean(-1)
        loss = (nll * self.weight).sum() / len(x)
        loss.backward()
        return loss

    def train(self):
        """One AdamW step."""
        loss = self.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {"loss": loss}

    def gradients(self):
        """Loss and gradients by published name, before any step."""
        loss = self.backward()
        grads = {name: p.grad.clone() for name, p in self.w.items() if p.grad is not None}
        self.optimiser.zero_grad(set_to_none=True)
        return {"loss": loss, **grads}

    @torch.inference_mode()
    def draw(self):
        """Likelier bits [b, l, d] of all scales, guided, with keys and values cached."""
        rows, valid = len(self.text), self.valid()
        none = self.w["cfg_uncond"][: self.text.shape[1]].expand_as(self.text)
        condition = self.condition(torch.cat((self.text, none)), torch.cat((valid, valid)))
        caches, found, total, end = [[] for _ in range(self.depth)], [], 0.0, 0
        x = self.start(condition)
        for scale, (h, w) in enumerate(self.schedule):
            begin, end = end, end + h * w
            x = x + self.w["lvl_embed.weight"][scale]
            for i, cache in enumerate(caches):
                cos, sin = self.cos[begin:end], self.sin[begin:end]
                x = self.block(i, x, condition, cos, sin, None, cache)
            logits = self.logits(x, condition)
            logits = self.guidance * logits[:rows] + (1 - self.guidance) * logits[rows:]
            bits = logits[..., 1] > logits[..., 0]
            found.append(bits)
            code = torch.where(bits, 1.0, -1.0) / bits.shape[-1] ** 0.5
            code = code.transpose(1, 2).unflatten(2, (h, w))
            total = total + F.interpolate(code, self.schedule[-1], mode="bilinear")
            if scale + 1 < len(self.schedule):
                small = F.interpolate(total, self.schedule[scale + 1], mode="bilinear")
                x = self.linear("word_embed", small.flatten(2).transpose(1, 2)).repeat(2, 1, 1)
        return {"bits": torch.cat(found, 1).int()}


if __name__ == "__main__":
    serve(Side({"infinity": (Transformer, "safetensors")}))
