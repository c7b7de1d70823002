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

from configs import common, image_tokenizers

MODEL = image_tokenizers.LOSS | dict(
    name="kl_vae",
    vae=dict(size="small_32"),
    kl=2e-3,  # beta of KL / pixel values; LDM's is 1e-6
)


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("debug", "64", "decoder", "kl16", "sd_f8")).variant
    if variant in ("kl16", "sd_f8"):
        model = MODEL | dict(vae=dict(size=variant), kl=1e-6)
        return image_tokenizers.ldm(model, steps=400_000, weight=0.5, image_size=256)
    config = image_tokenizers.small(MODEL, steps=4000)
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
        image_tokenizers.debug(config)
    return config
