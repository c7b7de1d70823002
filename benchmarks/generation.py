"""Drawing and answering: what the cache, the compiled loop and the sampler cost.

    python -m benchmarks.generation [--config=configs/uniflud.py:full] [--batch=8] [--out=FILE]
        [--set model.decoder.layers=6 ...]

cached:      inference.unified, one compiled loop: each token runs the trunk on one position.
recomputed:  one compiled loop too, but every token runs the trunk on the whole sequence.
python head: the cached trunk, with the diffusion steps of each token called one by one from Python.
Each with and without the diffusion head ("trunk" rows: the head replaced by one that does nothing),
because the head costs the same in both loops and so hides what the cache saves.
All of them take turns in one process and must draw the same tokens.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from configs.common import load_config
from eval.flops import count_flops
from inference import unified
from inference.diffusion import draw_noise, guidance_weights, spaced, step_coefficients
from models import MODELS
from models.blocks import diffusion_head as dh


def without_head(model):
    """The model with a head that passes its condition on: what is left is the trunk."""

    def head(params):
        channels = model.predict["head"](params).channels
        return dh.Head(
            time=lambda t: jnp.zeros((*t.shape, 1)),
            cond=lambda z: jnp.tile(z, 2)[..., : 2 * channels].astype(jnp.float32),
            modulate=lambda y: y,
            denoise=lambda x, y: y,
            channels=channels,
        )

    return model._replace(predict={**model.predict, "head": head})


def guided_prefix(predict, params, tokens, length):
    """Prefixes of the prompts and, behind them, of the empty prompt."""
    null = jnp.ones(length.shape, bool)
    pairs = zip(
        predict["generation_prefix"](params, tokens, length),
        predict["generation_prefix"](params, tokens, length, drop=null),
        strict=True,
    )
    return [jnp.concatenate(pair) for pair in pairs]


def recomputed(model, settings):
    """The loop of inference.unified without a cache: the trunk sees all tokens at every one."""
    predict = model.predict

    def run(params, tokens, length, keys):
        rows = tokens.shape[0]
        prefix, valid = guided_prefix(predict, params, tokens, length)
        draw = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
        orders = predict["draw_orders"](draw[:, 0], settings["order"])
        n = orders.shape[1]
        head = predict["head"](params)

        def step(v, k):
            z = predict["generation_states"](
                params, prefix, valid, jnp.tile(v, (2, 1, 1)), jnp.tile(orders, (2, 1))
            )[:, k]
            scale = unified.guidance_at(k, n, settings["guidance"], settings["schedule"])
            token = unified.sample_head(
                head,
                z.reshape(2, rows, -1),
                guidance_weights(scale),
                jax.vmap(lambda key: jax.random.fold_in(key, k))(draw[:, 1]),
                steps=settings["steps"],
                x0_clip=settings["x0_clip"],
            )
            return v.at[:, k].set(token), None

        v, _ = jax.lax.scan(step, jnp.zeros((rows, n, head.channels)), jnp.arange(n))
        return jnp.zeros_like(v).at[jnp.arange(rows)[:, None], orders].set(v)

    return jax.jit(run)


class PythonHead:
    """The cached trunk as jitted pieces, and each diffusion step of each token as one call."""

    def __init__(self, model, settings):
        self.predict, self.settings = model.predict, settings
        self.begin, self.extend = jax.jit(self._begin), jax.jit(self._extend, donate_argnums=3)
        self.visual = jax.jit(self.predict["visual"])
        self.denoise = jax.jit(self._denoise)
        self.noise = jax.jit(draw_noise, static_argnums=(1, 2))

    def _begin(self, params, tokens, length, keys):
        prefix, valid = guided_prefix(self.predict, params, tokens, length)
        draw = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
        orders = self.predict["draw_orders"](draw[:, 0], self.settings["order"])
        cache = self.predict["init_cache"](prefix.shape[0], prefix.shape[1] + orders.shape[1])
        _, start, cache = self.predict["prefill"](params, prefix, valid, cache)
        first = self.predict["start"](params, orders[:, 0])
        return draw[:, 1], orders, start, cache, first

    def _extend(self, params, inputs, position, cache):
        return self.predict["extend"](params, jnp.tile(inputs, (2, 1, 1)), position, cache)

    def _denoise(self, params, x, z, t, scale, c, noise):
        """One ancestral step, as sample_head's loop body writes it."""
        weights = guidance_weights(scale).reshape(2, 1, 1)
        both = jnp.broadcast_to(x, (2, *x.shape))
        out = self.predict["head"](params)(both, t, z.reshape(2, x.shape[0], -1))
        eps, v = jnp.split(out, 2, axis=-1)
        x0 = c["x0_x"] * x - c["x0_eps"] * (weights * eps).sum(0)
        x0 = jnp.clip(x0, -self.settings["x0_clip"], self.settings["x0_clip"])
        share = (v[0] + 1.0) / 2.0
        log_var = share * c["log_large"] + (1.0 - share) * c["log_small"]
        return c["mean_x0"] * x0 + c["mean_x"] * x + c["noise"] * jnp.exp(0.5 * log_var) * noise

    def __call__(self, params, tokens, length, keys):
        """Raster tokens [b, n, c]."""
        s, rows = self.settings, len(length)
        keys, orders, start, cache, inputs = self.begin(params, tokens, length, keys)
        n = orders.shape[1]
        channels = self.predict["head"](params).channels
        steps = spaced(s["steps"]).steps[::-1].astype(np.int32)
        table = step_coefficients(spaced(s["steps"]))
        out = jnp.zeros((rows, n, channels))
        for k in range(n):
            z, cache = self.extend(params, inputs, start + k, cache)
            scale = unified.guidance_at(k, n, s["guidance"], s["schedule"])
            folded = jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(keys)
            noise = self.noise(folded, s["steps"], channels)
            x = noise[0]
            for i, t in enumerate(steps):
                c = {name: values[i] for name, values in table.items()}
                x = self.denoise(params, x, z, t, scale, c, noise[i + 1])
            out = out.at[jnp.arange(rows), orders[:, k]].set(x)
            nearby = orders[:, k, None], orders[:, (k + 1) % n, None]
            inputs = self.visual(params, x[:, None], *nearby)[:, 0]
        return out


