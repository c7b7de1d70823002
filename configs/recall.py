"""Associative recall and needles: does a language model remember what it was told?

    python main.py --config=configs/recall.py

Aims at no published table: the tasks on which the xLSTM's input gate is tested (arXiv 2503.13427),
multi-query associative recall as in arXiv 2312.04927. Rows are drawn afresh at every step; accuracy
counts answers only, chance is 1 / 64. The model is an xLSTM; any language model can take its place.

| variant | trains on | where, how long |
| --- | --- | --- |
| (none) | 8 keys with values, asked for among silence, 64 tokens | 2 CPU cores, minutes |
| needle | 4 keys with values hidden in 256 other tokens | 2 CPU cores, minutes |
| debug | the first with a few steps | under a minute |
"""

from configs import common
from configs.data import data_config
from configs.xlstm import CELL, OPTIMIZER


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("needle", "debug")).variant
    rows = dict(name="recall", length=64, pairs=8)
    if variant == "needle":
        rows = dict(name="needle", length=256, pairs=4)
    config = common.base(
        seed=0,
        steps=1500,
        batch_size=64,
        model=dict(name="xlstm", vocab_size=0, xlstm=dict(size="debug", **CELL)),
        data=data_config(vocab_size=196, **rows),
        optimizer=dict(lr=3e-3) | OPTIMIZER,
        schedule=dict(name="cosine", warmup=100, final=0.05),
        evals=("losses",),
        checkpoint=dict(every=500, keep=2),
        log_every=50,
    )
    if variant == "debug":
        config.steps, config.log_every = 20, 5
        config.checkpoint.every = 10
    return config
