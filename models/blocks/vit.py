"""SigLIP's vision tower (building_blocks.md section 2): pre-LN ViT, optional attention pooling."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.blocks.attention import Attention
from models.blocks.common import Linear, constrain, remat_block, scan_layers
from models.blocks.norms import LayerNorm

_xavier = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a tower for square images of image_size pixels; SIZES has the published ones."""

    width: int
    layers: int
    mlp: int
    heads: int
    patch: int
    image_size: int = 224
    map_head: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if self.image_size < self.patch:
            raise ValueError(f"image_size={self.image_size} is less than patch={self.patch}")

    @property
    def tokens(self) -> int:
        """Tokens of an image; pixels past the last whole patch are dropped (VALID)."""
        return (self.image_size // self.patch) ** 2


SIZES = {
    "B/16": ViTConfig(768, 12, 3072, 12, 16),
    "L/16": ViTConfig(1024, 24, 4096, 16, 16),
    "So400m/14": ViTConfig(1152, 27, 4304, 16, 14),
    # For CPUs: 64 px in 64 tokens.
    "tiny": ViTConfig(128, 4, 512, 4, 8, image_size=64),
    "debug": ViTConfig(64, 2, 128, 2, 8, image_size=32),
}


def patches(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b m p"]:
    """Row-major square patches, each flattened as (row, column, channel)."""
    b, h, w, c = images.shape
    rows, columns = h // size, w // size
    images = images[:, : rows * size, : columns * size]
    x = images.reshape(b, rows, size, columns, size, c)
    return jnp.swapaxes(x, 2, 3).reshape(b, rows * columns, size * size * c)


class Mlp(nn.Module):
    """W2 gelu_tanh(W1 x + b1) + b2."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        def linear(features, axes, name):
            small = nn.initializers.normal(1e-6)
            return Linear((features,), axes, self.dtype, 1, True, _xavier, small, name=name)

        x_hidden = nn.gelu(linear(self.hidden, ("embed", "mlp"), "in")(x), approximate=True)
        x_hidden = constrain(x_hidden, "batch", "length", "act_mlp")
        return linear(x.shape[-1], ("mlp", "embed"), "out")(x_hidden)


def _attention(cfg: ViTConfig, dtype, impl, name):
    return Attention(
        cfg.heads,
        cfg.heads,
        cfg.width // cfg.heads,
        dtype,
        bias=True,
        kernel_init=_xavier,
        impl=impl,
        name=name,
    )


class Block(nn.Module):
    """x += attention(LN(x)); x += MLP(LN(x)); shaped as the body of a scan over layers."""

    cfg: ViTConfig
    dtype: Any = jnp.float32
    impl: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"], _=None):
        cfg = self.cfg
        y = LayerNorm(cfg.norm_eps, name="norm1")(x)
        x = x + _attention(cfg, self.dtype, self.impl, "attn")(y, None)[0]
        y = LayerNorm(cfg.norm_eps, name="norm2")(x)
        x = x + Mlp(cfg.mlp, self.dtype, name="mlp")(y)
        return constrain(x, "batch", "length", "act_embed"), None


class MapHead(nn.Module):
    """A learned probe attends over the tokens: y = MHA(probe, x); y + MLP(LN(y)), [B, D]."""

    cfg: ViTConfig
    dtype: Any = jnp.float32
    impl: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b d"]:
        cfg = self.cfg
        init = nn.with_logical_partitioning(_xavier, (None, "embed"))
        probe = self.param("probe", init, (1, cfg.width), jnp.float32).astype(self.dtype)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, cfg.width))
        y, _ = _attention(cfg, self.dtype, self.impl, "attn")(probe, None, keys_from=x)
        y = y + Mlp(cfg.mlp, self.dtype, name="mlp")(LayerNorm(cfg.norm_eps, name="norm")(y))
        return y[:, 0]


class ViT(nn.Module):
    """Images in [-1, 1] to tokens after the final norm; `pooled` adds the MAP head's vector."""

    cfg: ViTConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    impl: str = "auto"

    def setup(self):
        cfg = self.cfg
        self.patch = Linear(
            (cfg.width,), ("patch", "embed"), self.dtype, 1, True, nn.initializers.lecun_normal()
        )
        init = nn.initializers.normal(cfg.width**-0.5)
        init = nn.with_logical_partitioning(init, ("positions", "embed"))
        self.positions = self.param("positions", init, (cfg.tokens, cfg.width), jnp.float32)
        block = remat_block(Block, self.remat, looped=cfg.layers > 1)
        scan = scan_layers(block, cfg.layers, nn.broadcast, unroll=self.remat == "none")
        self.layers = scan(cfg, self.dtype, self.impl)
        self.final_norm = LayerNorm(cfg.norm_eps)
        if cfg.map_head:
            self.pool = MapHead(cfg, self.dtype, self.impl)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b m d"]:
        size = self.cfg.image_size
        if images.shape[1:3] != (size, size):
            raise ValueError(f"image_size={size}, but the images are {images.shape[1:3]}")
        x = self.patch(patches(images, self.cfg.patch)) + self.positions.astype(self.dtype)
        x = constrain(x, "batch", "length", "act_embed")
        x, _ = self.layers(x, None)
        return self.final_norm(x)

    def pooled(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b d"]]:
        """Tokens and the pooled vector; needs map_head=True."""
        if not self.cfg.map_head:
            raise ValueError("pooled() needs map_head=True")
        x = self(images)
        return x, self.pool(x)
