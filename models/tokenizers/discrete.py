"""Image tokenizers with discrete codes: Infinity's BSQ-VAE, VQGAN (Chameleon, Liquid), VAR's VQ.

Images [-1, 1] NHWC -> features [b, h, w, z] -> codes (see `quantisers`) -> latents -> images. The
encoder and the quantiser run in float32 whatever the precision of the decoder: a bit is a sign, and
an index the nearest of thousands. Published sizes: arXiv 2412.04431, 2405.09818, 2404.02905.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.tokenizers.conv import Conv, ConvConfig, Decoder, Encoder
from models.tokenizers.quantisers import Quantiser, bits, vq


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(ConvConfig):
    """Sizes of one tokenizer; z is the bits of a token (bsq, lfq), or the width of a code (vq)."""

    quantiser: str = "bsq"  # bsq | lfq | vq
    schedule: str = "single"  # single | dynamic | dynamic_2x2 | dense | var | geometric
    scales: int = 1  # of "geometric"
    codebook: int = 0  # codes of vq
    phis: int = 0  # convolutions behind vq's scales
    quant_conv: int = 0  # kernel size of the convolutions around the quantiser; 0 = none
    names: str = "ldm"  # how it is published: ldm | infinity | var

    @property
    def grid(self) -> tuple[int, int]:
        """Latents of the finest scale at the nominal resolution."""
        return (self.resolution // self.stride,) * 2


_INFINITY = TokenizerConfig(
    mult=(1, 2, 4, 4, 4), z=32, mid_attn=False, schedule="dynamic", names="infinity"
)
_SMALL = TokenizerConfig(
    ch=64, mult=(1,), z=16, res_blocks=1, mid_attn=False, groups=8, stem=4, resolution=32,
    schedule="geometric", scales=4,
)  # fmt: skip
_SMALL_64 = dataclasses.replace(_SMALL, mult=(1, 2), resolution=64)
_VQ = dict(quantiser="vq", codebook=512, schedule="single", quant_conv=1)

SIZES = {
    **{f"infinity_d{d}": dataclasses.replace(_INFINITY, z=d) for d in (16, 24, 32, 64)},
    # 14 bits on twice the grid; 2 x 2 of them are one token of the transformer.
    "infinity_8b": dataclasses.replace(
        _INFINITY, mult=(1, 2, 4, 4), z=14, schedule="dynamic_2x2"
    ),
    "chameleon": TokenizerConfig(
        z=256, resolution=512, quantiser="vq", codebook=8192, quant_conv=1
    ),
    "var": TokenizerConfig(
        z=32, attn=(4,), up_attn=(4,), quantiser="vq", schedule="var", codebook=4096, phis=4,
        quant_conv=3, names="var",
    ),
    "small_32": _SMALL,
    "small_64": _SMALL_64,
    "small_vq_32": dataclasses.replace(_SMALL, **_VQ),
    "small_vq_64": dataclasses.replace(_SMALL_64, **_VQ),
}  # fmt: skip


class ImageTokenizer(nn.Module):
    """Encoder and decoder; the quantiser between them is not part of it."""

    cfg: TokenizerConfig
    dtype: jnp.dtype = jnp.float32  # of the decoder
    remat: str = "none"

    def setup(self):
        cfg = self.cfg
        self.encoder = Encoder(cfg, self.remat)
        self.decoder = Decoder(cfg, self.remat)
        if cfg.quant_conv:
            self.quant_conv = Conv(cfg.z, size=cfg.quant_conv)
            self.post_quant_conv = Conv(cfg.z, size=cfg.quant_conv)

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z"]:
        """Images to features in float32, products included (about six passes of a TPU's matrix
        unit, no TF32 on a GPU): where a feature is near 0, rounding decides the bit."""
        with jax.default_matmul_precision("highest"):
            x = self.encoder(images.astype(jnp.float32))
            return self.quant_conv(x) if self.cfg.quant_conv else x

    def features(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Latents to the input of the last convolution."""
        z = z.astype(self.dtype)
        return self.decoder.features(self.post_quant_conv(z) if self.cfg.quant_conv else z)

    def pixels(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """`features` to images in float32, not clipped."""
        return self.decoder.pixels(h).astype(jnp.float32)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.pixels(self.features(self.encode(images)))


# ---------------------------------------------------------------- functions on plain parameters


def quantiser(cfg: TokenizerConfig, options=None) -> Quantiser:
    """The quantiser of a tokenizer; options (config.model.recipe) are for training only."""
    match cfg.quantiser:
        case "bsq" | "lfq":
            return bits.build(cfg, options)
        case "vq":
            return vq.build(cfg, options)
    raise ValueError(
        f"config.model.tokenizer.quantiser={cfg.quantiser!r}: allowed are bsq, lfq, vq"
    )


def init(rng: Array, cfg: TokenizerConfig) -> dict:
    """Boxed parameters of the networks: encoder, decoder, convolutions around the quantiser."""
    side = 2 * cfg.stride
    return ImageTokenizer(cfg).init(rng, jnp.zeros((1, side, side, 3)))["params"]


def encode_features(
    params: dict, cfg: TokenizerConfig, images: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 z"]:
    """Images in [-1, 1] to what the quantiser takes."""
    return ImageTokenizer(cfg).apply({"params": params}, images, method="encode")


def decode_latents(
    params: dict, cfg: TokenizerConfig, latents: Float[Array, "b h w z"], *, dtype=jnp.float32
) -> Float[Array, "b h2 w2 3"]:
    """What the quantiser gives to images, clipped to [-1, 1]."""

    def draw(net, z):
        return net.pixels(net.features(z))

    images = ImageTokenizer(cfg, dtype).apply({"params": params}, latents, method=draw)
    return jnp.clip(images, -1.0, 1.0)


def encode(params: dict, cfg: TokenizerConfig, images: Float[Array, "b h w c"]) -> Array:
    """Images to codes [b, n, words] (bits) or [b, n] (rows of the codebook)."""
    own = params.get("quantiser", {})
    return quantiser(cfg).encode(own, encode_features(params, cfg, images))


def decode(
    params: dict,
    cfg: TokenizerConfig,
    codes: Array,
    *,
    grid: tuple[int, int] | None = None,
    dtype=jnp.float32,
) -> Float[Array, "b h w 3"]:
    """Codes to images; grid: latents of the finest scale, None = the nominal resolution's."""
    latents = quantiser(cfg).decode(params.get("quantiser", {}), codes, grid or cfg.grid)
    return decode_latents(params, cfg, latents, dtype=dtype)


def abstract(cfg: TokenizerConfig):
    """Shapes of all parameters, the quantiser's included, without boxes."""

    def make():
        key = jax.random.key(0)
        own = quantiser(cfg).init(key)[0]
        return nn.meta.unbox(init(key, cfg) | ({"quantiser": own} if own else {}))

    return jax.eval_shape(make)
