"""Ablations of Infinity: one command trains every run with three seeds, then a table and a plot.

    python main.py --config=configs/infinity_ablations.py:correction

Aims at the signs of the paper's tables (arXiv 2412.04431: self-correction FID 9.76 -> 3.48,
decoding, vocabulary against model size) with the default model of configs/infinity.py, 800 steps a
run. A killed command goes on. Leaves report.md, report.json and report.png in the workdir.

| variant | compares | expected sign |
| --- | --- | --- |
| (none), correction | teacher forcing, random flips, self-correction | self-correction the best |
| longer | the same, the default's 1,500 steps: its three seeds | the same |
| decoding | guidance, also pyramid and on states; temperature | optimum inside, greedy worst |
| bits | 8, 16, 32 bits, each with a small and a smaller model | more bits want the larger |
| index | 10 bits: a decision each (Infinity), one of 1,024 codes, and VAR | bits no worse |
| systems | UniFluid, Infinity, VAR: equal parameters, equal pictures or tokens | none stated |
| debug | two corrections, debug models | two minutes |
"""

from configs import common
from configs.infinity_sizes import VAR as INSTEAD
from configs.runs import SEEDS, ablation

CONFIG = "configs/infinity.py"
PICTURES = ("retrieval/train_top1_latent", "retrieval/train_top1_classifier", "kid/kid")
BITS = (
    "bits/train_accuracy",
    "bits/train_corrupted_accuracy",
    "bits/train_corrupted_kept_accuracy",
    "bits/train_nll",
    "bits/held_out_nll",
    "bits/head_bytes",
)
CORRECTIONS = {
    "teacher forcing": ("model.correction=none",),
    "random flips": ("model.correction=random",),
    "self-correction": ("model.correction=self",),
}
EVALS = 'evals=("retrieval","kid")'
STEPS = 800
BUDGET = (f"steps={STEPS}", f"schedule.decay={STEPS // 3}")
LONG = ('evals=("bits","retrieval","kid")', "sample.prompts=()")
SHORT = (*BUDGET, *LONG)
# Guidance of the hidden states is in front of the last two blocks.
DECODING = {
    **{f"guidance {g}": (f"sample.guidance=({g}.0,)",) for g in (1, 2, 3, 4, 6)},
    "pyramid 1 to 5": ("sample.guidance=(1.0,2.3333333,3.6666667,5.0)",),
    "guidance 3 on hidden states": ("sample.guidance=(3.0,)", "sample.insertion=-2"),
    **{f"temperature {t}": (f"sample.temperature=({t},)",) for t in (0.5, 0.7)},
    "temperature 1 to 0.5": ("sample.temperature=(1.0,0.83,0.67,0.5)",),
    "greedy": ("sample.guidance=(1.0,)", "sample.temperature=(0.0,)"),
}
SIZES = {
    "small": (),
    "smaller": ("model.transformer.width=96", "model.transformer.depth=3"),
}
# Only captions to pictures: what the others see of the data. Its ViT, 0.4 of 3.4 M parameters, has
# nothing to do then and is not counted. A picture is 16 of its tokens and 85 of the others'.
UNIFLUID = ("data.mix.caption=0.0", "data.mix.vqa=0.0", "batch_size=32", EVALS)
UNIFLUIDS = {
    f"UniFluid, as many {what}": (*UNIFLUID, f"steps={steps}", f"schedule.decay={steps // 3}")
    for what, steps in {"pictures": STEPS, "tokens": STEPS * 85 // 16}.items()
}
VAR = tuple(f"{key}={value}" for key, value in INSTEAD.items())
VARIANTS = ("correction", "longer", "decoding", "bits", "index", "systems", "debug")


def get_config(arg=""):
    """The list of runs of one ablation."""
    variant = common.parse_arg(arg, VARIANTS).variant
    if variant == "debug":
        few = {name: CORRECTIONS[name] for name in ("teacher forcing", "self-correction")}
        quick = ('evals=("bits",)', "sample.prompts=()")
        return ablation("configs/infinity.py:debug", few, quick, BITS, seeds=(0,))
    if variant == "decoding":
        return _decoding()
    if variant == "bits":
        return _bits((8, 16, 32), SIZES)
    if variant == "systems":
        return _systems()
    if variant == "index":
        return _bits((10,), {"bits": (), "index": ("model.transformer.head=index",), "VAR": VAR})
    extra = LONG if variant == "longer" else SHORT
    return ablation(CONFIG, CORRECTIONS, extra, PICTURES + BITS)


def _decoding():
    """One training a seed; the other runs draw from its weights (one step at a rate of 0)."""
    config = ablation(CONFIG, {"guidance 3": ()}, SHORT, PICTURES)
    drawing = (EVALS, "sample.prompts=()", "steps=1", "optimizer.lr=0.0")
    others = {name: overrides for name, overrides in DECODING.items() if name != "guidance 3"}
    for seed in SEEDS:
        source = f"init_from={{workdir}}/guidance 3/seed{seed}"
        config.runs += ablation(CONFIG, others, (*drawing, source), seeds=(seed,)).runs
    return config


def _systems():
    """VAR on a tokenizer of its own, the others on the weights that ship."""
    config = _bits((10,), {"VAR": VAR})
    config.runs += ablation(CONFIG, {"Infinity": ()}, SHORT).runs
    config.runs += ablation("configs/uniflud.py", UNIFLUIDS, SHORT).runs
    config.evaluation.table.metrics = PICTURES
    return config


def _bits(widths, models):
    """A tokenizer for each number of bits, then every model on it with every seed."""
    tokenizers, runs = [], []
    for bits in widths:
        name, size = f"tokenizer/{bits} bits", f"model.tokenizer.z={bits}"
        tokenizers.append((name, "configs/bsq_vae.py", (size, "steps=1500")))
        groups = {
            f"{bits} bits, {model}": (size, f"init_from=vae={{workdir}}/{name}", *overrides)
            for model, overrides in models.items()
        }
        config = ablation(CONFIG, groups, SHORT, PICTURES + BITS)
        runs += config.runs
    config.runs = (*tokenizers, *runs)
    return config
