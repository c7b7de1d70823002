"""The Densing Law's reference family (arXiv 2412.04315): six sizes, trained here. Not a config."""

import dataclasses

from configs import ladder_runs, language
from configs.rungs import LENGTH, recipe

VOCABULARY = 32_000


@dataclasses.dataclass(frozen=True)
class Reference:
    """One size: heads of 64, grouped keys and values, gated SiLU."""

    batch: int  # sequences
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int

    @property
    def n(self) -> int:
        """Parameters without embeddings: matrices, two norms a layer, the last."""
        d = self.width
        block = 2 * d * d + 2 * d * 64 * self.kv_heads + 3 * d * self.mlp + 2 * d
        return self.layers * block + d


REFERENCE = {
    "0.005b": Reference(32, 8, 256, 640, 4, 1),
    "0.03b": Reference(32, 12, 512, 1280, 8, 2),
    "0.1b": Reference(64, 18, 768, 1920, 12, 3),
    "0.2b": Reference(128, 24, 1024, 2560, 16, 2),
    "0.4b": Reference(256, 30, 1280, 3200, 20, 2),
    "0.8b": Reference(512, 36, 1536, 3840, 24, 3),
}


def training(name: str, multiplier: float):
    """A run of 20 N tokens times `multiplier` on your own texts; the paper has 0.5 to 3.

    Sizes, batch and a schedule of warm-up, constant rate and decay are the paper's. Its table has
    no vocabulary, length, rate or lengths of the schedule's parts: those are Llama 2's and the
    ladder's, with a decay over the last tenth.
    """
    size = REFERENCE[name]
    r = recipe(size.n, LENGTH, multiplier, extra=0, batch=size.batch)
    heads = dict(heads=size.heads, kv_heads=size.kv_heads, head_dim=64)
    sizes = dict(width=size.width, layers=size.layers, mlp=size.mlp, tie=True)
    given = ladder_runs.training(r)
    given["schedule"] |= dict(name="wsd", decay=r.steps // 10)
    config = language.published(
        dict(name="llama", llama=dict(size="llama2_7b", **sizes, **heads)),
        length=LENGTH, vocab_size=VOCABULARY, **given,
    )  # fmt: skip
    config.evals, config.eval_every = ("bits_per_byte", "ranked"), max(1, r.steps // 20)
    return config
