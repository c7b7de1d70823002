"""Mode sample of an image tokenizer: a user's pictures through it, and errors of one line."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from configs.common import load_config
from inference import sample
from models import MODELS
from models.tokenizers.autoencoder import psnr, to_float

CONFIGS = ("bsq_vae", "vqgan", "kl_vae")


def built(name):
    config = load_config(f"configs/{name}.py:debug")
    model = MODELS[config.model.name](config)
    return config, model, jax.jit(lambda key: nn.meta.unbox(model.init(key)[0]))(jax.random.key(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_are_rebuilt_beside_what_they_were(name, tmp_path, capsys):
    config, model, params = built(name)
    size, files = config.data.image_size, []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(files[-1])
    common = dict(tokenizer=None, step=3, rng=jax.random.key(1), workdir=tmp_path)
    made = sample.respond(config, model, params, prompts=[], images=files, **common)
    assert [f.name for f in made] == ["rebuilt-3.png", "rebuilt-3-0.png", "rebuilt-3-1.png"]
    seen = np.stack([np.asarray(Image.open(f)) for f in files])
    kept = model.predict["reconstruct"](params, to_float(seen))
    pixels = to_float(np.stack([np.asarray(Image.open(f)) for f in made[1:]]))
    np.testing.assert_allclose(pixels, np.clip(kept, -1, 1), atol=1.1 / 255)
    said = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"{d:.1f} dB" for d in np.asarray(psnr(to_float(seen), kept))]
    with pytest.raises(ValueError, match="give --image=FILE"):
        sample.respond(config, model, params, prompts=["x"], images=[], **common)


def test_a_classifier_has_nothing_to_sample(tmp_path):
    common = dict(tokenizer=None, step=3, rng=jax.random.key(1), workdir=tmp_path)
    with pytest.raises(ValueError, match="neither draws nor writes"):
        sample.respond(*built("glyph_classifier"), prompts=["x"], images=[], **common)
