"""UniFluid as published: what all its configs share, and the paper's two sizes.

    python main.py --config=configs/unifluid.py:2b --mode=dryrun --topology=v5e:16x16

The paper's spelling of configs/uniflud.py: the same variants, whose table is there.
"""

from configs import common
from configs.data import data_config

MODEL = dict(
    name="unifluid",
    vocab_size=0,  # 0: of the data's tokenizer
    image_size=32,
    decoder=dict(size="tiny", width=192, layers=3, mlp=512, heads=4, kv_heads=2, head_dim=48),
    vit=dict(size="debug", width=128, layers=2, mlp=384, heads=4, patch=8, image_size=32),
    vae=dict(size="small_32"),
    head=dict(width=224, depth=3),
    lam=0.1,
    order="random",
    anneal=(0, 1),
    order_pos="next+self",
    prompt_bidirectional=True,
    picture_alone=False,  # True: pictures do not see questions, so that rows can hold several
    cfg_drop=0.1,
    cfg_null="empty",
    diffusion_mul=4,
    vb_weight=1.0,
    discretised_t0=False,
    loss_norm="per_example",
    pos_std=0.3,
    vit_zero_init=False,
    edit_source="both",
)

SAMPLE = dict(
    prompts=("red apple", "tiger", "un chat", "Auto", "Apfel", "ピザ"),
    guidance=3.0,
    image_guidance=1.0,
    steps=50,
    temperature=1.0,
    schedule="linear",
    order="random",
    x0_clip=5.0,
    max_new=24,
    beams=1,  # of captions and answers; PaliGemma's captions use 2
)


def published(variant):
    """The paper's recipe: batch 2048, AdamW, 1e-4, a million steps, from pre-trained Gemma-2."""
    size = {"0.7b": "unifluid_0p7b", "2b": "gemma2_2b"}[variant]
    head = {"0.7b": dict(width=1024, depth=6), "2b": dict(width=1536, depth=12)}[variant]
    model = MODEL | dict(
        vocab_size=256_000,
        image_size=256,
        decoder=dict(size=size),
        vit=dict(size="So400m/14", image_size=224),
        vae=dict(size="sd_f8"),
        head=head,
        lam=0.005,
        pos_std=0.02,
        vit_zero_init=True,
        discretised_t0=True,
    )
    return common.base(
        steps=1_000_000,
        batch_size=2048,
        model=model,
        objective=dict(name="model", freeze=("vae",)),
        data=data_config(
            name="image_text",
            source="folder",
            image_size=256,
            und_size=224,
            vocab_size=256_000,
            prompt_length=64,
            text_length=128,
            mix=dict(t2i=1.0, caption=0.5, vqa=0.5),
        ),
        optimizer=dict(lr=1e-4, b2=0.95, weight_decay=0.02, clip=1.0),
        schedule=dict(name="constant", warmup=65_000),
        ema=dict(decay=0.9999),
        mesh=dict(data=1, fsdp=-1, tensor=1, seq=1),
        precision="bfloat16",
        remat="full",
        sample=SAMPLE | dict(guidance=5.0, temperature=0.975, steps=100, x0_clip=None),
        evals=("captioning", "questions", "reconstruction", "sheets"),
        eval_every=10_000,
        sample_every=10_000,
        checkpoint=dict(every=1000, keep=3, keep_every=50_000),
        log_every=100,
    )


def get_config(arg=""):
    """The config of one variant of configs/uniflud.py."""
    from configs import uniflud  # which imports this file

    return uniflud.get_config(arg)
