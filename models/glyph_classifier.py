"""A small CNN that tells glyphs apart; evaluation compares pictures by its features.

Features are unit vectors, classes are unit vectors too (logit = scale x cosine), so that Euclidean
distance between features is what training shaped. Trained under shifts, scales, colour jitter, blur
and noise, the harmless differences between a drawn glyph and its original.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import Model, sized
from models.blocks.common import row_keys
from models.tokenizers.autoencoder import to_float
from models.tokenizers.conv import Conv, Norm, ResBlock, space_to_depth


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Widths per level (each halves the grid after the first), pixels folded by the stem."""

    widths: tuple[int, ...] = (32, 64, 128)
    features: int = 128
    stem: int = 2
    groups: int = 8
    resolution: int = 32


SIZES = {
    "small_32": ClassifierConfig(),
    "small_64": ClassifierConfig(stem=4, resolution=64),
}


class Body(nn.Module):
    """Pictures to unit feature vectors."""

    cfg: ClassifierConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b f"]:
        cfg = self.cfg
        x = space_to_depth(images.astype(self.dtype), cfg.stem)
        for level, width in enumerate(cfg.widths):
            x = Conv(width, stride=1 if level == 0 else 2, name=f"conv_{level}")(x)
            x = ResBlock(width, cfg.groups, name=f"block_{level}")(x)
        x = nn.swish(Norm(cfg.groups, name="norm")(x)).astype(jnp.float32).mean((1, 2))
        init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), ("channels_in", "channels_out")
        )
        return unit(nn.Dense(cfg.features, use_bias=False, kernel_init=init, name="out")(x))


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Vectors of length one."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def features(
    body: dict, cfg: ClassifierConfig, images: Float[Array, "b h w 3"], *, dtype=jnp.float32
) -> Float[Array, "b f"]:
    """Features of pictures in [-1, 1] with the shipped parameters, params["body"]."""
    return Body(cfg, dtype).apply({"params": body}, images)


def init_body(rng: Array, cfg: ClassifierConfig) -> dict:
    """Boxed parameters of the feature network alone: what evaluation loads."""
    side = cfg.resolution
    return Body(cfg).init(rng, jnp.zeros((1, side, side, 3)))["params"]


def augment(images: Float[Array, "b h w 3"], keys: Array) -> Float[Array, "b h w 3"]:
    """Per row: scale 0.85-1.1, shift up to 1/12 of the side, brightness and contrast per channel,
    partial blur, noise; white enters at the edges."""

    def one(x, key):
        k = jax.random.split(key, 6)
        side = x.shape[0]
        scale = jnp.exp(jax.random.uniform(k[0], (2,), minval=-0.16, maxval=0.1))
        middle = 0.5 * side * (1 - scale)
        shift = middle + jax.random.uniform(k[1], (2,), minval=-1, maxval=1) * side / 12
        dark = jax.image.scale_and_translate(
            1.0 - x, x.shape, (0, 1), scale, shift, "linear", antialias=False
        )
        x = 1.0 - dark
        x = x * (1 + 0.1 * jax.random.normal(k[2], (3,))) + 0.05 * jax.random.normal(k[3], (3,))
        padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
        rows = padded[:-2] + padded[1:-1] + padded[2:]
        blurred = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
        x = x + jax.random.uniform(k[4]) * (blurred - x)
        amount, noise = jax.random.split(k[5])
        return x + 0.15 * jax.random.uniform(amount) * jax.random.normal(noise, x.shape)

    return jax.vmap(one)(images, keys)


def build(config) -> Model:
    """The classifier of config.model.net; batches are {image uint8, label int32}."""
    m, dtype = config.model, jnp.dtype(config.precision)
    cfg, side = sized(SIZES, m.net, "model.net"), config.data.image_size
    if side % (cfg.stem * 2 ** (len(cfg.widths) - 1)):
        raise ValueError(f"config.data.image_size={side} does not fit the net {m.net.size!r}")
    body = Body(cfg, dtype)

    def init(rng):
        own, head = jax.random.split(rng)
        table = nn.with_logical_partitioning(
            nn.initializers.normal(cfg.features**-0.5), ("classes", "channels_in")
        )
        return {"body": init_body(own, cfg), "classes": table(head, (m.classes, cfg.features))}, {}

    def logits(params, images):
        return m.scale * body.apply({"params": params["body"]}, images) @ unit(params["classes"]).T

    def loss(params, extra, batch, rng, *, step, norms):
        del step
        images = augment(to_float(batch["image"]), row_keys(rng, batch["example"]))
        scores = nn.log_softmax(logits(params, images))
        nll = -jnp.take_along_axis(scores, batch["label"][:, None], axis=1)[:, 0]
        correct = (scores.argmax(-1) == batch["label"]).astype(jnp.float32)
        total = nll.sum() / norms["images"]
        metrics = {"nll": total, "accuracy": correct.sum() / norms["images"]}
        return total, (metrics, extra)

    def spec(*shape, dtype):
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)

    return Model(
        init=init,
        loss=loss,
        norms=lambda batch: {"images": jnp.float32(batch["image"].shape[0])},
        predict={
            "features": lambda params, x: features(params["body"], cfg, x, dtype=dtype),
            "logits": logits,
        },
        batches={
            "default": {
                "image": spec(side, side, 3, dtype=jnp.uint8),
                "label": spec(dtype=jnp.int32),
            }
        },
    )
