"""UniFluid's acceptance checks 2-7 (unifluid.md section 9) on a small model."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import load_config
from eval.flops import count_flops
from inference import beam, unified
from input_pipeline import layout
from models import MODELS, unifluid
from models.blocks import diffusion_head as dh
from models.unifluid import UniFluid
from tests.models.unifluid_case import batch_of, params_of, randomised, tiny_config


@pytest.fixture(scope="module")
def case():
    config = tiny_config()
    model = MODELS["unifluid"](config)
    net = UniFluid(unifluid.read_config(config))
    return config, model, net, params_of(), batch_of(model, config)


def states(net, params, batch, v, order):
    prefix, valid = unifluid.generation_prefix(
        net, params, batch["gen_tokens"], batch["gen_length"]
    )
    return unifluid.generation_states(net, params, prefix, valid, v, order)


def orders_of(net, rows, kind, seed=0):
    keys = jax.random.split(jax.random.key(seed), rows)
    return unifluid.draw_orders(keys, net.cfg.tokens, kind)


@pytest.mark.parametrize("order_pos", ["next+self", "instr_tokens", "rope2d"])
def test_check_2_causality(case, order_pos):
    """Changing the tokens from the k-th on leaves states up to k bit-identical."""
    config, _, net, params, batch = case
    net = UniFluid(dataclasses.replace(net.cfg, order_pos=order_pos))
    rows, n = batch["gen_length"].shape[0], net.cfg.tokens
    order = orders_of(net, rows, "random")
    v = jax.random.normal(jax.random.key(1), (rows, n, net.cfg.channels))
    run = jax.jit(lambda v, b, o: states(net, params, b, v, o))
    base = run(v, batch, order)
    for k in (0, 5, n - 2):
        changed = run(v.at[:, k:].add(1.0), batch, order)
        np.testing.assert_array_equal(changed[:, : k + 1], base[:, : k + 1])
        assert (jnp.abs(changed - base)[:, k + 1 :].max(-1) > 1e-4).all()
    other = dict(batch, gen_tokens=batch["gen_tokens"].at[:, 0].add(1) % config.model.vocab_size)
    assert (jnp.abs(run(v, other, order) - base).max((1, 2)) > 1e-4).all()
    shuffled = run(v, batch, jnp.roll(order, 1, axis=1))
    assert (jnp.abs(shuffled - base).max((1, 2)) > 1e-4).all()


def test_check_2_order_is_per_example_and_step(case):
    """Orders are permutations, differ between rows and steps, and repeat for the same key."""
    net = case[2]
    keys = jax.random.split(jax.random.key(0), 6)
    order = unifluid.draw_noise(net.cfg, keys, 0).order
    assert (jnp.sort(order, axis=1) == jnp.arange(net.cfg.tokens)).all()
    assert len({tuple(row) for row in np.asarray(order).tolist()}) == 6
    again = unifluid.draw_noise(net.cfg, keys, 7).order
    np.testing.assert_array_equal(order, again)
    other = jax.random.split(jax.random.key(1), 6)
    assert (unifluid.draw_noise(net.cfg, other, 0).order != order).any()


def test_check_2_annealed_order(case):
    """RAR's annealing: random before the first step, raster after the second."""
    cfg = dataclasses.replace(case[2].cfg, order="rar_anneal", anneal=(10, 30))
    assert [float(unifluid.random_share(cfg, s)) for s in (0, 10, 20, 30, 99)] == [1, 1, 0.5, 0, 0]
    keys = jax.random.split(jax.random.key(0), 400)
    raster = jnp.arange(cfg.tokens)
    share = (unifluid.draw_orders(keys, cfg.tokens, "rar_anneal", 0.5) == raster).all(1).mean()
    assert 0.4 < share < 0.6
    assert (unifluid.draw_orders(keys, cfg.tokens, "rar_anneal", 0.0) == raster).all()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_check_3_prefix(case, bidirectional):
    """The first prompt token sees the last one only where the prompt is bidirectional."""
    _, _, net, params, batch = case
    net = UniFluid(dataclasses.replace(net.cfg, prompt_bidirectional=bidirectional))

    def first(tokens):
        x, valid = unifluid.generation_prefix(
            net, params, tokens, jnp.full((len(tokens),), tokens.shape[1])
        )
        mask = unifluid.prompt_mask(net.cfg, valid)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return unifluid.apply(net, params, "trunk", x, mask, positions)[0][:, 0]

    tokens = batch["gen_tokens"]
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % 64)
    same = (first(tokens) == first(changed)).all()
    assert same != bidirectional


