"""Names of Gemma, Llama, Qwen 2 and OLMo 2 checkpoints for models/blocks/decoder.py."""

from export.weights import Rule, WeightMap, heads_in, heads_out, linear, plain
from models.blocks.decoder import DecoderConfig


def weight_map(cfg: DecoderConfig) -> WeightMap:
    """Decoder leaves <-> model.layers.N...; pattern place i of a scan holds layers i, i + P, ..."""
    head = "lm_head.weight"
    names = {
        "embedding": plain("model.embed_tokens.weight"),
        "final_norm/scale": plain("model.norm.weight"),
    }
    if not cfg.tie:
        names["head"] = plain(head)
    period = len(cfg.pattern)
    places = []
    if cfg.repeats:
        places += [
            (f"layers/{i}_{kind}", dict(stack=(period,), first=i))
            for i, kind in enumerate(cfg.pattern)
        ]
    first_of_tail = cfg.repeats * period
    places += [(f"tail_{i}", dict(first=first_of_tail + i)) for i in range(len(cfg.tail))]
    for path, where in places:
        for leaf, rule in _block(cfg, where).items():
            if not where.get("stack"):
                rule = rule._replace(name=rule.name.format(layer=where["first"]))
            names[f"{path}/{leaf}"] = rule
    return WeightMap(names, ignore=(head,) if cfg.tie else ())


def _block(cfg: DecoderConfig, where: dict) -> dict[str, Rule]:
    """Leaves of one layer. A lone pre-MLP norm is published as post_attention_layernorm."""
    layer = "model.layers.{layer}."
    attn, mlp = layer + "self_attn.", layer + "mlp."
    before_mlp = "pre_feedforward" if cfg.post_norms else "post_attention"
    rules = {
        "attn/q/kernel": heads_in(attn + "q_proj.weight", cfg.heads, **where),
        "attn/k/kernel": heads_in(attn + "k_proj.weight", cfg.kv_heads, **where),
        "attn/v/kernel": heads_in(attn + "v_proj.weight", cfg.kv_heads, **where),
        "attn/o/kernel": heads_out(attn + "o_proj.weight", cfg.heads, **where),
        "mlp/gate/kernel": linear(mlp + "gate_proj.weight", **where),
        "mlp/up/kernel": linear(mlp + "up_proj.weight", **where),
        "mlp/down/kernel": linear(mlp + "down_proj.weight", **where),
    }
    if cfg.pre_norms:
        rules["pre_attn_norm/scale"] = plain(layer + "input_layernorm.weight", **where)
        rules["pre_mlp_norm/scale"] = plain(layer + before_mlp + "_layernorm.weight", **where)
    if cfg.qkv_bias:
        for name, heads in (("q", cfg.heads), ("k", cfg.kv_heads), ("v", cfg.kv_heads)):
            rules[f"attn/{name}/bias"] = heads_in(f"{attn}{name}_proj.bias", heads, **where)
    if cfg.post_norms:
        rules["post_attn_norm/scale"] = plain(layer + "post_attention_layernorm.weight", **where)
        rules["post_mlp_norm/scale"] = plain(layer + "post_feedforward_layernorm.weight", **where)
    if cfg.qk_norm:
        rules["attn/q_norm/scale"] = plain(attn + "q_norm.weight", **where)
        rules["attn/k_norm/scale"] = plain(attn + "k_norm.weight", **where)
    return rules
