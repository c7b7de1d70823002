"""Binary tokenizers: pictures to tokens of d bits on several scales (Infinity, arXiv 2412.04431).

    python main.py --config=configs/bsq_vae.py

Aims at Infinity's table 7 (reconstruction FID / PSNR on ImageNet 256 px: d = 16 1.22 / 20.9, d = 32
0.61 / 22.7, d = 64 0.33 / 24.9) and, at 32 and 64 px, at tokenizers that train on two CPU cores.
Any quantiser and size is an override: --config.model.tokenizer.z=32, .scales=1 (one scale),
.quantiser=lfq with .z=9 (its scores are tokens x 2^z), or .quantiser=vq with .codebook=1024.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 32 px to 85 tokens of 16 bits, 4 scales, 0.6 M parameters | 2 CPU cores, half an hour |
| 64 | the same tokens of 64 px, 2.5 M parameters | 1 CPU core, 16 minutes |
| full | 64 with every loss on: LPIPS (AlexNet, the eval extra), PatchGAN | 1 CPU core, 34 minutes |
| debug | 20 steps of the default | under a minute |
| d16, d32, d64 | Infinity's 110 M parameters at stride 16, stage 1: 256 px, dense scales | pods |
| d16_stage2, ... d64_stage2 | stage 2: 256, 512, 1024 px in turn; init_from=stage 1 | pods |
| 8b, 8b_stage2 | the 82 M parameters at stride 8 and 14 bits of the 8B model, likewise | pods |

The published variants train with every loss on: L1, LPIPS (the eval extra), PatchGAN with hinge
loss, commitment and entropy of each scale, stochastic depth.

PatchGAN is --config.objective.name=adversarial with .start, .weight, ... (image_tokenizers.GAN); a
published variant without it is --config.objective.name=model --config.optimizer.groups={}.
"""

from configs import common, image_tokenizers

RECIPE = dict(
    weight=1.0,  # of the quantiser's terms together
    commitment=0.25,  # bsq, lfq: |u - code|^2 / d
    entropy=0.1,  # bsq, lfq: a token's code certain, codes spread
    inv_temperature=100.0,
    schedule="",  # of the scales in training; "" = the tokenizer's
    drop_scales=0.0,  # bsq, lfq: share of scales left out in a step, never the last
    residual_gradient=True,  # bsq, lfq: through the codes that earlier scales take off
    beta=0.25,  # vq: of the commitment, or with legacy of the codebook's term
    legacy=False,
    revive=0.03,  # vq: codes used less than this share of equal use move; 0 = never
)
MODEL = image_tokenizers.LOSS | dict(
    name="bsq_vae",
    tokenizer=dict(
        size="small_32",
        quantiser="bsq",  # bsq | lfq | vq
        z=16,  # bits of a token; vq: width of a code
        codebook=512,  # codes of vq
        schedule="geometric",
        scales=4,
    ),
    recipe=RECIPE,
)
GAN = dict(weight=0.3, adaptive=False, lecam=0.05, width=128, layers=3)
SIZES = {"d16": "infinity_d16", "d32": "infinity_d32", "d64": "infinity_d64", "8b": "infinity_8b"}


def get_config(arg=""):
    """The config of one variant; see the table above."""
    names = ("debug", "64", "full", *SIZES, *(f"{name}_stage2" for name in SIZES))
    variant = common.parse_arg(arg, names).variant
    name = variant.removesuffix("_stage2")
    if name in SIZES:
        return _published(SIZES[name], stage=2 if name != variant else 1)
    return small(MODEL, variant)


def small(model, variant):
    """The default of the discrete tokenizers and its smaller and larger sisters."""
    config = image_tokenizers.small(model, steps=3000)
    if variant in ("64", "full"):
        config.model.tokenizer.size = config.model.tokenizer.size.replace("32", "64")
        config.data.image_size, config.batch_size, config.optimizer.lr = 64, 32, 1e-3
    if variant == "full":
        config.model.perceptual = "alexnet"
        config.objective.name = "adversarial"
    if variant == "debug":
        image_tokenizers.debug(config)
    return config


def _published(size, stage):
    """Stage 1 at 256 px; stage 2 from its weights, each step at 256, 512 or 1024 px (8 : 4 : 2)."""
    first = stage == 1
    sides, drop = ((256,), 450_000) if first else ((256, 512, 1024), 150_000)
    dense = first or size != "infinity_8b"  # no dense schedule is known for 128 x 128 latents
    recipe = dict(weight=4.0, drop_scales=0.5, schedule="dense" if dense else "")
    model = dict(tokenizer=dict(size=size), recipe=RECIPE | recipe)
    return image_tokenizers.published(
        MODEL | model | image_tokenizers.PUBLISHED_LOSS,
        GAN | dict(start=50_000 if first else 0),
        dict(image_size=max(sides), sizes=sides),
        steps=500_000 if first else 200_000,
        optimizer=dict(lr=1e-4, b2=0.95, clip=1.0, groups=dict(discriminator=dict(lr_scale=2.0))),
        schedule=dict(name="piecewise", boundaries=(drop,), factors=(0.1,)),
    )