GUIDED = [
    ("random", 1.0, "next+self"),
    ("random", 3.0, "next+self"),
    ("raster", 1.0, "next+self"),
    ("raster", 3.0, "next"),
    ("random", 3.0, "instr_tokens"),
    ("random", 3.0, "rope2d"),
]


@pytest.mark.parametrize("order,guidance,order_pos", GUIDED)
def test_check_4_cached_generation_equals_teacher_forcing(case, order, guidance, order_pos):
    """Feeding the generated tokens back gives every condition z again, ragged prompts included."""
    config, _, _, params, batch = case
    config = tiny_config(model__order_pos=order_pos)
    model = MODELS["unifluid"](config)
    net = UniFluid(unifluid.read_config(config))
    out = unified.generate_images(
        model,
        params,
        batch["gen_tokens"],
        batch["gen_length"],
        jax.random.key(3),
        guidance=guidance,
        steps=4,
        order=order,
        x0_clip=5.0,
    )
    assert out.images.dtype == jnp.uint8 and np.isfinite(out.tokens).all()
    v = jnp.take_along_axis(out.tokens, out.order[:, :, None], axis=1)
    z = jax.jit(lambda: states(net, params, batch, v, out.order))()
    np.testing.assert_allclose(out.z, z, atol=1e-4 * float(jnp.abs(z).max()))


def test_check_4_rows_do_not_depend_on_each_other(case):
    """Other prompts in the batch change nothing about a row, bit for bit."""
    _, model, _, params, batch = case
    options = dict(guidance=2.0, steps=4, x0_clip=5.0)
    tokens, lengths = batch["gen_tokens"], batch["gen_length"]
    one = unified.generate_images(model, params, tokens, lengths, jax.random.key(3), **options)
    others = tokens.at[1:].set((tokens[1:] + 7) % 64)
    two = unified.generate_images(model, params, others, lengths, jax.random.key(3), **options)
    np.testing.assert_array_equal(one.tokens[:1], two.tokens[:1])
    np.testing.assert_array_equal(one.order[:1], two.order[:1])
    assert (one.tokens[1:] != two.tokens[1:]).any()


@pytest.mark.parametrize("picture_alone", [False, True])
def test_check_4_cached_text_equals_recomputation(case, picture_alone):
    """Greedy answers are the argmax of the teacher-forced logits at every position."""
    _, model, net, params, batch = case
    if picture_alone:
        model = MODELS["unifluid"](tiny_config(model__picture_alone=True))
    width, new = batch["und_tokens"].shape[1], 6
    start = jnp.where(jnp.arange(width) < batch["und_prefix"][:, None], batch["und_tokens"], 0)
    ids = unified.generate_text(
        model, params, batch["und_image"], start, batch["und_prefix"], max_new=new
    )
    rows = jnp.arange(len(start))[:, None]
    at = batch["und_prefix"][:, None] + jnp.arange(new)
    fed = dict(batch, und_tokens=start.at[rows, at].set(ids))
    fed["und_length"] = batch["und_prefix"] + new
    logits = jax.jit(model.predict["logits"])(params, fed)
    best = jnp.take_along_axis(logits.argmax(-1), at - 1, axis=1)
    before_eos = jnp.cumsum(ids == unified.EOS, axis=1) - (ids == unified.EOS) == 0
    np.testing.assert_array_equal(jnp.where(before_eos, best, 0), ids)


