"""Discrete image tokenizers against public ones, their sizes and names, their training.

test_4_... are for section 4 (VQGAN) of the building blocks' specification.
"""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax.linen import meta

from configs.bsq_vae import RECIPE
from export.weights import from_published, to_published
from kernels.bitwise.bits import unpack
from models import MODELS
from models.tokenizers import discrete
from models.tokenizers.autoencoder import psnr, to_float
from models.tokenizers.discrete_weights import weight_map
from models.tokenizers.quantisers import bits, schedules, vq
from tests.golden import recipes
from training.objectives import OBJECTIVES
from training.sharding import make_mesh, scope

_CONV = dict(ch=32, mult=(1, 2), z=8, res_blocks=1, resolution=32)
CHAMELEON = discrete.TokenizerConfig(**_CONV, quantiser="vq", codebook=32, quant_conv=1)
INFINITY = discrete.TokenizerConfig(
    ch=24, mult=(1, 2), z=6, res_blocks=1, mid_attn=False, resolution=20, names="infinity",
    schedule="geometric", scales=3,
)  # fmt: skip
INFINITY_SCALES = ((1, 1), (3, 3), (6, 6), (10, 10))
VAR = discrete.TokenizerConfig(
    ch=32, z=8, attn=(4,), up_attn=(4,), resolution=64, names="var", quantiser="vq", codebook=48,
    phis=4, quant_conv=3, schedule="geometric", scales=3,
)  # fmt: skip


abstract = functools.cache(discrete.abstract)


@pytest.fixture(scope="module")
def golden():
    return recipes.load("tokenizers")


def published_shapes(cfg):
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract(cfg))
    return {k: v.shape for k, v in to_published(zeros, weight_map(cfg)).items()}


@functools.cache
def golden_params(cfg, seed, only=None):
    """Parameters from the recipe's weights under their published names."""
    shapes, like = published_shapes(cfg), abstract(cfg)
    if only:  # transformers ships no decoder
        like = {k: v for k, v in like.items() if k in only}
        shapes = {k: v for k, v in shapes.items() if not k.startswith("decoder.")}
    tensors = recipes.weights(shapes, seed)
    if only:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("post_quant_conv")}
    return from_published(tensors, weight_map(cfg), like)


# ---------------------------------------------------------------- against public implementations


def test_4_chameleon_encoder_matches_transformers():
    golden = recipes.load("chameleon")
    params = golden_params(CHAMELEON, 20, ("encoder", "quant_conv", "quantiser"))

    @jax.jit
    def run(params, images):
        features = discrete.encode_features(params, CHAMELEON, images)
        return features, vq.nearest(features, params["quantiser"]["embedding"])

    # Only the encoder's half: the module declares nothing that is not called.
    features, indices = run(params, recipes.normal(21, 2, 32, 32, 3))
    recipes.assert_close(features, golden["latents"], 1e-5)
    np.testing.assert_array_equal(indices, golden["indices"])
    ours = {
        f"{k} {','.join(map(str, s))}"
        for k, s in published_shapes(discrete.SIZES["chameleon"]).items()
        if not k.startswith("decoder.")
    }
    assert ours == set(golden["names"])


def test_4_vqgan_matches_liquid(golden):
    params = golden_params(CHAMELEON, 50)
    quantiser = discrete.quantiser(CHAMELEON, ml_collections.ConfigDict(RECIPE | dict(legacy=True)))

    @jax.jit
    def run(params, images):
        codes = discrete.encode(params, CHAMELEON, images)
        features = discrete.encode_features(params, CHAMELEON, images)
        extra = {"use": jnp.ones(32), "offset": jnp.zeros((32, 8))}
        loss = quantiser.quantise(
            params["quantiser"], extra, features, jax.random.key(0), example=None, images=2.0
        ).loss
        return codes, loss, discrete.decode(params, CHAMELEON, codes)

    codes, loss, images = run(params, recipes.normal(51, 2, 32, 32, 3))
    np.testing.assert_array_equal(codes.reshape(2, 16, 16), golden["vqgan_indices"])
    recipes.assert_close(loss, golden["vqgan_loss"], 1e-5)
    recipes.assert_close(images[:, ::2, ::2], np.clip(golden["vqgan_decoded"], -1, 1), 1e-4)


