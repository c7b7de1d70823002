"""Timings of benchmarks/accelerator.py: bfloat16, medians, shares of the chip's peaks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks import generation as drawing
from benchmarks.accelerator_checks import mlstm_inputs, mlstm_layers, mlstm_steps
from benchmarks.language import LanguageModel
from benchmarks.train_step import Step
from configs.common import load_config
from eval.flops import count_flops
from kernels import mlstm as recurrent
from kernels.attention import MaskSpec
from kernels.attention.api import IMPLEMENTATIONS
from kernels.errors import NotSupported
from models import MODELS
from models.blocks import losses
from models.blocks.decoder import SIZES
from training.metrics import PEAK_FLOPS
from training.topology import CHIPS

KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA H100 80GB HBM3": "h100",
}  # fmt: skip
HBM = {"NVIDIA H200": 4.8e12}  # bytes a second of devices that no dry run knows
ROUNDS = 5


def vendor_peaks() -> dict[str, float]:
    """{"flops", "bytes"} a second of one device as published; empty where unknown."""
    kind = jax.devices()[0].device_kind
    peaks = {"flops": PEAK_FLOPS[kind]} if kind in PEAK_FLOPS else {}
    if kind in HBM:
        peaks["bytes"] = HBM[kind]
    if kind in KINDS:
        peaks |= {"flops": CHIPS[KINDS[kind]].peak, "bytes": CHIPS[KINDS[kind]].hbm_rate}
    return peaks


def seconds(run, rounds: int = ROUNDS) -> float:
    """Median of some runs after a warm-up."""
    return float(np.median(common.interleave({"": run}, rounds)[""]))


def rate(took: float, peaks: dict, flops: float = 0, moved: float = 0) -> dict:
    """Seconds, and achieved rates with their share of the peaks."""
    row = {"seconds": common.digits(took)}
    for name, amount in (("flops", flops), ("bytes", moved)):
        if amount:
            row[f"{name}_per_s"] = common.digits(amount / took)
            if name in peaks:
                row[f"share_of_peak_{name}"] = common.digits(amount / took / peaks[name], 3)
    return row


def attempt(row: dict, measure) -> dict:
    """row | measure(), or why there is no number: not supported, or out of memory."""
    try:
        return row | measure()
    except NotSupported as error:
        return row | {"not_supported": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"out_of_memory": True}


def device(quick: bool, peaks: dict) -> list[dict]:
    """A large product and a large copy; they become the peaks where the vendor's are unknown."""
    rows, best = [], {}
    for dtype, side in (("bfloat16", 1024 if quick else 8192), ("float32", 512 if quick else 4096)):
        # Not ones or zeros: chips run faster on them.
        x = jax.random.normal(jax.random.key(0), (side, side), dtype)
        took = seconds(functools.partial(jax.jit(jnp.dot), x, x))
        rows.append({"what": f"product {dtype}", "side": side} | rate(took, peaks, 2 * side**3))
        best.setdefault("flops", 2 * side**3 / took)
    x = jnp.ones((2**22 if quick else 2**28,), jnp.float32)
    took = seconds(functools.partial(jax.jit(lambda x: x + 1), x))
    rows.append({"what": "copy", "bytes": 2 * x.nbytes} | rate(took, peaks, moved=2 * x.nbytes))
    best["bytes"] = 2 * x.nbytes / took
    for name, value in best.items():
        peaks.setdefault(name, value)
    return rows


