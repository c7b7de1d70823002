"""Training of every image tokenizer behind the model seam: reconstruction + LPIPS + quantiser.

Terms are sums over images / norms["images"] of means over pixel values; the adversarial objective
takes the same pass apart through predict["generate"].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from models import Model
from models.blocks import perceptual
from models.tokenizers.quantisers import Quantiser


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


def to_uint8(images: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """[-1, 1] to bytes, rounded and clipped."""
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0, 255)).astype(jnp.uint8)


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


def batches(config) -> dict:
    """{image uint8, label int32}; one bucket per side in config.data.sizes, fewer of the larger."""

    def bucket(side, rows):
        return {
            "image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        }

    sizes = config.data.get("sizes", ())
    if not sizes:
        return {"default": bucket(config.data.image_size, config.batch_size)}
    return {str(s): bucket(s, config.batch_size * min(sizes) // s) for s in sizes}


def build(
    config,
    *,
    net,
    stride: int,
    quantiser: Quantiser,
    part: str,
    init_params: Callable[[Array], Any],
    predict: Mapping[str, Callable],
    weights,
) -> Model:
    """A model of `net` (methods encode, features, pixels) and a quantiser.

    part: where the quantiser's parameters lie in the model's, and its state in extra.
    """
    m, distance = config.model, _reconstruction(config.model)
    freeze = config.objective.get("freeze", ())
    held = any(f"{path}/".startswith(f"{part}/") for path in freeze)  # trained to given codes
    if config.objective.name != "adversarial" and "discriminator" in config.optimizer.groups:
        raise ValueError(
            f"config.objective.name={config.objective.name!r} has no discriminator, which "
            "config.optimizer.groups names: set --config.optimizer.groups={} too"
        )
    for side in (config.data.image_size, *config.data.get("sizes", ())):
        if side % stride:
            raise ValueError(f"config.data.image_size={side} must be a multiple of {stride}")

    def init(rng):
        own, network = jax.random.fold_in(rng, 1), init_params(rng)
        params, extra = quantiser.init(own)
        extra = {part: extra} if extra else {}
        if m.perceptual:
            extra["perceptual"] = perceptual.load(m.perceptual)
        return network | ({part: params} if params else {}), extra

    def generate(params, extra, batch, rng, *, norms) -> Generated:
        """One pass with the quantiser's gradients."""
        real, images = to_float(batch["image"]), norms["images"]
        got = quantiser.quantise(
            params.get(part, {}),
            extra.get(part, {}),
            net.apply({"params": params}, real, method="encode"),
            rng,
            example=batch["example"],
            images=images,
        )
        h = net.apply({"params": params}, got.latents, method="features")

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
        metrics = {
            "distance": distance(real, fake).sum() / images,
            "psnr": psnr(real, fake).sum() / images,
            **got.metrics,
        }
        if part in extra and not held:
            extra = {**extra, part: got.extra}
        gradient = lambda cotangent: pull(cotangent)[0]  # noqa: E731
        return Generated(real, fake, compare, gradient, got.loss, metrics, extra)

    def loss(params, extra, batch, rng, *, step, norms):
        del step
        g = generate(params, extra, batch, rng, norms=norms)
        return g.reconstruction(g.fake) + g.rest, (g.metrics, g.extra)

    def finalise(params, extra):
        """Parameters with what the quantiser's state knows written in: what is exported."""
        return {**params, part: quantiser.finalise(params[part], extra[part])}

    return Model(
        init=init,
        loss=loss,
        norms=lambda batch: {"images": jnp.float32(batch["image"].shape[0])},
        predict={
            **predict,
            "generate": generate,
            **({"finalise": finalise} if quantiser.finalise and not held else {}),
        },
        batches=batches(config),
        weights=weights,
    )