def packed(batch, length):
    """Rows 0 and 1, 2 and 3, ... of `batch` as two questions about the even row's picture."""
    rows = [
        layout.Answered(np.asarray(t), int(p), int(n), False)
        for t, p, n in zip(batch["und_tokens"], batch["und_prefix"], batch["und_length"])
    ]
    both = [layout.pack(pair, length, 0) for pair in zip(rows[::2], rows[1::2])]
    found = {
        f"und_{name}": jnp.stack([jnp.asarray(getattr(row, name)) for row in both])
        for name in ("tokens", "segments", "prefix")
    }
    assert all(row.segments.max() == 2 for row in both)
    return found | {"und_image": batch["und_image"][::2]}


def test_questions_packed_in_a_row_are_as_good_as_alone(case):
    """With picture_alone the packed answers' states, losses and gradients are those of rows of
    their own; without it packing is refused."""
    _, _, _, params, batch = case
    config = tiny_config(model__picture_alone=True)
    net = UniFluid(unifluid.read_config(config))
    alone = {k: v for k, v in batch.items() if k.startswith("und_")}
    alone["und_image"] = jnp.repeat(alone["und_image"][::2], 2, axis=0)
    rows = packed(alone, 2 * batch["und_tokens"].shape[1])

    @jax.jit
    def loss(params, batch):
        norm = unifluid.norms(net.cfg, batch)["text"]
        weights = unifluid.loss_weights(net.cfg, batch)
        nll, correct = unifluid.text_loss(net, params, batch, weights)
        return nll / norm, correct / norm

    one, two = (jax.value_and_grad(loss, has_aux=True)(params, b) for b in (alone, rows))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 + 1e-5 * np.abs(a).max()),
        one[1], two[1],
    )  # fmt: skip
    states = jax.jit(lambda b: unifluid.understanding_states(net, params, b))
    first, both = states(alone), states(rows)
    for i, (start, end) in enumerate(zip(alone["und_length"][::2], alone["und_length"][1::2])):
        np.testing.assert_allclose(both[i, :start], first[2 * i, :start], atol=1e-4)
        np.testing.assert_allclose(both[i, start : start + end], first[2 * i + 1, :end], atol=1e-4)
    other = dict(rows, und_tokens=rows["und_tokens"].at[:, 1].add(1))
    assert (states(other) != both).any(axis=(1, 2)).all()
    with pytest.raises(ValueError, match="picture_alone"):
        plain = UniFluid(unifluid.read_config(tiny_config()))
        unifluid.understanding_states(plain, params, rows)


def test_beams_carry_their_own_caches(case):
    """The score of what beam search returns is its teacher-forced log probability."""
    _, model, _, params, batch = case
    width, new = batch["und_tokens"].shape[1], 6
    start = jnp.where(jnp.arange(width) < batch["und_prefix"][:, None], batch["und_tokens"], 0)
    search = beam.compiled(tuple(model.predict.items()), new, 3, 0.0)
    ids, score = search(params, batch["und_image"], start, batch["und_prefix"])
    rows = jnp.arange(len(start))[:, None]
    at = batch["und_prefix"][:, None] + jnp.arange(new)
    fed = dict(batch, und_tokens=start.at[rows, at].set(ids))
    fed["und_length"] = batch["und_prefix"] + new
    logp = jax.nn.log_softmax(jax.jit(model.predict["logits"])(params, fed))
    said = jnp.take_along_axis(logp[rows, at - 1], ids[..., None], axis=-1)[..., 0]
    before_eos = jnp.cumsum(ids == unified.EOS, axis=1) - (ids == unified.EOS) == 0
    np.testing.assert_allclose(jnp.where(before_eos, said, 0).sum(1), score, atol=1e-4)


