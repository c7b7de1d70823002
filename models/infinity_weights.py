"""Names of FoundationVision/Infinity's checkpoints for models/infinity.py (infinity_2b_reg.pth,
infinity_8b_weights, ...), whose blocks lie in groups: block_chunks.0.module.0, ..."""

from export.weights import Rule, WeightMap, heads_in, heads_out, linear, plain
from models.infinity import TransformerConfig

# Constants and masks that training left in the files.
IGNORE = ("*zero_k_bias", "lvl_1L", "attn_bias_for_masking", "Infinity_*len")


def weight_map(cfg: TransformerConfig) -> WeightMap:
    """Every leaf of the transformer."""
    pool = "text_proj_for_sos.ca."
    rules = {
        "uncond": plain("cfg_uncond"),
        "text_norm/scale": plain("text_norm.weight"),
        "text_pool/query": _framed(pool + "mat_q", 1),
        **_heads("modulation", "shared_ada_lin.1", 6),
        "pos_start": _framed("pos_start", 2),
        "level": plain("lvl_embed.weight"),
        **_linear("word", "word_embed"),
        **_heads("head_modulation", "head_nm.ada_lin.1", 2),
    }
    if cfg.cross:
        rules |= _linear("text_in", "text_proj_for_ca.0")
        rules |= _linear("text_out", "text_proj_for_ca.2")
    if cfg.head == "index":  # not in the published code
        rules["head_table"] = plain("head.weight")
    else:
        rules["head_kernel"] = heads_in("head.weight", cfg.bits)
        rules["head_bias"] = heads_in("head.bias", cfg.bits)
    rules |= _keys_values(cfg, "text_pool", pool, cfg.pool_heads)
    rules |= _out("text_pool/o", pool + "proj", cfg.pool_heads)
    name = "block_chunks.{group}.module.{place}." if cfg.chunks > 1 else "blocks.{layer}."
    where = dict(stack=(1,), group=cfg.depth // cfg.chunks)
    rules |= {f"layers/{leaf}": rule for leaf, rule in _block(cfg, name, where).items()}
    return WeightMap(rules, ignore=IGNORE)


def _framed(name: str, axes: int, **where) -> Rule:
    """Published with `axes` axes of one in front."""
    front = (0,) * axes
    return Rule(name, lambda x: x[(None,) * axes], lambda x: x[front], **where)


def _linear(ours: str, published: str, **where) -> dict[str, Rule]:
    return {
        f"{ours}/kernel": linear(f"{published}.weight", **where),
        f"{ours}/bias": plain(f"{published}.bias", **where),
    }


def _heads(ours: str, published: str, heads: int, **where) -> dict[str, Rule]:
    return {
        f"{ours}/kernel": heads_in(f"{published}.weight", heads, **where),
        f"{ours}/bias": heads_in(f"{published}.bias", heads, **where),
    }


def _out(ours: str, published: str, heads: int, **where) -> dict[str, Rule]:
    return {
        f"{ours}/kernel": heads_out(f"{published}.weight", heads, **where),
        f"{ours}/bias": plain(f"{published}.bias", **where),
    }


def _rows(cfg, names: str, ours: str, published: str, heads: int, **where) -> dict[str, Rule]:
    """Kernels that are published as one matrix, one after the other."""
    width = cfg.width
    return {
        f"{ours}/{name}/kernel": heads_in(
            published, heads, part=(i * width, (i + 1) * width, len(names) * width), **where
        )
        for i, name in enumerate(names)
    }


def _keys_values(cfg, ours: str, published: str, heads: int, **where) -> dict[str, Rule]:
    rules = _rows(cfg, "kv", ours, published + "mat_kv.weight", heads, **where)
    return rules | {f"{ours}/v/bias": heads_in(published + "v_bias", heads, **where)}


def _block(cfg: TransformerConfig, block: str, where: dict) -> dict[str, Rule]:
    """Leaves of one block."""
    sa, ca, heads = block + "sa.", block + "ca.", cfg.heads
    scale = Rule(
        sa + "scale_mul_1H11",
        lambda x: x.reshape(1, -1, 1, 1),
        lambda x: x.reshape(-1),  # (1, 1, H, 1) where it was trained with flash attention
        **where,
    )
    rules = {
        "modulation": _framed(block + "ada_gss", 2, **where),
        **_rows(cfg, "qkv", "sa", sa + "mat_qkv.weight", heads, **where),
        "sa/q/bias": heads_in(sa + "q_bias", heads, **where),
        "sa/v/bias": heads_in(sa + "v_bias", heads, **where),
        "sa/scale": scale,
        **_out("sa/o", sa + "proj", heads, **where),
        **_linear("mlp/in", block + "ffn.fc1", **where),
        **_linear("mlp/out", block + "ffn.fc2", **where),
    }
    if not cfg.cross:
        return rules
    return rules | {
        **_heads("ca/q", ca + "mat_q", heads, **where),
        **_keys_values(cfg, "ca", ca, heads, **where),
        **_out("ca/o", ca + "proj", heads, **where),
        "ca_norm/scale": plain(block + "ca_norm.weight", **where),
        "ca_norm/bias": plain(block + "ca_norm.bias", **where),
    }
