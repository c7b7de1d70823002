"""Checkpoints: state, data position and metadata together, atomic, found again after damage.

The only file that calls orbax. The state is stored flat ({"params/dense/kernel": array}): any part
can be read alone, onto any mesh. A fingerprint of every array shows damage that still decodes.
"""

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from configs.loading import one_line
from training.data_position import read_positions, set_position
from training.fingerprint import fingerprints, verify
from training.tree import flat, unflat


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname  # our errors say it in one line; other warnings stay


class Checkpoints:
    """The checkpoints in one folder; the newest `keep` and every `keep_every`-th step stay."""

    def __init__(self, directory: Path, keep: int = 2, keep_every: int = 0, write: bool = True):
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self.directory, self._write, self._why = Path(directory).resolve(), write, ""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep if write else None,
            keep_period=(keep_every or None) if write else None,
            create=write,
            read_only=not write,
            cleanup_tmp_directories=write,
            save_root_metadata=False,
        )
        handlers = dict(state=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
        handlers["data"] = grain.checkpoint.CheckpointHandler()
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    @property
    def steps(self) -> list[int]:
        """Steps whose checkpoint is finished, ascending."""
        return sorted(int(p.name) for p in self.directory.glob("[0-9]*") if p.name.isdigit())

    def save(self, step: int, state: Any, iterator: Any, meta: dict, *, wait: bool = False) -> None:
        """Save in the background (`wait`: now); the error of an earlier save is raised here."""
        with self._told(step):
            self._manager.check_for_errors()
            if step not in self._manager.all_steps():
                values = flat(state)
                meta = meta | {"step": step, "fingerprints": fingerprints(values)}
                items = dict(state=ocp.args.PyTreeSave(values), meta=ocp.args.JsonSave(meta))
                if iterator is not None:
                    items["data"] = grain.checkpoint.CheckpointSave(iterator)
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            if wait:
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Until the background save is done; raises its error."""
        with self._told(None):
            self._manager.wait_until_finished()

    @contextmanager
    def _told(self, step: int | None):
        """An error of writing as one line that says which checkpoint is left."""
        try:
            yield
        except Exception as error:
            kept = [s for s in self.steps if s != step]
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            left = f"step {kept[-1]} is kept" if kept else "there is no earlier one"
            what += f" could not be saved in {self.directory} ({left}): {one_line(error, 200)}"
            raise OSError(what) from error

    def restore(self, like: Any, iterator: Any = None, step: int | None = None, check=None):
        """(state, meta) of `step` or of the newest readable checkpoint; None if there is none.

        `like` holds ShapeDtypeStructs with the shardings wanted; the data iterator is set;
        check(meta) may raise a ValueError, which is the user's to read.
        """
        steps = self.steps
        if step is not None and step not in steps:
            raise FileNotFoundError(f"--step={step} is not in {self.directory}; allowed: {steps}")
        for s in reversed(steps if step is None else [step]):
            found = self._open(s, like, iterator, check)
            if found is not None:
                return found
            if step is not None or s == steps[0]:
                advice = "" if step is not None else "; no other is left: delete it to start again"
                raise OSError(f"step {s} in {self.directory} cannot be read: {self._why}{advice}")
            self._put_aside(s)
        return None

    def _open(self, step: int, like: Any, iterator: Any, check):
        """(state, meta), or None where the files of this step are damaged."""
        if (meta := self._attempt(self._read, step, "meta", ocp.args.JsonRestore())) is None:
            return None
        if check is not None:
            check(meta)
        wanted, saved = flat(like), meta["fingerprints"]
        lacking = sorted(set(wanted) - set(saved))
        if lacking:
            text = f"step {step} in {self.directory} has no {lacking[0]!r}, which config asks for"
            raise ValueError(text)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        values = self._attempt(self._read, step, "state", args) if wanted else {}
        if values is None or not self._attempt(verify, values, saved):
            return None
        if iterator is not None:
            if (places := self._attempt(read_positions, self.directory / f"{step}/data")) is None:
                return None
            set_position(iterator, places)
        return unflat(values, like), meta

    def _read(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def _attempt(self, read, *args):
        """read(*args), or None where any host could not: all hosts then go to the same step."""
        value, self._why = None, ""
        try:
            value = read(*args)
        except Exception as error:
            self._why = one_line(error, 200)
        if jax.process_count() > 1:
            whole = multihost_utils.process_allgather(value is not None).all()
            value, self._why = (value if whole else None), self._why or "another host failed"
        return value

    def _put_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that its step can be saved again."""
        if jax.process_index() == 0:
            print(f"the checkpoint of step {step} is damaged ({self._why}); using the one before")
            if self._write:
                (self.directory / str(step)).rename(self.directory / f"damaged-{step}")
        multihost_utils.sync_global_devices("put_aside")
        self._manager.reload()

    def close(self) -> None:
        """Wait for the background and stop it; the error of a background save is raised."""
        with self._told(None):
            self._manager.close()
