"""Infinity's transformer against the official one; acceptance checks of the spec by number."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from export.files import save_safetensors
from export.weights import from_published, to_published
from inference.infinity import generate_images
from kernels.bitwise import bitwise_cross_entropy
from kernels.bitwise.bits import pack
from models import MODELS, infinity, infinity_build, infinity_weights
from models.infinity_scales import rope_positions, scale_ids, scale_weights
from models.tokenizers.quantisers import schedules
from tests.golden import recipes
from tests.models import infinity_case as case
from training import init_from, loop, state
from training.objectives import OBJECTIVES
from training.setup import load_for_use
from training.sharding import make_mesh, scope
from training.step import build_train_step, jit_train_step
from training.tree import flat


@pytest.fixture(scope="module")
def golden():
    return recipes.load("infinity")


@pytest.fixture(scope="module")
def forced():
    """(params, inputs [2, 532, 6], drop) -> (condition, hidden states, log odds), compiled once."""
    system, *_ = case.golden()

    @jax.jit
    def run(params, inputs, drop):
        text = infinity_build.encode_text(system, params, jnp.zeros((2, 5)), case.LENGTHS)
        condition = infinity_build.condition(system, params, *text, drop)
        hidden = infinity_build.states(system, params, condition, inputs, case.TALL)
        return condition, hidden, infinity_build.log_odds(system, params, condition, hidden)

    return run


def difference(logits):
    """Official pairs of logits [.., 2 d] -> log odds [.., d]."""
    pairs = logits.reshape(*logits.shape[:-1], -1, 2)
    return pairs[..., 1] - pairs[..., 0]


# ---------------------------------------------------------------- against the official code


def test_logits_and_loss_match_the_official_transformer(golden, forced):
    """Spec section 6: logits 5e-5, loss of a token 5e-6; ragged text, padding is not seen."""
    system, params, _ = case.golden()
    inputs, none = recipes.normal(62, 2, 532, 6), np.zeros(2, bool)
    condition, hidden, z = forced(params, inputs, none)
    np.testing.assert_allclose(z[:, ::7], difference(golden["logits"]), atol=5e-5)

    labels = np.random.default_rng(63).integers(0, 2, (2, 533, 6))
    head = infinity_build.apply(system, params, "head", condition)
    options = dict(scale=head.scale, shift=head.shift)
    token = bitwise_cross_entropy(hidden, head.w, head.b, pack(labels), **options)
    np.testing.assert_allclose(token[:, ::7], golden["token_loss"], atol=5e-6)
    weighted = (token * scale_weights(case.TALL)).sum(1).mean()
    np.testing.assert_allclose(weighted, golden["loss"], atol=1e-6)

    *_, z = forced(params, inputs, ~none)
    np.testing.assert_allclose(z[:, ::41], difference(golden["uncond"]), atol=5e-5)


def test_names_are_the_official_ones_both_ways(golden):
    """All but constants; block groups included. There and back is the identity."""
    system, params, _ = case.golden()
    cfg = system.cfg.transformer
    names = infinity_weights.weight_map(cfg)
    ours = {f"{k} {','.join(map(str, s))}" for k, s in case.published_shapes(cfg).items()}
    theirs = set(golden["names"].tolist())
    assert ours <= theirs
    assert {n.split(" ")[0].rsplit(".", 1)[-1] for n in theirs - ours} == {"zero_k_bias"}

    published = to_published(params["transformer"], names)
    published["block_chunks.0.module.1.sa.zero_k_bias"] = np.zeros(48, np.float32)
    flash = "block_chunks.1.module.0.sa.scale_mul_1H11"  # trained with flash attention
    published[flash] = published[flash].reshape(1, 1, 4, 1)
    again = from_published(published, names, case.shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, again, params["transformer"])


def test_check_1_rope_positions(golden):
    """Every side of every scale of the 15 ratios; the lists of spec section 2.6."""
    found = []
    for schedule in (schedules.RATIOS[r] for r in sorted(schedules.RATIOS, reverse=True)):
        positions, begin = rope_positions(schedule), 0
        for h, w in schedule:
            grid = positions[begin : begin + h * w].reshape(h, w, 2)
            assert (grid[..., 0] == grid[:, :1, 0]).all() and (grid[..., 1] == grid[:1, :, 1]).all()
            found += [grid[:, 0, 0], grid[0, :, 1]]
            begin += h * w
    assert sorted(map(tuple, found)) == sorted(map(tuple, _split(golden["positions"])))
    side = rope_positions(schedules.infinity(1.0, "0.06M"))[-256:-1:16, 0]
    assert side.tolist() == [4 * i for i in range(16)]
    twelve = rope_positions(schedules.infinity(1.0, "0.06M"))[-256 - 144 : -256 : 12, 0]
    assert twelve.tolist() == [0, 5, 11, 16, 21, 27, 32, 37, 43, 48, 53, 59]
    tall = rope_positions(schedules.infinity(1.25, "0.06M"))[-320::16, 0]
    assert tall.tolist()[:9] == [0, 4, 7, 10, 14, 18, 21, 24, 28]
    # A schedule that is not Infinity's counts on its own last scale.
    own = rope_positions(((1, 1), (2, 2), (8, 8)))
    assert own[1:5].tolist() == [[0, 0], [0, 4], [4, 0], [4, 4]] and own[-1].tolist() == [7, 7]


def _split(positions):
    """The lists of a file in which each begins with a 0."""
    return np.split(positions, np.flatnonzero(positions == 0)[1:])


def test_check_8_parameter_counts():
    """Spec section 3, within 0.1 %; the text encoder and the tokenizer are not counted."""
    published = {
        "layer12": 125.19, "layer16": 361.6, "layer24": 940.9, "2b": 2204.6, "layer32": 2256.7,
        "layer40": 4716.4, "layer48": 8767, "8b": 8375.8, "20b": 19952,
    }  # fmt: skip
    for name, millions in published.items():
        leaves = jax.tree.leaves(case.shapes(infinity.SIZES[name]))
        count = sum(math.prod(x.shape) for x in leaves)
        assert count == pytest.approx(millions * 1e6, rel=1e-4), name
    assert infinity.SIZES["layer32"].mlp == 8192 and infinity.SIZES["layer48"].mlp == 13312


# ---------------------------------------------------------------- properties


def test_check_5_scale_causality(forced):
    """Inputs of scale k change no log odds of earlier scales, exactly, and some of scale k."""
    _, params, _ = case.golden()
    inputs, none = recipes.normal(62, 2, 532, 6), np.zeros(2, bool)
    *_, before = forced(params, inputs, none)
    ids = scale_ids(case.TALL)
    for k in (1, 3, 6):
        changed = inputs + np.where(ids[1:] == k, 0.5, 0.0)[:, None].astype(np.float32)
        *_, after = forced(params, changed, none)
        np.testing.assert_array_equal(before[:, ids < k], after[:, ids < k])
        assert np.abs(before - after)[:, ids == k].max() > 1e-3
        assert k == 6 or np.abs(before - after)[:, ids > k].max() > 1e-3


def test_check_7_two_columns_weights_and_uniform_logits():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(40, 16)), rng.normal(size=(16, 8, 2))
    labels = rng.integers(0, 2, (40, 8))
    logits = np.einsum("nc,cdk->ndk", x, kernel)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, labels[..., None], -1).mean((1, 2))
    w = jnp.asarray(kernel[..., 1] - kernel[..., 0], jnp.float32)
    got = bitwise_cross_entropy(jnp.asarray(x, jnp.float32), w, jnp.zeros(8), pack(labels))
    np.testing.assert_allclose(got, want, atol=2e-6)
    none = bitwise_cross_entropy(jnp.zeros((3, 16)), w, jnp.zeros(8), pack(labels[:3]))
    np.testing.assert_allclose(none, math.log(2), rtol=1e-6)
    for ratio in schedules.RATIOS:
        schedule = schedules.infinity(ratio)
        weight = scale_weights(schedule)
        assert weight.sum() == pytest.approx(1, abs=1e-5)
        area = np.array([h * w for h, w in schedule])[scale_ids(schedule)]
        np.testing.assert_allclose(weight * np.sqrt(area), weight[0], rtol=1e-5)


def test_start_is_ln_2_and_small_branches():
    """Spec section 2.6, "Init": the head starts small, so that every bit starts undecided."""
    cfg = infinity.SIZES["debug"]
    params = jax.jit(lambda: infinity.init(jax.random.key(0), cfg))()
    params = jax.tree.map(np.asarray, meta.unbox(params))
    std = math.sqrt(1 / (3 * 64))
    for path, want in {
        "sa/q": std, "sa/o": std / 2, "ca/o": std / 2, "mlp/in": std, "mlp/out": std / 2,
    }.items():  # fmt: skip
        part, name = path.split("/")
        assert params["layers"][part][name]["kernel"].std() == pytest.approx(want, rel=0.05)
    own = params["layers"]["modulation"]
    assert own[:, :2].std() == pytest.approx(5e-6 / 8, rel=0.2)
    assert own[:, 2:].std() == pytest.approx(1e-3 / 8, rel=0.1)
    assert params["head_kernel"].std() == pytest.approx(0.02 * std, rel=0.05)
    assert params["head_modulation"]["kernel"].std() == pytest.approx(1e-3 * std, rel=0.05)
    assert np.exp(params["layers"]["sa"]["scale"]) == pytest.approx(4.0)
    uncond = infinity.unconditional_init(jax.random.key(1), (64, 2048), jnp.float32)
    assert np.abs(uncond).max() < 2 / math.sqrt(2048) and uncond.std() > 0.8 / math.sqrt(2048)


def test_drop_path_keeps_the_mean():
    """Linear in depth, scaled by what is kept; a row's coins depend on its key only."""
    cfg = infinity.TransformerConfig(32, 5, 2, drop_path=0.4, chunks=1)
    keys = jax.random.split(jax.random.key(0), 4000)
    keep = infinity.drop_path(cfg, keys)
    assert keep.shape == (5, 2, 4000) and (keep[0] == 1).all()
    np.testing.assert_allclose((keep == 0).mean((1, 2)), np.linspace(0, 0.4, 5), atol=0.02)
    np.testing.assert_allclose(keep.mean((1, 2)), 1, atol=0.03)
    np.testing.assert_array_equal(keep[..., 7:9], infinity.drop_path(cfg, keys[7:9]))
    assert infinity.drop_path(infinity.SIZES["debug"], keys) is None


