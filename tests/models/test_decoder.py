"""Gemma decoders against transformers, the cache against the full forward pass, exact sizes."""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from export.weights import from_published, to_published
from kernels.attention import MaskSpec
from models.blocks import decoder_weights
from models.blocks.decoder import SIZES, Decoder, DecoderConfig, init_cache
from models.blocks.norms import rms_norm
from models.blocks.rope import apply_rope, rope_table

GOLDEN = Path(__file__).parents[1] / "golden"
GEMMA2 = DecoderConfig(
    vocab_size=48, width=24, layers=5, mlp=32, heads=4, kv_heads=2, head_dim=8, window=4,
    attn_softcap=2.0, final_softcap=3.0, query_scale=6**-0.5, post_norms=True,
)  # fmt: skip
TINY = {
    "gemma1": DecoderConfig(
        vocab_size=48, width=24, layers=2, mlp=40, heads=3, kv_heads=1, head_dim=8,
        pattern=("global",),
    ),
    "gemma2": GEMMA2,
    "gemma3": DecoderConfig(
        vocab_size=48, width=12, layers=13, mlp=16, heads=2, kv_heads=1, head_dim=8, window=4,
        pattern=("local",) * 5 + ("global",), query_scale=6**-0.5, post_norms=True, qk_norm="head",
        rope_theta_global=1e6, rope_scale_global=8.0,
    ),
}  # fmt: skip


def abstract(cfg):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    init = jax.eval_shape(lambda t: Decoder(cfg).init(jax.random.key(0), t, method="text"), tokens)
    return nn.unbox(init)["params"]


def load(name):
    """Golden arrays, published weights, and our parameters made from them."""
    file = np.load(GOLDEN / f"{name}.npz")
    weights = {key[2:]: file[key] for key in file if key.startswith("w:")}
    cfg = TINY[name]
    arrays = {key: jnp.asarray(file[key]) for key in file if not key.startswith("w:")}
    params = from_published(weights, decoder_weights.weight_map(cfg), abstract(cfg))
    return arrays, weights, jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnums=0)
def text(cfg, params, tokens, mask=None, positions=None):
    """Logits of the full forward pass."""
    return Decoder(cfg).apply({"params": params}, tokens, mask, positions, method="text")


def close(got, want, tolerance):
    want = np.asarray(want, np.float32)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), want, rtol=0, atol=tolerance * np.abs(want).max()
    )


def test_1_1_exact_parameter_counts():
    def count(name):
        return sum(leaf.size for leaf in jax.tree.leaves(abstract(SIZES[name])))

    assert count("gemma_7b") == 8_537_680_896
    assert count("gemma2_2b") == 2_614_341_888
    assert abstract(SIZES["gemma2_2b"])["embedding"].size == 589_824_000
    assert count("gemma_2b") == 2_506_172_416
    assert count("gemma2_9b") == 9_241_705_984
    assert count("gemma2_27b") == 27_227_128_320
    # 0.68 B without the embedding (unifluid.md section 3)
    assert abs(count("unifluid_0p7b") - 256_000 * 1536 - 0.68e9) < 0.005e9


@pytest.mark.parametrize("name", TINY)
def test_12_logits_equal_transformers(name):
    """Causal and prefix-LM, with local layers of 4 positions among 13; fp32 1e-4."""
    file, _, params = load(name)
    logits = text(TINY[name], params, file["ids"])
    assert logits.dtype == jnp.float32
    close(logits, file["causal_logits"], 1e-4)
    mask = MaskSpec(prefix_length=file["prefix"])
    close(text(TINY[name], params, file["ids"], mask), file["prefix_logits"], 1e-4)


@pytest.mark.parametrize("name", TINY)
def test_weights_leave_as_they_came(name):
    _, weights, params = load(name)
    back = to_published(params, decoder_weights.weight_map(TINY[name]))
    assert back.keys() == weights.keys()
    for key, tensor in weights.items():
        np.testing.assert_array_equal(back[key], tensor.astype(np.float32), err_msg=key)


@pytest.mark.parametrize("name", ["gemma2_2b", "gemma3_4b"])
def test_every_leaf_of_a_published_size_has_a_name(name):
    cfg = SIZES[name]
    table = decoder_weights.weight_map(cfg).names
    leaves = jax.tree_util.tree_leaves_with_path(abstract(cfg))
    paths = {"/".join(k.key for k in path) for path, _ in leaves}
    assert paths == set(table)


