"""What the benchmarks share: interleaved rounds, statistics with spread, random models, results.

Programs that are compared take turns in every round of one process, so that another load on the
machine slows all of them; ratios are taken round by round and reported as median and quartiles.
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def interleave(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each case in each round."""
    clocked = {name: functools.partial(clock, run) for name, run in cases.items()}
    return take_turns(clocked, rounds, warmup)


def take_turns(
    cases: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds that each case returns in each round; the one that starts changes every round."""
    for _ in range(warmup):
        for run in cases.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(cases[name]())
    return seconds


def clock(run: Callable[[], Any]) -> float:
    """Seconds until the result of run() is there."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, four digits."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": digits(middle), "low": digits(low), "high": digits(high)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """slow / fast, round by round: median and quartiles."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def digits(value: float, count: int = 4) -> float:
    """Rounded to `count` significant digits."""
    return float(f"{value:.{count}g}")


def machine() -> dict[str, Any]:
    """Where a number was measured; the load average says whether anyone else was there."""
    device, cores = jax.devices()[0], os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu {cpu_name()}",
        "devices": jax.device_count(),
        "cores": cores,
        "load": digits(os.getloadavg()[0], 3),
        "jax": jax.__version__,
    }


def cpu_name() -> str:
    """Model of the processor, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(row: Mapping[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps(row), flush=True)


def save(path: str, command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with their command and machine as one JSON file; no file for an empty path."""
    if not path:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    result = {"command": command, "machine": machine(), "rows": list(rows)}
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def random_params(init: Callable[[jax.Array], Any], seed: int = 0) -> Any:
    """Unboxed parameters of a model's init plus a little: nothing that is computed is zero."""

    def make(key):
        # A sine instead of noise, since compiling a hundred random draws takes a minute.
        return jax.tree.map(
            lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
            nn.meta.unbox(init(key)),
        )

    return jax.jit(make)(jax.random.key(seed, impl="rbg"))


def drawn(draw: Callable) -> tuple[jax.Array, ...]:
    """draw(normal) in one program, with normal(i, *shape, dtype=) the i-th array.

    The key is an argument and of the kind that compiles fast.
    """

    def run(key):
        def normal(i, *shape, dtype=jnp.float32):
            return jax.random.normal(jax.random.fold_in(key, i), shape).astype(dtype)

        return tuple(draw(normal))

    return jax.jit(run)(jax.random.key(0, impl="rbg"))


def filled(shapes: Any) -> Any:
    """Arrays of these shapes with small numbers in them, none of them zero: a model's weights
    where compiling its init would take longer than what is measured."""

    def one(x):
        shape = x.shape or (1,)
        place = sum(jax.lax.broadcasted_iota(jnp.float32, shape, i) for i in range(len(shape)))
        return 0.02 * jnp.sin(1.0 + place).reshape(x.shape)

    return jax.jit(lambda: jax.tree.map(lambda x: one(x).astype(x.dtype), shapes))()


def random_batch(spec: Mapping[str, jax.ShapeDtypeStruct], vocabulary: int, seed: int = 0) -> dict:
    """A batch of these shapes: random pictures, moments and text, texts three quarters full."""
    rng, batch = np.random.default_rng(seed), {}
    for key, shape in spec.items():
        if shape.dtype == jnp.uint8:
            batch[key] = rng.integers(0, 256, shape.shape, dtype=np.uint8)
        elif jnp.issubdtype(shape.dtype, jnp.floating):
            batch[key] = rng.normal(size=shape.shape).astype(shape.dtype)
            if key.endswith("moments"):
                batch[key][..., shape.shape[-1] // 2 :] -= 4.0  # log variance
        else:
            batch[key] = rng.integers(4, vocabulary, shape.shape, dtype=np.int32)
    for kind in ("gen", "und"):
        if f"{kind}_tokens" in batch:
            width = batch[f"{kind}_tokens"].shape[1]
            for key in (f"{kind}_length", f"{kind}_text_length"):
                if key in batch:
                    batch[key][:] = max(width * 3 // 4, 1)
    if "und_prefix" in batch:
        batch["und_prefix"][:] = max(batch["und_tokens"].shape[1] // 4, 2)
    rows = sum(len(batch[key]) for key in ("gen_length", "und_length") if key in batch)
    return jax.tree.map(jnp.asarray, batch | {"example": np.arange(rows, dtype=np.int32)})


def temp_bytes(compiled) -> int:
    """Bytes of temporaries of a compiled program, arguments and results left out."""
    return compiled.memory_analysis().temp_size_in_bytes