def test_bsq_vae_matches_infinity(golden):
    params = golden_params(INFINITY, 30)

    @jax.jit
    def run(params, images, latents):
        features = discrete.encode_features(params, INFINITY, images)
        scales = bits.residual(features, INFINITY_SCALES)
        words = bits.pack_scales(scales.bits)
        return features, scales.sum, words, discrete.decode_latents(params, INFINITY, latents)

    images = recipes.normal(31, 2, 20, 20, 3)
    features, latents, words, decoded = run(params, images, golden["infinity_latents"])
    recipes.assert_close(features, golden["infinity_features"], 1e-5)
    np.testing.assert_array_equal(unpack(words, 6), golden["infinity_bits"])
    recipes.assert_close(latents, golden["infinity_latents"], 1e-6)
    recipes.assert_close(decoded, golden["infinity_decoded"], 1e-4)


def test_residual_vq_matches_var(golden):
    params = golden_params(VAR, 40)
    quantiser = discrete.quantiser(VAR, ml_collections.ConfigDict(RECIPE))

    @jax.jit
    def run(params, images):
        features = discrete.encode_features(params, VAR, images)
        extra = {"use": jnp.ones(48), "offset": jnp.zeros((48, 8))}
        got = quantiser.quantise(
            params["quantiser"], extra, features, jax.random.key(0), example=None, images=2.0
        )
        codes = quantiser.encode(params["quantiser"], features)
        return features, got.latents, got.loss, codes, discrete.decode(params, VAR, codes)

    features, latents, loss, codes, images = run(params, recipes.normal(41, 2, 64, 64, 3))
    recipes.assert_close(features, golden["var_features"], 1e-5)
    np.testing.assert_array_equal(codes, golden["var_indices"])
    recipes.assert_close(latents, golden["var_latents"], 1e-5)
    recipes.assert_close(loss, golden["var_loss"], 1e-5)
    recipes.assert_close(images[:, ::3, ::3], golden["var_decoded"], 1e-4)


# ---------------------------------------------------------------- published sizes and names


def count(cfg):
    tree = abstract(cfg)
    return {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in tree.items()}


def test_4_published_parameter_counts():
    """Spec 2.1 and building blocks 4: 45.0 + 65.1 M, 33.1 + 48.5 M, 68,718 k."""
    d32, eight = count(discrete.SIZES["infinity_d32"]), count(discrete.SIZES["infinity_8b"])
    assert d32 == {"encoder": 45_025_696, "decoder": 65_092_355}
    assert eight == {"encoder": 33_139_598, "decoder": 48_484_611}
    chameleon = count(discrete.SIZES["chameleon"])
    assert chameleon["encoder"] == 27_194_880 and chameleon["decoder"] == 39_294_851
    assert sum(chameleon.values()) == 68_718_467
    for name, stride, grid in [
        ("infinity_d64", 16, 16), ("infinity_8b", 8, 32), ("chameleon", 16, 32), ("var", 16, 16),
    ]:  # fmt: skip
        cfg = discrete.SIZES[name]
        assert (cfg.stride, cfg.grid) == (stride, (grid, grid))


@pytest.mark.parametrize(
    "size, key", [("infinity_d32", "infinity_d32"), ("infinity_8b", "infinity_8b"),
                  ("chameleon", "chameleon"), ("var", "var")],
)  # fmt: skip
def test_published_names_and_shapes(size, key, golden):
    """Our names are theirs, but for counters and constants that training left in the files."""
    ours = {
        f"{k} {','.join(map(str, s))}" for k, s in published_shapes(discrete.SIZES[size]).items()
    }
    theirs = set(golden[f"names_{key}"])
    assert ours <= theirs
    assert {n.split(" ")[0] for n in theirs - ours} <= {
        "quantize.lfq.mask", "quantize.ema_vocab_hit_SV",
    }  # fmt: skip


@pytest.mark.parametrize("ratio", [0.333, 1.0, 1.5])
def test_aspect_ratios(ratio):
    """Pictures of any ratio to the tokens of its schedule and back; 40 bits take two words."""
    cfg = discrete.TokenizerConfig(
        ch=8, mult=(1,), z=40, res_blocks=1, mid_attn=False, groups=4, stem=4, schedule="dynamic"
    )
    schedule = schedules.infinity(ratio, "0.06M")
    images = jax.ShapeDtypeStruct((2, 4 * schedule[-1][0], 4 * schedule[-1][1], 3), jnp.float32)
    params = abstract(cfg)
    codes = jax.eval_shape(lambda p, x: discrete.encode(p, cfg, x), params, images)
    assert (codes.shape, codes.dtype) == ((2, schedules.tokens(schedule), 2), jnp.uint32)
    back = jax.eval_shape(lambda p, c: discrete.decode(p, cfg, c, grid=schedule[-1]), params, codes)
    assert back.shape == images.shape


