"""Cleans pictures with captions and stores them as an ArrayRecord data set.

    python main.py --config=configs/curate.py --config.data.path=FOLDER --workdir=OUT
    python main.py --config=configs/uniflud.py --config.data.source=folder \\
        --config.data.captioned=folder --config.data.mix.vqa=0.0 --config.data.path=OUT/dataset

FOLDER holds jpg, png or webp files, each with a .txt of its caption beside it, or one
captions.jsonl. Variants: `:openmoji` runs on the OpenMoji set (no folder needed), `:debug` on its
32 px rendering. Expected: about 150 pictures a second on one core; of OpenMoji's 3,953
drawings 222 are exact duplicates of another and many are skin-tone twins (near duplicates).
Leaves `dataset/`, `curation.jsonl` (one line per picture: kept, or the reason) and
`curation.json` (counts).
"""

from configs.common import base, parse_arg
from configs.data import curate_config, data_config


def get_config(arg=""):
    """The config of one variant."""
    variant = parse_arg(arg, ("openmoji", "debug")).variant
    config = base(task="curate", data=data_config(source="folder", curate=curate_config()))
    if variant:
        config.data.source = "openmoji"
        config.data.image_size = 32 if variant == "debug" else 64
        config.data.curate.min_size = 32
    return config