def build(args):
    """(config, model, params, prompt arrays, sampler settings)."""
    fixed = {"model.vocab_size": 4096, "precision": args.precision, "data.questions": 1}
    config = load_config(args.config, *args.set, **fixed)
    if "patch" in config.model.vae:
        config.model.vae.patch = 1  # :full draws four latents a token: 64 tokens instead of 16
    model = MODELS[config.model.name](config)
    params = common.random_params(lambda key: model.init(key)[0])
    batch = common.random_batch(model.batches["image_text"], config.model.vocab_size)
    repeat = -(-args.batch // len(batch["gen_length"]))
    tokens = jnp.tile(batch["gen_tokens"], (repeat, 1))[: args.batch]
    length = jnp.tile(batch["gen_length"], repeat)[: args.batch]
    settings = dict(
        guidance=args.guidance, steps=args.steps, schedule="linear", order="random", x0_clip=5.0
    )
    keys = jax.random.split(jax.random.key(0), args.batch)
    return config, model, params, (tokens, length, keys), settings


def cached(model, settings):
    """The product's own sampler with the signature of the other two; raster tokens."""
    run = unified.compiled_images(model, **settings)

    def call(params, tokens, length, keys):
        return run(params, tokens, length, None, keys, jnp.float32(1.0)).tokens

    return call


def images(args) -> list[dict]:
    """Rows about drawing."""
    config, model, params, inputs, settings = build(args)
    trunk, short = without_head(model), settings | {"steps": 2}
    functions = {
        "cached": cached(model, settings),
        "recomputed": recomputed(model, settings),
        "python head": PythonHead(model, settings),
        "trunk cached": cached(trunk, short),
        "trunk recomputed": recomputed(trunk, short),
    }
    want = np.asarray(functions["cached"](params, *inputs))
    apart = {
        name: float(np.abs(np.asarray(functions[name](params, *inputs)) - want).max())
        for name in ("recomputed", "python head")
    }
    cases = {name: lambda f=f: f(params, *inputs) for name, f in functions.items()}
    times = common.interleave(cases, args.rounds)
    middle = {name: np.median(values) for name, values in times.items()}
    flops = {
        name: count_flops(functions[name], params, *inputs)
        for name in times
        if "python" not in name
    }
    setup = dict(
        config=args.config, batch=args.batch, tokens=want.shape[1], steps=args.steps,
        guidance=args.guidance, precision=args.precision,
    )  # fmt: skip
    rows = [
        {"what": name, **setup, "seconds": common.spread(times[name])}
        | {"images_per_s": common.digits(args.batch / middle[name])}
        | ({"gflop": common.digits(flops[name] / 1e9)} if name in flops else {})
        | ({"largest_difference": common.digits(apart[name], 2)} if name in apart else {})
        for name in times
    ]
    pairs = (
        ("recomputed", "cached"), ("trunk recomputed", "trunk cached"), ("python head", "cached")
    )  # fmt: skip
    rows += [{"what": f"{a} / {b}", "ratio": common.ratio(times[a], times[b])} for a, b in pairs]
    rows.append(
        {
            "what": "sampler's share of the cached loop",
            "share": common.spread(
                [1 - t / c for t, c in zip(times["trunk cached"], times["cached"], strict=True)]
            ),
        }
    )
    return rows


def text(args) -> dict:
    """Tokens per second of answering, prompt and picture included."""
    config, model, params, _, _ = build(args)
    batch = common.random_batch(model.batches["image_text"], config.model.vocab_size)
    rows = min(args.batch, len(batch["und_length"]))
    inputs = (batch["und_image"][:rows], batch["und_tokens"][:rows], batch["und_prefix"][:rows])

    def run():
        return unified.generate_text(model, params, *inputs, max_new=args.new)

    written = int((np.asarray(run()) != unified.PAD).sum())
    seconds = common.interleave({"text": run}, args.rounds)["text"]
    return {
        "what": "answers", "config": args.config, "batch": rows, "new": args.new,
        "seconds": common.spread(seconds),
        "tokens_per_s": common.digits(written / np.median(seconds)),
    }  # fmt: skip


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/uniflud.py:full")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="diffusion steps per token")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--new", type=int, default=24, help="text tokens per answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="", help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """All rows."""
    args = arguments(argv)
    rows = [*images(args), text(args)]
    for row in rows:
        common.show(row)
    options = f"--config={args.config} --batch={args.batch} --steps={args.steps}"
    more = f"--guidance={args.guidance:g} --precision={args.precision} --rounds={args.rounds}"
    more += f" --set {' '.join(args.set)}" * bool(args.set)
    common.save(args.out, f"python -m benchmarks.generation {options} {more}", rows)


if __name__ == "__main__":
    main()
