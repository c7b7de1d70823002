"""Arrays that do not train (frozen encoder, reference model): stored once per workdir, by hash."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from training.checkpoint import Checkpoints
from training.fingerprint import fingerprints
from training.tree import flat


def save_frozen(workdir: Path, frozen: Any) -> str:
    """Store `frozen` in a folder named after its contents, if it is not there; returns the name."""
    if not jax.tree.leaves(frozen):
        return ""
    prints = json.dumps(fingerprints(flat(frozen)), sort_keys=True)
    name = hashlib.sha256(prints.encode()).hexdigest()[:16]
    store = Checkpoints(Path(workdir) / "frozen" / name)
    try:
        store.save(0, frozen, None, {}, wait=True)
    finally:
        store.close()
    return name


def load_frozen(workdir: Path, name: str, like: Any) -> Any:
    """What save_frozen stored, with the shardings of `like`."""
    if not name:
        return like
    store = Checkpoints(Path(workdir) / "frozen" / name, write=False)
    try:
        found = store.restore(like)
    finally:
        store.close()
    if found is None:
        raise FileNotFoundError(f"{store.directory} is missing: the checkpoint needs it")
    return found[0]
