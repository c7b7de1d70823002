"""Checks of benchmarks/accelerator.py: this device against plain forms, float32, full precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks import generation as drawing
from benchmarks.language import LanguageModel
from configs.common import load_config
from kernels import mlstm as recurrent
from kernels.attention import MaskSpec
from kernels.attention.api import IMPLEMENTATIONS
from kernels.errors import NotSupported
from models import MODELS
from models.blocks import losses
from models.blocks.decoder import DecoderConfig

GEMMA2 = dict(attn_softcap=50.0, final_softcap=30.0, post_norms=True)
SMALL = DecoderConfig(512, 128, 3, 256, heads=4, kv_heads=2, head_dim=64, window=16, **GEMMA2)


def precise(function):
    """Products in full float32 while `function` is traced: accelerators round them by default."""

    @functools.wraps(function)
    def wrapped(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return wrapped


def verdict(check: str, value: float, limit: float, **more) -> dict:
    """One row; NaN fails."""
    return {"check": check, **more, "value": common.digits(value, 3), "limit": limit} | {
        "passed": bool(value <= limit)
    }


def apart(got, want) -> float:
    """Largest difference over all leaves, relative to the largest entry of each."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(
        float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30))
        for a, b in ((x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs)
    )


def masks(rows: int, length: int) -> dict[str, MaskSpec]:
    """The descriptions that models use."""
    half = jnp.full((rows,), length // 2, jnp.int32)
    packed = (jnp.arange(length) // (length // 3 + 1))[None].repeat(rows, 0)
    valid = jnp.arange(length)[None].repeat(rows, 0) < length - 3
    return {
        "causal": MaskSpec(),
        "window": MaskSpec(window=length // 4),
        "pinned": MaskSpec(window=length // 4, always_visible=length // 16),
        "prefix": MaskSpec(prefix_length=half),
        "packed": MaskSpec(q_segment_ids=packed, kv_segment_ids=packed),
        "padded": MaskSpec(causal=False, kv_valid=valid),
    }


@precise
def attention(quick: bool, peaks: dict) -> list[dict]:
    """Each implementation and mask against the reference: values and gradients."""
    rows, length, heads, groups, width = (2, 64, 4, 2, 32) if quick else (2, 512, 8, 4, 128)
    keys = jax.random.split(jax.random.key(0), 4)
    found = []
    for dtype, limit in (("bfloat16", 2e-2), ("float32", 1e-5)):
        q, g = (jax.random.normal(k, (rows, length, heads, width), dtype) for k in keys[:2])
        k, v = (jax.random.normal(k, (rows, length, groups, width), dtype) for k in keys[2:])

        # Arguments, not constants: XLA would fold products of constants while compiling.
        def both(impl, mask, q, k, v, g):
            # cuDNN takes no cap, so windows go without.
            options = dict(scale=width**-0.5, softcap=None if mask.window else 50.0)

            def value(q, k, v):
                return IMPLEMENTATIONS[impl](q, k, v, mask, **options)

            out, back = jax.vjp(value, q, k, v)
            return out, back(g)

        for name, mask in masks(rows, length).items():
            want = jax.jit(functools.partial(both, "ref"))(mask, q, k, v, g)
            for impl in ("xla", *({"tpu", "gpu"} & {jax.default_backend()})):
                row = {"dtype": dtype, "mask": name, "impl": impl}
                try:
                    got = jax.jit(functools.partial(both, impl))(mask, q, k, v, g)
                except NotSupported as error:
                    found.append({"check": "attention", **row, "not_supported": str(error)})
                    continue
                found.append(verdict("attention", apart(got, want), limit, **row))
    return found


@precise
def mlstm(quick: bool, peaks: dict) -> list[dict]:
    """Each implementation of the mLSTM against the recurrence: h, last state and gradients; one
    token in a scan over layers."""
    shape = (1, 1, 40, 16, 32) if quick else (2, 4, 600, 256, 512)
    found = []
    for dtype, limit in (("float32", 1e-4), ("bfloat16", 2e-2)):
        inputs, documents = mlstm_inputs(shape, dtype)
        weight = jax.random.normal(jax.random.key(9), inputs[2].shape)

        def both(impl, inputs, documents, weight):
            def total(*inputs):
                h, last = recurrent.mlstm(*inputs, segment_ids=documents, impl=impl)
                # Times exp(m): what does not depend on the gauge has one gradient.
                state = ((last.C.sum((2, 3)) + last.n.sum(2)) * jnp.exp(last.m)).sum()
                return (h.astype(jnp.float32) * weight).sum() + 1e-3 * state, h

            return jax.grad(total, (0, 1, 2, 3, 4), has_aux=True)(*inputs)

        exact = [x.astype(jnp.float32) for x in inputs]
        want = jax.jit(functools.partial(both, "ref"))(exact, documents, weight)
        for impl in ("xla", "tpu", "gpu"):
            row = {"dtype": dtype, "impl": impl}
            if impl != "xla" and jax.default_backend() != impl:
                continue
            try:
                got = jax.jit(functools.partial(both, impl))(inputs, documents, weight)
            except NotSupported as error:
                found.append({"check": "mlstm", **row, "not_supported": str(error)})
                continue
            found.append(verdict("mlstm", apart(got, want), limit, **row))

        *inputs, states = mlstm_layers(3, shape, dtype)
        exact = [x.astype(jnp.float32) for x in inputs]
        want = jax.jit(functools.partial(mlstm_steps, "ref"))(*exact, states)
        for impl in ("xla", jax.default_backend()):
            if impl in ("xla", "tpu", "gpu"):
                step = jax.jit(functools.partial(mlstm_steps, impl))
                row = {"dtype": dtype, "impl": impl}
                try:
                    got = step(*inputs, states)
                except NotSupported as error:
                    found.append({"check": "mlstm step", **row, "not_supported": str(error)})
                    continue
                found.append(verdict("mlstm step", apart(got, want), limit, **row))
    return found


def mlstm_layers(layers, shape, dtype):
    """(q, k, v, i, f, states of all layers) of one random token; shape as in mlstm_inputs."""
    b, h, _, k, v = shape
    inputs, _ = mlstm_inputs((b, h, 1, k, v), dtype)
    keys = jax.random.split(jax.random.key(1), 3)
    sizes = ((layers, b, h, k, v), (layers, b, h, k), (layers, b, h))
    states = (jnp.abs(jax.random.normal(x, size)) for x, size in zip(keys, sizes))
    return *(x[:, :, 0] for x in inputs), recurrent.State(*states)


def mlstm_steps(impl, q, k, v, i, f, states):
    """One token through layers as models scan over them: each layer's h is the next one's v."""

    def layer(v, state):
        return recurrent.mlstm_step(q, k, v, i, f, state, impl=impl)

    return jax.lax.scan(layer, v, states)


def mlstm_inputs(shape, dtype):
    """((q, k, v, i, f), document of each token) of random tokens; shape is (B, H, T, K, V)."""
    b, h, t, k, v = shape

    def draw(normal):
        # Positive q and k: sums that nearly cancel would measure the test, not the kernel.
        q, key = (jnp.abs(normal(i, b, h, t, k, dtype=dtype)) for i in (0, 1))
        i, f = normal(3, b, h, t), 3 + normal(4, b, h, t)
        return q, key, normal(2, b, h, t, v, dtype=dtype), i, f

    documents = jnp.cumsum(jax.random.bernoulli(jax.random.key(5), 0.01, (b, t)), axis=1)
    return common.drawn(draw), documents.astype(jnp.int32)


@precise
def cross_entropy(quick: bool, peaks: dict) -> list[dict]:
    """Sliced cross-entropy against the plain one."""
    tokens, width, vocabulary = (32, 32, 10_000) if quick else (512, 512, 64_000)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width))
    table = jax.random.normal(keys[1], (vocabulary, width)) * width**-0.5
    targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)

    def value(form, hidden, table):
        return form(hidden, table, targets, jnp.ones((tokens,)), softcap=30.0)[0]

    both = [
        jax.jit(jax.value_and_grad(functools.partial(value, form), (0, 1)))(hidden, table)
        for form in (losses.chunked_cross_entropy, losses.plain_cross_entropy)
    ]
    return [verdict("cross-entropy and its gradients", apart(*both), 1e-5)]


@precise
def decode(quick: bool, peaks: dict) -> list[dict]:
    """Cached greedy tokens against the full forward pass over the same text."""
    model, new = LanguageModel(SMALL), 24
    params = model.init()
    prompt = jax.random.randint(jax.random.key(1), (3, 16), 3, SMALL.vocab_size)
    out = model.decode(params, prompt, new)
    logits = jax.jit(model.logits)(params, jnp.concatenate([prompt, out], axis=1))
    scores = logits[:, prompt.shape[1] - 1 : -1]
    chosen = jnp.take_along_axis(scores, out[..., None], axis=2)[..., 0]
    # Not the arg max itself: two scores may be equal to the last bit but one.
    lost = float((scores.max(2) - chosen).max())
    return [verdict("score lost by cached greedy tokens", lost, 1e-4)]


@precise
def pictures(quick: bool, peaks: dict) -> list[dict]:
    """Latents drawn with the cache against recomputation without one, same noise."""
    argv = ["--config=configs/uniflud.py:debug", "--batch=2", f"--steps={4 if quick else 20}"]
    _, model, params, inputs, settings = drawing.build(drawing.arguments(argv))
    want = drawing.recomputed(model, settings)(params, *inputs)
    got = drawing.cached(model, settings)(params, *inputs)
    return [verdict("cached pictures", float(jnp.abs(got - want).max()), 1e-3)]


@precise
def training(quick: bool, peaks: dict) -> list[dict]:
    """Loss and gradients of the debug model here and on this machine's CPU."""
    config = load_config("configs/uniflud.py:debug", **{"model.vocab_size": 512})
    model = MODELS[config.model.name](config)
    params = common.random_params(lambda key: model.init(key)[0])
    batch = common.random_batch(model.batches["image_text"], config.model.vocab_size)

    def value(params, batch):
        key = jax.random.key(1)
        return model.loss(params, {}, batch, key, step=0, norms=model.norms(batch))[0]

    both = jax.jit(jax.value_and_grad(value))
    got = jax.device_get(both(params, batch))
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        return [{"check": "loss and gradients of UniFluid", "not_supported": "no CPU backend"}]
    want = jax.device_get(both(*jax.device_put((params, batch), cpu)))
    scale = np.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(want[1])))
    gap = jax.tree.map(lambda a, b: float(np.square(a - b).sum()), got[1], want[1])
    gradient = np.sqrt(sum(jax.tree.leaves(gap))) / scale
    return [
        verdict("loss of UniFluid", abs(float(got[0] / want[0]) - 1), 1e-5),
        verdict("gradient of UniFluid", float(gradient), 1e-4),
    ]
