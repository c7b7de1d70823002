"""Hymba: attention heads and Mamba heads side by side, meta tokens, windows, shared keys.

    python main.py --config=configs/hymba.py
    python main.py --config=configs/hymba.py:compare

Aims at the paper's table of small language models (arXiv 2411.13676: 1.5B, average 61.06 over seven
tasks) at sizes a CPU trains. Data: the GCIDE dictionary where the extra `text` is installed, the
source of Python's standard library elsewhere, or your own texts (config.data.text=folder).

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 3.5 M parameters, windows of 256 tokens, packed documents | 2 CPU cores, minutes |
| debug | the same with a tiny model, a few steps | under a minute |
| compare | Hymba, Mamba-1, Mamba-2, xLSTM, Llama: equal parameters, equal tokens | an hour |
| compare_debug | the same with tiny models, a few steps, one seed | minutes |
| 125m, 350m, 1.5b | the paper's sizes, 2,048 tokens, your own texts (config.data.path) | pods |
| 1.5b_8k | the last 100B tokens of 1.5b: 8,192 tokens, the stretched rotary base | pods |
"""

from configs import common, language
from configs.runs import ablation

VARIANTS = ("debug", "compare", "compare_debug", "125m", "350m", "1.5b", "1.5b_8k")
# The paper's: peak 3e-3, 1 % warm-up, the last 20 % fall to 1e-5. Betas, decay and clipping are
# not stated. Meta tokens do not decay (our choice).
OPTIMIZER = dict(lr=3e-3, b2=0.95, weight_decay=0.1, clip=1.0, undecayed=("meta",))
# What configs/hymba_ablations.py changes, besides the layers that see everything or share keys.
HEADS = dict(fusion="mean", state=16, meta=16, window=64)
LAYERS = dict(global_layers=(0, 5), groups=((1, 2), (3, 4)))
COLUMNS = (
    "bits_per_byte/bits_per_byte", "speed/parameters", "speed/train_tokens_per_s",
    "speed/state_bytes_1024", "speed/state_bytes_8192", "speed/step_ms_1024", "speed/step_ms_8192",
    "speed/step_bytes_1024", "speed/step_bytes_8192",
)  # fmt: skip


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, VARIANTS).variant
    if variant.startswith("compare"):
        return _compare(variant == "compare_debug")
    if variant not in ("", "debug"):
        return _published(variant)
    node = dict(size="tiny", **HEADS, **LAYERS)
    config = language.small(dict(name="hymba", hymba=node), optimizer=OPTIMIZER)
    if variant == "debug":
        language.debug(config, "debug")
        config.model.hymba.update(global_layers=(0, 3), groups=((1, 2),), meta=8, window=16)
    return config


def _compare(debug: bool):
    """The other systems' small models on this one's schedule and learning rate."""
    schedule = ("steps=300", "schedule.name=wsd", "schedule.decay=60", "schedule.final=0.01")
    extra = ('evals=("bits_per_byte","speed")', "sample.prompts=()", "optimizer.clip=1.0")
    extra += schedule if not debug else ()
    end = ":debug" if debug else ""
    models = {
        "Hymba": f"configs/hymba.py{end}",
        "Mamba-1": f"configs/mamba.py{end}",
        "Mamba-2": "configs/mamba.py:debug2" if debug else "configs/mamba.py:2",
        "xLSTM": f"configs/xlstm.py{end}",
        "Llama": f"configs/llama.py{end}",
    }
    seeds = (0,) if debug else (0, 1, 2)
    columns = COLUMNS[:3] if debug else COLUMNS
    lists = [ablation(spec, {name: ()}, extra, columns, seeds) for name, spec in models.items()]
    lists[0].runs = tuple(run for one in lists for run in one.runs)
    return lists[0]


def _published(variant: str):
    """1T to 1.3T tokens in batches of 2M (the paper's numbers disagree), then 100B at 8k."""
    size, _, stage = variant.partition("_")
    # Short contexts were trained with the plain rotary base.
    stretch = 4.0 if stage else 1.0
    steps = 50_000 if stage else 650_000
    return language.published(
        dict(name="hymba", hymba=dict(size=size, rope_stretch=stretch)),
        steps=steps,
        batch_size=256 if stage else 1024,
        length=8192 if stage else 2048,
        vocab_size=32_001,
        optimizer=OPTIMIZER,
        schedule=dict(
            name="wsd", warmup=steps // 100, decay=steps // 5, final=1e-5 / OPTIMIZER["lr"]
        ),
    )
