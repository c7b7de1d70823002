"""config.init_from: parameters taken from published weights or from another run's checkpoint."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from export.load import load_pretrained
from export.weights import unflatten
from models import MODELS
from training.checkpoint import Checkpoints
from training.objectives import low_rank
from training.sharding import place
from training.tree import flat, unbox, unflat
from training.workdir import read_config


def load(config, model, params: Any) -> dict[str, jax.Array]:
    """{path: array} to put over the initial parameters; `params` are abstract with shardings."""
    loaded: dict[str, jax.Array] = {}
    for name, source in parse(config.init_from).items():
        target, weight_map, prefix = params, model.weights, ""
        if name:
            if name not in params:
                raise ValueError(
                    f"config.init_from={config.init_from!r}: the model has no part {name!r}; "
                    f"its parts are {', '.join(params)}"
                )
            target, prefix = params[name], name + "/"
            parts = getattr(weight_map, "parts", {}) or {}
            weight_map = parts.get(name)
        for path, value in _read(source, weight_map, target, config.init_from).items():
            loaded[prefix + path] = value
    return loaded


def random_parts(config, loaded: dict) -> list[str]:
    """What config.objective.freeze holds still though no weight of it was loaded."""
    return [
        part
        for part in config.objective.freeze
        if not any(path == part or path.startswith(f"{part}/") for path in loaded)
    ]


def parse(text: str) -> dict[str, str]:
    """'vae=A,gemma=B' -> {'vae': 'A', 'gemma': 'B'}; 'A' -> {'': 'A'}."""
    entries = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, source = part.partition("=")
        if not equals:
            name, source = "", part
        if name in entries or not source:
            raise ValueError(f"config.init_from={text!r} must be DIR or name=DIR[,name=DIR...]")
        entries[name] = source
    return entries


def _read(source: str, weight_map, target: Any, setting: str) -> dict[str, jax.Array]:
    """{path below target: array} from a file or folder of weights, or a workdir of ours."""
    path = Path(source).expanduser()
    root = Path(__file__).resolve().parents[1]
    if not path.exists() and (root / source).exists():
        path = root / source
    if (path / "checkpoints").is_dir():
        return _from_run(path, target)
    if not path.exists():
        raise FileNotFoundError(f"config.init_from={setting!r}: {source} does not exist")
    tree = load_pretrained(path, weight_map, target)
    want = flat(target)
    return {k: place(np.asarray(v), want[k].sharding) for k, v in flat(tree).items()}


def _from_run(workdir: Path, like: Any) -> dict[str, jax.Array]:
    """{path: array} of the newest checkpoint: averages where it has them, frozen parts too."""
    found = _restore(workdir / "checkpoints", {})
    if found is None:
        raise FileNotFoundError(f"config.init_from: {workdir} holds no checkpoint")
    saved, wanted = found[1]["fingerprints"], flat(like)
    source = {k: f"ema/{k}" if f"ema/{k}" in saved else f"params/{k}" for k in wanted}
    here = {k: name for k, name in source.items() if name in saved}
    rest = {k: f"params/{k}" for k in wanted if k not in here}
    values = _restore(workdir / "checkpoints", {name: wanted[k] for k, name in here.items()})[0]
    if rest:
        name = found[1]["frozen"] or "none"
        held = _restore(workdir / "frozen" / name, {v: wanted[k] for k, v in rest.items()})
        if held is None:
            raise ValueError(f"config.init_from: {workdir} has no parameter {next(iter(rest))!r}")
        values |= held[0]
    values = {k: values[here.get(k) or rest[k]] for k in wanted}
    config = read_config(found[1]["config"])
    if config.model.name not in MODELS:
        return values
    model = MODELS[config.model.name](config)
    whole = NamedSharding(next(iter(wanted.values())).sharding.mesh, PartitionSpec())
    if config.objective.name == "low_rank":
        values |= _merged(workdir, config, model, saved, values, whole)
    return _finalised(workdir, model, values, like, whole)


def _merged(workdir: Path, config, model, saved, values: dict, whole) -> dict[str, jax.Array]:
    """Those of `values` that the run gave low-rank adapters, with them."""
    boxed, where = low_rank.adapted(model, config.objective)
    init = low_rank.build(model, config).init
    shapes = flat(unbox(jax.eval_shape(init, jax.random.key(0), boxed)[0]))
    where = {path: cut for path, cut in where.items() if path in values}
    parts = [f"adapters/{path}/{part}" for path in where for part in "ab"]
    stored = {k: f"ema/{k}" if f"ema/{k}" in saved else f"params/{k}" for k in parts}
    like = {
        name: jax.ShapeDtypeStruct(shapes[k].shape, shapes[k].dtype, sharding=whole)
        for k, name in stored.items()
    }
    read = _restore(workdir / "checkpoints", like)[0]
    factors = {path: [read[stored[f"adapters/{path}/{x}"]] for x in "ab"] for path in where}
    return {
        path: low_rank.merged(values[path], *factors[path], cut, config.objective)
        for path, cut in where.items()
    }


def _finalised(workdir: Path, model, values: dict, like: Any, whole) -> dict[str, jax.Array]:
    """`values` with the run's running statistics written in, as its own evaluation uses them."""
    finalise = model.predict.get("finalise")
    if finalise is None:
        return values
    shapes = jax.eval_shape(lambda: unbox(model.init(jax.random.key(0))[1]))
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
        for name, x in flat(shapes).items()
        if not name.startswith("perceptual/")  # weights of a loss, no statistics
    }
    saved = _restore(workdir / "checkpoints", {f"extra/{k}": x for k, x in wanted.items()})[0]
    extra = unflatten({k: saved[f"extra/{k}"] for k in wanted})
    return flat(jax.jit(finalise)(unflat(values, like), extra))


def _restore(folder: Path, like: dict):
    checkpoints = Checkpoints(folder, write=False)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()