def test_weights_round_trip_and_extra_tensors_are_ignored():
    params, names = golden_params(VAR, 40), weight_map(VAR)
    published = to_published(params, names) | {"quantize.ema_vocab_hit_SV": np.zeros((3, 48))}
    again = from_published(published, names, abstract(VAR))
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("size", ["small_32", "chameleon", "var"])
def test_codes_are_decided_by_float32_products(size):
    """Every product on the way to a code is HIGHEST, as TPUs and GPUs round by default; the
    decoder's are not. So is LFQ's softmax over all codes."""
    cfg = dataclasses.replace(discrete.SIZES[size], ch=32)
    images = jax.ShapeDtypeStruct((1, cfg.resolution, cfg.resolution, 3), jnp.float32)

    def products(call, *args):
        lowered = jax.jit(call).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        found = re.findall(r"stablehlo\.(?:convolution|dot_general).*", lowered)
        assert found
        return ["HIGHEST" in line for line in found]

    assert all(products(lambda p, x: discrete.encode(p, cfg, x), abstract(cfg), images))
    latents = jax.ShapeDtypeStruct((1, *cfg.grid, cfg.z), jnp.float32)
    draw = lambda p, z: discrete.decode_latents(p, cfg, z)  # noqa: E731
    assert not any(products(draw, abstract(cfg), latents))
    assert all(products(lambda u: bits.joint_entropies(u, 100.0), jnp.zeros((1, 2, 2, 9))))


# ---------------------------------------------------------------- training


def tiny_config(quantiser="bsq", **changes):
    """Whole config of a 16 px tokenizer that compiles in seconds."""
    tokenizer = dict(
        size="small_32", ch=16, z=8, groups=4, resolution=16, quantiser=quantiser, scales=3,
        codebook=32,
    )  # fmt: skip
    if quantiser == "vq":
        tokenizer["schedule"] = "single"
    config = ml_collections.ConfigDict(
        dict(
            model=dict(
                name="bsq_vae",
                tokenizer=tokenizer,
                recipe=dict(RECIPE),
                reconstruction="l1",
                perceptual="",
                perceptual_weight=1.0,
            ),
            objective=dict(name="model", freeze=("",)[:0]),
            optimizer=dict(groups={}),
            data=dict(image_size=16),
            batch_size=4,
            precision="float32",
            remat="none",
        )
    )
    config.update(changes)
    return config


def tiny_batch():
    coarse = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), np.uint8)
    return {
        "image": coarse.repeat(8, 1).repeat(8, 2),
        "label": np.arange(4, dtype=np.int32),
        "example": np.arange(4, dtype=np.int32),
    }


def train(config, steps, lr=3e-3):
    """(model, params for use, first and last params, metrics of every step)."""
    model = MODELS["bsq_vae"](config)
    objective = OBJECTIVES[config.objective.name](model, config)
    batch = tiny_batch()

    def init(rng):
        params, extra = model.init(rng)
        params, frozen = objective.init(rng, params)
        return meta.unbox((params, frozen, extra))

    with scope(make_mesh(dict(data=-1, fsdp=1, tensor=1, seq=1))):  # as the loop does
        first, frozen, extra = jax.jit(init)(jax.random.key(0))
    tx = optax.adam(lr, b1=0.5)

    @jax.jit
    def step(params, extra, opt, i):
        def loss(p):
            rng = jax.random.fold_in(jax.random.key(1), i)
            return objective.loss(p, frozen, extra, batch, rng, step=i, norms=model.norms(batch))

        (value, (metrics, extra)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), extra, opt, metrics | {"loss": value}

    params, opt, rows = first, tx.init(first), []
    for i in range(steps):
        params, extra, opt, metrics = step(params, extra, opt, i)
        rows.append({k: float(v) for k, v in metrics.items()})
    own = objective.model_params(params, frozen)
    if "finalise" in model.predict:
        own = model.predict["finalise"](own, extra)
    return model, own, first, params, rows


