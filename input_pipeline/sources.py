"""config.data.source: which sets of pictures are read, joined with "+"."""

from input_pipeline import examples, folder, openmoji, scenes

LOADERS = {"openmoji": openmoji.load, "scenes": scenes.load, "folder": folder.load}


def names(data) -> list[str]:
    """The sources that config.data.source names."""
    found = data.source.split("+")
    for name in found:
        if name not in LOADERS:
            raise ValueError(
                f"config.data.source={data.source!r}: {name!r} is none of {', '.join(LOADERS)}"
            )
    return found


def load(data, split: str, size: int) -> examples.Examples:
    """All sources of the config, one split, pictures of `size` pixels."""
    return examples.concatenate([LOADERS[name](data, split, size) for name in names(data)])
