"""PSNR and SSIM of the image tokenizer on held-out pictures: encode, decode, compare.

Codes are the most likely ones (posterior mean, nearest code, signs). Some pictures beside their
reconstructions go to samples/reconstruction-<step>.png. With config.evaluation.perceptual also
LPIPS (AlexNet) and KID (VGG16; reconstructions and originals, both against training pictures).
"""

from pathlib import Path

import jax
import numpy as np

from eval import common, data, kid, metrics
from inference import drawing
from input_pipeline import sources
from models.blocks import perceptual


def _rebuild(model):
    """(params, pictures in [-1, 1]) -> pictures: a tokenizer's own function, or both halves."""
    if "reconstruct" in model.predict:
        return common.need(model, "reconstruct")
    encode = common.need(model, "encode_latents")
    decode = common.need(model, "decode_latents")
    return lambda params, images: decode(params, encode(params, images))


def _sets(config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{prefix of the metrics: (held-out pictures, training pictures)} uint8: drawings or the user's
    own, then crops of photographs where config.data.source has them."""
    options, size = config.evaluation, config.data.image_size
    found = {"": [data.captioned(config, split, size) for split in ("held_out", "train")]}
    if "photos" in sources.names(config.data):
        splits = (data.split_name(config, "held_out"), "train")
        found["photos_"] = [sources.load(config.data, s, size, "photos") for s in splits]
    counts = (options.pictures, 1024)
    return {
        prefix: tuple(
            e.pictures.gather(common.choose(len(e), most, options.seed))
            for e, most in zip(pair, counts, strict=True)
        )
        for prefix, pair in found.items()
    }


def _scores(rebuilt, real, train, options) -> dict[str, float]:
    mean = np.broadcast_to(np.round(train.mean(axis=0)), real.shape)
    out = {
        "psnr": metrics.psnr(rebuilt, real).mean(),
        "psnr_mean_picture": metrics.psnr(mean, real).mean(),
        "ssim": metrics.ssim(rebuilt, real).mean(),
        "ssim_mean_picture": metrics.ssim(mean, real).mean(),
        "pictures": len(real),
    }
    if options.perceptual and kid.installed("LPIPS and KID of reconstructions are"):
        sets = (rebuilt, real, train[: len(real)])
        features = (kid.features(x, options.batch) for x in sets)
        out["kid"], out["kid_real"] = kid.distances(*features)
        out["lpips"] = _lpips(rebuilt, real, options.batch).mean()
    return {name: float(value) for name, value in out.items()}


def _lpips(a: np.ndarray, b: np.ndarray, batch: int) -> np.ndarray:
    """LPIPS (AlexNet) of every pair of uint8 pictures."""
    weights = perceptual.load("alexnet")
    distance = common.jitted(perceptual.lpips)
    both = lambda i: (common.to_float(a[i]), common.to_float(b[i]))  # noqa: E731
    return common.in_batches(lambda pair: distance(weights, *pair), len(a), batch, both)


def build(config):
    """Evaluator "reconstruction": beside what the mean training picture would get."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        rebuild, out = _rebuild(model), {}
        for prefix, (real, train) in _sets(config).items():
            images = common.in_batches(
                lambda x: rebuild(params, x),
                len(real),
                options.batch,
                lambda i, real=real: common.to_float(real[i]),
            )
            rebuilt = common.to_uint8(images)
            if jax.process_index() == 0:
                name = f"reconstruction-{prefix.replace('_', '-')}{step}.png"
                sheet(Path(workdir) / "samples" / name, real, rebuilt, step, options.sheet)
            scores = _scores(rebuilt, real, train, options)
            out |= {prefix + name: value for name, value in scores.items()}
        return out

    return evaluate


def sheet(path, real, rebuilt, step, most: int) -> None:
    """Contact sheet: each picture beside its reconstruction."""
    decibels = metrics.psnr(rebuilt, real)
    cells = [((a, b), f"{d:.1f} dB") for a, b, d in zip(real, rebuilt, decibels)]
    title = f"step {step}: held-out picture (left) beside its reconstruction (right)"
    drawing.picture_grid(path, title, [("held-out pictures", cells[:most])], columns=6)
