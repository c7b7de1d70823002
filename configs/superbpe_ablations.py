"""A small language model with BPE against SuperBPE: equal FLOPs, equal bytes of context.

    python main.py --config=configs/superbpe_ablations.py

Aims at the comparison of arXiv 2503.13423 at 8B parameters (BPB .7463 with BPE, .7480 with
t = 180K, so slightly worse, and .7449 with BPE at 11B; a more even loss per token; -27 to -35 % of
generation's cost per byte). First a run of configs/superbpe.py (8,192 tokens, t = 0.4 of them, and
BPE of the same size, on GCIDE, which needs the extra `text`), then a llama of 0.6 M parameters
beside 1 M of embedding on each, three seeds. A window holds as many bytes either way, so
SuperBPE's is shorter; it takes as many more steps as its steps are cheaper. Leaves report.md,
report.json, report.png and the tokenizers.

| variant | compares | expected sign |
| --- | --- | --- |
| (none) | bits per byte, spread of the loss per token, cost of a byte | -19 % FLOPs a byte |
| debug | the same, tiny, one seed | minutes |
"""

from configs import common
from configs.runs import SEEDS, ablation

CONFIG = "configs/llama.py"
# Bytes per token of held-out GCIDE with the two tokenizers of the first run (its report.json).
BYTES_PER_TOKEN = {"bpe": 3.500, "superbpe": 4.295}
# models/llama.py's "mini", for the arithmetic of equal FLOPs.
MODEL = dict(width=128, layers=3, mlp=384, heads=4, kv_heads=2, head_dim=32)
COLUMNS = (
    "bits_per_byte/bits_per_byte", "bits_per_byte/bytes_per_token", "token_cost/std_over_mean",
    "token_cost/easy_tokens", "token_cost/nats_mean", "token_cost/nats_std",
    "token_cost/flops_per_byte", "token_cost/tokens_per_document", "token_cost/context_bytes",
    "token_cost/training_petaflops",
)  # fmt: skip


def flops_per_token(length: int, vocab: int = 8192) -> int:
    """Forward FLOPs of a token of MODEL at windows of `length`: projections, attention, head."""
    m = MODEL
    qkv = m["width"] * m["head_dim"] * (2 * m["heads"] + 2 * m["kv_heads"])
    matrices = m["layers"] * (qkv + 3 * m["width"] * m["mlp"]) + m["width"] * vocab
    return 2 * matrices + 4 * m["layers"] * m["heads"] * m["head_dim"] * length


def get_config(arg=""):
    """The list of runs."""
    variant = common.parse_arg(arg, ("debug",)).variant
    debug = variant == "debug"
    length, steps, size = (64, 6, 1000) if debug else (256, 400, 8192)
    lengths = {k: round(length * BYTES_PER_TOKEN["bpe"] / v) for k, v in BYTES_PER_TOKEN.items()}
    cost = {k: n * flops_per_token(n, size) for k, n in lengths.items()}
    groups = {}
    for name, file in (("bpe", "bpe.json"), ("superbpe", "tokenizer.json")):
        mine = round(steps * cost["bpe"] / cost[name])
        groups[name] = (
            f"data.tokenizer={{workdir}}/tokenizer/{file}",
            f"data.length={lengths[name]}",
            f"steps={mine}",
            f"schedule.decay={mine // 5}",
            "checkpoint.every=100",
        )
    extra = (
        "model.llama.size=mini",
        f"batch_size={4 if debug else 16}",
        f"evaluation.windows={16 if debug else 64}",
        'evals=("bits_per_byte","token_cost")',
        "sample.prompts=()",
        f"schedule.warmup={10 if debug else 40}",
    )
    text = ("data.text=docs" if debug else "data.text=gcide",)  # BYTES_PER_TOKEN is GCIDE's
    seeds = (0,) if debug else SEEDS
    config = ablation(CONFIG, groups, (*extra, *text), COLUMNS, seeds)
    first = "configs/superbpe.py" + (":debug" if debug else "")
    pairs = sorted(config.runs, key=lambda run: run[0].rpartition("seed")[2])  # stopped: both have
    config.runs = (("tokenizer", first, (f"data.vocab_size={size}", *text)), *pairs)
    return config
