"""What the configs of language models share: texts, prompts, sampling. Not a config."""

import importlib.util

from configs import common
from configs.data import data_config

PROMPTS = {
    "gcide": ("Snail (n.)", "Wooden (a.)", "To whistle (v.)", "", "", ""),
    "stdlib": ("import os\n", "def main(", "class Error", "", "", ""),
}
SAMPLE = dict(
    max_new=96,
    rows=1,  # of the decoding step that is exported, and that a dry run compiles
    temperature=0.8,  # 0: the most likely token
    top_k=0,  # 0: all tokens
    top_p=0.95,
    repetition_penalty=1.0,
    stop=("",)[:0],
)


def small(model: dict, steps: int = 600, **overrides):
    """Minutes on two CPU cores: windows of 256 tokens of the dictionary GCIDE, or of the source of
    Python's standard library where the extra `text` is not installed."""
    text = "gcide" if importlib.util.find_spec("dictionary") else "stdlib"
    settings = dict(
        seed=0,
        steps=steps,
        batch_size=16,
        model=dict(vocab_size=0, z_loss=0.0) | model,
        data=data_config(name="text", text=text, length=256, vocab_size=4096),
        optimizer=dict(lr=3e-3, b2=0.95, weight_decay=0.1),
        schedule=dict(name="wsd", warmup=50, decay=steps // 5, final=0.01),
        sample=SAMPLE | dict(prompts=PROMPTS[text]),
        evals=("bits_per_byte",),
        checkpoint=dict(every=200, keep=2),
        log_every=25,
    )
    return common.base(**settings | overrides)


def debug(config, size: str):
    """The same with a tiny model and a few steps: under a minute."""
    config.steps, config.batch_size, config.log_every = 20, 8, 5
    config.model[config.model.name].size = size
    config.data.update(text="docs", length=64, vocab_size=512)
    config.sample.max_new = 16
    config.checkpoint.every = 10
    config.evaluation.update(windows=32, batch=16, contexts=(64, 128))
    return config


def published(model: dict, *, steps: int, batch_size: int, length: int, vocab_size: int, **over):
    """A published size on your own texts (config.data.path), for accelerators."""
    settings = dict(
        steps=steps,
        batch_size=batch_size,
        model=dict(vocab_size=vocab_size, z_loss=0.0) | model,
        data=data_config(name="text", text="folder", vocab_size=vocab_size, length=length),
        mesh=dict(data=1, fsdp=-1, tensor=1, seq=1),
        precision="bfloat16",
        remat="full",
        sample=SAMPLE | dict(prompts=("",)),
        evals=("bits_per_byte",),
        eval_every=10_000,
        sample_every=10_000,
        checkpoint=dict(every=1000, keep=3, keep_every=50_000),
        log_every=100,
    )
    return common.base(**settings | over)
