"""How evenly hard the tokens are, and what a byte costs: tokenizers compared beyond bits per byte.

Per-token losses do not compare across tokenizers, since tokens differ in length; their spread does,
and so do floating-point operations: of the training so far, of one token, of one byte. A model's
forward pass is counted from its jaxpr (eval/flops.py), a token at the mean position of a
window; a training step is three times that.
"""

import jax
import jax.numpy as jnp
import numpy as np

from eval import common
from eval.bits_per_byte import byte_lengths
from eval.flops import count_flops
from input_pipeline import documents, text

EASY = 0.1  # nats: a token that the model was nearly sure of
QUANTILES = (10, 50, 90)


def build(config):
    """Evaluator "token_cost" over the first config.evaluation.windows held-out windows."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        windows, tokenizer, _ = text.windows(config.data, options.held_out)
        rows = min(options.windows, len(windows.tokens))
        logits, losses = common.need(model, "logits"), common.need(model, "token_nll")

        def read(index):
            batch = {k: np.asarray(v[index]) for k, v in windows._asdict().items()}
            nll, counts = losses(params, batch)
            return jnp.where(counts > 0, nll, jnp.nan)[:, :-1]

        nll = common.in_batches(read, rows, options.batch, lambda index: index)
        size = byte_lengths(tokenizer)[np.asarray(windows.tokens[:rows, 1:])][~np.isnan(nll)]
        nll = nll[~np.isnan(nll)]
        each = {
            k: jax.ShapeDtypeStruct((1, config.data.length), jnp.int32) for k in windows._fields
        }
        forward = count_flops(lambda p, b: logits(p, b), params, each)
        found, _ = documents.load(config.data, options.held_out)
        tokens = sum(map(len, tokenizer.encode_batch(found)))
        per_token = forward / config.data.length
        return {
            "nats_mean": float(nll.mean()),
            "nats_std": float(nll.std()),
            "std_over_mean": float(nll.std() / nll.mean()),
            **{f"nats_p{q}": float(np.percentile(nll, q)) for q in QUANTILES},
            "easy_tokens": float((nll < EASY).mean()),
            "tokens_per_document": tokens / len(found),
            "context_bytes": config.data.length * float(size.mean()),
            "flops_per_token": per_token,
            "flops_per_byte": per_token / float(size.mean()),
            "training_petaflops": 3e-15 * forward * config.batch_size * step,
            "training_bytes": config.data.length * float(size.mean()) * config.batch_size * step,
        }

    return evaluate
