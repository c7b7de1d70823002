"""Model ladders: small runs that predict the scores of a large one before it is trained.

    python main.py --config=configs/ladder.py
    python main.py --config=configs/ladder.py:fit,runs=RUNS.json

Aims at the table of arXiv 2412.04403 (OLMo 2 7B-4T from 16 runs: 3.8 points, 5.9 % relative error
over eight tasks). The default trains a tiny ladder of this codebase's own on text, five sizes by
three budgets with three seeds; the largest size is held out. Then both steps of the prediction,
size and tokens to bits per byte and bits per byte to accuracy, with intervals and with what speaks
against them: report.md, report.json, ladder.png. A killed command goes on where it was.

| variant | does | where, how long |
| --- | --- | --- |
| (none) | 45 runs of 31,000 to 136,000 parameters, then the fit | 2 CPU cores, 20 minutes |
| debug | seven tiny runs of a few steps, one held out, then the fit | minutes |
| fit,runs=R | the fit alone, of R (below) | seconds |
| paper | the paper's 16 runs on your own texts (config.data.path), the fit | accelerators |
| 190m, 370m, 600m, 760m, 1.3b, 3b, 7b, 13b | one run of 20 N tokens | accelerators |
| 7b-4t, 13b-5t | the paper's targets | pods |
| 31k, 49k, 72k, 98k, 136k | one run of the tiny ladder | a CPU core, a minute |

A run of another budget: configs/ladder.py:190m,multiplier=10 (times 20 N tokens). R is a folder of
runs of this codebase, or a JSON list of runs with CSV files as the paper's authors published them
(eval/scaling/ladder_data.py; folder=DIR says where the files are; loss=c4 goes through C4's loss).
"""

from ml_collections import ConfigDict

from configs import common, language
from configs.rungs import PUBLISHED, TINY, Recipe, Rung, recipe

MULTIPLIERS = (0.25, 0.5, 1.0)
PAPER = {"sizes": ("190m", "370m", "760m", "1.3b"), "multipliers": (1.0, 2.0, 5.0, 10.0)}
# Tokens, sequences of 4,096, peak rate, warm-up: not by the ladder's rules.
TARGETS = {
    "7b-4t": ("7b", 3_945_065_873_408, 1024, 3e-4, 2000),
    "13b-5t": ("13b", 5_000_088_518_656, 2048, 9e-4, 1000),
}
MMLU = dict(stem=0.215, humanities=0.335, social_sciences=0.219, other=0.231)
OLMES = {  # task: keys with their weights, score of guessing
    "MMLU": ({f"mmlu_{part}_test": weight for part, weight in MMLU.items()}, 0.25),
    "HellaSwag": ({"hellaswag_val": 1.0}, 0.25),
    "ARC-C": ({"arc_challenge_test": 1.0}, 0.25),
    "ARC-E": ({"arc_easy_test": 1.0}, 0.25),
    "PIQA": ({"piqa_val": 1.0}, 0.5),
    "CSQA": ({"csqa_val": 1.0}, 0.2),
    "SocialIQA": ({"socialiqa_val": 1.0}, 1 / 3),
    "OpenBookQA": ({"openbookqa_test": 1.0}, 0.25),
}
LOSS, SCORE = "eval/downstream_bpb/{}_rc_5shot_bpb", "eval/downstream/{}_rc_5shot_len_norm"
LOSSES = {"bpb": "", "c4": "eval/c4_en-validation/CrossEntropyLoss"}
OWN = tuple(  # name, columns of the loss and of the score with their weights, score of guessing
    (name, ((f"eval/ranked/{name}_bpb", 1.0),), ((f"eval/ranked/{name}_len_norm", 1.0),), 0.25)
    for name in ("continuation", "order")
) + (
    (
        "text",
        (("eval/bits_per_byte/bits_per_byte", 1.0),),
        (("eval/bits_per_byte/accuracy", 1.0),),
        0.0,
    ),
)
DEBUG = ("evaluation.windows=16", "evaluation.ranked.count=16")
VARIANTS = ("debug", "fit", "paper", *PUBLISHED, *TARGETS, *TINY)


def get_config(arg=""):
    """The config of one variant; see the table above."""
    a = common.parse_arg(
        arg, VARIANTS, multiplier=1.0, runs="runs/ladder", folder="", loss="bpb", steps=0
    )
    if a.multiplier <= 0:
        raise ValueError(f"config argument multiplier={a.multiplier} must be > 0")
    if a.variant in TINY:
        return _tiny(a.variant, a.multiplier, a.steps)
    if a.variant in (*PUBLISHED, *TARGETS):
        return _published(a.variant, a.multiplier)
    if a.variant == "fit":
        own = not a.runs.endswith(".json")
        tasks = OWN if own else olmes(a.loss)
        config = common.base(task="fit", evals=("ladder",))
        config.fit = fit_options(tasks, runs=a.runs, folder=a.folder, **_smoothing(own))
        return config
    if a.variant == "paper":
        names = [(s, m) for s in PAPER["sizes"] for m in PAPER["multipliers"]]
        return _runs(names, (0,), fit_options(OWN, held_out=("1.3b",)))
    if a.variant == "debug":
        names = [(s, m) for s in ("31k", "49k") for m in MULTIPLIERS] + [("72k", 0.25)]
        config = _runs(names, (0,), fit_options(OWN, **_smoothing(True)))
        config.runs = tuple((n, f"{spec},steps=5", (*o, *DEBUG)) for n, spec, o in config.runs)
        return config
    names = [(size, m) for size in TINY for m in MULTIPLIERS]
    return _runs(names, (0, 1, 2), fit_options(OWN, **_smoothing(True)))


