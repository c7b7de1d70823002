"""Llama-style transformers: the attention model that others are compared with.

    python main.py --config=configs/llama.py

Aims at no table of its own: the baseline of configs/hymba.py:compare, and what the post-training
systems start from (Llama 3, Qwen 2.5, OLMo 2: config.init_from takes a published folder). Data: the
GCIDE dictionary where the extra `text` is installed, the source of Python's standard library
elsewhere, or your own texts (config.data.text=folder, config.data.path).

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 3.5 M parameters, windows of 256 tokens, packed documents | 2 CPU cores, minutes |
| debug | the same with a tiny model, a few steps | under a minute |
| llama2_7b, llama3_8b, llama3.1_8b, llama3.2_1b, llama3.2_3b | your own texts | GPUs, TPUs |
| qwen2.5_0.5b, qwen2.5_1.5b, qwen2.5_7b, qwen2.5_32b | your own texts | GPUs, TPUs |
| olmo2_1b, olmo2_7b, olmo2_13b | your own texts | GPUs, TPUs |
"""

from configs import common, language

PUBLISHED = {  # vocabulary
    "llama2_7b": 32_000,
    "llama3_8b": 128_256,
    "llama3.1_8b": 128_256,
    "llama3.2_1b": 128_256,
    "llama3.2_3b": 128_256,
    "qwen2.5_0.5b": 151_936,
    "qwen2.5_1.5b": 151_936,
    "qwen2.5_7b": 152_064,
    "qwen2.5_32b": 152_064,
    "olmo2_1b": 100_352,
    "olmo2_7b": 100_352,
    "olmo2_13b": 100_352,
}


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("debug", *PUBLISHED)).variant
    if variant in PUBLISHED:
        return language.published(
            dict(name="llama", llama=dict(size=variant)),
            steps=100_000,
            batch_size=256,
            length=4096,
            vocab_size=PUBLISHED[variant],
            optimizer=dict(lr=3e-4, b2=0.95, weight_decay=0.1),
            schedule=dict(name="cosine", warmup=2000, final=0.1),
        )
    config = language.small(dict(name="llama", llama=dict(size="tiny")))
    return language.debug(config, "debug") if variant == "debug" else config
