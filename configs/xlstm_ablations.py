"""Ablations of xLSTM: one command trains every run with three seeds, then a table and a plot.

    python main.py --config=configs/xlstm_ablations.py:recall

Aims at the stability section and at the gate ablation of the paper (arXiv 2503.13427, figures on
gate bias, soft caps and norm epsilon; fixed input gate). Each run is small; a killed command goes
on where it was. Leaves report.md, report.json and report.png in the workdir.

| variant | compares | expected sign |
| --- | --- | --- |
| (none), recall | input gate learnt, fixed at -10 and at 0, on associative recall | -10 fails |
| more | the same with 8 of 24 keys, more than such a memory holds | -10 fails |
| eps | epsilon of the head norm by bias of the input gate, on text | 1e-2 worse than 1e-6 |
| norm | epsilon 1e-6 and 1e-2 on whole default runs | 1e-2 worse |
| bias | input gate bias -10, -5, 0 at three times the learning rate | -10: fewest spikes |
| caps | gates capped at 15 or not, at three times the learning rate | capped: steadier |
| debug | recall with a tiny model and few steps | under two minutes |
"""

from configs import common
from configs.runs import ablation

CONFIG = "configs/xlstm.py"
VARIANTS = ("recall", "more", "eps", "norm", "bias", "caps", "debug")
TEXT = (  # half a million parameters beside the tables: minutes for all seeds of a variant
    "model.xlstm.size=mini",
    "batch_size=8",
    "evaluation.windows=256",
    "steps=300",
    "schedule.rate_steps=270",
    "log_every=1",
    'evals=("bits_per_byte","gradient_norms")',
    "sample.prompts=()",
    "checkpoint.every=300",
)
STEADY = ("bits_per_byte/bits_per_byte", "gradient_norms/spikes_per_1000",
          "gradient_norms/largest_over_median", "gradient_norms/log_std")  # fmt: skip
RECALL = ("losses/held_out_accuracy", "losses/held_out_loss")


def get_config(arg=""):
    """The list of runs of one ablation."""
    variant = common.parse_arg(arg, VARIANTS).variant
    model = "model.xlstm."
    if variant == "eps":
        groups = {
            f"eps={eps:g} bias={bias}": (
                f"{model}head_norm_eps={eps}",
                f"{model}input_bias={bias}.0",
            )
            for eps in (1e-6, 1e-2)
            for bias in (-10, -5, -2)
        }
        return ablation(CONFIG, groups, TEXT, STEADY[:1])
    if variant == "norm":
        groups = {f"eps={eps:g}": (f"{model}head_norm_eps={eps}",) for eps in (1e-6, 1e-2)}
        return ablation(CONFIG, groups, columns=STEADY[:1])
    if variant in ("bias", "caps"):
        groups = {f"bias={b}": (f"{model}input_bias={b}.0",) for b in (-10, -5, 0)}
        if variant == "caps":
            groups = {"capped": (), "cap a million": (f"{model}gate_cap=1000000.0",)}
        return ablation(CONFIG, groups, (*TEXT, "optimizer.lr=9e-3"), STEADY)
    fixed = f"{model}learn_input_gate=False"
    groups = {
        "learnt": (),
        "fixed at -10": (fixed, f"{model}input_bias=-10.0"),
        "fixed at 0": (fixed, f"{model}input_bias=0.0"),
    }
    if variant == "debug":
        return ablation("configs/recall.py:debug", groups, columns=RECALL, seeds=(0,))
    if variant == "more":
        return ablation("configs/recall.py:more", groups, ("steps=1500",), RECALL)
    return ablation("configs/recall.py", groups, columns=RECALL)
