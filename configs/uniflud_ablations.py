"""Ablations of UniFluid: one command trains every run with three seeds, then a table and a plot.

    python main.py --config=configs/uniflud_ablations.py:lam

Aims at the paper's figures on the loss weight and on token order (arXiv 2503.13436; Fluid, arXiv
2410.13863). Each run is the default of configs/uniflud.py with fewer steps, four minutes on two CPU
cores; a killed command continues where it was. Leaves report.md, report.json and report.png in the
workdir.

| variant | compares | expected sign |
| --- | --- | --- |
| (none), lam | five loss weights of the text term | larger: text better, pictures worse |
| order | random order, raster, random without P_next | random draws best, without P_next worst |
| joint | pictures only, text only, both | small weights of text do not hurt pictures |
| seeds | nothing: the default run itself, in full, with three seeds | its spread |
| debug | two loss weights, debug models | under two minutes |
"""

from configs import common
from configs.runs import ablation

CONFIG = "configs/uniflud.py"
LAMBDAS = (0.005, 0.05, 0.1, 0.5, 2.0)
PICTURES = (
    "retrieval/train_top1_classifier",
    "retrieval/train_top1_latent",
    "losses/train_mse",
    "losses/held_out_mse",
)
KINDS = ("colour", "count", "position", "presence")
TEXT = ("captioning/train_loss", "captioning/held_out_loss", "questions/accuracy")
SHORT = (
    "steps=500",
    "schedule.decay=160",
    'evals=("losses","captioning","questions","retrieval")',
    "evaluation.prompts=128",
    "sample.prompts=()",
)


def get_config(arg=""):
    """The list of runs of one ablation."""
    variant = common.parse_arg(arg, ("lam", "order", "joint", "seeds", "debug")).variant
    if variant == "debug":
        groups = {f"lam={lam}": (f"model.lam={lam}",) for lam in (0.1, 1.0)}
        quick = ('evals=("captioning",)', "sample.prompts=()")
        return ablation("configs/uniflud.py:debug", groups, quick, TEXT[:2], seeds=(0,))
    if variant == "seeds":
        columns = (*PICTURES[:2], *TEXT[:2], *(f"questions/{k}" for k in KINDS))
        return ablation(CONFIG, {"default": ()}, columns=columns)
    if variant == "order":
        groups = {
            "random": (),
            "raster": ("model.order=raster", "sample.order=raster"),
            "random without P_next": ("model.order_pos=self",),
        }
        return ablation(CONFIG, groups, SHORT, PICTURES + TEXT)
    if variant == "joint":
        groups = {
            "pictures only": ("data.mix.caption=0.0", "data.mix.vqa=0.0", "batch_size=40"),
            "both": ("model.lam=0.05",),
            "text only": ("data.mix.t2i=0.0", "batch_size=40", "model.lam=1.0"),
        }
        return ablation(CONFIG, groups, SHORT, PICTURES + TEXT)
    groups = {f"lam={lam}": (f"model.lam={lam}",) for lam in LAMBDAS}
    return ablation(CONFIG, groups, SHORT, PICTURES + TEXT)
