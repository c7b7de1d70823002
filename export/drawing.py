"""Exported pieces of drawing a picture token by token: prefill, one image token, decoding.

Guidance is on when config.sample.guidance is not 1: the cache then holds two rows, with the prompt
and without. The cache travels as plain arrays cache_0, cache_1, ...
"""

from typing import Any

import jax
import jax.numpy as jnp

from export.functions import Function, one_row
from inference.diffusion import guidance_weights, sample_head

NEEDS = {
    *("generation_prefix", "prefill", "extend", "turns", "start", "visual", "head"),
    "decode_latents",
}


def possible(predict) -> bool:
    """Whether these predict functions can be exported as pieces.

    Not with order_pos="rope2d": its step would need the place of the token before as well.
    """
    if not predict.keys() >= NEEDS:
        return False
    begin, place = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, 1)))
    return jax.eval_shape(predict["turns"], begin, place, place) is None


def functions(model, config, params: Any) -> dict[str, Function]:
    """image_prefill, image_token_step and image_decode of a model with an image-token sampler."""
    predict, sample = model.predict, config.sample
    branches = 1 if sample.guidance == 1.0 else 2
    batch = next(iter(model.batches.values()))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    tokens = jax.eval_shape(lambda k: predict["draw_orders"](k, sample.order), keys).shape[1]
    prefill = _prefill(predict, branches, tokens)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    prompt = {key: one_row(batch[key]) for key in ("gen_tokens", "gen_length")}
    prompt["next_position"] = index
    first, slot, cache = jax.eval_shape(prefill, params, prompt)
    step = _step(predict, branches, sample, jax.tree.structure(cache))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    state = {"inputs": first, "slot": slot, **_leaves(cache)}
    step_inputs = state | {
        "position": index, "next_position": index, "guidance": scalar, "temperature": scalar,
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }  # fmt: skip
    channels = jax.eval_shape(step, params, step_inputs)["token"].shape[-1]

    def call_prefill(params, inputs):
        first, slot, cache = prefill(params, inputs)
        return {"inputs": first, "slot": slot, **_leaves(cache)}

    def call_decode(params, inputs):
        return {"image": predict["decode_latents"](params, inputs["tokens"])}

    return {
        "image_prefill": Function(
            call_prefill, prompt, "reads a prompt; its outputs go into the first image_token_step"
        ),
        "image_token_step": Function(
            step,
            step_inputs,
            "draws the image token at raster index position; next_position is the one after it. "
            "Outputs other than token go into the next step",
        ),
        "image_decode": Function(
            call_decode,
            {"tokens": jax.ShapeDtypeStruct((1, tokens, channels), jnp.float32)},
            "image tokens in raster order to a picture in about [-1, 1]",
        ),
    }


def _leaves(cache: Any) -> dict[str, Any]:
    return {f"cache_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(cache))}


def _prefill(predict, branches: int, tokens: int):
    """(params, inputs) -> (inputs of the first step [1, g, d], slot [branches], cache)."""

    def prefill(params, inputs):
        prompt, length = inputs["gen_tokens"], inputs["gen_length"]
        x, valid = predict["generation_prefix"](params, prompt, length)
        if branches == 2:
            everyone = jnp.ones(1, bool)
            null = predict["generation_prefix"](params, prompt, length, drop=everyone)
            x, valid = jnp.concatenate([x, null[0]]), jnp.concatenate([valid, null[1]])
        first = predict["start"](params, inputs["next_position"])
        cache = predict["init_cache"](branches, x.shape[1] + tokens * first.shape[1])
        _, slot, cache = predict["prefill"](params, x, valid, cache)
        return first, slot, cache

    return prefill


def _step(predict, branches: int, sample, structure):
    """(params, inputs) -> {token [1, c], inputs, slot, cache_*} of the next step."""

    def step(params, inputs):
        cache = jax.tree.unflatten(
            structure, [inputs[f"cache_{i}"] for i in range(structure.num_leaves)]
        )
        x = jnp.tile(inputs["inputs"], (branches, 1, 1))
        z, cache = predict["extend"](params, x, inputs["slot"], cache)
        token = sample_head(
            predict["head"](params),
            z.reshape(branches, 1, -1),
            guidance_weights(inputs["guidance"]) if branches == 2 else None,
            jax.random.wrap_key_data(inputs["key"])[None],
            steps=sample.steps,
            temperature=inputs["temperature"],
            x0_clip=sample.x0_clip,
        )
        following = predict["visual"](
            params, token[:, None], inputs["position"][:, None], inputs["next_position"][:, None]
        )[:, 0]
        slot = inputs["slot"] + x.shape[1]
        return {"token": token, "inputs": following, "slot": slot, **_leaves(cache)}

    return step