def decode(cfg, params, tokens, prompt, lengths, max_len, mask):
    """Prefill of right-padded rows, then one token a step at each row's own position."""
    decoder, variables = Decoder(cfg), {"params": params}
    rows = jnp.arange(tokens.shape[0])

    def embed(ids):
        return decoder.apply(variables, ids, method="embed")

    @jax.jit
    def prefill(ids, cache):
        hidden, cache = decoder.apply(variables, embed(ids), mask, None, cache, lengths)
        return hidden[rows, jnp.maximum(lengths - 1, 0)], cache

    @jax.jit
    def step(ids, positions, cache):
        hidden, cache = decoder.apply(
            variables, embed(ids[:, None]), None, positions[:, None], cache
        )
        return hidden[:, 0], cache

    # What pads hold must not matter: give them other tokens than the full sequence has.
    pads = (tokens[:, :prompt] + 7) % cfg.vocab_size
    padded = jnp.where(jnp.arange(prompt) < lengths[:, None], tokens[:, :prompt], pads)
    hidden, cache = prefill(padded, init_cache(cfg, len(rows), max_len))
    out = [(lengths - 1, hidden)]
    for i in range(tokens.shape[1] - int(lengths.max())):
        hidden, cache = step(tokens[rows, lengths + i], lengths + i, cache)
        out.append((lengths + i, hidden))
    return [(at, decoder.apply(variables, h, method="logits")) for at, h in out]


@pytest.mark.parametrize("name,prefix_lm", [("gemma1", False), ("gemma2", True), ("gemma3", False)])
def test_1_4_decoding_equals_the_full_pass(name, prefix_lm):
    """Unequal lengths, a prompt longer than the window's ring of 4 slots; fp32 1e-5."""
    _, _, params = load(name)
    cfg = TINY[name]
    tokens = jax.random.randint(jax.random.key(1), (4, 17), 0, cfg.vocab_size)
    lengths = jnp.array([1, 10, 6, 4])
    mask = MaskSpec(prefix_length=lengths) if prefix_lm else MaskSpec()
    full = text(cfg, params, tokens, mask)
    results = decode(cfg, params, tokens, 10, lengths, 17, mask)
    assert len(results) == 8
    for at, logits in results:
        close(logits, full[jnp.arange(4), at], 1e-5)


def test_1_4_ring_equals_a_cache_without_ring():
    """A window of 8 needs 8 slots; the same model with room for all positions agrees."""
    _, _, params = load("gemma2")
    cfg = dataclasses.replace(GEMMA2, window=8)
    tokens = jax.random.randint(jax.random.key(2), (2, 20), 0, 48)
    lengths = jnp.array([11, 3])
    cache = init_cache(cfg, 2, 20)
    assert cache["layers"]["0_local"].slots == cache["tail_0"].slots == 8
    assert cache["layers"]["1_global"].slots == 20
    assert {leaf.shape[1] for leaf in jax.tree.leaves(cache)} == {2}
    ring = decode(cfg, params, tokens, 11, lengths, 20, MaskSpec())
    off = dataclasses.replace(cfg, window=0)
    assert init_cache(off, 2, 20)["layers"]["0_local"].slots == 20
    full = text(cfg, params, tokens)
    unlimited = text(off, params, tokens)
    assert np.abs(full - unlimited).max() > 1e-3  # the window binds, and window=0 lifts it
    for at, logits in ring:
        close(logits, full[jnp.arange(2), at], 1e-5)


def test_1_4_empty_prompts_and_several_tokens_a_step():
    _, _, params = load("gemma1")
    cfg, decoder = TINY["gemma1"], Decoder(TINY["gemma1"])
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 48)
    full = text(cfg, params, tokens)
    steps = decode(cfg, params, tokens, 2, jnp.array([0, 2]), 9, MaskSpec())[1:]
    assert len(steps) > 1
    for at, logits in steps:
        close(logits, full[jnp.arange(2), at], 1e-5)

    @jax.jit
    def three(ids, start, cache):
        x = decoder.apply({"params": params}, ids, method="embed")
        positions = start + jnp.broadcast_to(jnp.arange(3), (2, 3))
        hidden, cache = decoder.apply({"params": params}, x, None, positions, cache)
        return decoder.apply({"params": params}, hidden, method="logits"), cache

    cache, done = init_cache(cfg, 2, 9), []
    for start in (0, 3, 6):
        logits, cache = three(tokens[:, start : start + 3], start, cache)
        done.append(logits)
    close(jnp.concatenate(done, axis=1), full, 1e-5)


