"""Samplers of unified image-text models: random-order image tokens and prefix-LM text.

Everything after the prompt is one compiled loop: no host round trip per token. Rows do not depend
on each other: each has its own key, order and noise, folded from (rng, row, token).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from inference import beam
from inference.beam import EOS, PAD
from inference.diffusion import guidance_weights, sample_head
from models.tokenizers.autoencoder import to_uint8

# Keys of config.sample that say how a picture is drawn.
SAMPLER_KEYS = (
    "guidance", "image_guidance", "steps", "temperature", "schedule", "order", "x0_clip"
)  # fmt: skip


class Pictures(NamedTuple):
    """What one call of generate_images leaves: pictures, tokens, orders, conditions."""

    images: UInt8[Array, "b h w 3"]
    tokens: Float[Array, "b n c"]  # raster order, normalised latents
    order: Int[Array, "b n"]
    z: Float[Array, "b n d"]  # conditions in generation order (for tests and analysis)


def guidance_at(k, tokens: int, guidance: float, schedule: str):
    """Guidance for token k = 0..n-1: MAR's linear ramp 1 + (s - 1)(k + 1)/n, or constant."""
    match schedule:
        case "linear":
            return 1.0 + (guidance - 1.0) * (k + 1) / tokens
        case "constant":
            return jnp.float32(guidance)
        case _:
            raise ValueError(
                f"config.sample.schedule={schedule!r}: allowed are 'linear', 'constant'"
            )


def _branches(predict, params, tokens, length, source, guidance, image_guidance):
    """Prefixes of every guidance branch, stacked over rows, and the branch weights.

    One branch without guidance; [prompt, empty] with it; with a source picture and a second
    scale [prompt + image, image, nothing] (InstructPix2Pix):
    eps = e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0)).
    """
    rows = tokens.shape[0]
    x, valid = predict["generation_prefix"](params, tokens, length, source=source)
    if guidance == 1.0 and image_guidance == 1.0:
        return x, valid, 1
    everyone = jnp.ones((rows,), bool)
    null, null_valid = predict["generation_prefix"](
        params, tokens, length, source=source, drop=everyone
    )
    xs, valids = [x, null], [valid, null_valid]
    if image_guidance != 1.0:
        soft = x.shape[1] - tokens.shape[1]
        # Caches are filled from slot 0: what stays valid of this branch moves to the front.
        xs.append(jnp.roll(null, -soft, axis=1))
        valids.append(jnp.roll(null_valid.at[:, :soft].set(False), -soft, axis=1))
    return jnp.concatenate(xs), jnp.concatenate(valids), len(xs)


def _branch_weights(branches: int, scale, image_scale):
    """Weights of the branches' epsilons, summing to one."""
    match branches:
        case 1:
            return jnp.ones((1,))
        case 2:
            return guidance_weights(scale)
        case _:
            return jnp.stack([scale, image_scale - scale, 1.0 - image_scale])


@functools.lru_cache(maxsize=32)
def _compiled_images(functions, guidance, image_guidance, steps, schedule, order, x0_clip):
    """Jitted sampler for one set of static choices; `functions` is a hashable predict dict."""
    predict = dict(functions)

    def run(params, tokens, length, source, keys, temperature):
        rows = tokens.shape[0]
        x, valid, branches = _branches(
            predict, params, tokens, length, source, guidance, image_guidance
        )
        draw = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
        orders = predict["draw_orders"](draw[:, 0], order)
        n = orders.shape[1]
        one = predict["start"](params, orders[:, 0])
        group = one.shape[1]
        cache = predict["init_cache"](x.shape[0], x.shape[1] + n * group)
        _, begin, cache = predict["prefill"](params, x, valid, cache)
        following = jnp.roll(orders, -1, axis=1)  # the last token is never an input

        def step(carry, k):
            inputs, cache = carry
            own = jnp.where(k == 0, -1, orders[:, k - 1])
            places = (jnp.tile(x[:, None], (branches, 1)) for x in (own, orders[:, k]))
            z, cache = predict["extend"](
                params,
                jnp.tile(inputs, (branches, 1, 1)),
                begin + k * group,
                cache,
                predict["turns"](begin, *places),
            )
            scale = guidance_at(k, n, guidance, schedule)
            token = sample_head(
                predict["head"](params),
                z.reshape(branches, rows, -1),
                _branch_weights(branches, scale, jnp.float32(image_guidance)),
                jax.vmap(lambda key: jax.random.fold_in(key, k))(draw[:, 1]),
                steps=steps,
                temperature=temperature,
                x0_clip=x0_clip,
            )
            inputs = predict["visual"](
                params, token[:, None], orders[:, k, None], following[:, k, None]
            )[:, 0]
            return (inputs, cache), (token, z[:rows])

        _, (generated, z) = jax.lax.scan(step, (one, cache), jnp.arange(n))
        generated, z = generated.swapaxes(0, 1), z.swapaxes(0, 1)
        raster = jnp.zeros_like(generated).at[jnp.arange(rows)[:, None], orders].set(generated)
        return Pictures(to_uint8(predict["decode_latents"](params, raster)), raster, orders, z)

    return jax.jit(run)


