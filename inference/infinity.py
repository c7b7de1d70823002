"""Infinity's sampler: one compiled program draws a picture scale by scale and decodes it.

Each scale is one pass of the transformer over all its tokens, with keys and values of the scales
before in a cache; bits are drawn by kernels.bitwise.sample_bits. Scales have different shapes, so
that they are written out in the program; blocks are a loop.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from inference.text import keep_likely
from kernels import shard
from kernels.bitwise import sample_bits
from kernels.bitwise.bits import unpack
from models.blocks.common import row_keys
from models.infinity import IndexHead, modulated
from models.tokenizers.conv import depth_to_space, space_to_depth
from models.tokenizers.quantisers.bits import code
from models.tokenizers.quantisers.resize import resize

# Keys of config.sample that say how a picture is drawn.
SAMPLER_KEYS = ("guidance", "temperature", "top_p", "insertion", "aspect", "strip")

PerScale = float | Sequence[float]  # one number for all scales, or one for each


class Pictures(NamedTuple):
    """What one call of generate_images leaves."""

    images: UInt8[Array, "b h w 3"]
    bits: UInt32[Array, "b l words"]  # of all scales
    latents: Float[Array, "b h w z"]
    strip: UInt8[Array, "k b h w 3"] | None  # what the codes up to each scale give


def per_scale(value: PerScale, scales: int, key: str) -> np.ndarray:
    """float32 [k] of one number or k of them."""
    values = np.atleast_1d(np.asarray(value, np.float32))
    if values.shape not in ((1,), (scales,)):
        raise ValueError(
            f"config.sample.{key}={value}: one number, or one for each of the {scales} scales"
        )
    return np.broadcast_to(values, (scales,))


def pyramid(first: float, last: float, scales: int) -> tuple[float, ...]:
    """Guidance that rises linearly with the scale."""
    return tuple(np.linspace(first, last, scales).tolist())


def to_uint8(images: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """Pictures in [-1, 1] to bytes, cut off as the official sampler does."""
    return ((jnp.clip(images, -1.0, 1.0) + 1.0) / 2 * 255).astype(jnp.uint8)


def _uniforms(keys, k: int, shape) -> Float[Array, "b n d"]:
    """Numbers in [0, 1) of one scale: a row's depend on its key only."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, k), shape))(keys)


def _draw(hidden, head, keys, k: int, mix: bool, **draw) -> UInt32[Array, "b n words"]:
    """Bits of the first rows; mix: with guidance by the rows behind them."""
    if isinstance(head, IndexHead):
        return _draw_codes(hidden, head, keys, k, mix, **draw)
    rows = len(keys)
    scale, shift = head.scale, head.shift
    uniforms = _uniforms(keys, k, (hidden.shape[1], head.b.shape[0]))
    if mix:
        draw |= dict(x_uncond=hidden[rows:], scale_uncond=scale[rows:], shift_uncond=shift[rows:])
    own = dict(scale=scale[:rows], shift=shift[:rows])
    return sample_bits(hidden[:rows], head.w, head.b, uniforms, **own, **draw)[0]


def _draw_codes(hidden, head: IndexHead, keys, k, mix, *, temperature, top_p, guidance=1.0):
    """The same for whole codes; top_p: the nucleus of codes, as in text (inference/text.py)."""
    scores = modulated(hidden, head.scale, head.shift) @ head.table.T
    if mix:
        with_text, without = jnp.split(scores, 2)
        scores = guidance * with_text + (1.0 - guidance) * without
    scores = scores[: len(keys)]
    cool = scores / jnp.maximum(temperature, 1e-6)
    flat = keep_likely(cool.reshape(-1, cool.shape[-1]), 0, top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, k), scores.shape[1:]))
    drawn = jnp.argmax(flat.reshape(scores.shape) + noise(keys), axis=-1)
    best = jnp.argmax(scores, axis=-1)
    return jnp.where(temperature > 0, drawn, best)[..., None].astype(jnp.uint32)