def test_cache_misuse_is_an_error():
    _, _, params = load("gemma2")
    decoder, x = Decoder(GEMMA2), jnp.zeros((1, 6, 24))
    cache = init_cache(GEMMA2, 1, 12)
    with pytest.raises(ValueError, match="needs lengths"):
        decoder.apply({"params": params}, x, MaskSpec(), None, cache)
    with pytest.raises(ValueError, match="ring of 4 slots"):
        decoder.apply({"params": params}, x[:, :2], None, None, cache)


def test_decode_loop_updates_its_cache_in_place():
    """Temporaries of a donated 32-step loop are a fraction of the cache it carries."""
    cfg = dataclasses.replace(SIZES["debug"], layers=8, window=0)
    cache = jax.eval_shape(lambda: init_cache(cfg, 8, 512))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))

    def loop(params, cache):
        def step(carry, position):
            x, cache = carry
            at = jnp.full((8, 1), position)
            return Decoder(cfg).apply({"params": params}, x, None, at, cache), None

        return jax.lax.scan(step, (jnp.ones((8, 1, cfg.width)), cache), jnp.arange(32))[0]

    compiled = jax.jit(loop, donate_argnums=1).lower(abstract(cfg), cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2


def test_1_2_rms_norm_multiplies_in_float32():
    """(1 + w) is applied before the cast; Llama's order gives another number in bf16."""
    x = jax.random.normal(jax.random.key(0), (64, 48)).astype(jnp.bfloat16)
    w = 0.5 * jax.random.normal(jax.random.key(1), (48,))
    x64 = np.asarray(x, np.float64)
    normed = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    want = jnp.asarray(normed * (1 + np.asarray(w, np.float64)), jnp.float32).astype(jnp.bfloat16)
    llama = jnp.asarray(normed, jnp.float32).astype(jnp.bfloat16) * (1 + w).astype(jnp.bfloat16)
    got = rms_norm(x, w)
    assert got.dtype == jnp.bfloat16
    assert (got == want).mean() > 0.999 and (llama == want).mean() < 0.9


def test_1_2_embedding_factor_is_rounded_to_the_compute_type():
    cfg = dataclasses.replace(GEMMA2, width=3072, layers=1, mlp=8)
    params = {"embedding": jnp.ones((48, 3072))}
    for dtype, factor in ((jnp.bfloat16, 55.5), (jnp.float32, np.float32(np.sqrt(3072)))):
        decoder = Decoder(cfg, dtype=dtype)
        x = decoder.apply({"params": params}, jnp.zeros((1, 1), jnp.int32), method="embed")
        assert x.dtype == dtype and (x.astype(jnp.float32) == factor).all()


def test_1_2_rope_pairs_halves_and_depends_on_distance_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))

    def score(i, j):
        rotate = lambda x, p: apply_rope(x, rope_table(jnp.array([[p]]), 8))  # noqa: E731
        return jnp.sum(rotate(q, i) * rotate(k, j))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)  # j = 1 pairs with 1 + 4
    out = np.asarray(apply_rope(x, rope_table(jnp.array([[3]]), 8)))[0, 0, 0]
    angle = 3 * 10_000 ** (-2 / 8)
    np.testing.assert_allclose(out[[1, 5]], [np.cos(angle), np.sin(angle)], rtol=1e-5)
    assert np.count_nonzero(out) == 2


def test_1_2_rope_of_two_axes():
    """Angles alternate between row and column; equal axes are one position."""
    alone = rope_table(jnp.array([[3, 7]]), 8)
    both = rope_table(jnp.array([[[3, 7]]]), 8)
    for one, table in zip(alone, both, strict=True):
        np.testing.assert_array_equal(table[0, 0, 0, 0::2], one[0, 0, 0, 0::2])  # 3 turns them
        np.testing.assert_array_equal(table[0, 0, 0, 1::2], one[0, 1, 0, 1::2])  # and 7 these
    equal = rope_table(jnp.array([[[3, 3], [7, 7]]]), 8)
    np.testing.assert_array_equal(equal.cos, alone.cos)


