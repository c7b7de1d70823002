"""Trains a text tokenizer: byte-level BPE over the captions in 14 languages, or over any texts.

    python main.py --config=configs/tokenizer.py --config.data.vocab_size=8192 --workdir=OUT
    python main.py --config=configs/uniflud.py --config.data.tokenizer=OUT/tokenizer.json

Training configs train and keep a tokenizer of their own, so this is only needed for another
vocabulary or other texts. Variants: `:debug` (512 pieces), `:stdlib` (Python's own source, for
language models). Expected: a few seconds; `tokenizer.report.json` gives bytes per token by
language.
"""

from configs.common import base, parse_arg
from configs.data import data_config


def get_config(arg=""):
    """The config of one variant."""
    variant = parse_arg(arg, ("debug", "stdlib")).variant
    config = base(task="tokenizer", data=data_config(source="openmoji+scenes"))
    if variant == "debug":
        config.data.vocab_size = 512
    if variant == "stdlib":
        config.data.update(name="text", text="stdlib", vocab_size=8192)
    return config
