"""Infinity's sampler against the official one and against the masked forward pass."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import infinity as sampler
from inference import pictures
from kernels.bitwise.bits import unpack
from models import infinity_build
from models.blocks.common import row_keys
from models.tokenizers.conv import depth_to_space
from models.tokenizers.quantisers import schedules
from models.tokenizers.quantisers.bits import code, unpack_scales
from models.tokenizers.quantisers.resize import resize
from tests.golden import recipes
from tests.models import infinity_case as case

GUIDANCE = (1.0, 2.0, 3.0, 1.0, 3.0, 3.0, 3.0)  # of the golden pictures


def greedy(model, params, **options):
    tokens = np.zeros((2, 5), np.int32)
    key = jax.random.key(0)
    return sampler.generate_images(
        model, params, tokens, case.LENGTHS, key, temperature=0.0, **options
    )


def test_greedy_pictures_match_the_official_sampler():
    """Every bit of seven scales, with guidance on hidden states at some of them (spec 2.7)."""
    _, params, model = case.golden()
    got = greedy(model, params, guidance=GUIDANCE, insertion=-2)
    np.testing.assert_allclose(got.latents, recipes.load("infinity")["drawn_features"], atol=1e-5)
    assert got.bits.shape == (2, 533, 1) and got.images.dtype == jnp.uint8


def test_patchified_pictures_match_the_official_sampler():
    """Guidance on log odds; a token's 24 bits are 2 x 2 latents of 6."""
    _, params, model = case.golden(patchify=True)
    got = greedy(model, params, guidance=2.0)
    np.testing.assert_allclose(got.latents, recipes.load("infinity")["drawn_patchified"], atol=1e-5)
    layout = model.predict["layout"](1.0)
    bits = schedules.split(unpack(got.bits, 24) != 0, layout.tokens)
    again = sum(resize(code(depth_to_space(b, 2)), (16, 16)) for b in bits)
    np.testing.assert_allclose(again, got.latents, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 0.333, "patchified"])
def test_check_6_cached_scales_equal_the_masked_forward_pass(ratio):
    """Hidden states within 1e-5 in float32, at the first scales of each ratio; ragged text."""
    patchify = ratio == "patchified"
    system, params, model = case.golden(patchify)
    schedule = schedules.infinity(1.0 if patchify else ratio, "0.06M")[:3]
    bits = system.cfg.transformer.bits
    inputs = recipes.normal(3, 2, schedules.tokens(schedule) - 1, bits)

    @jax.jit
    def both(params, inputs):
        predict = model.predict
        text = predict["encode_text"](params, jnp.zeros((2, 5)), case.LENGTHS)
        condition = predict["condition"](params, *text)
        memory = predict["text_cache"](params, condition)
        cache, begin, out = predict["init_cache"](2, schedule), 0, []
        x = predict["start"](params, condition)
        for k, (h, w) in enumerate(schedule):
            if k:
                x = predict["embed"](params, inputs[:, begin : begin + h * w])
                begin += h * w
            step = predict["scale_step"](params, x, condition, memory, cache, schedule, k)
            out.append(step[0])
            cache = step[1]
        return jnp.concatenate(out, 1), predict["states"](params, condition, inputs, schedule)

    cached, masked = both(params, inputs)
    recipes.assert_close(cached, masked, 1e-5)


# ---------------------------------------------------------------- the small model


@functools.cache
def program(guided: bool = False, head: str = "bits"):
    """Compiled sampler of the small model, and the keys of its rows."""
    model, _ = case.tiny(head)
    run = sampler._compiled(tuple(model.predict.items()), (guided,) * 3, 0, 1.0, not guided)
    return run, row_keys(jax.random.key(1), jnp.arange(8))


def drawn(guidance=1.0, order=slice(None), guided=False, head="bits", temperature=1.0, top_p=0.97):
    """Pictures of the batch's prompts in another order."""
    model, params = case.tiny(head)
    batch, (run, keys) = case.batch_of(model), program(guided, head)
    ones = np.ones(3, np.float32)
    tokens, lengths = (batch[k][order] for k in ("gen_tokens", "gen_length"))
    lists = guidance * ones, temperature * ones
    return run(params, tokens, lengths, keys[order], *lists, np.float32(top_p))


@pytest.mark.parametrize("head", ["bits", "index"])
def test_pictures_are_their_bits(head):
    """Bits to codes to latents to pixels, and what the strip shows of every scale."""
    model, params = case.tiny(head)
    got = drawn(head=head)
    scales = model.predict["layout"](1.0).latents
    bits = unpack_scales(got.bits, scales, 8)
    latents = sum(resize(code(b), (4, 4)) for b in bits)
    np.testing.assert_allclose(got.latents, latents, atol=1e-6)
    pixels = jax.jit(model.predict["decode_latents"])(params, latents)
    images = np.floor((np.clip(pixels, -1, 1) + 1) / 2 * 255)
    assert np.abs(got.images - images).max() <= 1  # of 255, at the edge of a level
    assert got.strip.shape == (3, 8, 16, 16, 3)
    np.testing.assert_array_equal(got.strip[-1], got.images)


