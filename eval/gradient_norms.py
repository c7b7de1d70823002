"""How steady the gradient's norm was: spikes and spread over the run's log, after the warm-up.

A spike is a norm above SPIKE times the median of the WINDOW norms before it (xLSTM 7B's figures on
stability, arXiv 2503.13427, show the norm itself). Read from metrics.jsonl, so only as fine as
config.log_every.
"""

from pathlib import Path

import numpy as np

from eval import common

WINDOW, SPIKE = 50, 2.0


def measure(norms: np.ndarray) -> dict[str, float]:
    """Spikes per 1,000 norms, largest over median, and the spread of the logarithm."""
    if len(norms) <= WINDOW:
        raise ValueError(
            f"gradient_norms needs more than {WINDOW} logged steps, not {len(norms)}; lower "
            "config.log_every"
        )
    windows = np.lib.stride_tricks.sliding_window_view(norms, WINDOW)[:-1]
    spikes = norms[WINDOW:] > SPIKE * np.median(windows, axis=1)
    return {
        "spikes_per_1000": 1000 * float(spikes.mean()),
        "largest_over_median": float(norms.max() / np.median(norms)),
        "log_std": float(np.log(norms).std()),
    }


def build(config):
    """Evaluator "gradient_norms"."""

    def evaluate(model, params, *, step, rng, workdir):
        rows = common.read_rows(Path(workdir) / "metrics.jsonl")
        found = [
            r["train/grad_norm"]
            for r in rows
            if "train/grad_norm" in r and r["step"] > config.schedule.warmup
        ]
        return measure(np.array(found, np.float64))

    return evaluate
