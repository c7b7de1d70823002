"""Vector-quantised tokenizers: pictures to rows of a codebook (VQGAN, arXiv 2012.09841; VAR).

    python main.py --config=configs/vqgan.py

Aims at the tokenizer of Chameleon and Liquid (arXiv 2405.09818: 512 px to 1,024 of 8,192 codes) and
that of VAR (arXiv 2404.02905: 256 px to 680 of 4,096 codes on ten scales). The codebook and the
quantiser are overrides: --config.model.tokenizer.codebook=1024, .schedule=geometric with .scales=4.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | 32 px to 64 of 512 codes (9 bits), 0.6 M parameters | 1 CPU core, 6 minutes |
| 64 | the same tokens of 64 px, 2.6 M parameters | 1 CPU core, 16 minutes |
| full | 64 with every loss on: LPIPS (AlexNet, the eval extra), PatchGAN | 1 CPU core, 40 minutes |
| debug | 20 steps of the default | under a minute |
| chameleon | 69 M parameters, 512 px, stride 16, 8,192 codes of 256, published names | pods |
| var | 70 M parameters, 256 px, ten residual scales, 4,096 codes of 32, published names | pods |

The published variants train as VQGAN does (codebook loss with its historical beta, L1, LPIPS of the
eval extra, PatchGAN with hinge loss, adaptive weight and delayed start). VAR's training code is not
public: its sizes are, the recipe here is VQGAN's with beta on the commitment.
"""

from configs import bsq_vae, common, image_tokenizers

MODEL = bsq_vae.MODEL | dict(
    name="vqgan",
    tokenizer=dict(
        size="small_vq_32", quantiser="vq", z=16, codebook=512, schedule="single", scales=1
    ),
)


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, ("debug", "64", "full", "chameleon", "var")).variant
    if variant in ("chameleon", "var"):
        return _published(variant)
    return bsq_vae.small(MODEL, variant)


def _published(variant):
    """VQGAN's loss; the learning rate, the batch and the steps are LDM's (see kl_vae.py)."""
    recipe = dict(legacy=variant == "chameleon", revive=0.0)
    model = dict(tokenizer=dict(size=variant), recipe=bsq_vae.RECIPE | recipe)
    size = 512 if variant == "chameleon" else 256
    return image_tokenizers.ldm(MODEL | model, steps=500_000, weight=0.8, image_size=size)
