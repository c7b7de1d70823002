"""Training of discrete image tokenizers behind the model seam; see `autoencoder.py`."""

import jax.numpy as jnp

from models import Model, sized
from models.tokenizers import autoencoder, discrete, discrete_weights
from models.tokenizers.quantisers.schedules import schedule_for


def build(config) -> Model:
    """The tokenizer of config.model.tokenizer, trained by config.model.recipe.

    predict: encode (images -> codes), decode (codes -> images), reconstruct, and the halves of them
    at the features: encode_features, decode_latents, for models of several scales.
    """
    m, dtype = config.model, jnp.dtype(config.precision)
    cfg = sized(discrete.SIZES, m.tokenizer, "model.tokenizer")
    quantiser = discrete.quantiser(cfg, m.recipe)
    side = config.data.image_size // cfg.stride
    for pixels in (config.data.image_size, *config.data.get("sizes", ())):
        grid = (pixels // cfg.stride,) * 2
        # One that does not fit is an error now.
        schedule_for(cfg.schedule, grid, cfg.scales)
        if m.recipe.schedule:
            schedule_for(m.recipe.schedule, grid, cfg.scales, key="model.recipe.schedule")

    def encode(params, images):
        return discrete.encode(params, cfg, images)

    def decode(params, codes, grid=(side, side)):
        return discrete.decode(params, cfg, codes, grid=grid, dtype=dtype)

    def reconstruct(params, images):
        grid = tuple(n // cfg.stride for n in images.shape[1:3])
        return decode(params, encode(params, images), grid)

    return autoencoder.build(
        config,
        net=discrete.ImageTokenizer(cfg, dtype, config.remat),
        stride=cfg.stride,
        quantiser=quantiser,
        part="quantiser",
        init_params=lambda rng: discrete.init(rng, cfg),
        predict={
            "encode": encode,
            "decode": decode,
            "reconstruct": reconstruct,
            "encode_features": lambda params, images: discrete.encode_features(params, cfg, images),
            "decode_latents": lambda params, z: discrete.decode_latents(
                params, cfg, z, dtype=dtype
            ),
        },
        weights=discrete_weights.weight_map(cfg),
    )
