"""Square crops of the photographs that scikit-image ships (extra `photos`), for image tokenizers.

Sixteen pictures are no photo data set: they tell how a tokenizer does off the drawings it
mostly sees. A photograph is in one split only, so a held-out crop shows nothing seen in training.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline import store, transforms
from input_pipeline.examples import Decoded, Examples
from input_pipeline.records import Example

# In scikit-image's folder data/; grey ones are read as RGB.
FILES = {
    "train": (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "coins.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
        "rocket.jpg",
    ),
    "validation": ("clock_motion.png",),
    "test": ("chelsea.png", "coffee.png", "grass.png"),
}  # fmt: skip
CROPS = {"train": 250, "validation": 64, "test": 64}  # of each photograph


def folder() -> Path:
    """Where the photographs lie; scikit-image itself is not imported."""
    found = importlib.util.find_spec("skimage")
    if found is None:
        raise ValueError("config.data.source: 'photos' needs pip install -e '.[photos]'")
    return Path(found.origin).parent / "data"


def crops(path: Path, size: int, count: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: squares of a side between `size` and the photograph's
    shorter one (log-uniform), anywhere in it, shrunk; drawn from the file's name alone."""
    seed = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    with Image.open(path) as image:
        photo = transforms.on_white(image)
    smallest = min(photo.size)
    out = []
    for _ in range(count):
        scale, *place = rng.random(3)
        side = round(size * (smallest / size) ** scale)
        left, top = (round(p * (whole - side)) for p, whole in zip(place, photo.size, strict=True))
        square = photo.crop((left, top, left + side, top + side))
        out.append(transforms.centre_crop(square, size))
    return np.stack(out)


@functools.lru_cache(maxsize=4)
def _load(split: str, size: int) -> Examples:
    names = FILES[split]
    images = np.concatenate([crops(folder() / name, size, CROPS[split]) for name in names])
    items = [Example(f"{name}-{i}", None, {}) for name in names for i in range(CROPS[split])]
    return Examples(items, Decoded(images), {})


def load(data, split: str, size: int) -> Examples:
    """The crops of one split, without captions."""
    del data
    store.check_split(split)
    return _load(split, size)
