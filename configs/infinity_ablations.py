"""Ablations of Infinity: one command trains every run with three seeds, then a table and a plot.

    python main.py --config=configs/infinity_ablations.py:correction

Aims at the signs of the paper's tables (arXiv 2412.04431: self-correction FID 9.76 -> 3.48,
decoding, vocabulary against model size) with the default model of configs/infinity.py, 800 steps a
run. A killed command goes on. Leaves report.md, report.json and report.png in the workdir.

| variant | compares | expected sign |
| --- | --- | --- |
| (none), correction | teacher forcing, random flips, self-correction | self-correction the best |
| scales | the same with a tokenizer of seven scales, on scenes | the same |
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
SCORES = ("accuracy", "corrupted_accuracy", "corrupted_kept_accuracy", "nll")
BITS = (*(f"bits/train_{name}" for name in SCORES), "bits/held_out_nll", "bits/head_bytes")
CORRECTIONS = {
    "teacher forcing": ("model.correction=none",),
    "random flips": ("model.correction=random",),
    "self-correction": ("model.correction=self",),
}
EVALS = 'evals=("retrieval","kid")'
STEPS = 800
BUDGET = (f"steps={STEPS}", f"schedule.decay={STEPS // 3}")
SHORT = (*BUDGET, 'evals=("bits","retrieval","kid")', "sample.prompts=()")
SCENES = ("data.source=scenes", "data.scenes=20000")  # a scene is hardly seen twice
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
VARIANTS = ("correction", "scales", "decoding", "bits", "index", "systems", "debug")


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
        return _on_tokenizers(_bits(8, 16, 32), SIZES)
    if variant == "systems":
        return _systems()
    if variant == "index":
        index = ("model.transformer.head=index",)
        return _on_tokenizers(_bits(10), {"bits": (), "index": index, "VAR": VAR})
    if variant == "scales":
        scales = {"7 scales": "model.tokenizer.scales=7"}
        pictures = (name.replace("train", "held_out") for name in PICTURES)
        columns = (*pictures, *(f"bits/held_out_{name}" for name in SCORES))
        return _on_tokenizers(scales, CORRECTIONS, (*SHORT, *SCENES), columns)
    return ablation(CONFIG, CORRECTIONS, SHORT, PICTURES + BITS)


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
    config = _on_tokenizers(_bits(10), {"VAR": VAR})
    config.runs += ablation(CONFIG, {"Infinity": ()}, SHORT).runs
    config.runs += ablation("configs/uniflud.py", UNIFLUIDS, SHORT).runs
    config.evaluation.table.metrics = PICTURES
    return config


def _bits(*widths):
    return {f"{bits} bits": f"model.tokenizer.z={bits}" for bits in widths}


def _on_tokenizers(tokenizers, models, extra=SHORT, columns=PICTURES + BITS):
    """Each tokenizer (one override) first, then every model on it with every seed."""
    trained, runs = [], []
    for name, size in tokenizers.items():
        trained.append((f"tokenizer/{name}", "configs/bsq_vae.py", (size, "steps=1500")))
        own = (size, f"init_from=vae={{workdir}}/tokenizer/{name}")
        groups = {f"{name}, {model}": (*own, *overrides) for model, overrides in models.items()}
        config = ablation(CONFIG, groups, extra, columns)
        runs += config.runs
    config.runs = (*trained, *runs)
    return config
