"""Picture transforms: the centre crop that every picture goes through, and mirroring."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

# What Pillow raises on files that are no pictures, cut short, or far too large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


Size = int | tuple[int, int]  # side of a square, or (h, w)


def centre_crop(image: Image.Image, size: Size) -> np.ndarray:
    """uint8 [h, w, 3]: ADM's crop; halve with BOX while twice too large, then BICUBIC."""
    image = on_white(image)
    h, w = sides(size)
    if image.size == (w, h):
        return np.asarray(image)
    while image.size[0] >= 2 * w and image.size[1] >= 2 * h:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = max(w / image.size[0], h / image.size[1])
    width, height = (round(side * scale) for side in image.size)
    array = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - h) // 2, (width - w) // 2
    return array[top : top + h, left : left + w]


def sides(size: Size) -> tuple[int, int]:
    """(h, w)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def nearest(image: Image.Image, shapes: Sequence[Size]) -> Size:
    """The shape with the nearest h / w, as Infinity's code chooses."""
    ratio = image.size[1] / image.size[0]
    return min(shapes, key=lambda shape: abs(ratio - np.divide(*sides(shape))))


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB; what is transparent becomes white, not black."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode(encoded: bytes, *shapes: Size) -> np.ndarray:
    """uint8 [h, w, 3] of PNG, JPEG or WebP bytes, in the nearest of the shapes."""
    with Image.open(io.BytesIO(encoded)) as image:
        return centre_crop(image, nearest(image, shapes))


def shape_of(encoded: bytes, shapes: Sequence[Size]) -> Size:
    """The shape that `decode` gives, from the first bytes."""
    with Image.open(io.BytesIO(encoded)) as image:
        return nearest(image, shapes)


def batch_sizes(data, batch_size: int) -> dict[int, int]:
    """{side: pictures per batch}: config.data.sizes, where a batch of larger pictures has fewer in
    proportion to the side (8 at 256, 4 at 512, 2 at 1024), or the one image_size."""
    sizes = tuple(data.sizes) or (data.image_size,)
    for side in sizes:
        if data.image_size % side or batch_size * min(sizes) % side:
            raise ValueError(
                f"config.data.sizes={sizes}: {side} must divide config.data.image_size="
                f"{data.image_size} and config.batch_size x {min(sizes)}"
            )
    return {side: batch_size * min(sizes) // side for side in sizes}


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [b, h, h, 3] at a side that divides h: means of squares of pixels, rounded."""
    factor = images.shape[1] // side
    if factor == 1:
        return images
    cells = images.reshape(len(images), side, factor, side, factor, 3)
    return np.round(cells.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def mirror(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    """[b, h, w, 3] with the rows where `which` (bool [b]) holds mirrored."""
    return np.where(which[:, None, None, None], images[:, :, ::-1], images)
