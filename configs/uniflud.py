"""UniFluid: one model draws pictures from captions and answers questions about pictures.

    python main.py --config=configs/uniflud.py

Aims at the paper's tables 1-3 (arXiv 2503.13436: joint training, loss weight, token order).
Data: OpenMoji glyphs with their CLDR names in 14 languages and scenes composed from them.

| variant | trains | where, how long |
| --- | --- | --- |
| (none) | some glyphs and scenes, 32 px in 16 tokens, 3 M parameters | 2 CPU cores, 9 minutes |
| debug | the same with a tiny model, a few steps | a minute at first, then less |
| full | all glyphs and scenes, 64 px in 64 tokens | CPU hours, GPU minutes |
| edit | edits of composed scenes, from the weights of the default run | minutes |
| 0.7b, 2b | the paper's sizes, 256 px, your own pictures (config.data.path) | TPU or GPU pods |
"""

from configs import common
from configs.data import data_config

VARIANTS = ("debug", "full", "edit", "0.7b", "2b")

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

EVALS = ("captioning", "questions", "retrieval", "reconstruction", "kid", "gradients", "sheets")


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, VARIANTS).variant
    if variant in ("0.7b", "2b"):
        return _published(variant)
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
        checkpoint=dict(every=500, keep=2),
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
    config.steps, config.batch_size = 40_000, 64
    config.model.image_size = 64
    config.model.decoder.update(width=320, layers=6, mlp=960, heads=5, kv_heads=5, head_dim=64)
    config.model.vit.update(width=192, layers=4, mlp=576, image_size=64)
    config.model.vae.size = "small_64"
    config.model.head.update(width=384, depth=3)
    weights = "models/tokenizers/weights/kl_vae_64.safetensors"
    config.data.update(
        captioned="",
        first_lang=0.0,
        scene_glyphs=100,
        categories=("all",),
        skin_tones=True,
        image_size=64,
        latents=weights,
        prompt_length=40,
        text_length=48,
    )
    config.init_from = f"vae={weights}"
    config.schedule.update(warmup=500, decay=10_000)
    config.ema.decay = 0.9995
    config.checkpoint.every = 1000


def _edit(config):
    config.data.update(edit=True, source="scenes", captioned="")
    config.steps = 1000
    config.evals = ("edits",)


def _published(variant):
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
