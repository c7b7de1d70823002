"""Training of the KL autoencoder behind the model seam: reconstruction + LPIPS + beta KL.

All terms are per pixel value, so that LDM's beta = 1e-6 means what it does there:
loss = mean |x - x'| + w LPIPS(x, x') + beta KL / (pixels x 3).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from models import Model, sized
from models.blocks import perceptual
from models.tokenizers import kl_vae, kl_vae_weights

MOMENTUM = 0.99  # of the running statistics of the latents


class Generated(NamedTuple):
    """What an adversarial objective needs of one forward pass of a generator."""

    real: Float[Array, "b h w 3"]
    fake: Float[Array, "b h w 3"]
    reconstruction: Callable[[Array], Array]  # fake -> scalar, the terms that compare with real
    last_layer: Callable[[Array], Any]  # cotangent of fake -> gradient of the last kernel
    rest: Float[Array, ""]  # the loss terms that do not depend on fake
    metrics: dict[str, Float[Array, ""]]
    extra: Any


def to_float(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Bytes to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def row_keys(rng: Array, example: Array) -> Array:
    """One key per example of the global batch, whatever the micro-batch or shard it lies in."""
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(example)


def update_statistics(stats: dict, z: Float[Array, "b h w z"]) -> dict:
    """Running first and second moments of the latents per channel, with the weight they carry."""
    z = jax.lax.stop_gradient(z)
    new = {"weight": 1.0, "mean": z.mean((0, 1, 2)), "square": jnp.square(z).mean((0, 1, 2))}
    return jax.tree.map(lambda old, x: MOMENTUM * old + (1 - MOMENTUM) * x, stats, new)


def finalise(params: dict, extra: dict) -> dict:
    """Parameters with the running statistics of the latents written in: what is exported."""
    stats = extra["latents"]
    weight = jnp.maximum(stats["weight"], 1e-6)
    mean = stats["mean"] / weight
    std = jnp.sqrt(jnp.maximum(stats["square"] / weight - jnp.square(mean), 1e-12))
    return {**params, "latents": {"mean": mean, "std": std}}


def psnr(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Peak signal-to-noise ratio in dB per image of pictures in [-1, 1], b clipped."""
    error = jnp.square(a - jnp.clip(b, -1.0, 1.0)).mean((1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))


def _reconstruction(m) -> Callable[[Array, Array], Float[Array, "b"]]:
    match m.reconstruction:
        case "l1":
            return lambda a, b: jnp.abs(a - b).mean((1, 2, 3))
        case "l2":
            return lambda a, b: jnp.square(a - b).mean((1, 2, 3))
        case other:
            raise ValueError(f"config.model.reconstruction={other!r}: allowed are l1, l2")


def build(config) -> Model:
    """The autoencoder of config.model.vae; batches are {image uint8, label int32}."""
    m, dtype = config.model, jnp.dtype(config.precision)
    cfg = sized(kl_vae.SIZES, m.vae, "model.vae")
    net, distance = kl_vae.KLVAE(cfg, dtype, config.remat), _reconstruction(m)
    side = config.data.image_size
    held = "latents" in config.objective.get("freeze", ())  # a decoder trained to given latents
    if side % cfg.stride:
        raise ValueError(f"config.data.image_size={side} must be a multiple of {cfg.stride}")

    def init(rng):
        stats = {"weight": jnp.zeros(()), "mean": jnp.zeros(cfg.z), "square": jnp.zeros(cfg.z)}
        extra = {"latents": stats}
        if m.perceptual:
            extra["perceptual"] = perceptual.load(m.perceptual)
        return kl_vae.init(rng, cfg), extra

    def generate(params, extra, batch, rng, *, norms) -> Generated:
        """One pass with a sampled posterior; terms are sums over images / norms['images']."""
        real = to_float(batch["image"])
        values, images = real[0].size, norms["images"]
        moments = net.apply({"params": params}, real, method="encode")
        z = kl_vae.sample_posterior(moments, row_keys(rng, batch["example"]))
        h = net.apply({"params": params}, z, method="features")

        def last(kernel):
            decoder = params["decoder"]
            conv_out = {**decoder["conv_out"], "kernel": kernel}
            replaced = {**params, "decoder": {**decoder, "conv_out": conv_out}}
            return net.apply({"params": replaced}, h, method="pixels")

        def compare(fake):
            total = distance(real, fake)
            if m.perceptual:
                total += m.perceptual_weight * perceptual.lpips(extra["perceptual"], real, fake)
            return total.sum() / images

        fake, pull = jax.vjp(last, params["decoder"]["conv_out"]["kernel"])
        kl = kl_vae.kl_divergence(moments).sum() / images
        metrics = {
            "distance": distance(real, fake).sum() / images,
            "kl": kl,
            "psnr": psnr(real, fake).sum() / images,
            "posterior_std": _posterior_std(moments).sum() / images,
        }
        extra = {**extra, "latents": update_statistics(extra["latents"], z)}
        gradient = lambda cotangent: pull(cotangent)[0]  # noqa: E731
        return Generated(real, fake, compare, gradient, m.kl * kl / values, metrics, extra)

    def loss(params, extra, batch, rng, *, step, norms):
        del step
        g = generate(params, extra, batch, rng, norms=norms)
        return g.reconstruction(g.fake) + g.rest, (g.metrics, g.extra)

    def encode(params, images):
        return kl_vae.encode(params, cfg, images, dtype=dtype)

    def decode(params, z):
        return kl_vae.decode(params, cfg, z, dtype=dtype)

    def encode_latents(params, images):
        z = kl_vae.posterior_mean(encode(params, images))
        return kl_vae.tokens_from_latents(kl_vae.normalise(z, params["latents"]), cfg.patch)

    def decode_latents(params, tokens):
        z = kl_vae.latents_from_tokens(tokens, cfg.patch)
        return decode(params, kl_vae.denormalise(z, params["latents"]))

    def reconstruct(params, images):
        return decode(params, kl_vae.posterior_mean(encode(params, images)))

    def spec(*shape, dtype):
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)

    return Model(
        init=init,
        loss=loss,
        norms=lambda batch: {"images": jnp.float32(batch["image"].shape[0])},
        predict={
            "encode": encode,
            "decode": decode,
            "reconstruct": reconstruct,
            "encode_latents": encode_latents,
            "decode_latents": decode_latents,
            "generate": generate,
            **({} if held else {"finalise": finalise}),
        },
        batches={
            "default": {
                "image": spec(side, side, 3, dtype=jnp.uint8),
                "label": spec(dtype=jnp.int32),
            }
        },
        weights=kl_vae_weights.weight_map(cfg),
    )


def _posterior_std(moments: Float[Array, "b h w z2"]) -> Float[Array, "b"]:
    return jnp.exp(0.5 * kl_vae.split_moments(moments)[1]).mean((1, 2, 3))
