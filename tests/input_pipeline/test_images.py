"""Labelled pictures: epochs, shares, labels, mirroring; the crop; decoding on demand."""

import io

import numpy as np
import pytest
from PIL import Image

from input_pipeline import DATASETS, openmoji, sources, transforms


def build(config, index=0, count=1, split="train"):
    return DATASETS["images"](config, split=split, seed=0, process_index=index, process_count=count)


def keys(batch) -> list[bytes]:
    return [image.tobytes() for image in batch["image"]]


def test_an_epoch_shows_every_picture_once_and_shares_are_disjoint(make_config, take):
    config = make_config(2, name="images", source="openmoji")
    found = openmoji.load(config.data, "train", 32)
    steps = len(found) // 2
    assert len(found) % 2 == 0
    shares = [take(build(config, i, 2), steps) for i in range(2)]
    seen = [[k for batch in share for k in keys(batch)] for share in shares]
    stored = [image.tobytes() for image in found.pictures.gather(np.arange(len(found)))]
    assert sorted(seen[0] + seen[1]) == sorted(stored)
    assert len(seen[0]) == len(seen[1]) == steps
    assert not set(seen[0]) & set(seen[1])


def test_epochs_have_different_orders(make_config, take):
    config = make_config(1, name="images", source="openmoji")
    count = len(openmoji.load(config.data, "train", 32))
    batches = take(build(config), 2 * count)
    first, second = ([keys(b)[0] for b in part] for part in (batches[:count], batches[count:]))
    assert sorted(first) == sorted(second) and first != second


def test_label_is_the_group(make_config, take):
    config = make_config(16, name="images", source="openmoji", categories=("flags",))
    pipeline = build(config)
    found = openmoji.load_glyphs(config.data, "train", 32)
    group = {image.tobytes(): g for image, g in zip(found.images, found.group)}
    for batch in take(pipeline, 5):
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        assert [group[k] for k in keys(batch)] == batch["label"].tolist()
        assert batch["label"].max() < pipeline.classes


def test_flip_mirrors_about_half(make_config, take):
    fields = dict(name="images", source="openmoji")
    plain = take(build(make_config(32, **fields)), 4)
    flipped = take(build(make_config(32, **fields, flip=True)), 4)
    halves = [take(build(make_config(32, **fields, flip=True), i, 2), 4) for i in range(2)]
    mirrored = 0
    for step, (a, b) in enumerate(zip(plain, flipped)):
        for x, y in zip(a["image"], b["image"]):
            assert (x == y).all() or (x[:, ::-1] == y).all()
            mirrored += not (x == y).all()
        joined = np.concatenate([half[step]["image"] for half in halves])
        np.testing.assert_array_equal(joined, b["image"])
    assert 30 < mirrored < 100


def test_batches_come_at_several_sides(make_config, take):
    """Larger pictures in proportionally smaller batches, every process at the same side."""
    fields = dict(name="images", source="openmoji", flip=True, sizes=(8, 16, 32))
    whole = take(build(make_config(8, **fields)), 12)
    halves = [take(build(make_config(8, **fields), i, 2), 12) for i in range(2)]
    shapes = {batch["image"].shape for batch in whole}
    assert shapes == {(8, 8, 8, 3), (4, 16, 16, 3), (2, 32, 32, 3)}
    for step, batch in enumerate(whole):
        for key in ("image", "label"):
            joined = np.concatenate([half[step][key] for half in halves])
            np.testing.assert_array_equal(joined, batch[key])
    with pytest.raises(ValueError, match="12 must divide config.data.image_size=32"):
        build(make_config(8, **fields | dict(sizes=(12, 32))))


def test_shrinking_averages_squares():
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    got = transforms.shrink(x, 2)
    assert got[1, 0, 1, 2] == round(float(x[1, :4, 4:, 2].mean()))
    assert transforms.shrink(x, 8) is x


def test_large_sets_are_decoded_on_demand(make_config, take):
    fields = dict(name="images", source="openmoji+scenes")
    memory = take(build(make_config(8, **fields)), 3)
    demand = take(build(make_config(8, **fields, cache_mb=0)), 3)
    for a, b in zip(memory, demand):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    found = sources.load(make_config(cache_mb=0).data, "train", 32)
    assert not hasattr(found.pictures.parts[0], "images")


def test_unknown_split_is_explained(make_config):
    with pytest.raises(ValueError, match="split='valid' is not one of train, validation, test"):
        build(make_config(), split="valid")


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (35, 50), (20, 33)])
def test_centre_crop(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8))
    got = transforms.centre_crop(image, 32)
    assert got.shape == (32, 32, 3) and got.dtype == np.uint8
    # The same steps, spelled out.
    want = image
    while min(want.size) >= 64:
        want = want.resize((want.width // 2, want.height // 2), Image.Resampling.BOX)
    scale = 32 / min(want.size)
    want = want.resize(
        (round(want.width * scale), round(want.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (want.width - 32) // 2, (want.height - 32) // 2
    np.testing.assert_array_equal(got, np.asarray(want.crop((left, top, left + 32, top + 32))))


def test_transparency_becomes_white():
    out = io.BytesIO()
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(out, "PNG")
    assert (transforms.decode(out.getvalue(), 32) == 255).all()
    out = io.BytesIO()
    Image.new("L", (40, 40), 7).save(out, "PNG")
    assert (transforms.decode(out.getvalue(), 32) == 7).all()
