"""Pytrees as paths: names of leaves, flat dicts and back, logical-name boxes off."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax


def path_name(path: Sequence[Any]) -> str:
    """A jax key path as 'a/b/c'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flat(tree: Any, leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{path: leaf} of a pytree; `leaf` says of what else not to look into."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=leaf)
    return {path_name(path): value for path, value in leaves}


def unflat(values: dict[str, Any], like: Any) -> Any:
    """The tree of the structure of `like` with the leaves of a flat dict."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], like)


def is_box(leaf: Any) -> bool:
    """Whether a leaf carries logical axis names."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The tree without its logical names (no sharding constraint is added)."""
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)
