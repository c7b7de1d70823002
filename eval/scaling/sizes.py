"""Parameters of a run's model, counted from its config without making any."""

import functools
import json
import math
from typing import NamedTuple

import jax
from ml_collections import ConfigDict


class Size(NamedTuple):
    """Parameters: all, and those of the input embedding where the head has rows of its own."""

    total: int
    input_embedding: int

    @property
    def without_input(self) -> int:
        """What the laws call N: with the output head, without an embedding that is only read."""
        return self.total - self.input_embedding


def count(config: dict) -> Size:
    """Size of the model of a run's config.json."""
    needed = {key: config[key] for key in ("model", "precision", "remat", "ramp", "batch_size")}
    needed["data"] = {key: config["data"][key] for key in ("name", "length")}
    return _count(json.dumps(needed, sort_keys=True))


@functools.lru_cache(maxsize=256)
def _count(text: str) -> Size:
    from models import MODELS

    config = ConfigDict(json.loads(text))
    params, _ = jax.eval_shape(MODELS[config.model.name](config).init, jax.random.key(0))
    paths = {
        jax.tree_util.keystr(path): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    ends = lambda word: [s for p, s in paths.items() if f"'{word}'" in p]  # noqa: E731
    return Size(sum(paths.values()), sum(ends("embedding")) if ends("head") else 0)
