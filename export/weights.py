"""Our parameter names and layouts <-> published (Hugging Face) ones, from one table per model.

A model's table is a WeightMap: {"path/of/our/leaf": Rule(published name, conversion, inverse)}.
Scanned layers are stacked on leading axes inside and are one tensor per layer outside.

    WeightMap({
        "embed/embedding": plain("model.embed_tokens.weight"),
        "layers/block_0/mlp/up/kernel": linear("model.layers.{layer}.mlp.up_proj.weight",
                                               stack=(2,), first=0),      # layers 0, 2, 4, ...
        "layers/block_1/mlp/up/kernel": linear("model.layers.{layer}.mlp.up_proj.weight",
                                               stack=(2,), first=1),      # layers 1, 3, 5, ...
        "tail_0/mlp/up/kernel": linear("model.layers.24.mlp.up_proj.weight"),
    }, ignore=("lm_head.weight",))
"""

import difflib
import itertools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import numpy as np

from export.files import load_safetensors, save_safetensors

__all__ = [
    "Rule", "WeightMap", "compose", "conv", "flat_map", "flatten", "from_published", "heads_in",
    "heads_out", "linear", "load_safetensors", "plain", "save_safetensors", "to_published",
    "unflatten",
]  # fmt: skip


def _same(tensor: np.ndarray) -> np.ndarray:
    return tensor


class Rule(NamedTuple):
    """How one of our leaves is published.

    name:  published name; holds {layer} when stack is given, or {group} and {place} of `group`.
    to:    our tensor of one layer -> published tensor.
    back:  its inverse.
    stack: layers between neighbours along each leading stacked axis of our leaf, so
           layer = first + sum(index_k * stack_k): (1,) for a plain scan, (len(pattern),) for a
           scan over a pattern of blocks, (3, 1) for two nested scans; () = not stacked.
    first: layer number of index 0.
    part:  (start, stop, total): our leaf is rows start..stop of the published tensor's `total`
           rows (axis 0), as when q, k and v are published as one tensor; None = all of it.
    group: layers published together: {group} is layer // group, {place} layer % group.
    """

    name: str
    to: Callable[[np.ndarray], np.ndarray] = _same
    back: Callable[[np.ndarray], np.ndarray] = _same
    stack: tuple[int, ...] = ()
    first: int = 0
    part: tuple[int, int, int] | None = None
    group: int = 1

    def published(self, layer: int) -> str:
        """Published name of one layer's leaf."""
        group, place = divmod(layer, self.group)
        return self.name.format(layer=layer, group=group, place=place)


class WeightMap(NamedTuple):
    """Table of one model.

    names:  {our "path/to/leaf": Rule}.
    ignore: patterns (fnmatch) of published names that carry nothing of ours (tied heads, buffers).
    parts:  {our sub-path: WeightMap} of the maps this one was composed of, with the names that the
            part has when it is published alone.
    config: the keys that a published config.json holds for such a model.
    """

    names: Mapping[str, Rule]
    ignore: tuple[str, ...] = ()
    parts: Mapping[str, "WeightMap"] = {}
    config: Mapping[str, Any] = {}


def plain(name: str, **stacking) -> Rule:
    """A leaf published in our own layout."""
    return Rule(name, **stacking)


def linear(name: str, **stacking) -> Rule:
    """Ours [in, out], published [out, in]."""
    return Rule(name, np.transpose, np.transpose, **stacking)


def conv(name: str, **stacking) -> Rule:
    """Ours [*spatial, in, out], published [out, in, *spatial], for any number of axes."""

    def to(tensor):
        return np.moveaxis(tensor, (-1, -2), (0, 1))

    def back(tensor):
        return np.moveaxis(tensor, (0, 1), (-1, -2))

    return Rule(name, to, back, **stacking)


def heads_in(name: str, heads: int, **stacking) -> Rule:
    """Projection into heads: ours [in, heads, dim], published [heads * dim, in].

    Its bias is ours [heads, dim], published [heads * dim].
    """

    def to(tensor):
        return tensor.reshape(*tensor.shape[:-2], -1).T

    def back(tensor):
        return tensor.T.reshape(*tensor.T.shape[:-1], heads, -1)

    return Rule(name, to, back, **stacking)


def heads_out(name: str, heads: int, **stacking) -> Rule:
    """Projection out of heads: ours [heads, dim, out], published [out, heads * dim]."""

    def to(tensor):
        return tensor.reshape(-1, tensor.shape[-1]).T

    def back(tensor):
        return tensor.T.reshape(heads, -1, tensor.shape[0])

    return Rule(name, to, back, **stacking)


def compose(parts: Mapping[str, WeightMap | tuple[WeightMap, str]]) -> WeightMap:
    """Joins maps: {our sub-path: map or (map, prefix of its published names)}.

    The sub-path "" adds a map's leaves at the top.
    """
    names: dict[str, Rule] = {}
    ignore: list[str] = []
    kept: dict[str, WeightMap] = {}
    for path, part in parts.items():
        weight_map, prefix = (part, "") if isinstance(part, WeightMap) else part
        stem = f"{path}/" if path else ""
        added = {stem + k: r._replace(name=prefix + r.name) for k, r in weight_map.names.items()}
        if twice := names.keys() & added.keys():
            raise ValueError(f"two weight maps name the leaf {min(twice)!r}")
        names |= added
        ignore += [prefix + pattern for pattern in weight_map.ignore]
        kept |= {stem + k: m for k, m in weight_map.parts.items()}
        if path:
            kept[path] = weight_map
    return WeightMap(names, tuple(ignore), kept)


def flat_map(params: Any) -> WeightMap:
    """The map of a model without published names: a leaf is published as its own path."""
    return WeightMap({path: Rule(path) for path in flatten(params)})


