"""Toy regression for the tests of the loop.

python tests/training/toy.py --config=tests/training/toy_config.py
"""

from configs.common import base, parse_arg


def get_config(arg=""):
    """Twelve steps by default."""
    a = parse_arg(arg, variants=("debug", "two"), width=16)
    widths = (16, 24) if a.variant == "two" else (a.width,)
    return base(
        steps=12,
        batch_size=16,
        model=dict(name="toy", width=a.width, layers=2, dropout=0.2, explode=0),
        data=dict(name="toy", widths=widths, records=80, epochs=0, eval_seconds=0.0),
        optimizer=dict(lr=1e-2, weight_decay=0.1),
        schedule=dict(name="cosine", warmup=3),
        ema=dict(decay=0.9),
        evals=("toy",),
        checkpoint=dict(every=4),
        log_every=1,
    )
