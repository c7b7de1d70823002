"""Spikes and spread of the gradient's norm, read from a run's log after its warm-up."""

import json

import numpy as np
import pytest

from configs.common import base
from eval import gradient_norms


def test_spikes_are_counted_against_the_norms_before():
    norms = np.ones(150)
    norms[[100, 120]] = 5.0, 3.0
    found = gradient_norms.measure(norms)
    assert found["spikes_per_1000"] == pytest.approx(1000 * 2 / 100)
    assert found["largest_over_median"] == 5.0
    assert found["log_std"] == pytest.approx(np.log(norms).std())
    assert gradient_norms.measure(np.ones(60))["spikes_per_1000"] == 0


def test_reads_the_log_after_the_warm_up(tmp_path):
    rows = [{"step": s, "train/grad_norm": 100.0 if s <= 10 else 1.0} for s in range(1, 80)]
    lines = [json.dumps(r) for r in [*rows, {"step": 79, "eval/x": 1.0}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluate = gradient_norms.build(base(schedule=dict(warmup=10)))
    found = evaluate(None, None, step=79, rng=None, workdir=tmp_path)
    assert found["largest_over_median"] == 1.0
    with pytest.raises(ValueError, match="needs more than 50 logged steps, not 9"):
        gradient_norms.build(base(schedule=dict(warmup=70)))(
            None, None, step=79, rng=None, workdir=tmp_path
        )