def flatten(tree: Any) -> dict[str, Any]:
    """{"a/b/c": leaf} of nested dicts; boxes around leaves (logical axes) are looked through."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)): leaf
        for path, leaf in leaves
    }


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of flatten."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def published_names(weight_map: WeightMap, params: Any) -> dict[str, list[tuple[str, tuple]]]:
    """{published name: [(our path, index in its stacked axes), ...]}; params may be abstract."""
    result: dict[str, list[tuple[str, tuple]]] = {}
    for path, leaf in flatten(params).items():
        rule = weight_map.names.get(path)
        if rule is None:
            continue
        for index in itertools.product(*map(range, leaf.shape[: len(rule.stack)])):
            layer = rule.first + sum(i * s for i, s in zip(index, rule.stack))
            result.setdefault(rule.published(layer), []).append((path, index))
    return result


def _check_known(weight_map: WeightMap, flat: Mapping[str, Any]) -> None:
    unmapped = [path for path in flat if path not in weight_map.names]
    if unmapped:
        raise ValueError(
            "the weight map has no rule for " + _listed(unmapped, list(weight_map.names))
        )


def to_published(
    params: Any, weight_map: WeightMap, dtype: np.dtype | None = None
) -> dict[str, np.ndarray]:
    """{published name: array}; floating leaves are cast to dtype when it is given."""
    flat = flatten(params)
    _check_known(weight_map, flat)
    host: dict[str, np.ndarray] = {}
    result: dict[str, np.ndarray] = {}
    for name, sources in published_names(weight_map, params).items():
        pieces = []
        for path, index in sources:
            if path not in host:
                host[path] = np.asarray(jax.device_get(flat[path]))
            rule = weight_map.names[path]
            tensor = rule.to(host[path][index])
            pieces.append((rule.part or (0, len(tensor) if tensor.ndim else 1, None), tensor))
        result[name] = cast(_join(name, pieces), dtype)
    return result


def cast(tensor: np.ndarray, dtype) -> np.ndarray:
    """A floating tensor in another type; others, and all without a type, as they are."""
    if dtype is None or not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
        return tensor
    return tensor.astype(dtype)


def _join(name: str, pieces: list) -> np.ndarray:
    """Puts the parts of one published tensor together; they must tile its rows."""
    if len(pieces) == 1 and pieces[0][0][2] is None:
        return pieces[0][1]
    pieces = sorted(pieces, key=lambda piece: piece[0][0])
    ends = [0] + [part[1] for part, _ in pieces]
    starts = [part[0] for part, _ in pieces] + [pieces[0][0][2]]
    if ends != starts or any(len(tensor) != part[1] - part[0] for part, tensor in pieces):
        raise ValueError(f"several leaves are published as {name!r} and do not tile its rows")
    return np.concatenate([tensor for _, tensor in pieces])


def from_published(tensors: Mapping[str, np.ndarray], weight_map: WeightMap, abstract: Any) -> Any:
    """Nested dict of arrays with the shapes and dtypes of `abstract` (arrays or ShapeDtypeStructs).

    Missing, unexpected and mis-shaped names are all listed in one ValueError.
    """
    flat = flatten(abstract)
    _check_known(weight_map, flat)
    wanted = published_names(weight_map, abstract)
    missing = [name for name in wanted if name not in tensors]
    unexpected = [
        name
        for name in tensors
        if name not in wanted and not any(fnmatchcase(name, p) for p in weight_map.ignore)
    ]
    misshaped: list[str] = []
    filled: dict[str, np.ndarray] = {}
    for name, targets in wanted.items():
        if name not in tensors:
            continue
        for path, index in targets:
            leaf, rule = flat[path], weight_map.names[path]
            shape = leaf.shape[len(rule.stack) :]
            value, problem = _read(tensors[name], rule, shape)
            if problem:
                misshaped.append(f"{name} {problem} ({path})")
            elif not (missing or unexpected or misshaped):  # no work for a load that will fail
                if path not in filled:
                    filled[path] = np.empty(leaf.shape, leaf.dtype)
                filled[path][index] = value
    if missing or unexpected or misshaped:
        raise ValueError(_complaint(missing, unexpected, misshaped, wanted))
    return unflatten({path: filled[path] for path in flat})


def _read(tensor: np.ndarray, rule: Rule, shape: tuple) -> tuple[np.ndarray | None, str]:
    """Our tensor of one layer, or what is wrong with the shape of the published one."""
    found = tuple(tensor.shape)
    try:
        if rule.part:
            start, stop, total = rule.part
            if not found or found[0] != total:
                return None, f"has shape {list(found)}, needs {total} rows"
            tensor = tensor[start:stop]
        value = rule.back(tensor)
    except ValueError:  # a reshape or a transpose that the shape does not allow
        return None, f"has shape {list(found)}, ours is {list(shape)}"
    if value.shape != shape:
        return None, f"has shape {list(found)}, which gives {list(value.shape)}, ours {list(shape)}"
    return value, ""


def _complaint(missing, unexpected, misshaped, wanted) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {_listed(missing, unexpected)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected: {_listed(unexpected, missing)}")
    if misshaped:
        parts.append(f"{len(misshaped)} mis-shaped: {_listed(misshaped, [])}")
    return f"weights do not fit ({len(wanted)} tensors wanted): " + "; ".join(parts)


def _listed(names: list[str], candidates: list[str], limit: int = 8) -> str:
    """The first names, each with the closest candidate, and how many more there are."""
    shown = []
    for name in names[:limit]:
        close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.7)
        shown.append(f"{name} (did you mean {close[0]}?)" if close else name)
    more = len(names) - limit
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
