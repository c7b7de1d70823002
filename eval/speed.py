"""What a language model costs: trained tokens a second, and one token of decoding by context.

Decoding is measured on one row behind a prompt that fills config.evaluation.contexts tokens but for
the STEPS that are timed: bytes of the state, median milliseconds a token on this machine, and
bytes that the compiled step reads and writes in all its layers (eval/hlo.py), which do not
depend on the machine's load.
"""

import functools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from eval import common, hlo

STEPS, WARM = 32, 4


def state_bytes(state) -> int:
    """Of everything that a row carries from token to token."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def decoding(predict, params, context: int, vocabulary: int) -> dict[str, float]:
    """State bytes, median ms and compiled bytes of one token behind `context` others."""
    tokens = np.random.default_rng(0).integers(4, vocabulary, (1, context), np.int32)
    state = predict["init_state"](params, 1, context)
    read = jax.jit(predict["prefill"], donate_argnums=3)
    prompt = context - STEPS - WARM
    scores, state = read(params, tokens[:, :prompt], jnp.full(1, prompt), state)
    step = jax.jit(predict["extend"], donate_argnums=2)
    step = step.lower(params, scores.argmax(-1).astype(jnp.int32), state).compile()
    times = []
    for t in range(prompt, context):
        begin = time.perf_counter()
        scores, state = jax.block_until_ready(step(params, tokens[:, t], state))
        times.append(time.perf_counter() - begin)
    return {
        f"state_bytes_{context}": float(state_bytes(state)),
        f"step_ms_{context}": 1e3 * float(np.median(times[WARM:])),
        f"step_bytes_{context}": hlo.analyse(step.as_text(), 1).moved,
    }


def build(config):
    """Evaluator "speed"."""

    def evaluate(model, params, *, step, rng, workdir):
        rows = common.read_rows(Path(workdir) / "metrics.jsonl")
        rates = [r["train/examples_per_s"] for r in rows if "train/examples_per_s" in r]
        found = {"parameters": float(sum(x.size for x in jax.tree.leaves(params)))}
        if rates:
            found["train_tokens_per_s"] = float(np.median(rates)) * config.data.length
        predict = dict(model.predict)
        common.need(model, "init_state")
        batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in model.batches["text"].items()}
        scores = jax.eval_shape(functools.partial(predict["logits"], params), batch)
        if "decoding" in predict:
            params = predict["decoding"](params)
        for context in config.evaluation.contexts:
            found |= decoding(predict, params, context, scores.shape[-1])
        return found

    return evaluate