def test_check_4_what_is_learnt_in_the_ablations():
    """Strength 0 is teacher forcing; "random" has the labels of "none" and inputs with flips: those
    of "self" as long as no label has been corrected, up to the second scale."""
    model, params = case.tiny()
    images = case.batch_of(model)["gen_image"]
    kinds = {
        "none": dict(model__correction="none"),
        "zero": dict(model__strength=0.0),
        "self": {},
        "random": dict(model__correction="random"),
    }

    @jax.jit
    def given(params):
        out = {}
        for name, options in kinds.items():
            cfg, text = infinity_build.read_config(case.tiny_config(**options))
            system = infinity_build.System(cfg, None, text)
            flips = infinity_build._flips(cfg, jax.random.key(3), jnp.arange(8), (4, 4))
            relabel = cfg.correction != "random"
            out[name] = infinity_build.forced(system, params, images, flips, relabel)[:2]
        return out

    found = given(params)
    jax.tree.map(np.testing.assert_array_equal, found["zero"], found["none"])
    np.testing.assert_array_equal(found["random"][0][:, :4], found["self"][0][:, :4])
    assert (found["random"][0] != found["none"][0]).any()
    np.testing.assert_array_equal(found["random"][1], found["none"][1])
    assert (found["self"][0] != found["none"][0]).any()
    assert (found["self"][1] != found["none"][1]).any()


