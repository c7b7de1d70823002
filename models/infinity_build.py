"""Infinity's training and its model seam: frozen tokenizer, text encoder, transformer.

A batch's pictures go through the frozen tokenizer; bitwise self-correction makes inputs and labels
of what it gives (models/tokenizers/quantisers/self_correction.py). The loss of a token is the mean
over its bits of the cross-entropy (index head: the cross-entropy of its code over the number of
bits), weighted by one over the side of its scale; the sum over tokens, the mean over pictures.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from export.weights import compose
from kernels.attention import MaskSpec
from kernels.bitwise import bitwise_cross_entropy, ref
from kernels.bitwise.bits import pack, unpack
from models import Model, infinity, infinity_text, infinity_weights, sized, t5
from models.blocks.common import row_keys
from models.blocks.losses import token_nll
from models.infinity import (
    Condition,
    Head,
    IndexHead,
    PerLayer,
    Shared,
    TransformerConfig,
    modulated,
)
from models.infinity_scales import Rope2d, rope2d, scale_ids, scale_weights
from models.tokenizers import discrete, discrete_weights
from models.tokenizers.autoencoder import to_float
from models.tokenizers.quantisers.schedules import (
    RATIOS,
    Schedule,
    dynamic,
    nearest_ratio,
    tokens,
)
from models.tokenizers.quantisers.self_correction import draw_flips, self_correction

CORRECTIONS = ("self", "random", "none")


@dataclasses.dataclass(frozen=True)
class InfinityConfig:
    """Sizes and choices of training.

    correction: self (flipped bits, labels that correct them), random (flipped bits, labels as if
    they were not), none (teacher forcing).
    """

    transformer: TransformerConfig
    tokenizer: discrete.TokenizerConfig
    patchify: bool
    correction: str
    strength: float
    noise_scales: int
    reweight: bool
    text_drop: float


class Layout(NamedTuple):
    """Scales of a picture: of the tokenizer's latents, and of the transformer's tokens, which are
    2 x 2 latents each where it is patchified."""

    latents: Schedule
    tokens: Schedule


class System(NamedTuple):
    """What the functions below take: sizes, the transformer's module, the text encoder."""

    cfg: InfinityConfig
    net: infinity.Infinity
    text: infinity_text.TextEncoder


