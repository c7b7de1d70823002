"""Trains the toy on the meshes named in argv, one after the other, in one process of many devices.

python mesh_runs.py WORKDIR STEPS data,fsdp,tensor,seq[:WORKDIR-TO-CONTINUE] ...

The environment variable OPTIMIZER is config.optimizer.name.
"""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]


def main(workdir, steps, meshes):
    """One run per mesh in WORKDIR/<mesh>; prints the shardings of named parameters."""
    from training import platform

    platform.before_jax()
    platform.join_hosts()
    import toy

    toy.register()
    import jax

    from configs.common import load_config
    from training import loop
    from training.setup import prepare
    from training.tree import flat

    for text in meshes:
        sizes, _, origin = text.partition(":")
        place = Path(workdir) / text.replace(":", "-")
        overrides = dict(zip(("data", "fsdp", "tensor", "seq"), sizes.split(",")))
        config = load_config(
            toy.CONFIG,
            steps=int(steps),
            log_every=1,
            **{f"mesh.{axis}": size for axis, size in overrides.items()},
            **{"checkpoint.every": 10, "checkpoint.keep": 9, "schedule.name": "constant"},
            **{"optimizer.name": os.environ.get("OPTIMIZER", "adamw")},
        )
        if origin and jax.process_index() == 0:  # continue a run of another mesh from step 10
            for part in ("checkpoints/10", "metrics.jsonl"):
                source = Path(workdir) / origin / part
                place.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if source.is_dir() else shutil.copy
                (place / part).parent.mkdir(parents=True, exist_ok=True)
                copy(source, place / part)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(text)
        loop.train(config, place)
        if jax.process_index() == 0:
            for name, leaf in flat(prepare(config).plan.state).items():
                if name.startswith(("params/", "ema/")) or name.endswith("mu/head/kernel"):
                    print("sharding", text, name, tuple(leaf.sharding.spec), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
