"""UniFluid: one model draws pictures from captions and answers questions about pictures.

    python main.py --config=configs/uniflud.py

Aims at the paper's tables 1-3 (arXiv 2503.13436: joint training, loss weight, token order).
Data: OpenMoji glyphs with their CLDR names in 14 languages and scenes composed from them.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | some glyphs and scenes, 32 px in 16 tokens, 3 M parameters | 2 CPU cores, 6 minutes |
| debug | the same with a tiny model, a few steps | a minute at first, then less |
| full | all glyphs, 64 px in 16 tokens; more scenes, packed questions | 2 CPU cores, 4.6 hours |
| edit | edits of composed scenes, from the weights of the default run | minutes |
| 0.7b, 2b | the paper's sizes, 256 px, your own pictures (config.data.path) | TPU or GPU pods |
"""

from configs import common
from configs.data import data_config
from configs.unifluid import MODEL, SAMPLE, published

VARIANTS = ("debug", "full", "edit", "0.7b", "2b")

EVALS = ("captioning", "questions", "retrieval", "reconstruction", "kid", "gradients", "sheets")


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, VARIANTS).variant
    if variant in ("0.7b", "2b"):
        return published(variant)
    config = common.base(
        seed=0,
        steps=1400,
        batch_size=80,
        model=MODEL,
        objective=dict(name="model", freeze=("vae",)),
        data=data_config(
            name="image_text",
            captioned="openmoji",
            categories=("food", "nature"),
            skin_tones=False,
            first_lang=0.4,
            latents="models/tokenizers/weights/kl_vae_32.safetensors",
            mix=dict(t2i=5.0, caption=3.0, vqa=2.0),
            scene_glyphs=24,
            prompt_length=18,
            text_length=22,
        ),
        init_from="vae=models/tokenizers/weights/kl_vae_32.safetensors",
        optimizer=dict(lr=2e-3, b2=0.95, weight_decay=0.02, clip=1.0),
        schedule=dict(name="wsd", warmup=80, decay=450, final=0.02),
        ema=dict(decay=0.998, warmup=True),
        sample=SAMPLE,
        evals=EVALS,
        checkpoint=dict(every=100, keep=2),
        log_every=50,
    )
    if variant == "debug":
        _debug(config)
    if variant == "full":
        _full(config)
    if variant == "edit":
        _edit(config)
    return config


def _debug(config):
    config.steps, config.batch_size, config.log_every = 20, 16, 5
    config.model.decoder.update(width=64, layers=2, mlp=128, heads=2, kv_heads=1, head_dim=32)
    config.model.vit.update(width=64, layers=1, mlp=128)
    config.model.head.update(width=64, depth=2)
    config.sample.update(steps=10)
    config.evals = tuple(e for e in EVALS if e != "gradients")  # compiles longer than all others
    config.data.update(categories=("food",), scenes=200, vocab_size=1024)
    config.checkpoint.every = 10
    config.evaluation.update(captions=16, questions=16, prompts=16, sheet=8, pictures=64, batch=16)
    config.evaluation.draw_batch = len(SAMPLE["prompts"])  # one sampler to compile for both


def _full(config):
    config.steps, config.batch_size, config.model.lam = 9000, 66, 0.05
    config.model.update(image_size=64, picture_alone=True)
    config.model.decoder.update(width=256, layers=5, mlp=768, heads=4, kv_heads=2, head_dim=64)
    config.model.vit.update(width=192, layers=4, mlp=576, image_size=64)
    config.model.vae = dict(size="small_64", patch=2)  # 16 tokens of 2 x 2 latents
    config.model.head.update(width=320, depth=3)
    weights = "models/tokenizers/weights/kl_vae_64.safetensors"
    config.data.update(
        categories=("all",),
        skin_tones=True,
        image_size=64,
        latents=weights,
        families=True,
        mix=dict(t2i=8.0, caption=1.0, vqa=2.0),
        scenes=20_000,
        scene_glyphs=32,
        questions=8,
        first_lang=0.4,
        prompt_length=24,
        text_length=72,
    )
    config.init_from = f"vae={weights}"
    config.optimizer.update(name="muon", lr=1.5e-3)
    config.schedule.update(warmup=200, decay=1500, cycles=(6500,))
    config.ema.decay = 0.999
    config.checkpoint.update(every=250, keep_every=3000)
    config.evaluation.update(captions=256, questions=400, prompts=240)


def _edit(config):
    config.data.update(edit=True, source="scenes", captioned="")
    config.steps = 1000
    config.evals = ("edits",)
