"""Generation retrieval: is the picture drawn for a caption nearer to its own glyph than to others?

Distances are Euclidean in two spaces: the VAE's latents and the small glyph classifier's features.
Distractors are other captioned glyphs, drawn by config.evaluation.seed; a tie counts as a miss.
"""

import numpy as np

from eval import common, data, generation


def candidate_sets(group: np.ndarray, gallery_group: np.ndarray, others: int, seed: int):
    """Rows of the gallery each query competes with, int [n, others]; none is of its own group."""
    sets = []
    for query, own in enumerate(group):
        allowed = np.flatnonzero(gallery_group != own)
        rng = np.random.default_rng((seed, query))
        sets.append(rng.permutation(allowed)[:others])
    return np.stack(sets)


def ranks(queries, own, gallery, candidates) -> np.ndarray:
    """Number of candidates not farther from each query [n, d] than its own picture [n, d]."""
    queries, own, gallery = (np.asarray(x, np.float64) for x in (queries, own, gallery))
    own_distance = np.linalg.norm(queries - own, axis=1)
    distance = np.linalg.norm(queries[:, None] - gallery[candidates], axis=2)
    # "not farther" instead of "nearer": ties and NaN never help the model.
    return (~(distance > own_distance[:, None])).sum(axis=1)


def spaces(config, model, params) -> dict:
    """{name: function of uint8 pictures -> features [n, d]}."""
    batch = config.evaluation.batch
    encode = common.need(model, "encode_latents")

    def latents(images):
        tokens = common.in_batches(
            lambda x: encode(params, x), len(images), batch, lambda i: common.to_float(images[i])
        )
        return tokens.reshape(len(tokens), -1)

    classify = data.classifier_features(config)
    found = {"latent": latents}
    if classify is not None:
        found["classifier"] = lambda images: common.in_batches(
            classify, len(images), batch, lambda i: common.to_float(images[i])
        )
    return found


def gallery(config, drawn, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, groups) to draw distractors from: the split's own, filled up with other glyphs."""
    options, own = config.evaluation, drawn.of(split)
    images, groups = [own.real], own.group.tolist()
    for name in (split, *(n for n in data.SPLITS if n != split)):
        glyphs = data.captioned(config, name, config.data.image_size)
        fresh = [
            r
            for r in data.one_per_group(glyphs, len(glyphs), options.seed + 1)
            if data.group_of(glyphs, r) not in groups
        ][: max(0, options.candidates - len(groups))]
        if fresh:
            images.append(glyphs.pictures.gather(np.array(fresh)))
            groups += [data.group_of(glyphs, r) for r in fresh]
    return np.concatenate(images), np.array(groups)


def build(config):
    """Evaluator "retrieval": top-1 and top-5 of training and held-out captions in each space."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        drawn = generation.drawn(config, model, params, step=step, rng=rng, workdir=workdir)
        metrics = {}
        for split in drawn.splits():
            part = drawn.of(split)
            pictures, groups = gallery(config, drawn, split)
            others = min(options.candidates, len(groups)) - 1  # a small set gives fewer
            sets = candidate_sets(part.group, groups, others, options.seed)
            for space, features in spaces(config, model, params).items():
                rank = ranks(features(part.images), features(part.real), features(pictures), sets)
                for top in (1, 5):
                    key = f"{split}_top{top}_{space}"
                    metrics[key] = float((rank < top).mean())
                    metrics[f"{key}_chance"] = min(1.0, top / (others + 1))
            metrics[f"{split}_pictures"] = float(len(part.captions))
        return metrics

    return evaluate
