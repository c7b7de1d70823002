"""Rungs of a model ladder: sizes, parameter counts and matched hyper-parameters. Not a config.

arXiv 2412.04403 and allenai/OLMo-ladder. N counts the output head and not the input embedding.
"""

import dataclasses

LENGTH = 4096
VOCABULARY = 100_352  # 100,278 tokens, padded


@dataclasses.dataclass(frozen=True)
class Rung:
    """One size of an OLMo-2-shaped ladder; `mlp` is the gated width, 4 d where it is 0."""

    width: int
    layers: int
    heads: int
    mlp: int = 0
    vocab_size: int = VOCABULARY
    length: int = LENGTH

    @property
    def gated(self) -> int:
        """Width of the gated MLP."""
        return self.mlp or 4 * self.width

    @property
    def n(self) -> int:
        """Parameters without the input embedding: matrices, four norms a layer, the last, head."""
        d = self.width
        block = 4 * d * d + 3 * d * self.gated + 4 * d
        return self.layers * block + d + self.vocab_size * d

    @property
    def flops_per_token(self) -> int:
        """Forward and backward; the last term is the published counter's."""
        attention = 12 * self.layers * self.width * self.length
        return 6 * self.n + attention + 4 * self.vocab_size * self.width


PUBLISHED = {
    "190m": Rung(768, 12, 12),
    "370m": Rung(1024, 16, 16),
    "600m": Rung(1344, 16, 16),
    "760m": Rung(1536, 16, 16),
    "1.3b": Rung(2048, 16, 16),
    "3b": Rung(3328, 16, 16),
    "7b": Rung(4096, 32, 32, mlp=11_008),
    "13b": Rung(5120, 40, 40, mlp=13_824),
}

# Named by their parameters with the vocabulary of 512 that the data set's tokenizer is trained to.
_SMALL = dict(vocab_size=512, length=256)
TINY = {
    "31k": Rung(24, 2, 2, **_SMALL),
    "49k": Rung(32, 2, 2, **_SMALL),
    "72k": Rung(40, 2, 2, **_SMALL),
    "98k": Rung(40, 3, 2, **_SMALL),
    "136k": Rung(48, 3, 2, **_SMALL),
    "180k": Rung(56, 3, 2, **_SMALL),
}
TINY_HELD_OUT = ("136k", "180k")
TINY_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a rung is trained with."""

    batch_size: int  # sequences
    lr: float
    warmup: int  # steps
    steps: int
    tokens: int  # asked for: 20 N times the multiplier


def recipe(
    n: int, length: int, multiplier: float, divisor: int = 64, extra: int = 10, batch: int = 0
) -> Recipe:
    """The ladder's rules for `n` parameters, rows of `length`, `multiplier` times 20 n tokens.

    divisor: the batch is a multiple of it (64 gives the paper's table).
    extra: steps that the published runs did beyond their tokens. batch: sequences, 0 by the rule;
    it grows with n, and runs of tiny ladders are short of steps before they are short of tokens.
    The rules were found for sequences of 2,048 tokens: a batch has as many tokens at any length,
    the rate is a quarter.
    """
    scale = n / 108e6
    sequences = 160 * scale ** (2 / 3) * 2048 / length
    batch = batch or max(1, round(sequences / divisor)) * divisor
    per_step = batch * length
    tokens = round(20 * n * multiplier)
    return Recipe(
        batch_size=batch,
        lr=0.0047 * scale ** (-1 / 3) / 4,
        warmup=round(n / per_step),
        steps=-(-tokens // per_step) + extra,
        tokens=tokens,
    )
