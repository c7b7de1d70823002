"""Continuous KL autoencoder (LDM's, as MAR retrained it): images <-> Gaussian latents <-> tokens.

Images are [-1, 1] NHWC, moments are [mean | logvar] on the last axis, tokens are patches of
latents with zero mean and unit variance per channel. The networks are `conv.py`'s.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.tokenizers.conv import (
    Conv,
    ConvConfig,
    Decoder,
    Encoder,
    boxed,
    depth_to_space,
    space_to_depth,
)

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class KLVAEConfig(ConvConfig):
    """Sizes of one autoencoder."""

    patch: int = 1
    latent_std: float = 1.0  # of untrained or imported weights; trained ones store their own

    @property
    def encoded(self) -> int:
        """Mean and log variance of every channel."""
        return 2 * self.z

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


class LatentStatistics(nn.Module):
    """Mean and std [z] that make tokens unit variance; filled in from running statistics."""

    cfg: KLVAEConfig

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "z"], Float[Array, "z"]]:
        std = nn.initializers.constant(self.cfg.latent_std)
        mean = self.param("mean", boxed(nn.initializers.zeros, "norm"), (self.cfg.z,))
        return mean, self.param("std", boxed(std, "norm"), (self.cfg.z,))


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
