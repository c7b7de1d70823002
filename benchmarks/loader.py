"""Speed of the input pipeline: preparing, starting, images per second, and what a step waits.

    python -m benchmarks.loader [--full]

Prints one JSON object per question. `cpu` numbers divide by the CPU seconds of this process, all
threads included, so that they mean one core also on a busy machine; `wall` numbers do not.
--full adds preparation from nothing (about half a minute).
"""

import json
import os
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs.data import data_config
from input_pipeline import DATASETS

BATCH = 64


def make_config(batch_size: int = BATCH, **data) -> ConfigDict:
    """The flagship's default data, changed by fields of config.data."""
    default = dict(categories=("food", "nature", "travel"), skin_tones=False)
    return ConfigDict(dict(batch_size=batch_size, data=data_config(**default | data)))


def build(config):
    """The training pipeline of one process."""
    return DATASETS[config.data.name](
        config, split="train", seed=0, process_index=0, process_count=1
    )


def report(question: str, **numbers) -> None:
    """One JSON line."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in numbers.items()}
    print(json.dumps({"question": question, **rounded}), flush=True)


def preparation(question: str, **data) -> None:
    """Seconds from an empty cache to the first batch, and again with the cache."""
    kept = os.environ.get("UNIFLUD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNIFLUD_CACHE"] = folder
        wall, cpu = time.perf_counter(), time.process_time()
        pipeline = build(make_config(**data))
        next(iter(pipeline.dataset))
        cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
        pipeline.close()
    os.environ.pop("UNIFLUD_CACHE")
    if kept:
        os.environ["UNIFLUD_CACHE"] = kept
    report(question, wall_s=wall_s, cpu_s=cpu_s)


def start(question: str, **data) -> None:
    """Seconds to the first batch of a prepared set, in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    pipeline = build(make_config(**data))
    next(iter(pipeline.dataset))
    report(question, wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)
    pipeline.close()


def throughput(question: str, steps: int = 200, per_row: int = 1, **data) -> None:
    """Rows (or tokens, per_row of them a row) per second without a consumer, one thread."""
    pipeline = build(make_config(prefetch=0, **data))
    iterator = iter(pipeline.dataset)
    for _ in range(steps // 4):
        next(iterator)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(iterator)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    rows = steps * BATCH * per_row
    report(question, per_s_wall=round(rows / wall_s), per_s_cpu=round(rows / cpu_s))
    pipeline.close()


@jax.jit
def work(x):
    """About a tenth of a second on two cores: stands for a training step."""
    return jax.lax.fori_loop(0, 60, lambda i, y: jnp.tanh(y @ x), x)


def waiting(question: str, steps: int = 40, **data) -> None:
    """Share of the time that a loop of computed steps waits for its next batch."""
    pipeline = build(make_config(**data))
    iterator, x = iter(pipeline.dataset), jnp.full((512, 512), 1e-3)
    work(x).block_until_ready()
    next(iterator)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        result = work(x)
        asked = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - asked
        result.block_until_ready()
    total = time.perf_counter() - begin
    report(question, waited_share=waited / total, step_ms=1e3 * total / steps)
    pipeline.close()


def main(full: bool) -> None:
    """All questions."""
    report("machine", cores=os.cpu_count(), load=os.getloadavg()[0], python=sys.version.split()[0])
    if full:
        preparation("prepare image_text, 32 px, from nothing")
        preparation("prepare image_text, 64 px, from nothing", image_size=64)
    start("start image_text, 32 px, prepared before or now")
    start("start image_text, 32 px, second time in a process")
    throughput("image_text rows per second, 32 px")
    throughput("image_text rows per second, 64 px", image_size=64)
    throughput("edit rows per second, 32 px", edit=True, source="scenes")
    throughput("images per second, 32 px", name="images")
    throughput("images per second, 32 px, decoded on demand", name="images", cache_mb=0)
    tokens = dict(name="text", text="docs", length=256)
    throughput("text tokens per second, packed to 256", per_row=256, **tokens)
    waiting("data wait beside computation, image_text, 32 px")


if __name__ == "__main__":
    main(full="--full" in sys.argv[1:])