def compiled_flops(guidance):
    config = tiny_config()
    model = MODELS["unifluid"](config)
    params, batch = params_of(), batch_of(model, config)
    run = unified.compiled_images(
        model, guidance=guidance, steps=4, schedule="linear", order="random", x0_clip=None
    )
    keys = jax.random.split(jax.random.key(0), len(batch["gen_length"]))
    arguments = (params, batch["gen_tokens"], batch["gen_length"], None, keys, jnp.float32(1))
    latents = jnp.zeros((len(keys), 16, 16))
    pixels = count_flops(model.predict["decode_latents"], params, latents)
    return count_flops(run, *arguments) - pixels


def test_check_5_no_guidance_runs_no_second_branch(case):
    """cfg = 1 equals the unguided path bitwise and does half the work of the guided one."""
    _, model, _, params, batch = case
    args = (model, params, batch["gen_tokens"], batch["gen_length"], jax.random.key(3))
    plain = unified.generate_images(*args, steps=4)
    one = unified.generate_images(*args, steps=4, guidance=1.0, schedule="constant")
    np.testing.assert_array_equal(plain.tokens, one.tokens)
    ratio = compiled_flops(3.0) / compiled_flops(1.0)
    assert 1.9 < ratio < 2.05


def test_check_6_initial_loss():
    """A fresh head predicts 0: MSE is the variance of the noise; VB has no gradient in eps-hat."""
    config = tiny_config(batch_size=256)
    model = MODELS["unifluid"](config)
    params = randomised(model)
    fresh = nn.meta.unbox(jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"))[0])())
    params = dict(params, head=fresh["head"])
    batch = batch_of(model, config)
    rng = jax.random.key(0)
    _, (metrics, _) = jax.jit(
        lambda p: model.loss(p, {}, batch, rng, step=0, norms=model.norms(batch))
    )(params)
    assert abs(float(metrics["mse"]) - 1.0) < 0.02
    assert np.isfinite(float(metrics["vb"]))

    cfg = unifluid.read_config(config).head

    def bound(last):
        own = dict(params["head"], final=dict(params["head"]["final"], linear=last))
        x = jax.random.normal(rng, (32, cfg.channels))
        z = jax.random.normal(rng, (32, cfg.cond))
        t = jnp.arange(32) * 31
        return dh.loss(dh.bind(own, cfg), x, z, t, x + 0.1)[1].sum()

    grads = jax.grad(bound)(params["head"]["final"]["linear"])
    assert (grads["bias"][: cfg.channels] == 0).all()
    assert (grads["bias"][cfg.channels :] != 0).any()


def test_check_7_lambda_zero(case):
    """lam = 0: no gradient on embedding rows that no prompt uses; no text rows: text loss 0."""
    config = tiny_config(model__lam=0.0)
    model, params, batch = MODELS["unifluid"](config), case[3], case[4]
    norms = model.norms(batch)

    def total(p):
        return model.loss(p, {}, batch, jax.random.key(0), step=0, norms=norms)[0]

    grads = jax.jit(jax.grad(total))(params)
    used = set(np.asarray(batch["gen_tokens"]).ravel().tolist()) | {unifluid.BOI}
    rows = np.abs(np.asarray(grads["decoder"]["embedding"])).max(1)
    unused = [i for i in range(config.model.vocab_size) if i not in used]
    assert unused and (rows[unused] == 0).all() and rows[unifluid.BOI] > 0


@pytest.mark.parametrize("kind", ["gen", "und"])
def test_check_7_one_sided_batches(case, kind):
    """A batch of one kind only has a zero loss for the other, not NaN."""
    _, model, _, params, batch = case
    empty = {k: v for k, v in batch.items() if k.startswith(kind) or k == "example"}
    total, (metrics, _) = jax.jit(
        lambda p: model.loss(p, {}, empty, jax.random.key(0), step=0, norms=model.norms(empty))
    )(params)
    assert np.isfinite(float(total))
    absent = ("text", "text_accuracy") if kind == "gen" else ("mse", "vb")
    assert all(float(metrics[key]) == 0 for key in absent)


@pytest.mark.parametrize("latents", ["", "moments"])
def test_edits_read_the_source_picture(latents):
    """Section 2.7: the loss of an edit depends on the source in both its forms."""
    config = tiny_config(data__edit=True, data__latents=latents, model__cfg_drop=0.0)
    model, params = MODELS["unifluid"](config), params_of()
    batch = batch_of(model, config)

    @jax.jit
    def loss(batch):
        rng = jax.random.key(0)
        return model.loss(params, {}, batch, rng, step=0, norms=model.norms(batch))[1][0]["mse"]

    base = float(loss(batch))
    other = dict(batch, gen_source_image=255 - batch["gen_source_image"])
    assert np.isfinite(base) and abs(float(loss(other)) - base) > 1e-6
    if latents:
        moments = dict(batch, gen_source_moments=batch["gen_source_moments"] + 1.0)
        assert abs(float(loss(moments)) - base) > 1e-6


def test_edits_with_two_guidance_scales(case):
    """A second scale adds a branch without the source and changes the picture."""
    config = tiny_config(data__edit=True)
    model, params = MODELS["unifluid"](config), params_of()
    batch = batch_of(model, config)
    rows = len(batch["gen_length"])
    tokens = jax.random.normal(jax.random.key(2), (rows, 16, 16))
    args = (model, params, batch["gen_tokens"], batch["gen_length"], jax.random.key(3))
    options = dict(steps=4, x0_clip=5.0, source=(batch["gen_source_image"], tokens))
    one = unified.generate_images(*args, guidance=2.0, **options)
    two = unified.generate_images(*args, guidance=2.0, image_guidance=1.5, **options)
    assert float(jnp.abs(two.tokens - one.tokens).max()) > 1e-3
    assert np.isfinite(two.tokens).all()


def test_unequal_micro_batches_add_up(case):
    """Four micro-batches with the norms of the whole give the loss and gradient of one batch."""
    _, model, _, params, batch = case
    norms = model.norms(batch)

    def run(part):
        return jax.value_and_grad(
            lambda p: model.loss(p, {}, part, jax.random.key(0), step=0, norms=norms)[0]
        )(params)

    whole, grads = jax.jit(run)(batch)
    parts = [jax.tree.map(lambda x, a=a: x[a::4], batch) for a in range(4)]
    outs = [jax.jit(run)(part) for part in parts]
    np.testing.assert_allclose(sum(float(o[0]) for o in outs), float(whole), rtol=1e-5)
    summed = jax.tree.map(lambda *g: sum(g), *[o[1] for o in outs])
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        other = summed
        for key in path:
            other = other[key.key]
        scale = float(jnp.abs(g).max()) + 1e-12
        assert float(jnp.abs(g - other).max()) < 1e-4 * max(scale, 1e-3), path


def test_published_sizes_by_shape():
    """Parameter counts of the published variants, without making one array."""
    counts = {}
    for variant in ("0.7b", "2b"):
        model = MODELS["unifluid"](load_config(f"configs/uniflud.py:{variant}"))
        params = jax.eval_shape(model.init, jax.random.key(0))[0]
        sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
        counts[variant] = sizes
    assert counts["2b"]["decoder"] == 2_614_341_888  # gemma2_2b
    assert counts["2b"]["vit"] == 412_442_352  # So400m/14 without pooling
    # MAR-H's head has 152.8 M parameters at Z = 2304, MAR-B's 37.3 M.
    assert round(counts["2b"]["head"] / 1e6, 1) == 152.8
    assert abs(counts["0.7b"]["decoder"] - 256_000 * 1536 - 0.68e9) < 0.01e9
