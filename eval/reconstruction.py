"""PSNR and SSIM of the image tokenizer on held-out pictures: encode, decode, compare.

Codes are the most likely ones (posterior mean, nearest code, signs). Some pictures beside their
reconstructions go to samples/reconstruction-<step>.png.
"""

from pathlib import Path

import jax
import numpy as np

from eval import common, data, metrics
from inference import drawing


def _rebuild(model):
    """(params, pictures in [-1, 1]) -> pictures: a tokenizer's own function, or both halves."""
    if "reconstruct" in model.predict:
        return common.need(model, "reconstruct")
    encode = common.need(model, "encode_latents")
    decode = common.need(model, "decode_latents")
    return lambda params, images: decode(params, encode(params, images))


def build(config):
    """Evaluator "reconstruction": beside what the mean training picture would get."""
    options, size = config.evaluation, config.data.image_size

    def evaluate(model, params, *, step, rng, workdir):
        rebuild = _rebuild(model)
        held_out = data.captioned(config, "held_out", size)
        real = held_out.pictures.gather(
            common.choose(len(held_out), options.pictures, options.seed)
        )
        images = common.in_batches(
            lambda x: rebuild(params, x),
            len(real),
            options.batch,
            lambda i: common.to_float(real[i]),
        )
        train = data.captioned(config, "train", size)
        some = train.pictures.gather(common.choose(len(train), 1024, options.seed))
        mean = np.broadcast_to(np.round(some.mean(axis=0)), real.shape)
        rebuilt = common.to_uint8(images)
        if jax.process_index() == 0:
            path = Path(workdir) / "samples" / f"reconstruction-{step}.png"
            sheet(path, real, rebuilt, step, options.sheet)
        return {
            "psnr": float(metrics.psnr(rebuilt, real).mean()),
            "psnr_mean_picture": float(metrics.psnr(mean, real).mean()),
            "ssim": float(metrics.ssim(rebuilt, real).mean()),
            "ssim_mean_picture": float(metrics.ssim(mean, real).mean()),
            "pictures": float(len(real)),
        }

    return evaluate


def sheet(path, real, rebuilt, step, most: int) -> None:
    """Contact sheet: each picture beside its reconstruction."""
    decibels = metrics.psnr(rebuilt, real)
    cells = [((a, b), f"{d:.1f} dB") for a, b, d in zip(real, rebuilt, decibels)]
    title = f"step {step}: held-out picture (left) beside its reconstruction (right)"
    drawing.picture_grid(path, title, [("held-out pictures", cells[:most])], columns=6)
