"""Whole published models of benchmarks/accelerator.py: decoding behind a long text, Infinity.

Random weights at published sizes; bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import common
from benchmarks.accelerator_speed import attempt, rate, seconds
from benchmarks.decode_bytes import MODELS as DECODED
from benchmarks.scales import drawing
from benchmarks.train_step import Step
from configs.common import load_config
from eval.flops import count_flops
from eval.speed import state_bytes
from models import MODELS
from models.blocks.common import row_keys
from training.dryrun import model_flops

ROWS, LENGTH = 128, 8192  # the paper's (Hymba, arXiv 2411.13676, table 1)


def long_decode(quick: bool, peaks: dict) -> list[dict]:
    """Tokens a second behind 8,192: Hymba 1.5B and Llama 3.2 3B, as the paper compares them.

    128 rows, halved until they fit, which is the paper's rule too. Least bytes: weights and the
    whole state read once.
    """
    found = []
    for name, spec in DECODED.items():
        spec, length = (spec.partition(":")[0] + ":debug", 64) if quick else (spec, LENGTH)
        rows, row = 4 if quick else ROWS, {"what": f"{name}, a token", "behind": length}
        while True:
            row |= {"rows": rows}
            row |= attempt(row, functools.partial(_decoding, spec, rows, length, quick, peaks))
            if "out_of_memory" not in row or rows == 1:
                break
            del row["out_of_memory"]
            rows //= 2
        found.append(row)
    if all("tokens_per_s" in row for row in found):
        ours, theirs = (row["tokens_per_s"] for row in found)
        names = dict(what="Hymba 1.5B / Llama 3.2 3B, tokens a second", paper=3.49)
        found.append(names | {"ratio": common.digits(ours / theirs)})
    return found


def _decoding(spec: str, rows: int, length: int, quick: bool, peaks: dict) -> dict:
    """Seconds of one token of `rows` rows, of one program that draws many tokens.

    Not the difference of two numbers of tokens, which another load on the machine can turn round.
    """
    changes = {"batch_size": 1, "data.length": length, "sample.rows": rows}
    config = load_config(spec, **changes)
    model = MODELS[config.model.name](config)
    shapes = jax.eval_shape(model.predict["decoding"], _shapes(model))
    memory = jax.eval_shape(lambda p: model.predict["init_state"](p, rows, length), shapes)
    held = [state_bytes(shapes), state_bytes(memory)]
    many = 12 if quick else 40
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    if sum(held) > limit:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: weights and state do not fit")

    @functools.partial(jax.jit, donate_argnums=1)
    def generate(params, state):
        """Greedy tokens up to the last place."""

        def one(_, carry):
            token, state = carry
            scores, state = model.predict["extend"](params, token, state)
            return jnp.argmax(scores, axis=-1).astype(jnp.int32), state

        behind = jnp.full((rows,), length - many, jnp.int32)
        token = jnp.full((rows,), 5, jnp.int32)
        return jax.lax.fori_loop(0, many, one, (token, state._replace(length=behind)))

    params, state = common.filled(shapes), common.filled(memory)

    def clocked():
        nonlocal state
        token, state = generate(params, state)
        return token

    took = seconds(clocked, rounds=3) / many
    row = {"tokens_per_s": common.digits(rows / took), "state_bytes_per_row": held[1] // rows}
    return row | rate(took, peaks, moved=sum(held))


def _shapes(model):
    """Shapes of a model's parameters."""
    return jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0))[0]))


def infinity(quick: bool, peaks: dict) -> list[dict]:
    """Infinity 2B: pictures at a million pixels from given text, guided; a step at 256 px."""
    spec = "configs/infinity.py:" + ("debug" if quick else "2b")
    found = []
    for rows in (2,) if quick else (1, 4):
        row = {"what": "Infinity, drawing", "rows": rows}
        found.append(attempt(row, functools.partial(_drawing, spec, rows, peaks)))
    rows = 4 if quick else 16
    row = {"what": "Infinity, training step", "rows": rows}
    return [*found, attempt(row, functools.partial(_training, spec, rows, quick, peaks))]


def _drawing(spec: str, rows: int, peaks: dict) -> dict:
    config = load_config(spec, batch_size=rows)
    with config.unlocked():
        config.model.vocab_size = config.model.vocab_size or 1024
    model = MODELS["infinity"](config)
    shapes = jax.tree.map(
        lambda x: x.update(dtype=jnp.dtype(config.precision)) if x.ndim > 1 else x, _shapes(model)
    )
    params = common.filled(shapes)
    batch = next(iter(model.batches.values()))
    text = batch.get("gen_text", batch["gen_tokens"])
    words = jnp.arange(text.size, dtype=jnp.int32).reshape(text.shape) % 1000 + 4
    words = words if text.dtype == jnp.int32 else jnp.sin(words).astype(text.dtype)
    lengths = jnp.full((rows,), min(text.shape[1], 50), jnp.int32)
    inputs = params, words, lengths, row_keys(jax.random.key(0), jnp.arange(rows))
    draw = drawing(model, 3.0)
    took = seconds(lambda: draw(*inputs).images, rounds=3)
    row = {"pixels": config.data.image_size, "seconds_per_image": common.digits(took / rows)}
    return row | rate(took, peaks, count_flops(draw, *inputs))


def _training(spec: str, rows: int, quick: bool, peaks: dict) -> dict:
    config = load_config(spec if quick else f"{spec},side=256", batch_size=rows)
    with config.unlocked():
        config.ema.decay = 0.0  # one more copy of the weights than a chip holds
        config.init_from = ""
        config.model.vocab_size = config.model.vocab_size or 1024
    step = Step(config)
    flops = model_flops(config, step.mesh)  # without what is recomputed
    took = seconds(step)
    row = {"pixels": config.data.image_size, "temp_bytes": common.temp_bytes(step.compiled)}
    row["examples_per_s"] = common.digits(step.rows / took)
    return row | rate(took, peaks, flops)
