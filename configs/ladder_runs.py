"""How the runs of a model ladder are trained: published sizes and tiny ones. Not a config."""

from ml_collections import ConfigDict

from configs import language
from configs.rungs import PUBLISHED, TINY, TINY_BATCH, Recipe, Rung, recipe

# Tokens, sequences of 4,096, peak rate, warm-up: not by the ladder's rules.
TARGETS = {
    "7b-4t": ("7b", 3_945_065_873_408, 1024, 3e-4, 2000),
    "13b-5t": ("13b", 5_000_088_518_656, 2048, 9e-4, 1000),
}


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


def tiny(name: str, multiplier: float, steps: int) -> ConfigDict:
    """One run of the tiny ladder."""
    rung = TINY[name]
    r = recipe(rung.n, rung.length, multiplier, extra=0, batch=TINY_BATCH)
    config = language.small(_model(rung, 0), **training(r))
    config.steps = steps or r.steps
    return small(config, rung.length, rung.vocab_size)


def published(name: str, multiplier: float) -> ConfigDict:
    """A run of the paper's sizes on your own texts."""
    size, tokens, batch, lr, warmup = TARGETS.get(name, (name, 0, 0, 0.0, 0))
    rung = PUBLISHED[size]
    r = recipe(rung.n, rung.length, multiplier)
    if tokens:
        r = Recipe(batch, lr, warmup, -(-tokens // (batch * rung.length)), tokens)
    config = language.published(
        _model(rung, rung.vocab_size), length=rung.length, vocab_size=rung.vocab_size, **training(r)
    )
    config.model.z_loss = 1e-5
    every = 200 if multiplier <= 2 else 500 if multiplier <= 5 else 1000
    config.evals, config.eval_every = ("bits_per_byte", "ranked"), every
    return config
