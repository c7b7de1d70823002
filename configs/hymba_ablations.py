"""Hymba's design roadmap at small scale: one command trains every step of it with three seeds.

    python main.py --config=configs/hymba_ablations.py:roadmap

Aims at the paper's design roadmap (arXiv 2411.13676, table 1: commonsense, recall, throughput and
cache of 300M models). Attention alone, Mamba alone, one after the other, side by side, then with
windows, shared keys and meta tokens, and what happens without global layers or with the branches
concatenated. Four layers of width 64; "3 global layers" are the first and the last one here.
Leaves report.md, report.json and report.png in the workdir.

| variant | compares by | expected sign |
| --- | --- | --- |
| (none), recall | 8 of 24 keys, one number of state a channel | Mamba far below the rest |
| state | the same with two layers and equal sizes | Mamba clearly lower |
| needle | 4 keys with values in 128 tokens, windows of 8 | all windows far below two global |
| text | bits per byte, bytes of the state, tokens a second | side by side >= one after the other |
| roadmap | recall, needle and text in one list and one table, 81 runs | |
| meta | share of attention on the first token, entropy | both fall with meta tokens |
| debug | recall with a few steps, two of the models | minutes |
"""

from configs import common
from configs.runs import ablation

NODE = "model.hymba."
EVERYWHERE, ENDS, NOWHERE = "(0,1,2,3)", "(0,3)", "()"
PLACES = ("attention/first", "attention/meta", "attention/self", "attention/entropy")
COST = ("speed/parameters", "speed/train_tokens_per_s", "speed/state_bytes_8192")


def model(fusion="mean", everywhere=ENDS, groups="((1,2),)", meta=8):
    """Overrides of one step of the roadmap."""
    values = dict(fusion=fusion, global_layers=everywhere, groups=groups, meta=meta)
    overrides = tuple(f"{NODE}{key}={value}" for key, value in values.items())
    return overrides if meta else (*overrides, "optimizer.undecayed=()")


GROUPS = {
    "attention": model("attention", EVERYWHERE, "()", 0),
    "mamba": model("mamba", NOWHERE, "()", 0),
    "one after the other": model("alternate", EVERYWHERE, "()", 0),
    "side by side": model("mean", EVERYWHERE, "()", 0),
    "+ windows": model(groups="()", meta=0),
    "+ shared keys": model(meta=0),
    "+ meta tokens": model(),
    "no global layer": model(everywhere=NOWHERE),
    "concatenated": model("concat"),
}
TASKS = ("recall", "needle", "text")


def get_config(arg=""):
    """The list of runs of one comparison."""
    variant = common.parse_arg(arg, ("roadmap", *TASKS, "state", "meta", "debug")).variant
    if variant == "roadmap":
        return _roadmap()
    short = (f"{NODE}size=debug", f"{NODE}window=64", "sample.prompts=()")
    short += ("steps=300", "schedule.decay=60")
    if variant == "meta":
        pair = {"without": GROUPS["+ shared keys"], "with": GROUPS["+ meta tokens"]}
        extra = (*short, 'evals=("bits_per_byte","attention")')
        columns = ("bits_per_byte/bits_per_byte", *PLACES)
        return ablation("configs/hymba.py", pair, extra, columns)
    if variant == "text":
        extra = (*short, 'evals=("bits_per_byte","speed")')
        columns = ("bits_per_byte/bits_per_byte", *COST)
        return ablation("configs/hymba.py", GROUPS, extra, columns)
    columns = ("losses/held_out_accuracy", "losses/held_out_loss")
    if variant == "debug":
        few = {name: GROUPS[name] for name in ("mamba", "+ meta tokens")}
        return ablation("configs/recall.py:debug,model=hymba", few, (), columns, (0,))
    if variant == "state":
        small = (f"{NODE}state=1", f"{NODE}layers=2", "steps=800")
        pair = {
            "Hymba": model(everywhere="(0,1)", groups="()"),
            "Mamba": (*GROUPS["mamba"], f"{NODE}mlp=183"),  # 129,484 parameters; Hymba: 129,612
        }
        return ablation("configs/recall.py:more,model=hymba", pair, small, columns)
    variant, extra = {
        "needle": ("needle", ("batch_size=32", "steps=400")),
        "recall": ("more", (f"{NODE}state=1", "batch_size=64", "steps=600")),
    }[variant or "recall"]
    return ablation(f"configs/recall.py:{variant},model=hymba", GROUPS, extra, columns)


def _roadmap():
    """All tasks' runs, "recall: attention/seed0" and so on; a task's columns are its own."""
    lists = {task: get_config(task) for task in TASKS}
    columns = dict.fromkeys(c for one in lists.values() for c in one.evaluation.table.metrics)
    config = lists["text"]
    config.runs = tuple(
        (f"{task}: {name}", *rest) for task, one in lists.items() for name, *rest in one.runs
    )
    config.evaluation.table.metrics = tuple(columns)
    return config
