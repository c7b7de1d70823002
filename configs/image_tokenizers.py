"""What the configs of image tokenizers share: losses, small runs, published ones. Not a config."""

from configs import common
from configs.data import data_config

LOSS = dict(
    reconstruction="l2",  # l1 | l2, mean over pixel values
    perceptual="",  # "" | vgg16 | alexnet: LPIPS of the eval extra
    perceptual_weight=1.0,
)
PUBLISHED_LOSS = dict(reconstruction="l1", perceptual="vgg16")
# What objective.name=adversarial reads.
GAN = dict(
    start=1500,  # step at which the discriminator joins
    weight=0.5,  # of the generator's term
    width=32,  # channels of the discriminator's first layer
    layers=2,
    adaptive=True,  # weight times the ratio of the gradients at the decoder's last kernel
    lecam=0.0,  # of the penalty on the discriminator's scores far from 0
)


def small(model: dict, steps: int):
    """32 px glyphs and scenes: minutes on two CPU cores."""
    return common.base(
        steps=steps,
        batch_size=64,
        model=model,
        objective=GAN,
        data=data_config(name="images", flip=True),
        optimizer=dict(lr=2e-3, b2=0.95, clip=1.0),
        schedule=dict(name="cosine", warmup=100, final=0.02),
        evals=("reconstruction",),
        checkpoint=dict(every=500, keep=2),
        log_every=50,
    )


def debug(config):
    """The same for 20 steps of a few pictures: under a minute."""
    config.steps, config.log_every, config.batch_size = 20, 5, 16
    config.data.update(categories=("food",), scenes=200)
    config.checkpoint.every = 10
    config.evaluation.update(pictures=64)


def published(model: dict, objective: dict, data: dict, **settings):
    """A published size on your own pictures, for accelerators."""
    return common.base(
        batch_size=256,
        model=model,
        objective=GAN | objective | dict(name="adversarial"),
        data=data_config(name="images", source="folder", flip=True, **data),
        mesh=dict(data=1, fsdp=-1, tensor=1, seq=1),
        precision="bfloat16",
        remat="full",
        evals=("reconstruction",),
        evaluation=dict(batch=(2048 // data["image_size"]) ** 2),  # 4M pixels a call
        eval_every=10_000,
        checkpoint=dict(every=1000, keep=3, keep_every=50_000),
        log_every=100,
        **settings,
    )


def ldm(model: dict, steps: int, weight: float, image_size: int):
    """LDM's recipe (arXiv 2112.10752): the discriminator joins after 50,000 steps."""
    return published(
        model | PUBLISHED_LOSS,
        dict(start=50_000, weight=weight, width=64, layers=3),
        dict(image_size=image_size),
        steps=steps,
        optimizer=dict(lr=1e-4, b1=0.5, b2=0.9, clip=0.0),
    )
