"""config.data.source: which sets of pictures are read, joined with "+"."""

from input_pipeline import examples, folder, openmoji, photos, scenes, transforms

LOADERS = {
    "openmoji": openmoji.load,
    "scenes": scenes.load,
    "folder": folder.load,
    "photos": photos.load,
}


def names(data, which: str = "") -> list[str]:
    """The sources that `which`, or else config.data.source, names."""
    key, value = ("captioned", which) if which else ("source", data.source)
    found = value.split("+")
    for name in found:
        if name not in LOADERS:
            raise ValueError(
                f"config.data.{key}={value!r}: {name!r} is none of {', '.join(LOADERS)}"
            )
    if strange := sorted(set(found) - set(data.source.split("+"))):  # not what a user gave
        raise ValueError(
            f"config.data.captioned={which!r}: {strange[0]!r} is no part of "
            f"config.data.source={data.source!r}; give both"
        )
    return found


def load(data, split: str, size: transforms.Size, which: str = "") -> examples.Examples:
    """Sources `which` (all of the config when empty), one split, pictures of `size` pixels."""
    if not isinstance(size, int) and names(data, which) != ["folder"]:
        raise ValueError(
            f"config.data.shapes: source {which or data.source!r} has squares only; folder has all"
        )
    return examples.concatenate([LOADERS[name](data, split, size) for name in names(data, which)])
