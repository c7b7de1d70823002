"""A small text and a config on it, for the tests of SuperBPE."""

import random

from configs.common import load_config

WORDS = [
    *("snail", "whale", "shell", "water", "house", "night", "light", "stone"),
    *("river", "small", "green", "quick", "slow", "old", "new"),
]
RNG = random.Random(0)
LINES = [
    f"The {a} {b} of the {c} is in the {d}" + RNG.choice([".\n", ", and so is 1 of 234.\n", ":\n"])
    for a, b, c, d in (RNG.choices(WORDS, k=4) for _ in range(400))
]
TEXT = "".join(line + ("\n" if i % 5 == 0 else "") for i, line in enumerate(LINES))


def config(path, *overrides, **fields):
    """configs/superbpe.py on files; fields of data.superbpe."""
    found = load_config("configs/superbpe.py:debug", *overrides)
    with found.unlocked():
        found.data.text, found.data.path = "folder", str(path)
        found.data.superbpe.update(dict(sample_mb=0.0, held_out=0.0) | fields)
    return found