def attention(quick: bool, peaks: dict) -> list[dict]:
    """Every implementation on a training and a decoding shape."""
    rows, length, heads, groups, width = (2, 128, 4, 2, 32) if quick else (8, 2048, 8, 4, 256)
    shapes = {
        "causal": (length, MaskSpec()),
        "window": (length, MaskSpec(window=length // 4)),
        "decode": (1, MaskSpec(q_positions=jnp.full((rows, 1), length - 1, jnp.int32))),
    }
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(x, (rows, length, groups, width), jnp.bfloat16) for x in keys[:2])
    found = []
    impls = ("ref", "xla", *({"tpu", "gpu"} & {jax.default_backend()}))
    for (name, (queries, mask)), impl in itertools.product(shapes.items(), impls):
        q = jax.random.normal(keys[2], (rows, queries, heads, width), jnp.bfloat16)
        visible = float(mask.dense(queries, length).mean())
        flops = 4 * rows * heads * queries * length * width * visible
        moved = 0 if queries > 1 else k.nbytes + v.nbytes

        def forward(q, k, v, impl=impl, mask=mask):
            options = dict(scale=width**-0.5, softcap=None if mask.window else 50.0)
            return IMPLEMENTATIONS[impl](q, k, v, mask, **options)

        def both(q, k, v, forward=forward):
            return jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

        passes = {"forward": (forward, 1.0), "forward and backward": (both, 3.5)}
        for label, (function, times) in passes.items():
            if queries == 1 and function is both:
                continue
            row = {"what": name, "impl": impl, "pass": label}
            run = functools.partial(jax.jit(function), q, k, v)
            amount = dict(flops=flops * times, moved=moved)
            found.append(attempt(row, lambda run=run, a=amount: rate(seconds(run), peaks, **a)))
    return found


def mlstm(quick: bool, peaks: dict) -> list[dict]:
    """The mLSTM at a constant number of tokens, beside causal attention at the same model width.

    16 heads of 128 and 256, the shape of arXiv 2503.14376; attention 32 heads of 128.
    """
    tokens, heads, k, v = (256, 2, 32, 64) if quick else (65_536, 16, 128, 256)
    platform, found = jax.default_backend(), []
    impls = ("xla", *({"tpu", "gpu"} & {platform}))
    for length in (128, 256) if quick else (1024, 8192, 65_536):
        rows = tokens // length
        inputs, _ = mlstm_inputs((rows, heads, length, k, v), jnp.bfloat16)
        pairs = 2 * tokens * heads * (128 * (k + v) // 2 + 2 * k * v)  # chunks of 128
        moved = 2 * tokens * heads * 2 * (k + v)
        forms = {f"mlstm {name}": functools.partial(_mlstm, name) for name in impls}
        arrays = dict.fromkeys(forms, inputs)
        if platform == "gpu":
            forms["attention cudnn"] = _cudnn
            x = jax.random.normal(jax.random.key(1), (rows, length, heads * v // 128, 128))
            arrays["attention cudnn"] = (x.astype(jnp.bfloat16),) * 3
        for name, form in forms.items():
            grad = jax.grad(lambda *x, form=form: form(*x).sum(), (0, 1, 2))
            for label, function, times in (("forward", form, 1), ("and backward", grad, 3)):
                row = {"what": name, "length": length, "rows": rows, "pass": label}
                run = functools.partial(jax.jit(function), *arrays[name])
                work = dict(flops=pairs * times, moved=moved * times) if "mlstm" in name else {}
                found.append(attempt(row, lambda run=run, w=work: rate(seconds(run), peaks, **w)))
    return found + _mlstm_steps(quick, peaks, impls)


def _mlstm_steps(quick: bool, peaks: dict, impls) -> list[dict]:
    """One token through the layers of xLSTM 7B, states only: bytes are one read and one write."""
    layers, heads, k, v = (2, 2, 32, 64) if quick else (32, 8, 256, 512)
    found = []
    for rows, impl in itertools.product((1, 4) if quick else (1, 8, 64), impls):
        row = {"what": f"mlstm step {impl}", "layers": layers, "rows": rows}

        def measure(rows=rows, impl=impl):
            inputs = mlstm_layers(layers, (rows, heads, 1, k, v), jnp.bfloat16)
            run = functools.partial(jax.jit(functools.partial(mlstm_steps, impl)), *inputs)
            return rate(seconds(run), peaks, moved=2 * inputs[-1].C.nbytes)

        found.append(attempt(row, measure))
    return found


def _mlstm(impl, *inputs):
    return recurrent.mlstm(*inputs, impl=impl)[0].astype(jnp.float32)


def _cudnn(q, k, v):
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return out.astype(jnp.float32)


def cross_entropy(quick: bool, peaks: dict) -> list[dict]:
    """Loss and gradients over Gemma's vocabulary, in slices and at once."""
    tokens, width, vocabulary = (64, 64, 16_000) if quick else (4096, 2304, 256_000)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    table = jax.random.normal(keys[1], (vocabulary, width)) * width**-0.5
    targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    forms = {"in slices": losses.chunked_cross_entropy, "at once": losses.plain_cross_entropy}
    flops = 3 * 2 * tokens * width * vocabulary
    found = []
    for name, form in forms.items():

        def value(hidden, table, form=form):
            return form(hidden, table, targets, jnp.ones((tokens,)), softcap=30.0)[0]

        def measure(value=value):
            compiled = jax.jit(jax.value_and_grad(value, (0, 1))).lower(hidden, table).compile()
            took = seconds(lambda: compiled(hidden, table))
            return {"temp_bytes": common.temp_bytes(compiled)} | rate(took, peaks, flops)

        found.append(attempt({"what": name, "tokens": tokens, "vocabulary": vocabulary}, measure))
    return found


def decode(quick: bool, peaks: dict) -> list[dict]:
    """Greedy decoding with Gemma-2 2B's sizes: time per token without the prompt's."""
    cfg = SIZES["debug"] if quick else SIZES["gemma2_2b"]
    model = LanguageModel(cfg, "bfloat16")
    params = jax.jit(lambda: model.cast(model.init()))()
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    prompt, few, many = (8, 4, 12) if quick else (128, 16, 144)
    found = []
    for batch in (1, 4) if quick else (1, 16, 64):
        tokens = jnp.full((batch, prompt), 5, jnp.int32)

        def measure(tokens=tokens, batch=batch):
            runs = {n: lambda n=n: model.decode(params, tokens, n) for n in (few, many)}
            times = common.interleave(runs, ROUNDS)
            # The fastest of each: another load only adds, and to medians it may add unevenly.
            took = (min(times[many]) - min(times[few])) / (many - few)
            slots = cfg.layers * (prompt + many) * cfg.kv_heads * cfg.head_dim
            matrices = sum(x.size for x in jax.tree.leaves(params))
            return {"tokens_per_s": common.digits(batch / took)} | rate(
                took, peaks, 2 * matrices * batch, weights + 2 * 2 * batch * slots
            )

        found.append(attempt({"what": "greedy tokens", "batch": batch}, measure))
    return found


def midsize(quick: bool, **overrides):
    """The paper's recipe at about 350 M parameters: 256 px, bfloat16, VAE moments given."""
    config = load_config("configs/uniflud.py:0.7b", **overrides)
    with config.unlocked():
        config.model.decoder.update(width=1024, layers=12, mlp=4096, head_dim=128)
        config.model.vocab_size, config.data.latents = 32_768, "given"
        config.model.vit.size, config.batch_size = "B/16", 64
        config.model.vae.size = "kl16"
        if quick:
            config.model.decoder.update(width=64, layers=2, mlp=128, head_dim=32)
            config.model.vocab_size, config.batch_size, config.model.image_size = 512, 4, 64
            config.model.vit.update(size="debug", image_size=32)
            config.model.vae.size = "small_64"
            config.model.head.update(width=64, depth=2)
    return config


def training(quick: bool, peaks: dict) -> list[dict]:
    """Steps of the loop under two checkpointing policies; recomputed FLOPs do not count."""
    found, flops = [], 0
    for remat in ("none", "full"):

        def measure(remat=remat):
            nonlocal flops
            step = Step(midsize(quick, remat=remat))
            took = seconds(step)
            flops = flops or step.flops
            each = {name: peak * jax.device_count() for name, peak in peaks.items()}
            return {
                "parameters": sum(x.size for x in jax.tree.leaves(step.state["params"])),
                "temp_bytes": common.temp_bytes(step.compiled),
                "examples_per_s": common.digits(step.rows / took),
                **rate(took, each, flops),
            }

        found.append(attempt({"what": "training step", "remat": remat}, measure))
    return found


def pictures(quick: bool, peaks: dict) -> list[dict]:
    """Pictures a second of the mid-size model, with and without the head, and without a cache."""
    config = midsize(quick)
    model = MODELS[config.model.name](config)
    params = common.random_params(lambda key: model.init(key)[0])
    steps = 4 if quick else 50
    settings = dict(guidance=3.0, steps=steps, schedule="linear", order="random", x0_clip=5.0)
    trunk, short = drawing.without_head(model), settings | {"steps": 2}
    forms = {
        "cached": drawing.cached(model, settings),
        "trunk cached": drawing.cached(trunk, short),
        "trunk recomputed": drawing.recomputed(trunk, short),
    }
    found = []
    for batch in (2,) if quick else (8, 64):
        length = config.data.prompt_length
        tokens = jnp.full((batch, length), 5, jnp.int32)
        keys = jax.random.split(jax.random.key(0), batch)
        inputs = (params, tokens, jnp.full((batch,), length, jnp.int32), keys)
        for name, form in forms.items():

            def measure(form=form, inputs=inputs, batch=batch):
                took = seconds(lambda: form(*inputs), rounds=3)
                flops = count_flops(form, *inputs)
                return {"images_per_s": common.digits(batch / took)} | rate(took, peaks, flops)

            found.append(attempt({"what": name, "batch": batch, "steps": steps}, measure))
    return found
