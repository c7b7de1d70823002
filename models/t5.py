"""The encoder of Flan-T5 (T5 v1.1; arXiv 1910.10683, 2002.05202, 2210.11416): text to embeddings.

    x = x + Attention(RMSNorm(x));   x = x + W_down(gelu(W_gate n) * (W_up n)),  n = RMSNorm(x)

No biases anywhere, and attention logits are not scaled; a learned number per head and bucket of
distance, one table for all layers, is added to them. Used frozen: `load` reads a folder with
published weights. Widely used as the text tower of image generators (Infinity: Flan-T5 XL).
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from export.weights import (
    WeightMap,
    from_published,
    heads_in,
    heads_out,
    linear,
    load_safetensors,
    plain,
)
from models.blocks.common import Linear, constrain, remat_block, scan_layers
from models.blocks.decoder import GatedMlp
from models.blocks.norms import RMSNorm

MAX_TOKENS = 512  # of a text in training


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder; SIZES has the published ones."""

    width: int
    layers: int
    mlp: int
    heads: int
    head_dim: int = 64
    vocab_size: int = 32_128
    buckets: int = 32  # of distances, half of them for keys behind the query
    max_distance: int = 128  # from here on one bucket
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets={self.buckets} must be a multiple of 4")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(f"max_distance={self.max_distance} must exceed {self.buckets // 4}")


SIZES = {
    "small": T5Config(512, 8, 1024, 6),
    "base": T5Config(768, 12, 2048, 12),
    "large": T5Config(1024, 24, 2816, 16),
    "xl": T5Config(2048, 24, 5120, 32),
    "xxl": T5Config(4096, 24, 10240, 64),
    "debug": T5Config(32, 2, 48, 3, head_dim=8, vocab_size=512),
}


def distance_buckets(queries: int, keys: int, cfg: T5Config) -> Int[np.ndarray, "t s"]:
    """Row of the bias table for each pair: half of the buckets for keys behind the query; in either
    half the first half holds single distances, the rest grows by a factor up to max_distance."""
    distance = np.arange(keys)[None] - np.arange(queries)[:, None]
    half, single = cfg.buckets // 2, cfg.buckets // 4
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(single)
    # In float32, operation by operation: bucket edges are where the published models have them.
    growth = np.log(far) / np.float32(math.log(cfg.max_distance / single)) * np.float32(single)
    coarse = np.minimum(single + growth.astype(np.int32), half - 1)
    bucket = np.where(np.abs(distance) < single, np.abs(distance), coarse)
    return np.where(distance > 0, half + bucket, bucket)


class _Attention(nn.Module):
    """softmax(q kᵀ + bias) v over a row's own tokens, projected back."""

    cfg: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "1 h t t"], lengths: Int[Array, "b"]
    ) -> Float[Array, "b t d"]:
        cfg, width = self.cfg, x.shape[-1]

        def heads(name, std):
            shape, axes = (cfg.heads, cfg.head_dim), ("embed", "heads", "head_dim")
            y = Linear(shape, axes, self.dtype, kernel_init=_normal(std), name=name)(x)
            return constrain(y, "batch", "length", "act_heads", None)

        q = heads("q", (width * cfg.head_dim) ** -0.5)  # small: the logits are not scaled
        k, v = heads("k", width**-0.5), heads("v", width**-0.5)
        # At most some hundred tokens: one block of scores, whose bias kernels.attention lacks.
        out = jax.nn.dot_product_attention(
            q, k, v, bias, scale=1.0, key_value_seq_lengths=lengths, implementation="xla"
        )
        axes, std = ("heads", "head_dim", "embed"), (cfg.heads * cfg.head_dim) ** -0.5
        return Linear((width,), axes, self.dtype, 2, kernel_init=_normal(std), name="o")(out)


def _normal(std: float):
    return nn.initializers.normal(std)


class _Block(nn.Module):
    """One layer, shaped as the body of a scan."""

    cfg: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], bias, lengths):
        cfg = self.cfg
        y = RMSNorm(cfg.norm_eps, offset=0.0, name="attn_norm")(x)
        x = x + _Attention(cfg, self.dtype, name="attn")(y, bias, lengths)
        y = RMSNorm(cfg.norm_eps, offset=0.0, name="mlp_norm")(x)
        read, write = _normal(cfg.width**-0.5), _normal(cfg.mlp**-0.5)
        mlp = GatedMlp(cfg.mlp, self.dtype, read_init=read, write_init=write, name="mlp")
        return constrain(x + mlp(y), "batch", "length", "act_embed"), None


