"""Associative recall and needles: does a language model remember what it was told?

    python main.py --config=configs/recall.py
    python main.py --config=configs/recall.py:needle,model=hymba

Aims at no published table: the tasks on which the xLSTM's input gate (arXiv 2503.13427) and Hymba's
heads (arXiv 2411.13676) are tested, multi-query associative recall as in arXiv 2312.04927. Rows are
drawn afresh at every step; accuracy counts answers only. Chance is 1 in 8 (needle: 1 in 16); who
knows which values were told, but not whose they are, has little more than 1 in 4 (more: 1 in 8).
Muon: an xLSTM takes twice the steps with AdamW.

| variant | trains on | where, how long |
| --- | --- | --- |
| (none) | 4 of 8 keys with values, then asked for, 32 tokens | 2 CPU cores, minutes |
| more | 8 of 24 keys with values, 64 tokens | 2 CPU cores, minutes |
| needle | 4 of 16 keys with values, hidden in 128 tokens | 2 CPU cores, minutes |
| debug | the first with a few steps | under a minute |

model=xlstm (the default), hymba, mamba or llama: 0.1 to 0.3 M parameters each.
"""

from configs import common
from configs.data import data_config
from configs.hymba import HEADS
from configs.xlstm import CELL, OPTIMIZER

# Fields that configs/xlstm_ablations.py and configs/hymba_ablations.py change are spelled out.
MODELS = {
    "xlstm": CELL,
    "hymba": HEADS
    | dict(layers=4, mlp=128, meta=8, window=8, global_layers=(0, 3), groups=((1, 2),)),
    "mamba": dict(layers=4),
    "llama": dict(layers=4),
}


def get_config(arg=""):
    """The config of one variant; see the table above."""
    args = common.parse_arg(arg, ("more", "needle", "debug"), model="xlstm")
    variant, name = args.variant, args.model
    if name not in MODELS:
        raise ValueError(f"config argument model={name!r}: allowed are {', '.join(MODELS)}")
    rows = dict(name="recall", length=32, pairs=4, vocab_size=28)
    if variant == "more":  # Some rows ask for few of their keys: without those none finds out how.
        rows = dict(name="recall", length=64, pairs=8, vocab_size=76, fewest=1)
    if variant == "needle":
        rows = dict(name="needle", length=128, pairs=4, vocab_size=52, fewest=1)
    config = common.base(
        seed=0,
        steps=1000,
        batch_size=128,
        model={"name": name, "vocab_size": 0, name: dict(size="debug") | MODELS[name]},
        data=data_config(**rows),
        optimizer=OPTIMIZER | dict(name="muon", lr=2e-3, clip=1.0, weight_decay=0.0),
        schedule=dict(name="cosine", warmup=100, final=0.05),
        evals=("losses",),
        checkpoint=dict(every=500, keep=2),
        log_every=50,
    )
    if variant in ("more", "needle"):
        config.optimizer.lr, config.schedule.warmup = 1e-2, 30
    if variant == "debug":
        config.steps, config.log_every = 20, 5
        config.checkpoint.every = 10
    return config
