"""Continuous KL autoencoder (LDM's, as MAR retrained it): images <-> Gaussian latents <-> tokens.

Images are [-1, 1] NHWC, moments are [mean | logvar] on the last axis, tokens are patches of
latents with zero mean and unit variance per channel. Deviation: the small sizes fold `stem` x
`stem` pixels into channels first, which keeps convolutions on a CPU short.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.blocks.common import constrain, remat_block

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class KLVAEConfig:
    """Sizes of one autoencoder; `attn` lists encoder levels with attention after every block."""

    ch: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z: int = 16
    res_blocks: int = 2
    attn: tuple[int, ...] = ()
    groups: int = 32
    stem: int = 1
    patch: int = 1
    resolution: int = 256
    latent_std: float = 1.0  # of untrained or imported weights; trained ones store their own

    @property
    def stride(self) -> int:
        """Pixels per latent along one side."""
        return self.stem * 2 ** (len(self.mult) - 1)

    @property
    def grid(self) -> int:
        """Tokens along one side at the nominal resolution."""
        return self.resolution // (self.stride * self.patch)

    @property
    def tokens(self) -> int:
        """Tokens per image at the nominal resolution."""
        return self.grid**2

    @property
    def channels(self) -> int:
        """Channels of one token."""
        return self.z * self.patch**2


SIZES = {
    "kl16": KLVAEConfig(attn=(4,), latent_std=1 / 0.2325),
    "sd_f8": KLVAEConfig(mult=(1, 2, 4, 4), z=4, patch=2, latent_std=1 / 0.18215),
    "small_32": KLVAEConfig(
        ch=64, mult=(1, 1), z=16, res_blocks=1, groups=8, stem=4, resolution=32
    ),
    "small_64": KLVAEConfig(
        ch=64, mult=(1, 1), z=16, res_blocks=1, groups=8, stem=4, resolution=64
    ),
}


# ---------------------------------------------------------------- pure functions


def group_norm(
    x: Float[Array, "b h w c"], scale: Float[Array, "c"], bias: Float[Array, "c"], groups: int
) -> Float[Array, "b h w c"]:
    """Group normalisation over (space, channels of a group), eps 1e-6, computed in float32."""
    b, h, w, c = x.shape
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


def tokens_from_latents(z: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n d"]:
    """Patchify: row-major tokens, channel order (c, p, q) as in MAR."""
    z = space_to_depth(z, patch)
    return z.reshape(z.shape[0], -1, z.shape[-1])


def latents_from_tokens(tokens: Float[Array, "b n d"], patch: int) -> Float[Array, "b h w c"]:
    """Exact inverse of `tokens_from_latents` for square grids."""
    b, n, d = tokens.shape
    side = round(n**0.5)
    if side**2 != n:
        raise ValueError(f"tokens={n}: latents are square, so the token count must be a square")
    return depth_to_space(tokens.reshape(b, side, side, d), patch)


def normalise(z: Float[Array, "*b z"], latents: dict) -> Float[Array, "*b z"]:
    """Latents to zero mean and unit variance; `latents` = {mean [z], std [z]} of the weights."""
    return (z - latents["mean"]) / latents["std"]


def denormalise(z: Float[Array, "*b z"], latents: dict) -> Float[Array, "*b z"]:
    """Exact inverse of `normalise`: what `decode` takes."""
    return z * latents["std"] + latents["mean"]


def split_moments(
    moments: Float[Array, "*b z2"],
) -> tuple[Float[Array, "*b z"], Float[Array, "*b z"]]:
    """Mean and clipped log variance of the posterior, in float32."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def posterior_mean(moments: Float[Array, "*b z2"]) -> Float[Array, "*b z"]:
    """Mode of the posterior: what evaluation uses."""
    return split_moments(moments)[0]


def sample_posterior(moments: Float[Array, "*b z2"], rng: Array) -> Float[Array, "*b z"]:
    """mean + exp(logvar / 2) * noise; rng is one key, or typed keys [b] for per-row noise."""
    mean, logvar = split_moments(moments)
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.ndim == 1:
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(rng)
    else:
        noise = jax.random.normal(rng, mean.shape)
    return mean + jnp.exp(0.5 * logvar) * noise


def kl_divergence(moments: Float[Array, "b h w z2"]) -> Float[Array, "b"]:
    """KL(posterior || N(0, 1)) per image in nats: sum of (mean^2 + var - 1 - logvar) / 2."""
    mean, logvar = split_moments(moments)
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


# ---------------------------------------------------------------- modules


