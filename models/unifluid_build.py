"""UniFluid behind the model seam: what samplers, evaluators and exporters call, and `build`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from export.weights import WeightMap, compose, flat_map
from models import Model, unifluid
from models.blocks import decoder_weights, diffusion_head_weights, siglip_weights
from models.blocks.decoder import init_cache
from models.blocks.losses import row_nll
from models.tokenizers import kl_vae, kl_vae_weights
from models.unifluid import UniFluid, UniFluidConfig, apply


def text_nll(net: UniFluid, params, batch) -> dict[str, Float[Array, "b"]]:
    """Sums per example over the answer tokens: nll (nats), correct, count."""
    hidden = unifluid.understanding_states(net, params, batch)
    return row_nll(
        hidden,
        unifluid.output_table(net, params),
        unifluid.next_tokens(batch),
        unifluid.answer_weights(batch),
        softcap=net.cfg.decoder.final_softcap,
    )


def prefill(net: UniFluid, params, x, valid, cache, picture: int = 0):
    """Right-padded prefix inputs [b, s, d] -> (state of the last valid one, length, cache).

    picture: how many of the first inputs are a picture to understand.
    """
    length = valid.sum(axis=1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    mask = unifluid.prompt_mask(net.cfg, valid, picture)
    hidden, cache = apply(net, params, "trunk", x, mask, positions, cache, length)
    last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    return last, length, cache


def extend(net: UniFluid, params, x, pos, cache, turns=None):
    """Append inputs [b, g, d] at positions pos.. [b] -> (state of the last one [b, d], cache).

    turns: `unifluid.turns` of this input of a picture.
    """
    for i in range(x.shape[1]):  # one by one: a ring of slots takes one token at a time
        positions = (pos + i)[:, None]
        hidden, cache = apply(
            net, params, "trunk", x[:, i, None], None, positions, cache, None, turns
        )
    return hidden[:, 0], cache


def understanding_prefix(net: UniFluid, params, image, tokens, length):
    """Prefix of an answer: SigLIP tokens, then right-padded BOS question sep."""
    soft = apply(net, params, "encode_image", image)
    text = apply(net, params, "text", tokens)
    valid = jnp.arange(tokens.shape[1]) < length[:, None]
    valid = jnp.concatenate([jnp.ones(soft.shape[:2], bool), valid], axis=1)
    return jnp.concatenate([soft.astype(text.dtype), text], axis=1), valid


def decode_latents(net: UniFluid, params, tokens) -> Float[Array, "b h w 3"]:
    """Raster image tokens [b, n, c] -> pictures in about [-1, 1]."""
    vae, cfg = params["vae"], net.cfg
    z = kl_vae.latents_from_tokens(tokens, cfg.vae.patch)
    return kl_vae.decode(vae, cfg.vae, kl_vae.denormalise(z, vae["latents"]))


def encode_latents(net: UniFluid, params, images) -> Float[Array, "b n c"]:
    """Pictures in [-1, 1] -> raster image tokens (posterior mean)."""
    vae, cfg = params["vae"], net.cfg
    mean = kl_vae.posterior_mean(kl_vae.encode(vae, cfg.vae, images))
    return unifluid.normalised_tokens(cfg, vae, mean)


def batch_spec(config, cfg: UniFluidConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One global mixed batch: generation rows (gen_*) and understanding rows (und_*)."""
    d, m = config.data, config.model
    mix = d.mix.t2i + d.mix.caption + d.mix.vqa
    gen = round(config.batch_size * d.mix.t2i / mix)
    und = config.batch_size - gen
    side = m.image_size // cfg.vae.stride

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def pixels(rows, size):
        return jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)

    moments = jax.ShapeDtypeStruct((gen, side, side, 2 * cfg.vae.z), jnp.float32)
    spec = {
        "gen_tokens": ints(gen, d.prompt_length),
        "gen_length": ints(gen),
        "und_image": pixels(und, cfg.vit.image_size),
        "und_tokens": ints(und, d.text_length),
        "und_prefix": ints(und),
        "und_length": ints(und),
    }
    if d.questions > 1:
        del spec["und_length"]
        spec["und_prefix"] = spec["und_segments"] = ints(und, d.text_length)
    spec["gen_image"] = pixels(gen, m.image_size)
    if d.latents:
        del spec["gen_image"]
        spec["gen_moments"] = moments
        spec |= {"gen_source_moments": moments} if d.edit else {}
    if d.edit:
        spec["gen_source_image"] = pixels(gen, cfg.vit.image_size)
    return {key: value for key, value in spec.items() if value.shape[0]}


def weight_map(cfg: UniFluidConfig, params) -> WeightMap:
    """Gemma-2, SigLIP, MAR's VAE and diffusion head under their published names, the rest flat."""
    parts = {
        "decoder": decoder_weights.weight_map(cfg.decoder),
        "vit": siglip_weights.weight_map(cfg.vit),
        "vae": (kl_vae_weights.weight_map(cfg.vae), "vae."),
        "head": diffusion_head_weights.weight_map("head."),
    }
    own = flat_map({k: v for k, v in params.items() if k not in parts})
    return compose(parts | {"": own})


def build(config) -> Model:
    """The flagship behind the seam of models/__init__.py."""
    cfg = unifluid.read_config(config)
    net = UniFluid(cfg, jnp.dtype(config.precision), config.remat)

    def init(rng):
        own, vae = jax.random.split(rng)
        size = cfg.vit.image_size
        image, tokens = jnp.zeros((1, size, size, 3), jnp.uint8), jnp.zeros((1, 1), jnp.int32)
        return {**net.init(own, image, tokens)["params"], "vae": kl_vae.init(vae, cfg.vae)}, {}

    def init_caches(batch, max_len):
        return init_cache(cfg.decoder, batch, max_len, jnp.dtype(config.precision))

    def logits(params, batch):
        hidden = unifluid.understanding_states(net, params, batch)
        return apply(net, params, "logits", hidden)

    def bind(function):
        return functools.partial(function, net)

    def method(name):
        return lambda params, *args: apply(net, params, name, *args)

    predict = {
        "text_nll": bind(text_nll),
        "logits": logits,
        "init_cache": init_caches,
        "prefill": bind(prefill),
        "extend": bind(extend),
        "turns": functools.partial(unifluid.turns, cfg),
        "generation_prefix": bind(unifluid.generation_prefix),
        "generation_states": bind(unifluid.generation_states),
        "understanding_prefix": bind(understanding_prefix),
        "decode_latents": bind(decode_latents),
        "encode_latents": bind(encode_latents),
        "text": method("text"),
        "to_logits": method("logits"),
        "start": method("start"),
        "visual": method("visual"),
        "head": bind(unifluid.head),
        "draw_orders": lambda keys, order: unifluid.draw_orders(keys, cfg.tokens, order),
    }
    return Model(
        init=init,
        loss=functools.partial(unifluid.loss, net),
        norms=functools.partial(unifluid.norms, cfg),
        predict=predict,
        batches={"image_text": batch_spec(config, cfg)},
        weights=weight_map(cfg, jax.eval_shape(init, jax.random.key(0))[0]),
    )