@pytest.mark.long
def test_bsq_vae_learns_beside_a_discriminator():
    """Every term on but LPIPS: L1, commitment, entropy, stochastic depth, hinge, LeCam."""
    config = tiny_config()
    config.model.recipe.update(drop_scales=0.5, weight=0.5)
    config.objective.update(
        name="adversarial", start=60, weight=0.1, adaptive=False, lecam=0.05, width=8, layers=1
    )
    model, params, first, last, rows = train(config, 80)
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 6
    assert rows[59]["gan/discriminator"] == 0 and rows[60]["gan/discriminator"] > 0
    assert rows[60]["gan/weight"] == pytest.approx(0.1)
    moved = lambda part: max(  # noqa: E731
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(first[part]), jax.tree.leaves(last[part]))
    )
    assert moved("discriminator") > 1e-3 and moved("encoder") > 1e-3
    assert rows[0]["bits_per_token"] == 8 and rows[0]["bits_per_image"] == 8 * (1 + 4 + 16)
    assert 0 < rows[-1]["codebook_usage"] <= 1

    images = to_float(tiny_batch()["image"])

    @jax.jit
    def use(params, images):
        codes = model.predict["encode"](params, images)
        return codes, model.predict["decode"](params, codes), model.predict["reconstruct"](
            params, images
        )  # fmt: skip

    codes, decoded, reconstructed = use(params, images)
    assert codes.shape == (4, 21, 1) and codes.dtype == jnp.uint32
    np.testing.assert_allclose(decoded, reconstructed, atol=1e-5)
    assert float(psnr(images, decoded).mean()) > rows[0]["psnr"] + 6
    assert float(jnp.abs(decoded).max()) <= 1


def test_vqgan_learns_and_uses_its_codes():
    config = tiny_config("vq")
    config.model.recipe.revive = 0.3
    model, params, _, _, rows = train(config, 150)
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 6
    assert rows[-1]["bits_used"] > 1.5 and rows[0]["bits_per_token"] == 5
    images = to_float(tiny_batch()["image"])
    decoded = jax.jit(model.predict["reconstruct"])(params, images)
    assert float(psnr(images, decoded).mean()) > rows[0]["psnr"] + 6


@pytest.mark.parametrize("part", ["", "quantiser", "quantiser/embedding"])
def test_frozen_quantisers_keep_their_codes(part):
    """No use is counted, no code revived, and nothing written into what is exported."""
    config = tiny_config("vq")
    config.model.recipe.revive = 0.995  # codes that this step does not use would move
    config.objective.freeze = ("encoder", part) if part else ("encoder",)
    model = MODELS["bsq_vae"](config)
    params, extra = meta.unbox(jax.jit(model.init)(jax.random.key(0)))
    loss = jax.jit(functools.partial(model.loss, step=0, norms=model.norms(tiny_batch())))
    _, (_, after) = loss(params, extra, tiny_batch(), jax.random.key(1))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), extra, after)["quantiser"]
    assert same == dict.fromkeys(("use", "offset"), bool(part))
    assert ("finalise" in model.predict) == (not part)


def test_sizes_are_buckets_with_fewer_of_the_larger():
    config = tiny_config()
    config.data.update(image_size=32, sizes=(16, 32))
    config.model.tokenizer.scales = 2
    batches = MODELS["bsq_vae"](config).batches
    shapes = {k: v["image"].shape for k, v in batches.items()}
    assert shapes == {"16": (4, 16, 16, 3), "32": (2, 32, 32, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(size="d32"), "config.model.tokenizer.size='d32': allowed are infinity_d16"),
        (dict(schedule="dynamic"), "schedule 'dynamic' has no grid 4 x 4"),
        (dict(quantiser="fsq"), "config.model.tokenizer.quantiser='fsq': allowed are bsq"),
        (dict(schedule="dens"), "config.model.tokenizer.schedule='dens': allowed are single"),
        (dict(stem=3), "config.data.image_size=16 must be a multiple of 3"),
    ],
)
def test_mistakes_are_named(change, message):
    config = tiny_config()
    config.model.tokenizer.update(change)
    with pytest.raises(ValueError, match=message):
        MODELS["bsq_vae"](config)


def test_mistakes_of_the_recipe_are_named():
    config = tiny_config("vq")
    config.model.recipe.drop_scales = 0.5
    with pytest.raises(ValueError, match="recipe.drop_scales=0.5: quantiser 'vq' drops no scales"):
        MODELS["bsq_vae"](config)
    config.model.recipe.update(drop_scales=0.0, schedule="dens")
    with pytest.raises(ValueError, match="config.model.recipe.schedule='dens': allowed are single"):
        MODELS["bsq_vae"](config)


@pytest.mark.long
def test_eight_devices_equal_one():
    script = Path(__file__).with_name("tokenizers_on_mesh.py")
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = dict(line.split() for line in run.stdout.splitlines())
    assert set(rows) == {"loss", "gradient", "extra", "codes"}
    assert float(rows["codes"]) == 0
    assert all(float(v) < 1e-5 for v in rows.values()), rows