def test_micro_batches_add_up():
    model, params = case.tiny()
    batch = case.batch_of(model)
    twice = {k: np.concatenate([v[:4]] * 2) for k, v in batch.items()}

    @jax.jit
    def loss(batch):
        norms = {"pictures": jnp.float32(8)}
        return model.loss(params, {}, batch, jax.random.key(3), step=0, norms=norms)[0]

    again = {k: np.concatenate([v[4:]] * 2) for k, v in batch.items()}
    parts = (loss(twice) + loss(again)) / 2
    assert float(parts) == pytest.approx(float(loss(batch)), abs=1e-6)


def test_no_text_is_as_long_as_the_prompt():
    """Rows that are dropped do not see their words, only how many there are."""
    system, params, _ = case.golden()

    @jax.jit
    def pooled(text, lengths):
        valid = jnp.arange(5) < lengths[:, None]
        drop = jnp.ones(2, bool)
        return infinity_build.condition(system, params, text, valid, drop).pooled

    a = pooled(params["text"], np.array([5, 3]))
    b = pooled(params["text"][::-1] * 2, np.array([5, 3]))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a[0] - a[1]).max() > 1e-3


def test_bit_scores_count_what_they_say():
    """Without flips both kinds of labels are one; the numbers are those of the log odds."""
    model, params = case.tiny()
    batch = case.batch_of(model)
    scores = jax.jit(model.predict["bit_scores"])
    right = scores(params, batch, jax.random.key(0), np.float32(0))
    for name in ("nll", "accuracy"):
        np.testing.assert_array_equal(right[name], right[f"kept_{name}"])
    wrong = scores(params, batch, jax.random.key(0), np.float32(0.5))
    assert wrong["nll"][0] == right["nll"][0] and wrong["kept_nll"][2] != wrong["nll"][2]
    assert right["nll"].shape == (3,) and (right["accuracy"] <= 1).all()


