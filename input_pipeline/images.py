"""Data set "images": {"image" uint8 [B, H, W, 3], "label" int32 [B]} for VAEs and classifiers.

The label is the group of the picture: equal drawings under several names share it. Pictures
without groups (scenes, own folders) are numbered behind the groups.
"""

import numpy as np

from input_pipeline import Pipeline, batching, openmoji, sources, store, transforms


def build(config, *, split: str, seed: int, process_index: int, process_count: int) -> Pipeline:
    """Endless shuffled pictures of one split."""
    store.check_split(split)
    data = config.data
    found = sources.load(data, split, data.image_size)
    if not len(found):
        raise ValueError(f"config.data.source={data.source!r} has no picture in split {split!r}")
    groups = np.array([e.group for e in found.items], np.int32)
    glyphs = len(openmoji.all_glyphs()) if (groups >= 0).any() else 0
    labels = np.where(groups >= 0, groups, glyphs + np.arange(len(groups), dtype=np.int32))
    shares = {
        side: batching.share(count, process_index, process_count, "config.batch_size")
        for side, count in transforms.batch_sizes(data, config.batch_size).items()
    }

    def make(indices: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = indices["image"]
        side = list(shares)[rng.integers(len(shares)) if len(shares) > 1 else 0]
        rows = shares[side]
        images = transforms.shrink(found.pictures.gather(chosen[rows]), side)
        if data.flip:
            images = transforms.mirror(images, rng.random(len(chosen))[rows] < 0.5)
        return {"image": images, "label": labels[chosen[rows]]}

    parts = {"image": batching.index_batches(len(found), config.batch_size, seed)}
    dataset = batching.assemble(parts, make, seed=seed, prefetch=data.prefetch)
    classes = max(glyphs, int(labels.max()) + 1)
    return Pipeline(dataset, classes=classes, counts=found.counts, on_close=dataset.close)
