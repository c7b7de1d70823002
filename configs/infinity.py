"""Infinity: pictures from captions, bit by bit and scale after scale (arXiv 2412.04431).

    python main.py --config=configs/infinity.py

Aims at the paper's tables of self-correction (FID 9.76 -> 3.48), of decoding and of sizes.
Data: OpenMoji glyphs with their CLDR names. The tokenizer is that of configs/bsq_vae.py, frozen.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 32 px to 85 tokens of 16 bits on 4 scales, 3.0 M parameters | 2 CPU cores, 12 minutes |
| var | VAR: a caption is one vector, a token one of 2^16 codes (30 steps tried) | 1/3 step/s |
| debug | the same with a tiny model, a few steps | under a minute |
| 125m, 361m, 940m | the paper's layer12, layer16, layer24; 256 px, your own pictures | pods |
| 2b, layer32, layer40, layer48 | 2.2, 2.3, 4.7 and 8.8 B; 1,024 px, d = 32 bits | pods |
| 8b | 8.4 B on 14 bits of 2 x 2 latents | pods |
| 20b | 20 B, in the official code only | pods |

Published sizes need a trained tokenizer, init_from=vae=DIR, of configs/bsq_vae.py or published
(docs/results/infinity.md, fine-tuning). They take side=256, 512 or 1024, the stages in turn
(init_from the one before), and ratios=all, the paper's 15 shapes (or some: ratios=1+1.5+0.666):
2b,side=256,ratios=all.
"""

from configs import common
from configs.data import data_config
from configs.infinity_sizes import MODEL, PUBLISHED, SAMPLE, UNDECAYED, VAR, published

TOKENIZER = "models/tokenizers/weights/bsq_vae_32.safetensors"
EVALS = ("bits", "retrieval", "reconstruction", "kid", "sheets")


def get_config(arg=""):
    """The config of one variant; see the table above."""
    args = common.parse_arg(arg, ("var", "debug", *PUBLISHED), side=0, ratios="")
    variant = args.variant
    if variant in PUBLISHED:
        return published(variant, args.side, args.ratios)
    if args.side or args.ratios:
        raise ValueError("config arguments side and ratios are for the published sizes")
    config = common.base(
        steps=1500,
        batch_size=32,
        model=MODEL,
        objective=dict(name="model", freeze=("vae",)),
        data=data_config(
            name="image_text",
            source="openmoji",
            categories=("food", "nature"),
            skin_tones=False,
            first_lang=0.4,
            mix=dict(t2i=1.0, caption=0.0, vqa=0.0),
            prompt_length=18,
        ),
        init_from=f"vae={TOKENIZER}",
        optimizer=dict(lr=2e-3, b2=0.97, weight_decay=0.02, clip=1.0, undecayed=UNDECAYED),
        schedule=dict(name="wsd", warmup=80, decay=500, final=0.02),
        ema=dict(decay=0.998, warmup=True),
        sample=SAMPLE,
        evals=EVALS,
        checkpoint=dict(every=100, keep=2),
        log_every=50,
    )
    if variant == "var":
        config.update_from_flattened_dict(VAR)
    if variant == "debug":
        _debug(config)
    return config


def _debug(config):
    config.steps, config.batch_size, config.log_every = 20, 16, 5
    config.model.transformer.update(size="debug", width=64, depth=2, heads=2)
    config.model.text.update(width=64, layers=1, mlp=128)
    config.data.update(categories=("food",), vocab_size=1024)
    config.checkpoint.every = 10
    config.evaluation.update(prompts=16, sheet=8, pictures=64, batch=16, loss_batches=1)
    config.evaluation.draw_batch = len(SAMPLE["prompts"])  # one sampler to compile for both ...
    config.sample.strip = False  # ... and for that it must not leave more