def test_index_head_scores_all_codes():
    """Loss and scores are those of a softmax over 2^8 codes; a code's number is its packed bits."""
    model, params = case.tiny("index")
    batch, p = case.batch_of(model), model.predict
    table = params["transformer"]["head_table"]
    assert table.shape == (256, 32)

    @jax.jit
    def explicit(params):
        given = p["forced"](params, batch["gen_image"])
        text = p["captions"](params, batch)
        hidden = p["states"](params, text, given.inputs, given.schedule)
        head = p["head"](params, text)
        x = infinity.modulated(hidden, head.scale, head.shift)
        logs = jax.nn.log_softmax(x @ table.T)
        label = given.labels[..., 0].astype(int)
        nll = -jnp.take_along_axis(logs, label[..., None], -1)[..., 0] / 8
        equal = ((logs.argmax(-1) ^ label)[..., None] >> jnp.arange(8)) & 1 == 0
        return nll, equal.mean(-1)

    nll, right = explicit(params)
    scores = jax.jit(p["bit_scores"])(params, batch, jax.random.key(0), np.float32(0))
    ends = np.cumsum([0, 1, 4, 16])
    for k, (a, b) in enumerate(zip(ends, ends[1:])):
        np.testing.assert_allclose(scores["nll"][k], nll[:, a:b].mean(), rtol=1e-5)
        np.testing.assert_allclose(scores["accuracy"][k], right[:, a:b].mean(), rtol=1e-5)


def test_index_head_starts_at_the_entropy_of_all_codes_and_learns():
    """ln 2 per bit at the start, and gradients that descend."""
    options = dict(
        model__correction="none", model__text_drop=0.0, model__transformer__drop_path=0.0
    )
    config = case.tiny_config(model__transformer__head="index", **options)
    model = MODELS["infinity"](config)
    params = jax.jit(lambda: meta.unbox(model.init(jax.random.key(0))[0]))()
    batch = case.batch_of(model)

    @jax.jit
    def step(params):
        def loss(own):
            norms, key = model.norms(batch), jax.random.key(3)
            return model.loss(params | own, {}, batch, key, step=0, norms=norms)[0]

        value, grads = jax.value_and_grad(loss)({"transformer": params["transformer"]})
        moved = jax.tree.map(
            lambda p, g: p - 0.3 * g, {"transformer": params["transformer"]}, grads
        )
        return params | moved, value

    losses = []
    for _ in range(30):
        params, value = step(params)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(2), abs=0.01)
    assert losses[-1] < losses[0] - 0.05