@pytest.mark.parametrize("head", ["bits", "index"])
def test_check_10_guidance_of_one_is_the_path_without(head):
    """The program with rows without text, at guidance 1, draws what the program without them
    does."""
    plain = drawn(head=head).bits
    np.testing.assert_array_equal(drawn(guided=True, head=head).bits, plain)
    assert (drawn(4.0, guided=True, head=head).bits != plain).any()


@pytest.mark.parametrize("head", ["bits", "index"])
def test_rows_draw_alone(head):
    """A row's picture depends on its prompt and its key, not on the batch around it."""
    order = np.arange(8)[::-1]
    np.testing.assert_array_equal(drawn(order=order, head=head).bits[order], drawn(head=head).bits)


def test_pictures_of_another_shape():
    """aspect: height / width; evaluators draw in the data's shape whatever it is."""
    model, params = case.tiny()
    batch = case.batch_of(model)
    asked = (params, batch["gen_tokens"], batch["gen_length"], jax.random.key(0))
    got = sampler.generate_images(model, *asked, aspect=2.25)
    assert got.images.shape == (8, 24, 12, 3) and got.strip is None
    scales = model.predict["layout"](2.25).latents
    assert scales[-1] == (6, 3)
    latents = sum(resize(code(b), (6, 3)) for b in unpack_scales(got.bits, scales, 8))
    np.testing.assert_allclose(got.latents, latents, atol=1e-6)
    config = case.tiny_config(sample__aspect=2.25, sample__strip=True)
    drawn = pictures.generate(config, model, *asked, shown=False)
    assert drawn.images.shape == (8, 16, 16, 3) and drawn.strip is None


def test_index_head_draws_codes():
    """Greedy: the likeliest code of the masked forward pass on what was drawn. A nucleus that holds
    one code is greedy too."""
    model, params = case.tiny("index")
    got, p = drawn(head="index", temperature=0.0), model.predict
    np.testing.assert_array_equal(drawn(head="index", top_p=0.0).bits, got.bits)
    assert (drawn(head="index").bits != got.bits).any()
    batch, scales = case.batch_of(model), p["layout"](1.0).latents
    bits = unpack_scales(got.bits, scales, 8)
    totals = np.cumsum([resize(code(b), (4, 4)) for b in bits], axis=0)
    inputs = [resize(t, s).reshape(8, -1, 8) for t, s in zip(totals, scales[1:])]

    @jax.jit
    def likeliest(params, inputs):
        text = p["captions"](params, batch)
        hidden = p["states"](params, text, inputs, scales)
        return infinity_build.likeliest(p["head"](params, text), hidden)

    np.testing.assert_array_equal(likeliest(params, jnp.concatenate(inputs, 1)), got.bits)


@pytest.mark.long
def test_matrices_rounded_once_draw_the_same_pictures():
    """bfloat16: bit for bit, with half of the blocks' bytes."""
    system, params, model = case.golden()
    system = system._replace(net=system.net.clone(dtype=jnp.bfloat16))
    predict = infinity_build.predictions(system, lambda ratio: (16, 16), jnp.bfloat16)
    predict["decode_latents"] = model.predict["decode_latents"]
    once = predict["decoding"](params)
    layers = jax.tree.leaves(once["transformer"]["layers"])
    assert sum(x.size for x in layers if x.dtype == jnp.bfloat16) > 0.9 * sum(
        x.size for x in layers
    )
    run = sampler.compiled_images(types.SimpleNamespace(predict=predict), guidance=2.0)
    scales = len(predict["layout"](1.0).tokens)
    rest = np.zeros((2, 5), np.int32), case.LENGTHS, row_keys(jax.random.key(0), jnp.arange(2))
    rest += np.full(scales, 2.0, np.float32), np.ones(scales, np.float32), np.float32(0.9)
    a, b = (run(p, *rest) for p in (params, once))
    np.testing.assert_array_equal(a.bits, b.bits)
    np.testing.assert_array_equal(a.images, b.images)


def test_lists_per_scale_are_checked():
    model, params = case.tiny()
    tokens = np.zeros((1, 6), np.int32)
    draw = functools.partial(
        sampler.generate_images, model, params, tokens, np.ones(1, np.int32), jax.random.key(0)
    )
    with pytest.raises(ValueError, match="config.sample.guidance=.* one for each of the 3 scales"):
        draw(guidance=(1.0, 2.0))
    with pytest.raises(ValueError, match="config.sample.insertion=-2: 0 .log odds., or -1 to -1"):
        draw(guidance=3.0, insertion=-2)
    assert sampler.pyramid(1, 3, 3) == (1.0, 2.0, 3.0)