def test_1_3_padding_and_packing_change_no_numbers():
    _, _, params = load("gemma2")
    tokens = jax.random.randint(jax.random.key(4), (1, 9), 0, 48)
    alone = text(GEMMA2, params, tokens)

    left = jnp.pad(tokens, ((0, 0), (3, 0)))
    valid = jnp.arange(12)[None] >= 3
    positions = jnp.cumsum(valid, axis=1) - 1
    mask = MaskSpec(q_positions=positions, kv_positions=positions, kv_valid=valid)
    padded = text(GEMMA2, params, left, mask, positions)
    close(padded[:, 3:], alone, 1e-5)

    packed = jnp.concatenate([tokens[:, :4], tokens], axis=1)
    segments = (jnp.arange(13) >= 4).astype(jnp.int32)[None]
    positions = jnp.where(segments == 1, jnp.arange(13) - 4, jnp.arange(13))
    mask = MaskSpec(q_segment_ids=segments)
    both = text(GEMMA2, params, packed, mask, positions)
    joined = text(GEMMA2, params, packed, None, positions)
    assert np.abs(joined[:, 4:] - alone).max() > 1e-3  # without the segments numbers do change
    close(both[:, 4:], alone, 1e-5)
    close(both[:, :4], alone[:, :4], 1e-5)


def test_remat_changes_no_gradient():
    file, _, params = load("gemma2")

    def gradient(remat):
        decoder = Decoder(GEMMA2, remat=remat)
        loss = jax.grad(lambda p: decoder.apply({"params": p}, file["ids"], method="text").std())
        return jax.flatten_util.ravel_pytree(jax.jit(loss)(params))[0]

    plain = gradient("none")
    for policy in ("dots", "full"):
        close(gradient(policy), plain, 1e-5)
    with pytest.raises(ValueError, match="config.remat='some', allowed: none, dots, full"):
        gradient("some")


@pytest.mark.parametrize("layers", [2, 12])
def test_remat_frees_memory(layers):
    """In a scan (12 layers) and written out (2): recomputation must not be merged away."""
    cfg = dataclasses.replace(SIZES["debug"], layers=layers)
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def peak(remat):
        decoder = Decoder(cfg, remat=remat)

        def loss(p, ids):
            return decoder.apply({"params": p}, ids, method="text").std()

        compiled = jax.jit(jax.grad(loss)).lower(abstract(cfg), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = (peak(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none


def test_bf16_computes_on_float32_parameters():
    file, _, params = load("gemma2")
    decoder = Decoder(GEMMA2, dtype="bfloat16")
    x = decoder.apply({"params": params}, file["ids"], method="embed")
    hidden, _ = decoder.apply({"params": params}, x)
    assert hidden.dtype == jnp.bfloat16
    logits = decoder.apply({"params": params}, hidden, method="logits")
    assert logits.dtype == jnp.float32
    close(logits, file["causal_logits"], 0.1)


def test_1_5_initial_scales():
    """Projections have variance 1 / fan-in, embeddings 1 / D, norm scales 0."""
    cfg = dataclasses.replace(SIZES["debug"], width=256, mlp=512, vocab_size=1000)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(Decoder(cfg).init(jax.random.key(0), tokens, method="text"))["params"]
    block = params["layers"]["0_local"]
    for leaf, fan_in in (
        (block["attn"]["q"]["kernel"], 256),
        (block["attn"]["o"]["kernel"], 64),
        (block["mlp"]["down"]["kernel"], 512),
        (params["embedding"], 256),
    ):
        assert abs(float(leaf.std()) * fan_in**0.5 - 1) < 0.05
    assert not block["pre_attn_norm"]["scale"].any()


def test_untied_head_and_bad_configs():
    cfg = dataclasses.replace(GEMMA2, tie=False)
    params = abstract(cfg)
    assert params["head"].shape == (48, 24)
    assert decoder_weights.weight_map(cfg).names["head"].name == "lm_head.weight"
    with pytest.raises(ValueError, match="kv_heads=3"):
        dataclasses.replace(GEMMA2, kv_heads=3)
    with pytest.raises(ValueError, match="'local' and 'global'"):
        dataclasses.replace(GEMMA2, pattern=("sparse",))
