"""Infinity's published sizes, and what every size of it shares. Not a config."""

from configs import common
from configs.data import data_config

PUBLISHED = {
    "125m": "layer12", "361m": "layer16", "940m": "layer24", "2b": "2b", "layer32": "layer32",
    "layer40": "layer40", "layer48": "layer48", "8b": "8b", "20b": "20b",
}  # fmt: skip

MODEL = dict(
    name="infinity",
    vocab_size=0,  # 0: of the data's tokenizer
    # head: bits | index; cross=False: blocks know the caption by its pooled vector only
    transformer=dict(size="small", width=160, depth=5, heads=4, head="bits", cross=True),
    tokenizer=dict(size="small_32", z=16, scales=4),
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
    aspect=1.0,  # h / w; published sizes take the nearest of their 15 shapes
    strip=True,  # also draws what the picture is after each scale
)

# VAR (arXiv 2404.02905): a label's one vector instead of attention to a text, a code's index; the
# blocks that the attention and the text's stack cost. On Infinity's tokenizer and positions.
VAR = {
    "model.text.name": "label",
    "model.transformer.cross": False,
    "model.transformer.head": "index",
    "model.transformer.depth": 8,
    "optimizer.undecayed": tuple(u for u in UNDECAYED if "/ca/" not in u),
}


def shapes_of(ratios: str, side: int) -> tuple[tuple[float, ...], tuple[tuple[int, int], ...]]:
    """(h / w, pixels) of the shapes that "all", or numbers joined with "+", name, about side^2
    pixels each."""
    from models.tokenizers.quantisers.schedules import RATIOS, dynamic

    scales = len(dynamic((side // 16, side // 16)))
    known = sorted(RATIOS)
    found = tuple(known) if ratios == "all" else tuple(map(float, ratios.split("+")))
    if unknown := [ratio for ratio in found if ratio not in RATIOS]:
        raise ValueError(
            f"config argument ratios={ratios!r}: {unknown[0]} is none of "
            f"{', '.join(f'{ratio:g}' for ratio in known)}"
        )
    grids = (RATIOS[ratio][scales - 1] for ratio in found)
    return found, tuple((16 * h, 16 * w) for h, w in grids)


def published(variant: str, side: int = 0, ratios: str = ""):
    """The official script: AdamW (0.9, 0.97), constant rate, 1M pixels from the 2B model on."""
    size = PUBLISHED[variant]
    side = side or (256 if variant in ("125m", "361m", "940m") else 1024)
    shapes = shapes_of(ratios, side) if ratios else ((1.0,), ())
    batch = 4096 if side == 256 else 2048
    model = MODEL | dict(
        transformer=dict(size=size),
        tokenizer=dict(size="infinity_8b" if size == "8b" else "infinity_d32"),
        text=dict(name="t5", size="xl"),  # data.text_embeddings: its folder
        vocab_size=32_128,
        ratios=shapes[0],
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
            shapes=shapes[1],
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
        sample=SAMPLE | dict(guidance=(4.0,), temperature=(0.5,), strip=False),
        evals=("bits", "reconstruction", "sheets"),
        # Calls of 4M pixels; a row of 1M pixels holds 5.5 GB of the 2B's keys and values, guided.
        evaluation=dict(batch=(2048 // side) ** 2, draw_batch=128 if side == 256 else 32),
        eval_every=10_000,
        sample_every=10_000,
        checkpoint=dict(every=1000, keep=3, keep_every=50_000),
        log_every=100,
    )
