"""Defaults of `config.data`, the only place where they are written down.

Not a training config: `configs/common.py:base()` includes `data_config()`; each system's config
overrides what it needs. docs/data.md explains every field.
"""

import ml_collections

LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")


def data_config(**overrides) -> ml_collections.ConfigDict:
    """Returns the data defaults with overrides applied."""
    config = ml_collections.ConfigDict(
        dict(
            name="image_text",  # image_text | images | text | recall | needle
            source="openmoji+scenes",  # openmoji | scenes | photos | folder, joined with "+"
            captioned="",  # sources of the pictures to draw and to caption; "" = source
            dir="~/.cache/uniflud/data",  # prepared sets; the env var UNIFLUD_CACHE wins
            path="",  # folder of pictures and captions (source="folder"), or of texts
            image_size=32,  # side in pixels of the pictures to generate
            und_size=0,  # side in pixels of the pictures to understand; 0 = image_size
            categories=("all",),  # OpenMoji groups: people, food, nature, travel, ...
            skin_tones=True,  # False leaves out the 2,035 variants by skin tone
            families=False,  # True draws the variants by skin tone as often as one picture
            langs=LANGUAGES,  # caption languages; one is drawn per picture and epoch
            first_lang=0.0,  # share of captions in langs[0]; the other draws take all alike
            scenes=4000,  # training scenes; validation and test have a tenth each
            scene_glyphs=100,  # different glyphs that scenes may show; 0 = all that fit
            edit=False,  # pictures to generate become edits of a source picture
            tokenizer="",  # tokenizer.json to use; "" trains one of vocab_size and keeps it
            vocab_size=4096,
            prompt_length=32,  # tokens, BOS included
            text_length=48,  # tokens of question, answer and the three marks
            questions=1,  # most questions with answers packed into a row about one picture
            mix=dict(t2i=2.0, caption=1.0, vqa=1.0),  # weights of the tasks in a batch
            latents="",  # weights of a VAE: gen_moments instead of gen_image
            text_embeddings="",  # folder of a Flan-T5 encoder: gen_text beside gen_tokens
            flip=False,  # mirror pictures at random (images only)
            sizes=(0,)[:0],  # (256, 512, 1024): each batch at one of these sides (images only)
            shapes=((256, 256),)[:0],  # (h, w) of pictures to generate, one a batch (folder only)
            max_unreadable=10,  # more unreadable files or records than this is an error
            cache_mb=1024,  # decoded pictures kept in memory; larger sets decode on the fly
            prefetch=4,  # batches made ahead by one thread; 0 = none
            text="stdlib",  # stdlib | docs | captions | folder (name="text")
            stages=((0, ()),)[:0],  # ((steps, ((folder below path, share), ...)), ...)
            length=256,  # tokens per row of text (name="text", "recall", "needle")
            pairs=8,  # keys with values to remember in a row (name="recall", "needle")
            fewest=0,  # questions of a training row: about so many to all pairs; 0 = all
        )
    )
    config.update(overrides)
    return config


def curate_config(**overrides) -> ml_collections.ConfigDict:
    """Returns the defaults of config.data.curate (task curate) with overrides applied."""
    config = ml_collections.ConfigDict(
        dict(
            min_size=64,  # shorter side in pixels
            max_aspect=3.0,  # longer side over shorter side
            min_chars=3,  # of a caption; shorter and longer ones are dropped one by one
            max_chars=500,
            near=4,  # near duplicates: bits of 64 in which their hashes may differ ...
            near_levels=1.5,  # ... and mean difference of their thumbnails, of 255 levels
            size=256,  # larger pictures are cropped and shrunk to this side; 0 = kept as they are
        )
    )
    config.update(overrides)
    return config
