"""Editing of held-out scenes, measured on pixels: was the asked change made, was the rest kept?

The right result is known exactly. recolour: the median of the background pixels is nearest to the
asked colour among all canvas colours. remove, replace, add: at least 90 % of the pixels that must
change are nearer to their target than to what they were. Each beside what the image tokenizer
alone makes of the right result; copying the source scores 0.
"""

from collections.abc import Mapping

import jax
import numpy as np

from eval import common, data, generation, metrics
from inference import drawing
from input_pipeline import canvas, edits, scenes

CHANGED = 0.9  # share of the pixels that must have moved


def held_out_edits(config) -> list[tuple]:
    """(edit at the drawn size, source at the size that is looked at), every operation in turn."""
    options, split = config.evaluation, data.split_name(config, "held_out")
    names = scenes.vocabulary(config.data)
    found: dict[str, list] = {operation: [] for operation in edits.OPERATIONS}
    index = 0
    while any(len(v) < options.edits for v in found.values()):
        made = edits.make_edit(
            names, seed=options.seed, index=index, size=config.data.image_size, split=split
        )
        if len(found[made.operation]) < options.edits:
            seen = edits.make_edit(
                names, seed=options.seed, index=index, size=data.und_size(config), split=split
            )
            found[made.operation].append((made, seen.source))
        index += 1
    return [pair for group in zip(*found.values()) for pair in group]


def right_background(image, target, colour: str) -> bool:
    """Whether the background of `image` has the asked colour; pictures uint8 [h, w, 3]."""
    mask = (target == np.array(canvas.COLOURS[colour])).all(axis=-1)
    median = np.median(image[mask].astype(np.float64), axis=0)
    distance = {k: np.square(median - np.array(v)).sum() for k, v in canvas.COLOURS.items()}
    return min(distance, key=distance.get) == colour


def share_changed(image, source, target) -> float:
    """Share of the pixels that must change which are nearer to target than to source."""
    image, source, target = (x.astype(np.float64) for x in (image, source, target))
    mask = (source != target).any(axis=-1)
    to_target = np.square(image - target).sum(axis=-1)[mask]
    return float((to_target < np.square(image - source).sum(axis=-1)[mask]).mean())


def kept_psnr(image, source, target) -> float:
    """PSNR in dB over the pixels that must stay; at most 60."""
    mask = (source == target).all(axis=-1)
    if not mask.any():
        return 60.0
    return float(min(60.0, metrics.psnr(image[mask][None], target[mask][None])[0]))


def score(made, images) -> Mapping[str, float]:
    """{operation_accuracy, operation_kept_psnr} of pictures for a list of edits."""
    rows: dict[str, list] = {}
    for edit, image in zip(made, images):
        if edit.operation == "recolour":
            done = right_background(image, edit.target, edit.colour)
        else:
            done = share_changed(image, edit.source, edit.target) >= CHANGED
        rows.setdefault(f"{edit.operation}_accuracy", []).append(float(done))
        kept = kept_psnr(image, edit.source, edit.target)
        rows.setdefault(f"{edit.operation}_kept_psnr", []).append(kept)
    return {k: float(np.mean(v)) for k, v in rows.items()}


def build(config):
    """Evaluator "edits" of the edit variant; also writes samples/edits-<step>.png."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        pairs = held_out_edits(config)
        made = [edit for edit, _ in pairs]
        encode, decode = common.need(model, "encode_latents"), common.need(model, "decode_latents")

        def tokens(images):
            return common.in_batches(
                lambda x: encode(params, x),
                len(images),
                options.batch,
                lambda i: common.to_float(images[i]),
            )

        targets = tokens(np.stack([e.target for e in made]))
        ceiling = common.in_batches(
            lambda x: decode(params, x), len(made), options.batch, lambda i: targets[i]
        )
        source = np.stack([seen for _, seen in pairs]), tokens(np.stack([e.source for e in made]))
        instructions = [e.instruction for e in made]
        key = jax.random.fold_in(rng, 3)
        images = generation.draw(config, model, params, instructions, key, source=source)
        results, limits = score(made, images), score(made, common.to_uint8(ceiling))
        if jax.process_index() == 0:
            _sheet(config, workdir, step, made, images)
        chance = {"recolour_accuracy_chance": 1 / len(canvas.COLOURS)}
        return {**results, **{f"{k}_tokenizer": v for k, v in limits.items()}, **chance}

    return evaluate


def _sheet(config, workdir, step, made, images):
    cells = [((e.source, x, e.target), e.instruction) for e, x in zip(made, images)]
    title = f"step {step}: source, drawn by the model, right result"
    path = workdir / "samples" / f"edits-{step}.png"
    shown = [("held-out edits", cells[: config.evaluation.sheet])]
    drawing.picture_grid(path, title, shown, columns=3, side=72)
