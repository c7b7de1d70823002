"""--mode=export: weights, configuration, tokenizer and functions in workdir/export."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from export.functions import functions, serialise
from export.weights import cast, flatten, save_safetensors, to_published


def run(config, workdir: str | Path, step: int | None = None) -> Path:
    """Exports the newest checkpoint of workdir (or that of `step`); returns the folder."""
    from training.setup import load_for_use

    loaded, params, at = load_for_use(config, Path(workdir), step)
    try:
        # Outside the mesh: an exported function runs on one device.
        folder = write(loaded.config, loaded.model, params, at, Path(workdir) / "export")
        if loaded.pipeline.tokenizer is not None:
            loaded.pipeline.tokenizer.save(folder / "tokenizer.json")
    finally:
        loaded.pipeline.close()
    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    return folder


def write(config, model, params: Any, step: int, folder: Path) -> Path:
    """model.safetensors, config.json, *.stablehlo and index.json of one set of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {path: np.asarray(jax.device_get(x)) for path, x in flatten(params).items()}
    metadata = {"step": str(step), "model": config.model.name}
    published = flat if model.weights is None else to_published(params, model.weights)
    published = _chosen(published, config.export)
    save_safetensors(folder / "model.safetensors", published, metadata)
    (folder / "config.json").write_text(_pretty(describe(config, model, published, step)))
    if config.export.part:
        return folder  # a part has no functions
    found = functions(model, config, params)
    own_names = "model.safetensors"
    if found and model.weights is not None:
        # Functions take the parameters in the layout the model computes with.
        own_names = "params.safetensors"
        save_safetensors(folder / own_names, flat, metadata)
    index: dict[str, Any] = {"params": own_names, "functions": {}}
    for name, function in found.items():
        contents, entry = serialise(function, flat)
        (folder / f"{name}.stablehlo").write_bytes(contents)
        index["functions"][f"{name}.stablehlo"] = entry
    if found:
        (folder / "index.json").write_text(_pretty(index))
    return folder


def _chosen(tensors: dict[str, np.ndarray], options) -> dict[str, np.ndarray]:
    """The tensors of config.export.part, floats in config.export.dtype."""
    if options.dtype not in ("", "float32", "float16", "bfloat16"):
        raise ValueError(
            f"config.export.dtype={options.dtype!r}: allowed are '' (as trained), float32, "
            "float16, bfloat16"
        )
    if options.part:
        start = options.part.strip("/") + "/"
        found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        if not found:
            parts = sorted({k.partition("/")[0] for k in tensors})
            raise ValueError(f"config.export.part={options.part!r}: the parts are {parts}")
        tensors = found
    dtype = np.dtype(jnp.dtype(options.dtype)) if options.dtype else None
    return {name: cast(tensor, dtype) for name, tensor in tensors.items()}


def describe(config, model, tensors: dict[str, np.ndarray], step: int) -> dict[str, Any]:
    """config.json: the published keys where there are some, and ours under "uniflud"."""
    ours = {
        "step": step,
        "parameters": int(sum(x.size for x in tensors.values())),
        "config": json.loads(config.to_json_best_effort()),
    }
    published = dict(model.weights.config) if model.weights is not None else {}
    dtypes = {str(x.dtype) for x in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return {"model_type": config.model.name, "torch_dtype": dtype, **published, "uniflud": ours}


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