def fit_options(tasks, **given) -> dict:
    """config.fit of the evaluator "ladder"."""
    options = dict(
        runs="",  # JSON list of runs, or a folder of runs; "" = the runs of this workdir
        folder="",  # where the files of a JSON list lie, if not where it says
        held_out=("",)[:0],  # targets: runs whose names begin so; () = the largest size
        targets=((),)[:0],  # more targets: ((name, N, tokens), ...)
        tasks=tasks,  # (name, ((loss column, weight), ...), ((score column, weight), ...), chance)
        last=5,  # step 1 takes the mean of so many last evaluations
        skip=0.1,  # step 2 leaves out this share at the start of each run ...
        window=5,  # ... and takes trailing means of so many evaluations
        level=0.9,  # of the intervals
        reach=10.0,  # N or tokens beyond so many times the largest seen are called too far
        noise=0.006,  # standard deviation of a task's loss between evaluations: too noisy
        backtest=0.02,  # relative error on the ladder's own largest size: model error
    )
    return options | given


def olmes(loss: str = "bpb") -> tuple:
    """config.fit.tasks of the published tables; loss: of the right answers, or C4's."""
    if loss not in LOSSES:
        raise ValueError(common.unknown("config argument loss", loss, LOSSES))

    def one(keys):
        own = tuple((LOSS.format(key), weight) for key, weight in keys.items())
        score = tuple((SCORE.format(key), weight) for key, weight in keys.items())
        return (((LOSSES[loss], 1.0),) if LOSSES[loss] else own), score

    return tuple((name, *one(keys), chance) for name, (keys, chance) in OLMES.items())


def _smoothing(own: bool) -> dict:
    """Our runs are evaluated five times, and the last evaluation is that of the annealed model."""
    return dict(last=1, window=1, skip=0.0) if own else {}


def _runs(names, seeds, fit: dict) -> ConfigDict:
    """Task `runs`: every size and budget with every seed, then the report."""
    runs = tuple(
        (
            f"{size}-{m:g}xC/seed{seed}",
            f"configs/ladder.py:{size},multiplier={m}",
            (f"seed={seed}",),
        )
        for seed in seeds
        for size, m in names
    )
    config = common.base(task="runs", runs=runs, report="ladder")
    config.fit = fit
    return config


def _model(rung: Rung, vocab_size: int) -> dict:
    """OLMo 2 at this size: norms behind the blocks, q and k normed whole, a head of its own."""
    sizes = dict(width=rung.width, layers=rung.layers, mlp=rung.gated)
    heads = dict(heads=rung.heads, kv_heads=rung.heads, head_dim=rung.width // rung.heads)
    node = dict(size="olmo2_1b", **sizes, **heads)
    return dict(name="llama", vocab_size=vocab_size, llama=node)


def training(r: Recipe, embedding: str = "decoder/embedding") -> dict:
    """Steps, batch, optimiser and schedule of a rung; the input embedding does not decay."""
    return dict(
        steps=r.steps,
        batch_size=r.batch_size,
        optimizer=dict(
            lr=r.lr, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0,
            undecayed=(embedding,),
        ),
        schedule=dict(name="cosine", warmup=r.warmup, final=0.1),
    )  # fmt: skip


def small(config: ConfigDict, length: int, vocab_size: int) -> ConfigDict:
    """Text and evaluations of the tiny runs."""
    config.data.update(vocab_size=vocab_size, length=length)
    config.sample.prompts = ()
    config.evals, config.eval_every = ("bits_per_byte", "ranked"), -(-config.steps // 5)
    config.evaluation.update(windows=128)
    config.evaluation.ranked.update(tasks=("continuation", "order"), count=192)
    config.checkpoint.update(every=200, keep=1)
    config.log_every = 25
    return config


def _tiny(name: str, multiplier: float, steps: int) -> ConfigDict:
    """One run of the tiny ladder."""
    rung = TINY[name]
    r = recipe(rung, multiplier, divisor=1, extra=0)
    config = language.small(_model(rung, 0), **training(r))
    config.steps = steps or r.steps
    return small(config, rung.length, rung.vocab_size)


def _published(name: str, multiplier: float) -> ConfigDict:
    """A run of the paper's sizes on your own texts."""
    size, tokens, batch, lr, warmup = TARGETS.get(name, (name, 0, 0, 0.0, 0))
    rung = PUBLISHED[size]
    r = recipe(rung, multiplier)
    if tokens:
        r = Recipe(batch, lr, warmup, -(-tokens // (batch * rung.length)), tokens)
    config = language.published(
        _model(rung, rung.vocab_size), length=rung.length, vocab_size=rung.vocab_size, **training(r)
    )
    config.model.z_loss = 1e-5
    every = 200 if multiplier <= 2 else 500 if multiplier <= 5 else 1000
    config.evals, config.eval_every = ("bits_per_byte", "ranked"), every
    return config
