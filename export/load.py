"""Pretrained weights from a file or folder, in published names or in our own."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.files import load_safetensors
from export.weights import WeightMap, flat_map, from_published, published_names


def load_pretrained(path: str | os.PathLike, weight_map: WeightMap | None, abstract: Any) -> Any:
    """Nested dict of arrays with the shapes and dtypes of `abstract`.

    path: a .safetensors file, or a folder with model.safetensors or an index of shards.
    weight_map: of exactly these parameters; None where nothing is published under other names.
    A file in our own names ("a/b/c", as mode=export writes for such models) is recognised.
    """
    tensors = load_safetensors(path)
    try:
        return from_published(tensors, choose_map(tensors, weight_map, abstract), abstract)
    except ValueError as error:
        raise ValueError(f"{Path(path)}: {error}") from None


def choose_map(
    tensors: Mapping[str, Any], weight_map: WeightMap | None, abstract: Any
) -> WeightMap:
    """The map under which most names of the file are known; the published one on a draw."""
    ours = flat_map(abstract)
    if weight_map is None:
        return ours
    as_ours = len(tensors.keys() & ours.names.keys())
    as_published = len(tensors.keys() & published_names(weight_map, abstract).keys())
    return ours if as_ours > as_published else weight_map