def test_one_vector_of_the_caption_instead_of_attention_to_it():
    """VAR's conditioning: no attention to the text, no parameters for it, published names for what
    is left; the caption counts, the order of its words and its padding do not."""
    config = case.tiny_config(
        model__transformer__cross=False, model__text=dict(name="label", width=32)
    )
    model = MODELS["infinity"](config)
    params = jax.jit(lambda: meta.unbox(model.init(jax.random.key(0))[0]))()
    own = params["transformer"]
    assert not {"text_in", "text_out"} & set(own) and set(own["layers"]) == {
        "modulation",
        "sa",
        "mlp",
    }
    assert set(params["text"]) == {"table"} and params["text"]["table"].shape == (32, 32)
    back = from_published(to_published(params, model.weights), model.weights, params)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    batch, p = case.batch_of(model), model.predict

    @jax.jit
    def hidden(tokens, length):
        text = p["captions"](params, batch | {"gen_tokens": tokens, "gen_length": length})
        given = p["forced"](params, batch["gen_image"])
        return p["states"](params, text, given.inputs, given.schedule)

    tokens, length = np.tile(np.arange(4, 10), (8, 1)), np.full(8, 4)
    mixed = tokens[:, [2, 0, 3, 1, 4, 5]]
    mixed[:, 4:] = 31
    same = hidden(tokens, length)
    np.testing.assert_allclose(hidden(mixed, length), same, atol=1e-5)
    assert np.abs(hidden(tokens, length + 1) - same).max() > 1e-4
    loss = jax.jit(
        lambda: model.loss(params, {}, batch, jax.random.key(1), step=0, norms=model.norms(batch))[
            0
        ]
    )()
    assert loss == pytest.approx(np.log(2), abs=0.05)
    drawn = generate_images(model, params, tokens[:2], length[:2], jax.random.key(2), guidance=3.0)
    assert drawn.images.shape == (2, 16, 16, 3)


def test_buckets_of_aspect_ratios():
    """Published sizes: one bucket per ratio; h and w are 16 times the last scale."""
    from configs.common import load_config

    config = load_config("configs/infinity.py:debug", init_from="")
    config.model.ratios, config.model.tokenizer.size = (1.0, 1.5, 0.666), "infinity_d32"
    config.data.image_size = 256
    batches = MODELS["infinity"](config).batches
    sides = {k: v["gen_image"].shape[1:3] for k, v in batches.items()}
    assert sides == {"1": (256, 256), "1.5": (336, 224), "0.666": (224, 336)}
    layout = MODELS["infinity"](config).predict["layout"]
    assert layout(0.7) == layout(0.666) and layout(9.0) == layout(3.0)  # drawing: the nearest
    config.model.ratios = (1.1,)
    with pytest.raises(ValueError, match="config.model.ratios has 1.1: allowed are 0.333"):
        MODELS["infinity"](config)
    config = load_config("configs/infinity.py:8b,side=512,ratios=all")  # data and model agree
    batches = MODELS["infinity"](config).batches.values()
    shapes = tuple(batch["gen_image"].shape[1:3] for batch in batches)
    assert shapes == tuple(config.data.shapes) and len(set(shapes)) == 15
    config.model.ratios = (1.1,)
    with pytest.raises(ValueError, match="config.model.ratios has 1.1: allowed are 0.333"):
        MODELS["infinity"](config)


def test_captions_embedded_before():
    """With Flan-T5 the batch brings what the encoder says: the model has no text part, and what the
    tokens are does not matter."""
    options = dict(model__text=dict(name="t5", size="debug"), data__text_embeddings="folder")
    model = MODELS["infinity"](case.tiny_config(**options))
    spec = next(iter(model.batches.values()))
    assert spec["gen_text"].shape == (8, 6, 32) and spec["gen_text"].dtype == jnp.float16
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0))[0])
    assert params.keys() == {"transformer", "vae"}

    def loss(params, batch):
        rng, batch = jax.random.key(0), batch | {"example": jnp.arange(8)}
        return model.loss(params, {}, batch, rng, step=0, norms=model.norms(batch))[0]

    assert jax.eval_shape(loss, params, spec).shape == ()
    del spec["gen_tokens"]
    assert jax.eval_shape(loss, params, spec).shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data__text_embeddings="folder"), "config.model.text.name='decoder' with config.data"),
        (dict(model__correction="bsc"), "config.model.correction='bsc': allowed are self, random"),
        (dict(model__transformer__size="3b"), "config.model.transformer.size='3b': allowed are"),
        (dict(model__transformer__head="words"), "head='words': allowed are bits, index"),
        (dict(model__transformer__head="index", model__tokenizer__z=32), "scores all 2.32 codes"),
        (dict(model__tokenizer__quantiser="vq"), "quantiser='vq': allowed is bsq"),
        (dict(model__text__name="clip"), "config.model.text.name='clip': allowed are decoder, t5"),
        (dict(data__prompt_length=64), "config.data.prompt_length=64 is more than"),
        (dict(data__mix__caption=1.0), "config.data.mix: this model draws only"),
    ],
)
def test_mistakes_are_named(change, message):
    config = case.tiny_config()
    with config.unlocked():
        for key, value in change.items():
            *path, leaf = key.split("__")
            node = config
            for part in path:
                node = node[part]
            node[leaf] = value
    with pytest.raises(ValueError, match=message):
        MODELS["infinity"](config)


