"""The folder of a run: one process at a time, and the config beside the results."""

import fcntl
import json
from contextlib import contextmanager
from pathlib import Path

import jax
from ml_collections import ConfigDict

from training.metrics import write_text


@contextmanager
def claim(workdir: Path):
    """Make the folder and hold it; the lock goes away with the process, however it ends."""
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise OSError(f"--workdir={workdir} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--workdir={workdir} is in use by another process") from error
        yield


def write_config(workdir: Path, config) -> None:
    """config.json: every resolved key."""
    if jax.process_index() == 0:
        values = json.loads(config.to_json_best_effort())
        write_text(workdir / "config.json", json.dumps(values, indent=1) + "\n")


def read_config(values: dict) -> ConfigDict:
    """A config from its JSON: lists are the tuples that configs use."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ConfigDict(tuples(values))