def _boxed(init, *names):
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
        kernel = self.param("kernel", _boxed(init, *axes), shape)
        bias = self.param("bias", _boxed(nn.initializers.zeros, "channels_out"), (self.features,))
        return conv(x, kernel, bias, stride=self.stride)


class Norm(nn.Module):
    """Affine group normalisation."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", _boxed(nn.initializers.ones, "norm"), shape)
        bias = self.param("bias", _boxed(nn.initializers.zeros, "norm"), shape)
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
    """Residual, attention, residual block at the coarsest grid."""

    features: int
    groups: int
    remat: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        block = remat_block(ResBlock, self.remat, looped=False)
        x = block(self.features, self.groups, name="block_1")(x)
        x = AttnBlock(self.groups, name="attn_1")(x)
        return block(self.features, self.groups, name="block_2")(x)


class Encoder(nn.Module):
    """Images to 2z features per latent position."""

    cfg: KLVAEConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z2"]:
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
        x = Mid(x.shape[-1], cfg.groups, self.remat, name="mid")(x)
        x = nn.swish(Norm(cfg.groups, name="norm_out")(x))
        return Conv(2 * cfg.z, name="conv_out")(x)


class DecoderBody(nn.Module):
    """Everything of the decoder but the last convolution."""

    cfg: KLVAEConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        cfg, block = self.cfg, remat_block(ResBlock, self.remat, looped=False)
        x = Conv(cfg.ch * cfg.mult[-1], name="conv_in")(z)
        x = Mid(x.shape[-1], cfg.groups, self.remat, name="mid")(x)
        for level in reversed(range(len(cfg.mult))):
            for i in range(cfg.res_blocks + 1):
                x = block(cfg.ch * cfg.mult[level], cfg.groups, name=f"up_{level}_block_{i}")(x)
            if level != 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = Conv(x.shape[-1], name=f"up_{level}_upsample")(x)
        return nn.swish(Norm(cfg.groups, name="norm_out")(x))


class Decoder(nn.Module):
    """Latents to features in front of the last convolution, and that convolution."""

    cfg: KLVAEConfig
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


class LatentStatistics(nn.Module):
    """Mean and std [z] that make tokens unit variance; filled in from running statistics."""

    cfg: KLVAEConfig

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "z"], Float[Array, "z"]]:
        std = nn.initializers.constant(self.cfg.latent_std)
        mean = self.param("mean", _boxed(nn.initializers.zeros, "norm"), (self.cfg.z,))
        return mean, self.param("std", _boxed(std, "norm"), (self.cfg.z,))


class KLVAE(nn.Module):
    """Encoder, 1x1 moment and latent convolutions, decoder; `latents` is never trained."""

    cfg: KLVAEConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        cfg = self.cfg
        self.encoder = Encoder(cfg, self.remat)
        self.quant_conv = Conv(2 * cfg.z, size=1)
        self.post_quant_conv = Conv(cfg.z, size=1)
        self.decoder = Decoder(cfg, self.remat)
        self.latents = LatentStatistics(cfg)

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z2"]:
        """Images to posterior moments in float32."""
        return self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)

    def features(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Latents to the input of the last convolution."""
        return self.decoder.features(self.post_quant_conv(z.astype(self.dtype)))

    def pixels(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """`features` to images in float32, not clipped."""
        return self.decoder.pixels(h).astype(jnp.float32)

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 3"]:
        """Latents to images in float32, not clipped."""
        return self.pixels(self.features(z))

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        self.latents()
        return self.decode(posterior_mean(self.encode(images)))


# ---------------------------------------------------------------- functions on plain parameters


def init(rng: Array, cfg: KLVAEConfig) -> dict:
    """Boxed parameters: encoder, quant_conv, post_quant_conv, decoder, latents."""
    side = 2 * cfg.stride
    return KLVAE(cfg).init(rng, jnp.zeros((1, side, side, 3)))["params"]


def encode(
    params: dict, cfg: KLVAEConfig, images: Float[Array, "b h w c"], *, dtype=jnp.float32
) -> Float[Array, "b h2 w2 z2"]:
    """Images in [-1, 1] to posterior moments [mean | logvar]."""
    return KLVAE(cfg, dtype).apply({"params": params}, images, method="encode")


def decode(
    params: dict, cfg: KLVAEConfig, z: Float[Array, "b h w z"], *, dtype=jnp.float32
) -> Float[Array, "b h2 w2 c"]:
    """Latents (not tokens) to images around [-1, 1], not clipped."""
    return KLVAE(cfg, dtype).apply({"params": params}, z, method="decode")
