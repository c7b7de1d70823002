"""Names of SigLIP checkpoints (Hugging Face layout) for models/blocks/vit.py."""

import numpy as np

from export.weights import Rule, WeightMap, heads_in, heads_out, linear, plain
from models.blocks.vit import ViTConfig


def weight_map(cfg: ViTConfig, prefix: str = "vision_model.") -> WeightMap:
    """ViT leaves <-> vision_model...; a whole SigLIP file loads too, its text tower is ignored."""
    names = {
        "patch/kernel": _patch(prefix + "embeddings.patch_embedding.weight", cfg.patch),
        "patch/bias": plain(prefix + "embeddings.patch_embedding.bias"),
        "positions": plain(prefix + "embeddings.position_embedding.weight"),
        **_norm("final_norm", prefix + "post_layernorm"),
    }
    layer, stacked = prefix + "encoder.layers.{layer}.", dict(stack=(1,))
    parts = {
        **_norm("norm1", layer + "layer_norm1", **stacked),
        **_norm("norm2", layer + "layer_norm2", **stacked),
        **_attention(layer + "self_attn.", cfg.heads, **stacked),
        **_mlp(layer + "mlp.", **stacked),
    }
    names |= {f"layers/{leaf}": rule for leaf, rule in parts.items()}
    ignore = ["text_model.*", "logit_scale", "logit_bias", "*.position_ids"]
    if cfg.map_head:
        names |= {f"pool/{leaf}": rule for leaf, rule in _pool(cfg, prefix + "head.").items()}
    else:
        ignore.append(prefix + "head.*")
    return WeightMap(names, ignore=tuple(ignore))


def _patch(name: str, size: int) -> Rule:
    """Ours [row · column · channel, D], published [D, channel, row, column]."""

    def to(tensor):
        return tensor.reshape(size, size, -1, tensor.shape[-1]).transpose(3, 2, 0, 1)

    def back(tensor):
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])

    return Rule(name, to, back)


def _norm(path: str, name: str, **stacking) -> dict[str, Rule]:
    return {
        f"{path}/scale": plain(name + ".weight", **stacking),
        f"{path}/bias": plain(name + ".bias", **stacking),
    }


def _attention(name: str, heads: int, **stacking) -> dict[str, Rule]:
    rules = {
        "attn/o/kernel": heads_out(name + "out_proj.weight", heads, **stacking),
        "attn/o/bias": plain(name + "out_proj.bias", **stacking),
    }
    for part in "qkv":
        rules[f"attn/{part}/kernel"] = heads_in(f"{name}{part}_proj.weight", heads, **stacking)
        rules[f"attn/{part}/bias"] = heads_in(f"{name}{part}_proj.bias", heads, **stacking)
    return rules


def _mlp(name: str, **stacking) -> dict[str, Rule]:
    return {
        f"mlp/{ours}/{leaf}": rule(f"{name}{theirs}.{published}", **stacking)
        for ours, theirs in (("in", "fc1"), ("out", "fc2"))
        for leaf, published, rule in (("kernel", "weight", linear), ("bias", "bias", plain))
    }


def _pool(cfg: ViTConfig, name: str) -> dict[str, Rule]:
    """The MAP head publishes q, k and v as one tensor of 3 D rows, and its probe as [1, 1, D]."""
    rules = {
        "probe": Rule(name + "probe", lambda x: x[None], lambda x: np.squeeze(x, 0)),
        "attn/o/kernel": heads_out(name + "attention.out_proj.weight", cfg.heads),
        "attn/o/bias": plain(name + "attention.out_proj.bias"),
        **_norm("norm", name + "layernorm"),
        **_mlp(name + "mlp."),
    }
    for i, part in enumerate("qkv"):
        rows = (i * cfg.width, (i + 1) * cfg.width, 3 * cfg.width)
        for leaf, published in (("kernel", "weight"), ("bias", "bias")):
            joint = heads_in(f"{name}attention.in_proj_{published}", cfg.heads)
            rules[f"attn/{part}/{leaf}"] = joint._replace(part=rows)
    return rules