def test_checks_10_and_14_eight_devices_equal_one():
    """Loss and gradients, 20 steps of training, drawn pictures."""
    script = Path(__file__).with_name("infinity_on_mesh.py")
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = dict(line.split(" ") for line in run.stdout.splitlines())
    assert found.keys() == {"losses", "images"}
    assert float(found["losses"]) < 1e-5 and float(found["images"]) == 0


def test_fine_tuning_from_published_files(tmp_path):
    """init_from=transformer=FILE,vae=FILE with the official names: adapters and their averages
    train beside those weights."""
    model, params = case.tiny()
    for part in ("transformer", "vae"):
        names = model.weights.parts[part]
        save_safetensors(tmp_path / f"{part}.safetensors", to_published(params[part], names))
    config = case.tiny_config(
        init_from=",".join(f"{p}={tmp_path / p}.safetensors" for p in ("transformer", "vae")),
        objective__name="low_rank",
        objective__leaves=("transformer/layers/*kernel",),
        ema__decay=0.9,
    )
    objective = OBJECTIVES["low_rank"](model, config)
    mesh = make_mesh(config.mesh)
    with scope(mesh):
        plan = state.plan(model, objective, config, mesh)
        loaded = init_from.load(config, model, plan.params)
        now, frozen = state.create(plan, state.key_for(config, state.INIT), loaded)
        for part in ("transformer", "vae"):
            jax.tree.map(np.testing.assert_array_equal, frozen["params"][part], params[part])
        step = jit_train_step(build_train_step(model, objective, plan, config), plan)
        batch = case.batch_of(model)
        batch.pop("example")
        for _ in range(2):
            now, metrics = step(now, frozen, batch)
    averages = {k: np.abs(v).max() for k, v in now["ema"].items() if k.endswith("/b")}
    assert len(averages) > 5 and min(averages.values()) > 0 and np.isfinite(metrics["loss"])


def test_check_12_64_bits_in_a_loss_and_a_picture():
    """Two words a token, through self-correction, transformer, head and sampler; no 64-bit type."""
    config = case.tiny_config()
    config.model.tokenizer.z = 64
    model = MODELS["infinity"](config)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0))[0])
    batch = case.batch_of(model)

    def loss(params):
        given = model.norms(batch)
        return model.loss(params, {}, batch, jax.random.key(1), step=0, norms=given)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(np.log(2), rel=0.2)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    asked = (params, batch["gen_tokens"], batch["gen_length"], jax.random.key(2))
    drawn = generate_images(model, *asked)
    assert drawn.bits.dtype == np.uint32 and drawn.bits.shape == (8, 21, 2)
    assert all(x.dtype.itemsize <= 4 for x in jax.tree.leaves((drawn, gradients)))


@pytest.mark.long
def test_check_14_a_resumed_run_is_the_same(tmp_path):
    """Two steps and two after a new start are four steps, bit by bit."""

    def train(folder, steps):
        config = case.load_config("configs/infinity.py:debug", f"steps={steps}", "evals=()")
        with config.unlocked():
            config.schedule.name, config.log_every = "constant", 1
            config.batch_size, config.sample.prompts, config.checkpoint.every = 8, (), 2
            config.model.transformer.update(width=32)
        loop.train(config, tmp_path / folder)
        return flat(load_for_use(config, tmp_path / folder)[1])

    train("stopped", 2)
    resumed, whole = train("stopped", 4), train("whole", 4)
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
