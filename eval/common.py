"""What evaluators share: padded batches, compiled calls, arrays on the host, fixed choices."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np


def padded(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Index batches of one size covering 0..count-1, and how many of each are real.

    The last one repeats its last index: every call has one shape, and nothing is dropped.
    """
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        yield np.minimum(rows, count - 1), min(size, count - start)


def in_batches(function: Callable, count: int, size: int, rows: Callable) -> np.ndarray:
    """function(rows(index)) over padded batches, concatenated without the padding, on the host."""
    parts = [to_host(function(rows(index)))[:real] for index, real in padded(count, size)]
    return np.concatenate(parts)


def to_host(array) -> np.ndarray:
    """The whole array as numpy on every process, also when its shards lie on other hosts."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


@functools.lru_cache(maxsize=64)
def jitted(function: Callable) -> Callable:
    """jax.jit(function), the same object each time: later evaluations do not compile again."""
    return jax.jit(function)


def need(model, name: str) -> Callable:
    """model.predict[name], compiled; an error that names the evaluators' need otherwise."""
    if name not in model.predict:
        raise ValueError(
            f"config.evals needs a model with predict[{name!r}]; "
            f"this one has {', '.join(model.predict) or 'none'}"
        )
    return jitted(model.predict[name])


def choose(count: int, most: int, seed: int) -> np.ndarray:
    """At most `most` of 0..count-1, in an order that depends on count and seed only."""
    return np.random.default_rng((seed, count)).permutation(count)[:most]


def read_rows(path) -> list[dict]:
    """Rows of a metrics.jsonl; a line cut short by a kill is left out, no file gives none."""
    path, rows = Path(path), []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 pictures as float32 in [-1, 1]."""
    return np.asarray(images, np.float32) / 127.5 - 1.0


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Pictures in [-1, 1] as uint8, rounded and clipped."""
    return np.round(np.clip((np.asarray(images, np.float32) + 1.0) * 127.5, 0, 255)).astype(
        np.uint8
    )
