"""Hymba behind the model seam: published names, the bytes of its caches, and `build`."""

import math

import jax
import jax.numpy as jnp

from export.weights import Rule, WeightMap, heads_in, linear, plain
from models import Model, hymba, language
from models.hymba import Hymba, HymbaConfig, Run
from models.mamba import conv_kernel, parts


def weight_map(cfg: HymbaConfig) -> WeightMap:
    """Names of nvidia/Hymba-1.5B-Base."""
    names = {
        "embedding": plain("model.embed_tokens.weight"),
        "final_norm/scale": plain("model.final_layernorm.weight"),
    }
    if cfg.meta:
        names["meta"] = plain("model.memory_tokens")
    for number, run in enumerate(cfg.runs()):
        for i in range(len(run.unit)):
            rules = _block(cfg, run, i)
            names |= {f"run{number}/{i}/{leaf}": rule for leaf, rule in rules.items()}
    return WeightMap(names, ignore=("lm_head.weight",))


def _block(cfg: HymbaConfig, run: Run, i: int) -> dict[str, Rule]:
    layer, where = run.unit[i], dict(stack=(len(run.unit),), first=run.first + i)
    block = "model.layers.{layer}."
    mixer, mlp = block + "mamba.", block + "moe.experts.0."
    rules = {
        "norm/scale": plain(block + "input_layernorm.weight", **where),
        "mlp_norm/scale": plain(block + "pre_moe_layernorm.weight", **where),
        "out/kernel": linear(mixer + "out_proj.weight", **where),
    }
    for name in ("gate", "up", "down"):
        rules[f"mlp/{name}/kernel"] = linear(f"{mlp}{name}_proj.weight", **where)
    # One published matrix: its rows, in this order, are q, k, v, u, z, as far as they are there.
    sizes, made = {}, {}
    if layer.attends:
        sizes["q"], made["q"] = cfg.width, cfg.heads
        rules["attn_norm/scale"] = plain(mixer + "pre_avg_layernorm1.weight", **where)
    if layer.owns:
        sizes["k"], made["k"] = cfg.kv_heads * cfg.head_dim, cfg.kv_heads
        sizes["v"], made["v"] = cfg.kv_heads * cfg.value_dim, cfg.kv_heads
    if layer.scans:
        sizes |= {"u": cfg.inner, "z": cfg.inner}
        rules["ssm_norm/scale"] = plain(mixer + "pre_avg_layernorm2.weight", **where)
        rules |= {f"ssm/{leaf}": rule for leaf, rule in _ssm(mixer, where).items()}
    into = mixer + "in_proj.weight"
    for name, part in parts(linear(into, **where), sizes).items():
        rule = heads_in(into, made[name], **where) if name in made else linear(into, **where)
        rules[f"{name}/kernel"] = rule._replace(part=part.part)
    return rules


def _ssm(mixer: str, where: dict) -> dict[str, Rule]:
    rules = {
        "conv/kernel": conv_kernel(mixer + "conv1d.weight", **where),
        "conv/bias": plain(mixer + "conv1d.bias", **where),
        "x_proj/kernel": linear(mixer + "x_proj.0.weight", **where),
        "dt_proj/kernel": linear(mixer + "dt_proj.0.weight", **where),
        "dt_bias": plain(mixer + "dt_proj.0.bias", **where),
        "A_log": plain(mixer + "A_log.0", **where),
        "D": plain(mixer + "D.0", **where),
    }
    for name in ("dt", "B", "C"):
        rules[f"{name}_norm/scale"] = plain(f"{mixer}{name}_layernorm.weight", **where)
    return rules


def cache_report(cfg: HymbaConfig, tokens: int, bytes_per_number: int = 2) -> dict[str, int]:
    """Bytes of one sequence's state after `tokens` tokens, by convention.

    published_all: the paper's 78.6 MB at 8k if `tokens` count the meta tokens, the window's ring
    does not, and conv and scan states are stored in 2 bytes. published_conv: if meta tokens come
    on top everywhere, and of the Mamba states only the convolution's taps count. Both give the
    published number (hymba.md section 7). ours: what init_state allocates, scan states in float32.
    """
    layers = [layer for run in cfg.runs() for layer in run.unit * run.count]
    per_token = cfg.kv_heads * (cfg.head_dim + cfg.value_dim) * bytes_per_number
    everywhere = sum(layer.owns and layer.everywhere for layer in layers)
    windows = sum(layer.owns and not layer.everywhere for layer in layers)
    scans = sum(layer.scans for layer in layers) * cfg.inner

    def attention(all_of, ring):
        return per_token * (everywhere * all_of + windows * ring)

    ring = min(cfg.window, tokens)
    state = cfg.state + cfg.taps - 1
    net = Hymba(cfg, jnp.bfloat16 if bytes_per_number == 2 else jnp.float32)
    params = jax.eval_shape(lambda: language.init(net, jax.random.key(0)))
    params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "value"))
    held = jax.eval_shape(lambda p: hymba.init_state(net, p, 1, tokens), params)
    return {
        "published_all": attention(tokens, ring) + bytes_per_number * scans * state,
        "published_conv": attention(tokens + cfg.meta, ring + cfg.meta)
        + bytes_per_number * scans * cfg.taps,
        "ours": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held.layers)),
    }


def build(config) -> Model:
    """The language model behind the seam of models/__init__.py."""
    functions = dict(attended=hymba.attended)
    return language.build(config, hymba.SIZES, Hymba, hymba.init_state, weight_map, **functions)
