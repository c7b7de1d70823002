"""Glyph classifier: the features by which evaluation finds a drawn glyph among others.

    python main.py --config=configs/glyph_classifier.py

Trains on OpenMoji's training glyphs, one class per picture, under light augmentation; held-out
glyphs are compared by features and never trained on.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 32 px, 0.5 M parameters and a class table | 2 CPU cores, minutes |
| 64 | the same at 64 px | 2 CPU cores, minutes |
| debug | 20 steps | under a minute |
"""

from configs import common
from configs.data import data_config


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("debug", "64")).variant
    config = common.base(
        steps=3000,
        batch_size=64,
        model=dict(
            name="glyph_classifier",
            net=dict(size="small_32"),
            classes=4096,  # group numbers are below 3,953
            scale=20.0,  # of the cosine between features and class vectors
        ),
        data=data_config(name="images", source="openmoji"),
        optimizer=dict(lr=2e-3, b2=0.98, weight_decay=0.02, clip=1.0),
        schedule=dict(name="cosine", warmup=100, final=0.02),
        checkpoint=dict(every=500, keep=2),
        log_every=50,
    )
    if variant == "64":
        config.model.net.size = "small_64"
        config.data.image_size = 64
    if variant == "debug":
        config.steps, config.log_every = 20, 5
        config.data.update(categories=("food",), skin_tones=False)
        config.checkpoint.every = 10
    return config
