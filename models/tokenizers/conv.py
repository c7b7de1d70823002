"""Convolutional encoders and decoders that all image tokenizers share (LDM's, all published ones).

Images are NHWC in [-1, 1]. A tokenizer's config is a `ConvConfig` with fields of its own; what its
encoder gives is `cfg.encoded` channels, what its decoder takes is `cfg.z`. Deviation: the small
sizes fold `stem` x `stem` pixels into channels first, which keeps convolutions on a CPU short.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.blocks.common import constrain, remat_block


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """Sizes of an encoder and its decoder."""

    ch: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z: int = 16  # channels of a latent
    res_blocks: int = 2  # per level of the encoder, the decoder has one more
    attn: tuple[int, ...] = ()  # encoder levels with attention after every block
    up_attn: tuple[int, ...] = ()  # decoder levels, likewise
    mid_attn: bool = True
    groups: int = 32  # of every norm; 24 where they do not divide the channels (Infinity)
    stem: int = 1
    resolution: int = 256  # nominal

    @property
    def stride(self) -> int:
        """Pixels per latent along one side."""
        return self.stem * 2 ** (len(self.mult) - 1)

    @property
    def encoded(self) -> int:
        """Channels that the encoder gives."""
        return self.z


# ---------------------------------------------------------------- pure functions


def group_norm(
    x: Float[Array, "b h w c"], scale: Float[Array, "c"], bias: Float[Array, "c"], groups: int
) -> Float[Array, "b h w c"]:
    """Group normalisation over (space, channels of a group), eps 1e-6, computed in float32.

    24 groups where `groups` does not divide the channels.
    """
    b, h, w, c = x.shape
    groups = groups if c % groups == 0 else 24
    y = x.astype(jnp.float32).reshape(b, h * w, c)

    def mean(t):  # space first, then the channels of a group: five times faster on a CPU
        over = t.sum(1).reshape(b, groups, c // groups).sum(-1) * (groups / (h * w * c))
        return jnp.repeat(over, c // groups, axis=-1)[:, None]

    y = y - mean(y)
    gain = jax.lax.rsqrt(mean(jnp.square(y)) + 1e-6) * scale
    return (y * gain + bias).reshape(b, h, w, c).astype(x.dtype)


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "p q c d"],
    bias: Float[Array, "d"],
    *,
    stride: int = 1,
) -> Float[Array, "b h2 w2 d"]:
    """Convolution; stride 2 pads right and bottom by one only, as the published weights expect."""
    side = kernel.shape[0] // 2
    pad = (0, 1) if stride == 2 else (side, side)
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + bias


def space_to_depth(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 d"]:
    """Fold factor x factor pixels into channels, order (c, p, q)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, c * factor**2)


def depth_to_space(x: Float[Array, "b h w d"], factor: int) -> Float[Array, "b h2 w2 c"]:
    """Exact inverse of `space_to_depth`."""
    b, h, w, d = x.shape
    c = d // factor**2
    x = x.reshape(b, h, w, c, factor, factor).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * factor, w * factor, c)


# ---------------------------------------------------------------- modules


def boxed(init, *names):
    return nn.with_logical_partitioning(init, names)


class Conv(nn.Module):
    """Square convolution with bias; PyTorch's default kernel scale, U(+-1/sqrt(fan_in))."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        axes = ("spatial", None, "channels_in", "channels_out")  # flax takes a name only once
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", boxed(init, *axes), shape)
        bias = self.param("bias", boxed(nn.initializers.zeros, "channels_out"), (self.features,))
        return conv(x, kernel, bias, stride=self.stride)


class Norm(nn.Module):
    """Affine group normalisation."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", boxed(nn.initializers.ones, "norm"), shape)
        bias = self.param("bias", boxed(nn.initializers.zeros, "norm"), shape)
        return group_norm(x, scale, bias, self.groups)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), 1x1 shortcut where widths differ."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = Conv(self.features, name="conv1")(nn.swish(Norm(self.groups, name="norm1")(x)))
        h = Conv(self.features, name="conv2")(nn.swish(Norm(self.groups, name="norm2")(h)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, name="shortcut")(x)
        return constrain(x + h, "batch", None, None, None)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, residual; softmax in float32."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = Norm(self.groups, name="norm")(x)
        q, k, v = (Conv(c, size=1, name=n)(y).reshape(b, h * w, c) for n in ("q", "k", "v"))
        scores = jnp.einsum("btc,bsc->bts", q, k, preferred_element_type=jnp.float32) * c**-0.5
        weights = nn.softmax(scores, axis=-1).astype(x.dtype)
        y = jnp.einsum("bts,bsc->btc", weights, v).reshape(b, h, w, c)
        return x + Conv(c, size=1, name="proj_out")(y)


class Mid(nn.Module):
    """Residual, attention (where the config has it), residual block at the coarsest grid."""

    cfg: ConvConfig
    features: int
    remat: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        block = remat_block(ResBlock, self.remat, looped=False)
        x = block(self.features, self.cfg.groups, name="block_1")(x)
        if self.cfg.mid_attn:
            x = AttnBlock(self.cfg.groups, name="attn_1")(x)
        return block(self.features, self.cfg.groups, name="block_2")(x)


class Encoder(nn.Module):
    """Images to cfg.encoded features per latent position."""

    cfg: ConvConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        cfg, top = self.cfg, len(self.cfg.mult) - 1
        block = remat_block(ResBlock, self.remat, looped=False)
        x = Conv(cfg.ch, name="conv_in")(space_to_depth(x, cfg.stem))
        for level, mult in enumerate(cfg.mult):
            for i in range(cfg.res_blocks):
                x = block(cfg.ch * mult, cfg.groups, name=f"down_{level}_block_{i}")(x)
                if level in cfg.attn:
                    x = AttnBlock(cfg.groups, name=f"down_{level}_attn_{i}")(x)
            if level != top:
                x = Conv(cfg.ch * mult, stride=2, name=f"down_{level}_downsample")(x)
        x = Mid(cfg, x.shape[-1], self.remat, name="mid")(x)
        x = nn.swish(Norm(cfg.groups, name="norm_out")(x))
        return Conv(cfg.encoded, name="conv_out")(x)


class DecoderBody(nn.Module):
    """Everything of the decoder but the last convolution."""

    cfg: ConvConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        cfg, block = self.cfg, remat_block(ResBlock, self.remat, looped=False)
        x = Conv(cfg.ch * cfg.mult[-1], name="conv_in")(z)
        x = Mid(cfg, x.shape[-1], self.remat, name="mid")(x)
        for level in reversed(range(len(cfg.mult))):
            for i in range(cfg.res_blocks + 1):
                x = block(cfg.ch * cfg.mult[level], cfg.groups, name=f"up_{level}_block_{i}")(x)
                if level in cfg.up_attn:
                    x = AttnBlock(cfg.groups, name=f"up_{level}_attn_{i}")(x)
            if level != 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = Conv(x.shape[-1], name=f"up_{level}_upsample")(x)
        return nn.swish(Norm(cfg.groups, name="norm_out")(x))


class Decoder(nn.Module):
    """Latents to features in front of the last convolution, and that convolution."""

    cfg: ConvConfig
    remat: str = "none"

    def setup(self):
        self.conv_out = Conv(3 * self.cfg.stem**2)
        self.body = DecoderBody(self.cfg, self.remat)

    def features(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Input of the last convolution: the adversarial weight needs its gradient only."""
        return self.body(z)

    def pixels(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Last convolution, unfolded to pixels."""
        return depth_to_space(self.conv_out(h), self.cfg.stem)

    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 3"]:
        return self.pixels(self.features(z))