@functools.lru_cache(maxsize=16)
def _compiled(functions, guided, insertion, aspect, strip):
    """Jitted sampler for one set of static choices; `functions` is a hashable predict dict."""
    predict = dict(functions)
    layout = predict["layout"](aspect)
    patchify, grid = layout.latents != layout.tokens, layout.latents[-1]
    branches = 2 if any(guided) else 1

    def run(params, tokens, lengths, keys, guidance, temperature, top_p):
        rows = tokens.shape[0]
        text, valid = predict["encode_text"](params, tokens, lengths)
        drop = None
        if branches == 2:  # rows with their text first, then without
            text, valid = (jnp.concatenate([x, x]) for x in (text, valid))
            drop = jnp.arange(2 * rows) >= rows
        condition = predict["condition"](params, text, valid, drop)
        memory = predict["text_cache"](params, condition)
        cache = predict["init_cache"](branches * rows, layout.tokens)
        head = predict["head"](params, condition)
        x, total, words, strips = predict["start"](params, condition), 0.0, [], []
        for k, (h, w) in enumerate(layout.tokens):
            mix = guided[k] and insertion == 0
            hidden, cache = predict["scale_step"](
                params,
                x,
                condition,
                memory,
                cache,
                layout.tokens,
                k,
                guidance[k],
                insertion if guided[k] else 0,
            )
            draw = dict(temperature=temperature[k], top_p=top_p)
            draw |= dict(guidance=guidance[k]) if mix else {}
            packed = _draw(hidden, head, keys, k, mix, **draw)
            bits = (unpack(packed, predict["bits"]) != 0).reshape(rows, h, w, -1)
            bits = depth_to_space(bits, 2) if patchify else bits
            total = total + resize(code(bits), grid)
            words.append(packed)
            if strip:
                strips.append(to_uint8(predict["decode_latents"](params, total)))
            if k + 1 < len(layout.tokens):
                x = resize(total, layout.latents[k + 1])
                x = space_to_depth(x, 2) if patchify else x
                x = predict["embed"](params, x.reshape(rows, -1, x.shape[-1]))
                x = jnp.concatenate([x] * branches)
        images = strips[-1] if strip else to_uint8(predict["decode_latents"](params, total))
        return Pictures(
            images, jnp.concatenate(words, axis=1), total, jnp.stack(strips) if strip else None
        )

    return jax.jit(run)


def compiled_images(model, *, guidance: PerScale = 1.0, insertion=0, aspect=1.0, strip=False):
    """run(params, tokens, lengths, keys, guidance [k], temperature [k], top_p) -> Pictures, jitted
    and kept. Of the guidance only where it is not one is compiled in: rows without text are run
    only if it is anywhere."""
    scales = len(model.predict["layout"](aspect).tokens)
    guided = tuple(bool(g != 1) for g in per_scale(guidance, scales, "guidance"))
    return _compiled(tuple(model.predict.items()), guided, int(insertion), float(aspect), strip)


def generate_images(
    model,
    params,
    tokens: Int[Array, "b p"],
    lengths: Int[Array, "b"],
    rng,
    *,
    guidance: PerScale = 1.0,
    temperature: PerScale = 1.0,
    top_p: float = 1.0,
    insertion: int = 0,
    aspect: float = 1.0,
    strip: bool = False,
    source=None,
) -> Pictures:
    """Draw one picture per right-padded prompt.

    guidance: classifier-free scale (1: none); temperature: 0 takes the likelier bits; top_p: a
    value of a bit with probability up to 1 - top_p is never drawn; insertion: guidance on the log
    odds (0) or behind block depth + insertion; aspect: height / width, of which the nearest shape
    of the schedule is drawn; strip: also what the picture is after each scale.
    """
    if source is not None:
        raise ValueError("this model draws from text only")
    scales = len(model.predict["layout"](aspect).tokens)
    run = compiled_images(model, guidance=guidance, insertion=insertion, aspect=aspect, strip=strip)
    rows = tokens.shape[0]
    # Rows that devices do not divide would lie whole on each of them, with their caches.
    spare = -rows % shard.size(shard.mesh_axes("batch"))
    if spare:
        tokens, lengths = (jnp.concatenate([x, x[:1].repeat(spare, 0)]) for x in (tokens, lengths))
    drawn = run(
        model.predict["decoding"](params),
        tokens,
        lengths,
        row_keys(rng, jnp.arange(rows + spare)),
        per_scale(guidance, scales, "guidance"),
        per_scale(temperature, scales, "temperature"),
        jnp.float32(top_p),
    )
    if not spare:
        return drawn
    images, bits, latents, strip_ = drawn
    cut = (x[:rows] for x in (images, bits, latents))
    return Pictures(*cut, None if strip_ is None else strip_[:, :rows])