class Encoder(nn.Module):
    """Right-padded tokens to embeddings after the final norm, zeros behind a row's length."""

    cfg: T5Config
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b t"], lengths: Int[Array, "b"]
    ) -> Float[Array, "b t d"]:
        cfg, length = self.cfg, tokens.shape[1]
        init = nn.with_logical_partitioning(_normal(1.0), ("vocab", "embed"))
        shape = (cfg.vocab_size, cfg.width)
        embedding = self.param("embedding", init, shape, jnp.float32)
        init = nn.with_logical_partitioning(_normal(cfg.width**-0.5), (None, "heads"))
        table = self.param("distances", init, (cfg.buckets, cfg.heads), jnp.float32)
        bias = table[distance_buckets(length, length, cfg)].transpose(2, 0, 1)[None]
        x = jnp.take(embedding, tokens, axis=0).astype(self.dtype)
        x = constrain(x, "batch", "length", "act_embed")
        block = remat_block(_Block, self.remat, looped=cfg.layers > 1)
        scan = scan_layers(block, cfg.layers, nn.broadcast, unroll=self.remat == "none")
        x, _ = scan(cfg, self.dtype, name="layers")(x, bias, lengths)
        x = RMSNorm(cfg.norm_eps, offset=0.0, name="final_norm")(x)
        return jnp.where(jnp.arange(length)[:, None] < lengths[:, None, None], x, 0)


def init(rng: Array, cfg: T5Config) -> Any:
    """Parameters with logical axis names."""
    tokens, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    return Encoder(cfg).init(rng, tokens, lengths)["params"]


def encode(
    params: Any,
    cfg: T5Config,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> Float[Array, "b t d"]:
    """Embeddings of right-padded rows."""
    return Encoder(cfg, dtype, remat).apply({"params": params}, tokens, lengths)


def weight_map(cfg: T5Config) -> WeightMap:
    """Names of google/flan-t5-*; of a whole model the decoder is left out."""
    layer, stacked = "encoder.block.{layer}.layer.", dict(stack=(1,))
    attn, mlp = layer + "0.SelfAttention.", layer + "1.DenseReluDense."
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    names = {
        "embedding": plain("shared.weight"),
        "distances": plain(first),
        "final_norm/scale": plain("encoder.final_layer_norm.weight"),
        "layers/attn_norm/scale": plain(layer + "0.layer_norm.weight", **stacked),
        "layers/mlp_norm/scale": plain(layer + "1.layer_norm.weight", **stacked),
        "layers/attn/o/kernel": heads_out(attn + "o.weight", cfg.heads, **stacked),
    }
    for part in "qkv":
        rule = heads_in(f"{attn}{part}.weight", cfg.heads, **stacked)
        names[f"layers/attn/{part}/kernel"] = rule
    for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
        names[f"layers/mlp/{ours}/kernel"] = linear(f"{mlp}{theirs}.weight", **stacked)
    ignore = ("encoder.embed_tokens.weight", "decoder.*", "lm_head.weight")
    return WeightMap(names, ignore, config=to_json(cfg))


_KEYS = dict(
    width="d_model", layers="num_layers", mlp="d_ff", heads="num_heads", head_dim="d_kv",
    vocab_size="vocab_size", buckets="relative_attention_num_buckets",
    max_distance="relative_attention_max_distance", norm_eps="layer_norm_epsilon",
)  # fmt: skip


def to_json(cfg: T5Config) -> dict[str, Any]:
    """What a published config.json says of an encoder."""
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in _KEYS.items()}
    return dict(model_type="t5", feed_forward_proj="gated-gelu") | sizes


def from_json(found: dict[str, Any]) -> T5Config:
    """The sizes in a published config.json; T5 1.0, which has another MLP, is refused."""
    kind = found.get("feed_forward_proj")
    if kind != "gated-gelu":
        raise ValueError(f"feed_forward_proj={kind!r}; T5 v1.1 and Flan-T5 have 'gated-gelu'")
    try:
        return T5Config(
            **{ours: found[theirs] for ours, theirs in _KEYS.items() if theirs in found}
        )
    except TypeError as error:
        raise ValueError(f"no T5 config: {error}") from None


def load(folder: Path, dtype: Any = jnp.float32) -> tuple[Any, T5Config]:
    """(parameters, sizes) from a folder as it is published: config.json, *.safetensors."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    cfg = from_json(json.loads(file.read_text()))
    boxed = jax.eval_shape(lambda: init(jax.random.key(0), cfg))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.meta.unbox(boxed))
    return from_published(load_safetensors(folder), weight_map(cfg), wanted), cfg
