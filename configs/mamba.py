"""Mamba-1 and Mamba-2: recurrent language models with a diagonal memory.

    python main.py --config=configs/mamba.py

Aims at the published sizes (arXiv 2312.00752 table 3, 2405.21060 table 1) and serves as baseline of
configs/hymba.py:compare. Data: the GCIDE dictionary where the extra `text` is installed, the
source of Python's standard library elsewhere, or your own texts (config.data.text=folder).

| variant | trains | where, how long |
| --- | --- | --- |
| (none), 2 | Mamba-1, Mamba-2 of 3.5 M parameters, windows of 256 tokens | 2 CPU cores, minutes |
| debug, debug2 | the same with tiny models, a few steps | under a minute |
| mamba_130m, mamba_370m, mamba_790m, mamba_1.4b, mamba_2.8b | your own texts | GPUs, TPUs |
| mamba2_130m, mamba2_370m, mamba2_780m, mamba2_1.3b, mamba2_2.7b | your own texts | GPUs, TPUs |
"""

from configs import common, language

# Peak learning rates of the two papers' models (arXiv 2312.00752 table 12: five times GPT-3's).
PUBLISHED = {
    "mamba_130m": 3e-3,
    "mamba_370m": 1.5e-3,
    "mamba_790m": 1.25e-3,
    "mamba_1.4b": 1e-3,
    "mamba_2.8b": 8e-4,
    "mamba2_130m": 3e-3,
    "mamba2_370m": 1.5e-3,
    "mamba2_780m": 1.25e-3,
    "mamba2_1.3b": 1e-3,
    "mamba2_2.7b": 8e-4,
}


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("2", "debug", "debug2", *PUBLISHED)).variant
    if variant in PUBLISHED:
        return language.published(
            dict(name="mamba", mamba=dict(size=variant)),
            steps=600_000,
            batch_size=256,
            length=2048,
            vocab_size=50_288 if variant.startswith("mamba2") else 50_280,
            optimizer=dict(lr=PUBLISHED[variant], b2=0.95, weight_decay=0.1),
            schedule=dict(name="cosine", warmup=2000, final=0.01),
        )
    second = variant.endswith("2")
    config = language.small(dict(name="mamba", mamba=dict(size="tiny2" if second else "tiny")))
    return language.debug(config, variant) if variant.startswith("debug") else config
