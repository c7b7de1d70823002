"""Image tokenizers compared: one command trains every run with three seeds, then a table.

    python main.py --config=configs/bsq_vae_ablations.py:bits

Aims at the signs of Infinity's table 7 (arXiv 2412.04431: reconstruction gets better from d = 16 to
64 bits) at 64 px, on OpenMoji, scenes and crops of photographs, scored on held-out drawings and
photographs apart; needs pip install -e '.[eval,photos]'. 1,500 steps of 32 pictures a run.
Leaves report.md, report.json and report.png in the workdir; a killed command goes on.

| variant | compares | expected sign |
| --- | --- | --- |
| (none), bits | 8, 16, 32, 64 bits a token on four scales | better with more bits |
| scales | one, two, three, four scales of 16 bits: 64 to 85 tokens | better with more scales |
| quantisers | 576 bits a picture: BSQ, LFQ, VQ with revival; KL of 16 channels beside them | |
| debug | 8 and 16 bits, 20 steps, one seed | two minutes |
"""

from configs import common
from configs.runs import ablation

TOKENIZER = "model.tokenizer."
SCORES = ("psnr", "ssim", "lpips", "kid")
COLUMNS = tuple(f"reconstruction/{set_}{s}" for set_ in ("", "photos_") for s in SCORES)
USED = "train/code_perplexity"  # of the last batch's tokens
REAL = (
    "steps=1500",
    "data.source=openmoji+scenes+photos",
    "evaluation.perceptual=True",
    "evaluation.pictures=192",
)


def get_config(arg=""):
    """The list of runs of one comparison."""
    variant = common.parse_arg(arg, ("bits", "scales", "quantisers", "debug")).variant
    bits = {f"{d} bits": (f"{TOKENIZER}z={d}",) for d in (8, 16, 32, 64)}
    if variant == "debug":
        few = dict(list(bits.items())[:2])
        return ablation("configs/bsq_vae.py:debug", few, (), COLUMNS[:2], (0,))
    if variant == "scales":
        groups = {f"{n} scales": (f"{TOKENIZER}scales={n}",) for n in (1, 2, 3, 4)}
        return ablation("configs/bsq_vae.py:64", groups, REAL, COLUMNS)
    if variant == "quantisers":
        nine = (f"{TOKENIZER}z=9", f"{TOKENIZER}scales=1")
        specs = {
            "BSQ, 9 bits": ("configs/bsq_vae.py:64", nine),
            "LFQ, 9 bits": ("configs/bsq_vae.py:64", (*nine, f"{TOKENIZER}quantiser=lfq")),
            "VQ, 512 codes": ("configs/vqgan.py:64", ()),
            "KL, 16 channels": ("configs/kl_vae.py:64", ("init_from=",)),
        }
        lists = [
            ablation(spec, {name: more}, REAL, (*COLUMNS, USED))
            for name, (spec, more) in specs.items()
        ]
        lists[0].runs = tuple(run for one in lists for run in one.runs)
        return lists[0]
    return ablation("configs/bsq_vae.py:64", bits, REAL, COLUMNS)
