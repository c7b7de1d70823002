"""Infinity: pictures from captions, bit by bit and scale after scale (arXiv 2412.04431).

    python main.py --config=configs/infinity.py

Aims at the paper's tables of self-correction (FID 9.76 -> 3.48), of decoding and of sizes.
Data: OpenMoji glyphs with their CLDR names. The tokenizer is that of configs/bsq_vae.py, frozen.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 32 px to 85 tokens of 16 bits on 4 scales, 3.0 M parameters | 2 CPU cores, 12 minutes |
| debug | the same with a tiny model, a few steps | under a minute |
| 125m, 361m, 940m | the paper's layer12, layer16, layer24; 256 px, your own pictures | pods |
| 2b, layer32, layer40, layer48 | 2.2, 2.3, 4.7 and 8.8 B; 1,024 px, d = 32 bits | pods |
| 8b | 8.4 B on 14 bits of 2 x 2 latents | pods |
| 20b | 20 B, in the official code only | pods |

Stages of the published sizes: image_size=256, 512, 1024 in turn, init_from the stage before.
"""

from configs import common
from configs.data import data_config

TOKENIZER = "models/tokenizers/weights/bsq_vae_32.safetensors"
PUBLISHED = {
    "125m": "layer12", "361m": "layer16", "940m": "layer24", "2b": "2b", "layer32": "layer32",
    "layer40": "layer40", "layer48": "layer48", "8b": "8b", "20b": "20b",
}  # fmt: skip

MODEL = dict(
    name="infinity",
    vocab_size=0,  # 0: of the data's tokenizer
    transformer=dict(size="small", width=160, depth=5, heads=4),
    tokenizer=dict(size="small_32", z=16),
    text=dict(name="decoder", size="debug", width=128, layers=2, mlp=256, heads=4, kv_heads=4),
    ratios=(1.0,),  # h / w of the pictures, one bucket each
    correction="self",  # self | random (flipped inputs, labels as if they were right) | none
    strength=0.3,  # a scale's share of flipped bits is drawn from 0 .. strength
    noise_scales=13,  # bits of later scales are never flipped
    reweight=True,  # a token's loss over the side of its scale
    text_drop=0.1,  # of captions
)
# Not decayed by the official script, beside vectors: tables, modulation, biases of several heads.
UNDECAYED = tuple(
    f"transformer/{leaf}"
    for leaf in (
        "uncond", "level", "text_pool/query", "text_pool/v/bias", "modulation/bias",
        "head_modulation/bias", "layers/modulation", "layers/sa/q/bias", "layers/sa/v/bias",
        "layers/ca/q/bias", "layers/ca/v/bias",
    )
)  # fmt: skip
SAMPLE = dict(
    prompts=("red apple", "tiger", "un chat", "Auto", "Apfel", "ピザ"),
    guidance=(3.0,),  # one number, or one for each scale
    temperature=(1.0,),
    top_p=0.97,
    insertion=0,  # guidance on log odds (0), or behind block depth + insertion
    ratio=1.0,  # h / w
    strip=False,  # also draws what the picture is after each scale
)
EVALS = ("bits", "retrieval", "reconstruction", "kid", "sheets")


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("debug", *PUBLISHED)).variant
    if variant in PUBLISHED:
        return _published(variant)
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
        checkpoint=dict(every=500, keep=2),
        log_every=50,
    )
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
    config.evaluation.draw_batch = len(SAMPLE["prompts"])  # one sampler to compile for both


def _published(variant):
    """The official script: AdamW (0.9, 0.97), constant rate, 1M pixels from the 2B model on."""
    size = PUBLISHED[variant]
    side = 256 if variant in ("125m", "361m", "940m") else 1024
    tokenizer = "infinity_8b" if size == "8b" else "infinity_d32"
    batch = 4096 if side == 256 else 2048
    model = MODEL | dict(
        transformer=dict(size=size),
        tokenizer=dict(size=tokenizer),
        text=dict(name="t5", size="xl"),  # data.text_embeddings: its folder
        vocab_size=32_128,
    )
    return common.base(
        steps=150_000 if side == 256 else 60_000,
        batch_size=batch,
        model=model,
        objective=dict(name="model", freeze=("vae",)),
        data=data_config(
            name="image_text",
            source="folder",
            image_size=side,
            prompt_length=512,
            text_embeddings="flan-t5-xl",
            mix=dict(t2i=1.0, caption=0.0, vqa=0.0),
        ),
        optimizer=dict(
            lr=6e-5 if side == 256 else 2e-5,
            b2=0.97,
            weight_decay=0.005,
            clip=5.0,
            undecayed=UNDECAYED,
        ),
        ema=dict(decay=0.9999),
        mesh=dict(data=1, fsdp=-1, tensor=1, seq=1),
        precision="bfloat16",
        remat="full",
        accumulate=1 if side == 256 else 8,  # the 2B model on 256 v5e: 5 of 16 GiB, else 31
        sample=SAMPLE | dict(guidance=(4.0,), temperature=(0.5,)),
        evals=("bits", "reconstruction", "sheets"),
        eval_every=10_000,
        sample_every=10_000,
        checkpoint=dict(every=1000, keep=3, keep_every=50_000),
        log_every=100,
    )
