"""xLSTM: recurrent language models with a matrix memory, constant cost per token of generation.

    python main.py --config=configs/xlstm.py

Aims at the paper's 7B (arXiv 2503.13427: 2.3T tokens, Open LLM Leaderboard v2 0.260) and its
ablations at sizes a CPU trains. Data: the GCIDE dictionary where the extra `text` is installed
(pip install -e '.[text]'), the source of Python's standard library elsewhere, or your own texts
(config.data.text=folder, config.data.path).

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 3.5 M parameters, windows of 256 tokens, packed documents | 2 CPU cores, minutes |
| debug | the same with a tiny model, a few steps | under a minute |
| 165m, 1.3b, 2.7b | the paper's smaller sizes, your own texts (config.data.path) | GPUs, TPUs |
| 7b | its recipe, 512 x 8,192 tokens, two stages of data in folders below data.path | pods |
"""

from configs import common, language

VARIANTS = ("debug", "165m", "1.3b", "2.7b", "7b")
# The published choices; configs/xlstm_ablations.py changes them.
CELL = dict(input_bias=-10.0, gate_cap=15.0, head_norm_eps=1e-6, learn_input_gate=True)
OPTIMIZER = dict(b2=0.95, weight_decay=0.1, clip=0.5)
# Table of the paper: the folders that 7b reads, and their shares in its two stages.
STAGES = (
    (500_000, (("dclm", 1.0),)),
    (
        50_000,
        (
            *(("dclm", 0.4), ("fineweb_edu", 0.15), ("cosmopedia", 0.1), ("proofpile_2", 0.15)),
            *(("the_stack", 0.15), ("sft", 0.05)),
        ),
    ),
)


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, VARIANTS).variant
    if variant not in ("", "debug"):
        return _published(variant)
    config = language.small(
        dict(name="xlstm", xlstm=dict(size="tiny", **CELL)),
        optimizer=dict(lr=3e-3) | OPTIMIZER,
        schedule=_decay(600, warmup=50),
    )
    return language.debug(config, "debug") if variant == "debug" else config


def _decay(steps: int, warmup: int) -> dict:
    """The 7B run's schedule: to 0.1 of the peak at 10/11 of the steps, at last linearly to 0."""
    return dict(
        name="exp_linear", warmup=warmup, rate=0.1, rate_steps=steps * 10 // 11, decay=steps // 78
    )


def _published(variant: str):
    """Section 4 of the paper; windows and batches of the smaller sizes are its ablations'."""
    large = variant == "7b"
    steps = 550_000 if large else 95_000
    config = language.published(
        dict(name="xlstm", xlstm=dict(size=variant, **CELL)),
        steps=steps,
        batch_size=512 if large else 256,
        length=8192 if large else 2048,
        vocab_size=50_304,
        # b1 is 0.99 in the paper and 0.9 in the authors' code.
        # Only matrices called "kernel" decay in the authors' code, so not the embedding.
        optimizer=dict(lr=5e-4 if large else 1e-3, b1=0.99, undecayed=("embedding",)) | OPTIMIZER,
        schedule=_decay(steps, warmup=3000),
    )
    if large:
        config.schedule.update(rate_steps=500_000, decay=7000)
        config.ramp, config.data.stages = ((128, 2000), (256, 2000)), STAGES
    else:
        config.schedule.update(name="cosine", final=0.1, decay=0)
    return config
