"""Picture transforms: the centre crop that every picture goes through, and mirroring."""

import io

import numpy as np
from PIL import Image

# What Pillow raises on files that are no pictures, cut short, or far too large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: ADM's crop; halve with BOX while twice too large, then BICUBIC."""
    image = on_white(image)
    if image.size == (size, size):
        return np.asarray(image)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    array = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return array[top : top + size, left : left + size]


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB; what is transparent becomes white, not black."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode(encoded: bytes, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of PNG, JPEG or WebP bytes."""
    with Image.open(io.BytesIO(encoded)) as image:
        return centre_crop(image, size)


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