def compiled_images(
    model, *, guidance, steps, schedule, order, x0_clip, image_guidance: float = 1.0
):
    """run(params, tokens, lengths, source, keys, temperature) -> Pictures, jitted and kept."""
    return _compiled_images(
        tuple(model.predict.items()),
        float(guidance),
        float(image_guidance),
        steps,
        schedule,
        order,
        x0_clip,
    )


def generate_images(
    model,
    params,
    tokens: Int[Array, "b p"],
    lengths: Int[Array, "b"],
    rng,
    *,
    guidance: float = 1.0,
    image_guidance: float = 1.0,
    steps: int = 100,
    temperature: float = 1.0,
    schedule: str = "linear",
    order: str = "random",
    x0_clip: float | None = None,
    source=None,
) -> Pictures:
    """Draw one picture per right-padded prompt.

    guidance: classifier-free scale s (1 runs no second branch); image_guidance: second scale for
    a source picture; steps: diffusion steps per token; temperature: of the per-step noise;
    source: (pictures uint8 [b, s, s, 3], tokens [b, n, c]) to edit.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(tokens.shape[0]))
    run = compiled_images(
        model,
        guidance=guidance,
        image_guidance=image_guidance,
        steps=steps,
        schedule=schedule,
        order=order,
        x0_clip=x0_clip,
    )
    return run(params, tokens, lengths, source, keys, jnp.float32(temperature))


@functools.lru_cache(maxsize=8)
def _compiled_text(functions, max_new):
    predict = dict(functions)

    def run(params, images, tokens, lengths, temperature, keys):
        x, valid = predict["understanding_prefix"](params, images, tokens, lengths)
        rows = x.shape[0]
        cache = predict["init_cache"](rows, x.shape[1] + max_new)
        picture = x.shape[1] - tokens.shape[1]
        last, begin, cache = predict["prefill"](params, x, valid, cache, picture)

        def pick(hidden, k):
            logits = predict["to_logits"](params, hidden)
            noise = jax.vmap(
                lambda key: jax.random.gumbel(jax.random.fold_in(key, k), logits.shape[1:])
            )(keys)
            return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)

        def body(carry):
            k, hidden, done, out, cache = carry
            token = jnp.where(done, PAD, pick(hidden, k))
            out = out.at[:, k].set(token)
            done = done | (token == EOS)
            x = predict["text"](params, token[:, None])
            hidden, cache = predict["extend"](params, x, begin + k, cache)
            return k + 1, hidden, done, out, cache

        def more(carry):
            return (carry[0] < max_new) & ~carry[2].all()

        out = jnp.full((rows, max_new), PAD, jnp.int32)
        carry = (jnp.int32(0), last, jnp.zeros((rows,), bool), out, cache)
        return jax.lax.while_loop(more, body, carry)[3]

    return jax.jit(run)


def generate_text(
    model,
    params,
    images: UInt8[Array, "b s s 3"],
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    *,
    max_new: int,
    temperature: float = 0.0,
    rng=None,
    beams: int = 1,
    length_penalty: float = 0.0,
) -> Int[Array, "b {max_new}"]:
    """Answer right-padded questions about pictures; greedy unless temperature or beams say other.

    beams > 1: beam search, hypotheses ranked as inference/beam.py says; it has no temperature.
    Returns ids up to and including EOS, PAD after; the loop ends when every row has ended.
    """
    if beams > 1:
        if temperature:
            raise ValueError(f"beam search (beams={beams}) has no temperature ({temperature})")
        search = beam.compiled(tuple(model.predict.items()), max_new, beams, float(length_penalty))
        return search(params, images, tokens, lengths)[0]
    rng = jax.random.key(0) if rng is None else rng
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(tokens.shape[0]))
    run = _compiled_text(tuple(model.predict.items()), max_new)
    return run(params, images, tokens, lengths, jnp.float32(temperature), keys)
