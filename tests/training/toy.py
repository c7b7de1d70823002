"""A tiny model and data set with everything the loop must get right, registered for tests.

Run as a script it is main.py with these registered: python toy.py --config=toy_config.py ...
"""

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CONFIG = str(Path(__file__).with_name("toy_config.py"))


def do_fault():
    """What the environment variable TOY_FAULT asks for, once: a signal, or a full disk."""
    fault = json.loads(os.environ.pop("TOY_FAULT", "{}"))
    if "signal" in fault:
        os.kill(os.getpid(), getattr(signal, fault["signal"]))
    if "fill" in fault:
        while not os.path.exists(fault["after"]):
            time.sleep(0.05)
        with open(fault["fill"], "wb") as file:
            try:
                while True:
                    file.write(b"0" * 4096)
                    file.flush()
            except OSError:
                file.truncate(file.tell() - 16384)  # room for a few rows, not for a checkpoint


def build_model(config):
    """Masked regression with two loss terms, dropout per example and a running count."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from models import Model

    m = config.model

    def box(value, *names):
        return nn.LogicallyPartitioned(value, names)

    def init(rng):
        a, b, c = jax.random.split(rng, 3)
        trunk = dict(
            up=box(jax.random.normal(a, (m.layers, m.width, 32)) / 8, "layers", "embed", "mlp"),
            down=box(jax.random.normal(b, (m.layers, 32, m.width)) / 8, "layers", "mlp", "embed"),
            scale=box(jnp.ones((m.layers, m.width)), "layers", "norm"),
        )
        head = dict(
            kernel=box(jax.random.normal(c, (m.width, 2)) / 4, "embed", "width_out"),
            bias=box(jnp.zeros(2), "width_out"),
        )
        return dict(trunk=trunk, head=head), dict(seen=jnp.zeros((), jnp.float32))

    def apply(params, x, keys=None):
        def layer(h, p):
            y = jnp.tanh(h * p["scale"] @ p["up"]) @ p["down"]
            return h + nn.with_logical_constraint(y, ("batch", "act_embed")), None

        h, _ = jax.lax.scan(layer, x, params["trunk"])
        if keys is not None and m.dropout:
            keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - m.dropout, h.shape[1:]))(keys)
            h = jnp.where(keep, h / (1 - m.dropout), 0)
        return h @ params["head"]["kernel"] + params["head"]["bias"]

    def norms(batch):
        w = batch["weight"]
        return dict(first=jnp.maximum(w.sum(), 1), second=jnp.float32(w.shape[0]))

    def loss(params, extra, batch, rng, *, step, norms):
        keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(batch["example"])
        x = batch["x"][..., : m.width]
        y = apply(params, x, keys)
        error = jnp.square(y - batch["y"])
        first = (error[:, 0] * batch["weight"]).sum() / norms["first"]
        second = error[:, 1].sum() / norms["second"]
        total = first + second
        if m.explode:
            total = total * jnp.where(step == m.explode - 1, jnp.nan, 1)
        extra = dict(seen=extra["seen"] + batch["weight"].sum())
        return total, (dict(first=first, second=second), extra)

    def bucket(width):
        f = lambda *s: jax.ShapeDtypeStruct((config.batch_size, *s), jnp.float32)  # noqa: E731
        return dict(x=f(width), y=f(2), weight=f())

    batches = {f"w{w}": bucket(w) for w in config.data.widths}
    predict = dict(apply=apply)
    return Model(init, loss, norms, predict, batches)


def build_data(config, *, split, seed, process_index, process_count):
    """Records made from their index; widths alternate between the buckets batch by batch."""
    import grain
    import numpy as np

    from input_pipeline import Pipeline

    local = config.batch_size // process_count
    fault = json.loads(os.environ.get("TOY_FAULT", "{}"))
    widths = config.data.widths

    def make(i):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), int(i)])
        x = rng.normal(size=max(widths)).astype(np.float32)
        y = np.stack([x[:4].sum(), x[:4].prod()]).astype(np.float32)
        weight = np.float32(rng.random() < 0.6)
        return dict(x=x, y=y, weight=weight)

    def cut(index, batch):
        if index == fault.get("batch"):
            do_fault()
        return batch | dict(x=batch["x"][:, : widths[index % len(widths)]])

    ds = grain.MapDataset.range(config.data.records).seed(seed).shuffle()
    ds = ds.map(make).repeat(config.data.epochs or None).batch(local)
    ds = ds[process_index::process_count].map_with_index(cut)
    # No read-ahead: a fault at batch 9 must come when the loop asks for batch 9.
    none = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return Pipeline(ds.to_iter_dataset(none), vocab_size=0)


def build_eval(config):
    """Mean error on fixed inputs; waits when asked to, so that a test can interrupt it."""

    def evaluate(model, params, *, step, rng, workdir):
        import time

        import jax
        import jax.numpy as jnp

        if "TOY_FAULT" in os.environ and "eval" in os.environ["TOY_FAULT"]:
            do_fault()
        Path(workdir, "eval-started").touch()
        time.sleep(config.data.eval_seconds)
        if model is None:
            return dict(total=float(len(list(Path(workdir).glob("*/metrics.jsonl")))))
        x = jax.random.normal(rng, (16, max(config.data.widths)))[:, : config.model.width]
        return dict(mean=float(jnp.abs(model.predict["apply"](params, x)).mean()))

    return evaluate


def register():
    """Put the toys into the tables."""
    from eval import EVALUATORS
    from input_pipeline import DATASETS
    from models import MODELS

    MODELS["toy"], DATASETS["toy"], EVALUATORS["toy"] = build_model, build_data, build_eval


if __name__ == "__main__":
    import main
    from training import platform

    platform.before_jax()  # registering imports jax
    register()
    sys.exit(main.main([str(ROOT / "main.py"), *sys.argv[1:]]))
