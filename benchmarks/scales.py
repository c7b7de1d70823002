"""Drawing scale by scale: what the cache of the earlier scales saves.

    python -m benchmarks.scales --out=benchmarks/results/scales.json

cached:     the product's sampler, inference/infinity.py; a scale's pass runs its own tokens.
recomputed: the same program, but each scale's pass runs all tokens so far, masked by scales.
Without the decoder, which costs both the same. FLOPs are counted from the programs, and need no
memory: the 2B model at a million pixels (13 scales, 10,521 tokens). Of the linear layers alone the
ratio is sum_k (tokens up to scale k) / tokens, 2.57 there. Seconds are this machine's, in turns,
for blocks of width 512 at 256 px (7 scales, 521 tokens); both must draw the same codes.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from configs.common import load_config
from eval.flops import count_flops
from inference.infinity import compiled_images
from kernels.attention import MaskSpec
from models import MODELS
from models.blocks.common import row_keys
from models.infinity import PerLayer, Shared
from models.infinity_build import apply
from models.infinity_scales import Rope2d, rope2d, scale_ids
from models.tokenizers.quantisers.schedules import tokens


def without_decoder(model):
    """Latents for pictures."""
    return model._replace(predict={**model.predict, "decode_latents": lambda _, z: z[..., :3]})


def recomputed(model):
    """A model whose cache holds the inputs of all scales so far, and whose step runs them all."""
    system = model.predict["scale_step"].args[0]
    cfg = system.cfg.transformer

    def step(params, x, condition, text, cache, schedule, k, guidance=1.0, insertion=0):
        cache = (*cache, x)
        so_far = schedule[: k + 1]
        rope = Rope2d(*(t[: tokens(so_far)] for t in rope2d(schedule, cfg.head_dim)))
        mask = MaskSpec(causal=False, scales=tuple(h * w for h, w in so_far))
        shared = Shared(condition, rope, mask)
        layers = PerLayer(jnp.arange(cfg.depth), None, text)
        inputs = jnp.concatenate(cache, axis=1)
        hidden = apply(system, params, "trunk", inputs, scale_ids(so_far), layers, shared)[0]
        return hidden[:, -x.shape[1] :], cache

    functions = dict(scale_step=step, init_cache=lambda rows, schedule: ())
    return model._replace(predict={**model.predict, **functions})


def drawing(model, guidance: float):
    """draw(params, text, lengths, keys) -> Pictures, jitted."""
    scales = len(model.predict["layout"]().tokens)
    run = compiled_images(model, guidance=guidance)
    lists = np.full(scales, guidance, np.float32), np.ones(scales, np.float32)

    def draw(params, text, lengths, keys):
        return run(params, text, lengths, keys, *lists, jnp.float32(0.97))

    return draw


def build(config):
    """(model without decoder, the same recomputing, abstract text, lengths and keys)."""
    model = without_decoder(MODELS["infinity"](config))
    rows, spec = config.batch_size, next(iter(model.batches.values()))
    text = spec.get("gen_text", spec["gen_tokens"])
    keys = jax.eval_shape(lambda: row_keys(jax.random.key(0), jnp.arange(rows)))
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return model, recomputed(model), (text, lengths, keys)


def row_of(config, model, guidance) -> dict:
    """What a row is about, and the ratio of the linear layers."""
    schedule = model.predict["layout"]().tokens
    total = tokens(schedule)
    passes = sum(tokens(schedule[: k + 1]) for k in range(len(schedule)))
    return dict(
        width=config.model.transformer.width if "width" in config.model.transformer else 2048,
        pixels=config.data.image_size, scales=len(schedule), tokens=total, guidance=guidance,
        rows=config.batch_size, linear_ratio=common.digits(passes / total),
    )  # fmt: skip


def counted(guidance: float) -> dict:
    """FLOPs of one picture by the 2B model at a million pixels, counted only."""
    config = load_config("configs/infinity.py:2b", batch_size=1)
    model, again, given = build(config)
    params = jax.eval_shape(lambda: common.random_params(lambda key: model.init(key)[0]))
    flops = {
        name: count_flops(drawing(one, guidance), params, *given)
        for name, one in (("cached", model), ("recomputed", again))
    }
    ratio = common.digits(flops["recomputed"] / flops["cached"])
    tera = {f"{name}_tflop": common.digits(value / 1e12) for name, value in flops.items()}
    return dict(what="2b, FLOPs") | row_of(config, model, guidance) | tera | dict(ratio=ratio)


def small_config(rows: int):
    """512 wide blocks on the published tokenizer's schedule at 256 px."""
    overrides = ("batch_size=" + str(rows), "data.image_size=256", "init_from=")
    config = load_config("configs/infinity.py", *overrides)
    with config.unlocked():
        config.model.vocab_size = 1024
        config.model.tokenizer = dict(size="infinity_d16", ch=32)
        config.model.transformer.update(width=512, depth=6, heads=8)
    return config


def timed(guidance: float, rows: int, rounds: int) -> list[dict]:
    """Seconds of both in turns, on this machine."""
    config = small_config(rows)
    model, again, (text, _, _) = build(config)
    params = common.random_params(lambda key: model.init(key)[0])
    words = jnp.arange(text.size, dtype=jnp.int32).reshape(text.shape) % 1000 + 4
    lengths = jnp.arange(rows, dtype=jnp.int32) % text.shape[1] + 1
    given = (params, words, lengths, row_keys(jax.random.key(1), jnp.arange(rows)))
    draws = {"cached": drawing(model, guidance), "recomputed": drawing(again, guidance)}
    bits = [np.asarray(draw(*given).bits) for draw in draws.values()]
    cases = {name: lambda draw=draw: draw(*given) for name, draw in draws.items()}
    times = common.interleave(cases, rounds)
    setup = row_of(config, model, guidance)
    found = [dict(what=name, seconds=common.spread(times[name])) | setup for name in times]
    same = float((bits[0] == bits[1]).mean())
    ratio = common.ratio(times["recomputed"], times["cached"])
    flops = [count_flops(draw, *given) for draw in draws.values()]
    last = dict(what="recomputed / cached", ratio=ratio, same_codes=common.digits(same))
    return [*found, last | dict(flops_ratio=common.digits(flops[1] / flops[0])) | setup]


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=2, help="pictures at once, of the timed rows")
    parser.add_argument("--rounds", type=int, default=5, help="of CPU timing; 0: none")
    parser.add_argument("--out", default="", help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """All rows."""
    args = arguments(argv)
    rows = [counted(args.guidance)]
    if args.rounds:
        rows += timed(args.guidance, args.rows, args.rounds)
    for row in rows:
        common.show(row)
    options = f"--guidance={args.guidance:g} --rows={args.rows} --rounds={args.rounds}"
    common.save(args.out, f"python -m benchmarks.scales {options}", rows)


if __name__ == "__main__":
    main()
