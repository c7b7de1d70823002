"""KL autoencoders: pictures to the continuous tokens that UniFluid draws (arXiv 2406.11838, 5).

    python main.py --config=configs/kl_vae.py

Aims at MAR's kl16 (reconstruction FID 0.53 on ImageNet; LDM's recipe, arXiv 2112.10752, table 8)
and, at 32 and 64 px, at tokenizers small enough to be shipped with the code.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 32 px to 16 tokens of 16, 0.9 M parameters, glyphs and scenes | 2 CPU cores, minutes |
| 64 | the same network at 64 px: 64 tokens of 16 | 1 CPU core, 16 minutes |
| decoder | the shipped 32 px decoder alone, further; tokens stay what they are | minutes |
| debug | 20 steps of the default | under a minute |
| kl16 | MAR's 66 M parameters, 256 px to 256 tokens of 16, LPIPS, PatchGAN, your data | pods |
| sd_f8 | Stable Diffusion's 84 M parameters, 32 x 32 x 4 latents, the same losses | pods |
"""

from configs import common
from configs.data import data_config

MODEL = dict(
    name="kl_vae",
    vae=dict(size="small_32"),
    reconstruction="l2",  # l1 | l2, mean over pixel values
    kl=2e-3,  # beta of KL / pixel values; LDM's is 1e-6
    perceptual="",  # "" | vgg16 | alexnet: LPIPS of the eval extra
    perceptual_weight=1.0,
)


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("debug", "64", "decoder", "kl16", "sd_f8")).variant
    if variant in ("kl16", "sd_f8"):
        return _published(variant)
    config = common.base(
        steps=4000,
        batch_size=64,
        model=MODEL,
        data=data_config(name="images", flip=True),
        optimizer=dict(lr=2e-3, b2=0.95, clip=1.0),
        schedule=dict(name="cosine", warmup=100, final=0.02),
        evals=("reconstruction",),
        checkpoint=dict(every=500, keep=2),
        log_every=50,
    )
    if variant == "64":
        config.model.vae.size = "small_64"
        config.data.image_size = 64
        config.steps, config.batch_size, config.optimizer.lr = 3000, 32, 1e-3
        config.init_from = "models/tokenizers/weights/kl_vae_32.safetensors"
    if variant == "decoder":
        config.steps, config.optimizer.lr = 6000, 1.5e-3
        config.objective.freeze = ("encoder", "quant_conv", "latents")
        config.init_from = "models/tokenizers/weights/kl_vae_32.safetensors"
    if variant == "debug":
        config.steps, config.log_every, config.batch_size = 20, 5, 16
        config.data.update(categories=("food",), scenes=200)
        config.checkpoint.every = 10
        config.evaluation.update(pictures=64)
    return config


def _published(variant):
    """LDM's loss: L1 + LPIPS + 1e-6 KL, the discriminator joins after 50,000 steps."""
    return common.base(
        steps=400_000,
        batch_size=256,
        model=MODEL
        | dict(vae=dict(size=variant), reconstruction="l1", kl=1e-6, perceptual="vgg16"),
        objective=dict(name="adversarial", start=50_000, weight=0.5, width=64, layers=3),
        data=data_config(name="images", source="folder", image_size=256, flip=True),
        optimizer=dict(lr=1e-4, b1=0.5, b2=0.9, clip=0.0),
        mesh=dict(data=1, fsdp=-1, tensor=1, seq=1),
        precision="bfloat16",
        remat="full",
        evals=("reconstruction",),
        eval_every=10_000,
        checkpoint=dict(every=1000, keep=3, keep_every=50_000),
        log_every=100,
    )
