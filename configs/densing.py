"""Capacity density: the size a reference would need for a model's score, over the model's own size.

    python main.py --config=configs/densing.py
    python main.py --config=configs/densing.py:fit,table=SCORES.csv,dates=DATES.csv
    python main.py --config=configs/densing.py:fit,runs=RUNS.json

Aims at the Densing Law (arXiv 2412.04315): the density of the best open models doubles about every
95 days. The default trains a tiny Llama ladder as the reference (six sizes by three budgets, the
two largest held out) and xLSTM and Hymba beside it, three seeds; prints the fitted law, the
held-out sizes as their losses give them back, and each family's density at equal scores
(densing.md, densing.json, densing.png). The ladder is that of configs/ladder.py: with
--workdir=runs/ladder its runs are used.

| variant | does | where, how long |
| --- | --- | --- |
| (none) | the 54 runs of the ladder, 12 of other families, the report | 2 CPU cores, half an hour |
| debug | eight tiny runs of a few steps, then the report | minutes |
| fit | the report of a table of scores, or of a ladder's target, or both | seconds |
| xlstm, hymba | one run of 20 N tokens times multiplier | a CPU core, a minute |
| 0.005b, 0.03b, 0.1b, 0.2b, 0.4b, 0.8b | the same of the paper's reference | accelerators |

fit takes table= (a CSV with a row a model) and dates= (a CSV of release dates), runs=, folder= and
family= as configs/ladder.py:fit does. The paper trains its reference with multiplier=0.5 to 3.
"""

from ml_collections import ConfigDict

from configs import common, densing_reference, hymba, ladder, ladder_runs, language, xlstm
from configs.rungs import TINY_BATCH, recipe

SMALL = dict(vocab_size=512, length=256)
NODES = {  # close to 81,000 parameters with the output head
    "xlstm": dict(size="debug", width=40, layers=3, heads=2, ffn_multiple=8, **xlstm.CELL),
    "hymba": dict(
        size="debug", width=32, layers=3, mlp=96, heads=2, global_layers=(0, 2), groups=(),
        **(hymba.HEADS | dict(meta=8)),
    ),
}  # fmt: skip
COUNTS = {"xlstm": 80_892, "hymba": 82_438}  # with a vocabulary of 512
MULTIPLIERS = (0.25, 0.5)
# Active and total parameters (billions) of mixtures of experts; the public table mixes both.
MIXTURES = (
    ("mistralai/Mixtral-8x7B-v0.1", 12.9, 46.7),
    ("mistralai/Mixtral-8x22B-v0.1", 39.1, 140.6),
    ("deepseek-ai/DeepSeek-V2", 21.0, 236.0),
    ("ai21labs/Jamba-v0.1", 12.0, 52.0),
)
COLUMNS = dict(  # dated: the model's name in the file of dates
    model="Model", family="Model Family", size="Model Size (B)", date="release_date", dated="model"
)
FLOORS = (
    ("MMLU", 0.25), ("ARC-C", 0.25), ("HellaSwag", 0.25), ("Winograd", 0.5), ("XWinograd", 0.5),
    ("GSM8K", 0.0), ("HumanEval", 0.0),
)  # fmt: skip


def get_config(arg=""):
    """The config of one variant; see the table above."""
    sizes = densing_reference.REFERENCE
    a = common.parse_arg(
        arg, ("debug", "fit", *NODES, *sizes), multiplier=1.0, table="", dates="", runs="",
        folder="", family="", steps=0,
    )  # fmt: skip
    if a.variant in sizes:
        return densing_reference.training(a.variant, a.multiplier)
    if a.variant in NODES:
        return _family(a.variant, a.multiplier, a.steps)
    if a.variant == "fit":
        config = common.base(task="fit", evals=("densing",))
        config.fit = _fit(a)
        return config
    config = ladder.get_config(a.variant)
    seeds = (0,) if a.variant == "debug" else (0, 1, 2)
    more = (("xlstm", 0.25),) if seeds == (0,) else [(f, m) for f in NODES for m in MULTIPLIERS]
    end, few = (",steps=5", ladder.DEBUG) if a.variant == "debug" else ("", ())
    config.runs += tuple(
        (
            f"{family}-{m:g}xC/seed{seed}",
            f"configs/densing.py:{family},multiplier={m}{end}",
            (f"seed={seed}", *few),
        )
        for seed in seeds
        for family, m in more
    )
    config.report = "densing_runs"
    config.fit.update(reference="llama", d0=0.0)  # tokens of the common comparison; 0: the middle
    return config


def _family(name: str, multiplier: float, steps: int) -> ConfigDict:
    """Another family on the ladder's recipe for its own number of parameters."""
    r = recipe(COUNTS[name], SMALL["length"], multiplier, extra=0, batch=TINY_BATCH)
    given = ladder_runs.training(r, "embedding")
    if name == "hymba":
        given["optimizer"]["undecayed"] += ("meta",)
    config = language.small(dict(name=name, **{name: NODES[name]}), **given)
    config.steps = steps or r.steps
    return ladder_runs.small(config, **SMALL)


def _fit(a) -> dict:
    """config.fit of the evaluator "densing"."""
    return dict(
        table=a.table,  # CSV: a row a model; "" = no trend
        dates=a.dates,  # CSV of model and release date; "" = a column of the table
        columns=COLUMNS,
        metrics=("MMLU",),  # their mean is the score
        floors=FLOORS,  # (metric, score of guessing)
        reference="Qwen1.5",  # family whose sizes are the reference
        chance=0.01,  # closer to guessing than this: density 0 ...
        saturated=0.001,  # ... to the reference's ceiling: infinite; neither is in the trend
        origin="2023-02-24",  # day 0, the release of Llama 1; older models are left out
        envelope="record",  # record | every day | all: what the line goes through
        mixtures=MIXTURES,  # (model, active, total parameters in billions)
        draws=2000,  # resamples of models
        level=0.9,
        sensitivity=True,  # the table over families, metrics and envelopes
        d0=(1e12,),  # tokens at which a ladder's target is measured, besides its own
        ladder=ladder.get_config(f"fit,runs={a.runs},folder={a.folder},family={a.family}").fit,
    )