def layout(cfg: InfinityConfig, grid: tuple[int, int]) -> Layout:
    """Scales of pictures with this grid of latents."""
    latents = discrete.quantiser(cfg.tokenizer).schedule(tuple(grid))
    part = 2 if cfg.patchify else 1
    return Layout(latents, tuple((h // part, w // part) for h, w in latents))


def apply(system: System, params, method: str, *args):
    """Run one method of the transformer."""
    return system.net.apply({"params": params["transformer"]}, *args, method=method)


# ---------------------------------------------------------------- what predicts


def encode_text(system: System, params, tokens, length):
    """Right-padded token ids (or what the encoder takes) and their lengths -> (vectors [b, p,
    width], valid [b, p])."""
    valid = jnp.arange(tokens.shape[1]) < length[:, None]
    return system.text.encode(params.get("text", {}), tokens, valid), valid


def condition(system: System, params, text, valid, drop: Bool[Array, "b"] | None = None):
    """Encoded text -> Condition; rows of `drop` get none, but as long."""
    return apply(system, params, "condition", text, valid, drop)


def captions(system: System, params, batch, drop: Bool[Array, "b"] | None = None) -> Condition:
    """Condition of a batch's captions."""
    given = ("gen_text", "gen_text_length") if "gen_text" in batch else ("gen_tokens", "gen_length")
    text = encode_text(system, params, *(batch[key] for key in given))
    return condition(system, params, *text, drop)


def states(
    system: System,
    params,
    condition: Condition,
    inputs: Float[Array, "b m d"],
    schedule: Schedule,
    keep: Float[Array, "depth 2 b"] | None = None,
) -> Float[Array, "b l c"]:
    """Hidden states of all scales at once; inputs are those of the scales behind the first."""
    cfg, ids = system.cfg.transformer, scale_ids(schedule)
    start = apply(system, params, "start", condition)
    x = jnp.concatenate([start, apply(system, params, "embed", inputs)], axis=1)
    mask = MaskSpec(causal=False, scales=tuple(h * w for h, w in schedule))
    shared = Shared(condition, rope2d(schedule, cfg.head_dim), mask)
    layers = PerLayer(jnp.arange(cfg.depth), keep)
    return apply(system, params, "trunk", x, ids, layers, shared)[0]


def log_odds(system: System, params, condition: Condition, hidden) -> Float[Array, "b l d"]:
    """Of every bit, float32: for analysis, training does not hold them."""
    return ref.log_odds(hidden, *apply(system, params, "head", condition))


def scale_step(
    system: System,
    params,
    x: Float[Array, "b n c"],
    condition: Condition,
    text,
    cache,
    schedule: Schedule,
    k: int,
    guidance=1.0,
    insertion: int = 0,
):
    """One scale while sampling: embedded inputs [b, h_k w_k, c] -> (hidden states, cache).

    text: `infinity.text_cache`. insertion < 0: guidance on the hidden states behind block depth +
    insertion, the first half of the rows having the text, the second not.
    """
    cfg = system.cfg.transformer
    if insertion and not 0 < cfg.depth + insertion < cfg.depth:
        raise ValueError(
            f"config.sample.insertion={insertion}: 0 (log odds), or -1 to {1 - cfg.depth} (blocks)"
        )
    mix_at = cfg.depth + insertion if insertion else -1
    ids = scale_ids(schedule)
    here = slice(begin := tokens(schedule[:k]), begin + x.shape[1])
    rope = Rope2d(*(t[here] for t in rope2d(schedule, cfg.head_dim)))
    shared = Shared(condition, rope, None, guidance, begin, mix_at)
    layers = PerLayer(jnp.arange(cfg.depth), None, text)
    return apply(system, params, "trunk", x, ids[here], layers, shared, cache)


def encode_features(system: System, params, images: Float[Array, "b h w 3"]):
    """Pictures in [-1, 1] -> features that the quantiser takes, without gradient."""
    return jax.lax.stop_gradient(
        discrete.encode_features(params["vae"], system.cfg.tokenizer, images)
    )


def encode_latents(system: System, params, images: Float[Array, "b h w 3"]):
    """Pictures in [-1, 1] -> the sum of the codes of all scales [b, h, w, z]."""
    cfg = system.cfg.tokenizer
    codes = discrete.encode(params["vae"], cfg, images)
    grid = tuple(n // cfg.stride for n in images.shape[1:3])
    return discrete.quantiser(cfg).decode({}, codes, grid)


def decode_latents(system: System, params, latents, dtype=jnp.float32) -> Float[Array, "b h w 3"]:
    """The sum of codes -> pictures in [-1, 1]."""
    return discrete.decode_latents(params["vae"], system.cfg.tokenizer, latents, dtype=dtype)


# ---------------------------------------------------------------- loss


class Forced(NamedTuple):
    """A batch with teacher forcing: transformer inputs, packed labels, the scales."""

    inputs: Float[Array, "b m d"]
    labels: UInt32[Array, "b l words"]
    schedule: Schedule


def forced(
    system: System, params, images: UInt8[Array, "b h w 3"], flips=(), relabel: bool = True
) -> Forced:
    """Inputs and labels of uint8 pictures; flips and relabel: `self_correction`."""
    cfg = system.cfg
    features = encode_features(system, params, to_float(images))
    scales = layout(cfg, features.shape[1:3])
    inputs, labels = self_correction(
        features, scales.latents, flips, relabel=relabel, patchify=cfg.patchify
    )
    return Forced(inputs, labels, scales.tokens)


def _flips(cfg: InfinityConfig, rng, example, grid):
    if cfg.correction == "none":
        return ()
    return draw_flips(
        rng,
        example,
        layout(cfg, grid).latents,
        cfg.tokenizer.z,
        strength=cfg.strength,
        noise_scales=cfg.noise_scales,
    )


def token_weights(cfg: InfinityConfig, schedule: Schedule) -> Float[np.ndarray, "l"]:
    """Weights in the loss; they sum to one."""
    n = tokens(schedule)
    return scale_weights(schedule) if cfg.reweight else np.full(n, 1 / n, np.float32)


def loss(system: System, params, extra, batch, rng, *, step, norms):
    """Weighted bitwise cross-entropy in nats, as the loop wants it."""
    del step
    cfg, images, example = system.cfg, batch["gen_image"], batch["example"]
    flip_rng, row_rng = jax.random.split(rng)
    coin, branch = (row_keys(jax.random.fold_in(row_rng, i), example) for i in (0, 1))
    grid = tuple(n // cfg.tokenizer.stride for n in images.shape[1:3])
    flips = _flips(cfg, flip_rng, example, grid)
    given = forced(system, params, images, flips, relabel=cfg.correction != "random")
    drop = jax.vmap(jax.random.uniform)(coin) < cfg.text_drop
    text = captions(system, params, batch, drop)
    keep = infinity.drop_path(cfg.transformer, branch)
    hidden = states(system, params, text, given.inputs, given.schedule, keep)
    weight = token_weights(cfg, given.schedule)
    head = apply(system, params, "head", text)
    per_token = weighted_nll(head, cfg.transformer.bits, hidden, given.labels, weight)
    total = per_token.sum() / norms["pictures"]
    plain = jax.lax.stop_gradient(per_token / weight).mean(1).sum() / norms["pictures"]
    return total, ({"loss": total, "bit_nll": plain}, extra)


def weighted_nll(
    head: Head | IndexHead,
    bits: int,
    hidden: Float[Array, "b l c"],
    labels: UInt32[Array, "b l words"],
    weight: Float[np.ndarray, "l"],
) -> Float[Array, "b l"]:
    """Nats per bit of every token, times its weight; no log odds and no scores are held."""
    if isinstance(head, IndexHead):  # float32 as the bits' log odds; a code's number is its word
        x = modulated(hidden, head.scale, head.shift).reshape(-1, hidden.shape[-1])
        nll = token_nll(x, head.table, labels.reshape(-1).astype(jnp.int32))[0]
        return weight * nll.reshape(labels.shape[:2]) / bits
    weights = jnp.broadcast_to(weight, hidden.shape[:2])
    rows = dict(weights=weights, scale=head.scale, shift=head.shift)
    return bitwise_cross_entropy(hidden, head.w, head.b, labels, **rows)


def norms(batch) -> dict[str, Float[Array, ""]]:
    """The loss is a mean over the pictures of the global batch."""
    return {"pictures": jnp.float32(batch["gen_image"].shape[0])}


def bit_scores(system: System, params, batch, rng, flipped: float | Float[Array, ""] = 0.0):
    """{nll, accuracy, kept_nll, kept_accuracy}: [k], means over a batch's bits of each scale.

    flipped: share of the prefix's bits that are wrong. The labels correct them; "kept" are those of
    the right prefix. No text and no block is dropped.
    """
    cfg, images = system.cfg, batch["gen_image"]
    grid = tuple(n // cfg.tokenizer.stride for n in images.shape[1:3])
    keys = row_keys(rng, batch["example"])

    def flips_of(key):
        scales = enumerate(layout(cfg, grid).latents)
        shapes = [(jax.random.fold_in(key, k), (h, w, cfg.tokenizer.z)) for k, (h, w) in scales]
        return [jax.random.bernoulli(key, flipped, shape) for key, shape in shapes]

    flips = jax.vmap(flips_of)(keys)
    given = forced(system, params, images, flips)
    kept = forced(system, params, images, flips, relabel=False)
    text = captions(system, params, batch)
    head = apply(system, params, "head", text)
    hidden = states(system, params, text, given.inputs, given.schedule)
    ids = scale_ids(given.schedule)

    def means(x):
        return jax.ops.segment_sum(x.mean(0), ids, len(counts)) / counts

    counts, scores, bits = np.bincount(ids), {}, cfg.transformer.bits
    best, ones = unpack(likeliest(head, hidden), bits), np.ones(len(ids), np.float32)
    for case, labels in (("", given.labels), ("kept_", kept.labels)):
        scores[f"{case}nll"] = means(weighted_nll(head, bits, hidden, labels, ones))
        scores[f"{case}accuracy"] = means((best == unpack(labels, bits)).mean(-1))
    return scores


def likeliest(head: Head | IndexHead, hidden: Float[Array, "b l c"]) -> UInt32[Array, "b l words"]:
    """Of each token the likelier value of every bit, or the bits of the likeliest code."""
    if isinstance(head, IndexHead):
        scores = modulated(hidden, head.scale, head.shift) @ head.table.T
        return jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.uint32)
    return pack(ref.log_odds(hidden, *head) > 0)


# ---------------------------------------------------------------- from a config


def read_config(config) -> tuple[InfinityConfig, infinity_text.TextEncoder]:
    """config.model -> sizes with every choice checked, and the text encoder."""
    m = config.model
    if m.correction not in CORRECTIONS:
        raise ValueError(
            f"config.model.correction={m.correction!r}: allowed are {', '.join(CORRECTIONS)}"
        )
    tokenizer = sized(discrete.SIZES, m.tokenizer, "model.tokenizer")
    if tokenizer.quantiser != "bsq":
        raise ValueError(
            f"config.model.tokenizer.quantiser={tokenizer.quantiser!r}: allowed is bsq"
        )
    patchify = tokenizer.schedule == "dynamic_2x2"
    text = infinity_text.build(config)
    transformer = dataclasses.replace(
        sized(infinity.SIZES, m.transformer, "model.transformer"),
        bits=tokenizer.z * (4 if patchify else 1),
        text_width=text.width,
    )
    if transformer.text_length < config.data.prompt_length:
        raise ValueError(
            f"config.data.prompt_length={config.data.prompt_length} is more than "
            f"config.model.transformer.text_length={transformer.text_length}"
        )
    own = {f.name for f in dataclasses.fields(InfinityConfig)} - {
        "transformer", "tokenizer", "patchify"
    }  # fmt: skip
    return InfinityConfig(transformer, tokenizer, patchify, **{name: m[name] for name in own}), text


def grid_for(config, cfg: InfinityConfig, ratio: float) -> tuple[int, int]:
    """Grid of latents of pictures of about image_size^2 pixels with h / w = ratio, or the nearest
    that the schedule has."""
    side, patch = config.data.image_size // cfg.tokenizer.stride, 2 if cfg.patchify else 1
    if not cfg.tokenizer.schedule.startswith("dynamic"):
        return round(side * math.sqrt(ratio)), round(side / math.sqrt(ratio))
    scales = len(dynamic((side // patch,) * 2))
    return tuple(n * patch for n in RATIOS[nearest_ratio(ratio)][scales - 1])


def text_spec(config, text: infinity_text.TextEncoder) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's captions: tokens, and with config.data.text_embeddings what an encoder said."""
    rows, length = config.batch_size, config.data.prompt_length
    one = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    if not config.data.text_embeddings:
        return {"gen_tokens": tokens, "gen_length": one}
    longest = min(length, t5.MAX_TOKENS)
    vectors = jax.ShapeDtypeStruct((rows, longest, text.width), jnp.float16)
    return {
        "gen_tokens": tokens, "gen_length": one, "gen_text": vectors, "gen_text_length": one
    }  # fmt: skip


def batch_specs(config, system: System) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """One bucket of captioned pictures per aspect ratio."""
    cfg, mix, rows = system.cfg, config.data.mix, config.batch_size
    if config.data.name == "image_text" and (mix.caption or mix.vqa or not mix.t2i):
        raise ValueError("config.data.mix: this model draws only; caption and vqa must be 0")

    def spec(ratio):
        if cfg.tokenizer.schedule.startswith("dynamic") and ratio not in RATIOS:
            allowed = ", ".join(map(str, sorted(RATIOS)))
            raise ValueError(f"config.model.ratios has {ratio}: allowed are {allowed}")
        sides = (n * cfg.tokenizer.stride for n in grid_for(config, cfg, ratio))
        image = jax.ShapeDtypeStruct((rows, *sides, 3), jnp.uint8)
        return text_spec(config, system.text) | {"gen_image": image}

    return {f"{ratio:g}": spec(ratio) for ratio in config.model.ratios}


def decoding(params, dtype):
    """The parameters with the blocks' matrices in the type that they are multiplied in, once for
    all scales. The same numbers come out. Not to be jitted: that would copy what stays."""

    def one(path, x):
        matrix = path[-1].key == "kernel" and x.dtype != dtype
        return x.astype(dtype) if matrix else x

    transformer = params["transformer"]
    layers = jax.tree_util.tree_map_with_path(one, transformer["layers"])
    return {**params, "transformer": {**transformer, "layers": layers}}


def predictions(system: System, grid_of, dtype) -> dict:
    """What samplers and evaluators call; grid_of: (h / w) -> grid of latents."""
    cfg = system.cfg.transformer

    def bind(function, **options):
        return functools.partial(function, system, **options)

    def method(name):
        return lambda params, *args: apply(system, params, name, *args)

    return {
        "decoding": functools.partial(decoding, dtype=dtype),
        "encode_text": bind(encode_text),
        "condition": bind(condition),
        "captions": bind(captions),
        "states": bind(states),
        "log_odds": bind(log_odds),
        "forced": bind(forced),
        "bit_scores": bind(bit_scores),
        "start": method("start"),
        "embed": method("embed"),
        "head": method("head"),
        "bits": cfg.bits,
        "layout": lambda ratio=1.0: layout(system.cfg, grid_of(ratio)),
        "text_cache": lambda params, text: infinity.text_cache(params["transformer"], cfg, text),
        "init_cache": lambda rows, schedule: infinity.init_cache(cfg, rows, schedule, dtype),
        "scale_step": bind(scale_step),
        "encode_latents": bind(encode_latents),
        "decode_latents": bind(decode_latents, dtype=dtype),
    }


def build(config) -> Model:
    """The system behind the seam of models/__init__.py."""
    cfg, text = read_config(config)
    dtype = jnp.dtype(config.precision)
    system = System(cfg, infinity.Infinity(cfg.transformer, dtype, config.remat), text)

    def init(rng):
        own, words, vae = jax.random.split(rng, 3)
        words = text.init(words)
        return {
            "transformer": infinity.init(own, cfg.transformer),
            "vae": discrete.init(vae, cfg.tokenizer),
            **({"text": words} if words else {}),
        }, {}

    weights: dict[str, Any] = {
        "transformer": infinity_weights.weight_map(cfg.transformer),
        "text": (text.weights, "text."),
        "vae": (discrete_weights.weight_map(cfg.tokenizer), "vae."),
    }
    return Model(
        init=init,
        loss=functools.partial(loss, system),
        norms=norms,
        predict=predictions(system, functools.partial(grid_for, config, cfg), dtype),
        batches=batch_specs(config, system),
        weights=compose(weights),
    )
