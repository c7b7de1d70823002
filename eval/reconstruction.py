"""PSNR of the image tokenizer on held-out pictures: encode (posterior mean), decode, compare."""

import numpy as np

from eval import common, data, metrics


def _rebuild(model):
    """(params, pictures in [-1, 1]) -> pictures: a tokenizer's own function, or both halves."""
    if "reconstruct" in model.predict:
        return common.need(model, "reconstruct")
    encode = common.need(model, "encode_latents")
    decode = common.need(model, "decode_latents")
    return lambda params, images: decode(params, encode(params, images))


def build(config):
    """Evaluator "reconstruction": dB, beside what the mean training picture would get."""
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
        return {
            "psnr": float(metrics.psnr(common.to_uint8(images), real).mean()),
            "psnr_mean_picture": float(metrics.psnr(mean, real).mean()),
            "pictures": float(len(real)),
        }

    return evaluate
