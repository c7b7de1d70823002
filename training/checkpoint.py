"""Checkpoints: state, data position and metadata together, atomic, found again after damage.

The only file that calls orbax. The state is stored flat ({"params/dense/kernel": array}), so any
part can be read alone and onto any mesh. Every array's fingerprint is stored as well: a damaged
file that still decodes is noticed.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from etils import epath

from training.fingerprint import fingerprints
from training.sharding import path_name


def flat(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def unflat(values: dict[str, Any], like: Any) -> Any:
    """The tree of the structure of `like` with the leaves of `flat`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], like)


class Checkpoints:
    """The checkpoints of one workdir, oldest to newest."""

    def __init__(self, workdir: str | Path, keep: int = 2, keep_every: int = 0, write: bool = True):
        for name in ("absl", "orbax"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.directory = epath.Path(workdir).resolve() / "checkpoints"
        self._write = write
        self._last_error: Exception | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep if write else None,
            keep_period=(keep_every or None) if write else None,
            create=write,
            read_only=not write,
            cleanup_tmp_directories=write,
            save_root_metadata=False,
            enable_async_checkpointing=True,
        )
        handlers = dict(
            state=ocp.PyTreeCheckpointHandler(),
            data=grain.checkpoint.CheckpointHandler(),
            meta=ocp.JsonCheckpointHandler(),
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=tuple(handlers), item_handlers=handlers
        )

    @property
    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, iterator: Any, meta: dict, *, wait: bool = False) -> None:
        """Save in the background (`wait`: now); a failed earlier save is raised here."""
        try:
            self._manager.check_for_errors()
            if step not in self._manager.all_steps():
                meta = meta | {"step": step, "fingerprints": fingerprints(flat(state))}
                items = dict(
                    state=ocp.args.PyTreeSave(flat(state)),
                    data=grain.checkpoint.CheckpointSave(iterator),
                    meta=ocp.args.JsonSave(meta),
                )
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            if wait:
                self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Until the background save is done; raises its error."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(None, error) from error

    def _failed(self, step: int | None, error: Exception) -> OSError:
        kept = [s for s in self.steps if s != step]
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        last = f"step {kept[-1]} is kept" if kept else "there is no earlier one"
        reason = " ".join(str(error).split())[:300]
        return OSError(f"{what} could not be written to {self.directory} ({last}): {reason}")

    def restore(self, like: Any, iterator: Any = None, step: int | None = None, check=None):
        """(state, meta) of `step` or of the newest readable checkpoint; None if there is none.

        `like` holds ShapeDtypeStructs with the shardings wanted; the data iterator is set;
        check(meta) may raise a ValueError, which is the user's to read.
        """
        steps = self.steps if step is None else [step]
        if step is not None and step not in self.steps:
            raise FileNotFoundError(
                f"--step={step} is not in {self.directory}; there are {self.steps or 'none'}"
            )
        for s in reversed(steps):
            try:
                return self._read(s, like, iterator, check)
            except MismatchError:
                raise
            except Exception as error:
                if step is not None or s == steps[0]:
                    raise OSError(
                        f"the checkpoint of step {s} in {self.directory} cannot be read and there "
                        f"is none before it: {' '.join(str(error).split())[:300]}"
                    ) from error
                reason = " ".join(str(error).split())[:120]
                print(f"checkpoint of step {s} is damaged ({reason}); using the one before")
                self._damaged(s)
        return None

    def _read(self, step: int, like: Any, iterator: Any, check):
        wanted = flat(like)
        args = dict(
            meta=ocp.args.JsonRestore(),
            state=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=args["meta"]))["meta"]
        try:
            if check is not None:
                check(meta)
        except ValueError as error:
            raise MismatchError(str(error)) from error
        known = meta["fingerprints"]
        lacking = sorted(set(wanted) - set(known))
        if lacking:
            raise MismatchError(
                f"the checkpoint of step {step} in {self.directory} has no {lacking[0]!r} "
                f"({len(lacking)} arrays missing): it belongs to another model or optimiser"
            )
        state = self._manager.restore(step, args=ocp.args.Composite(state=args["state"]))["state"]
        for name, value in fingerprints(state).items():
            if known[name] != value:
                raise OSError(f"array {name} does not have the contents that were saved")
        if iterator is not None:
            data = grain.checkpoint.CheckpointRestore(iterator)
            self._manager.restore(step, args=ocp.args.Composite(data=data))
        return unflat(state, like), meta

    def _damaged(self, step: int) -> None:
        """Put a damaged checkpoint aside, so that its step can be saved again."""
        if self._write and jax.process_index() == 0:
            (self.directory / str(step)).rename(self.directory / f"damaged-{step}")
        self._manager.reload()

    def close(self) -> None:
        """Wait for the background and stop it."""
        self._manager.close()


class MismatchError(ValueError):
    """A checkpoint that is sound but belongs to something else."""


def save_frozen(workdir: Path, frozen: Any) -> str:
    """Store arrays that do not train once, in a folder named after their contents."""
    if not jax.tree.leaves(frozen):
        return ""
    prints = fingerprints(flat(frozen))
    name = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:16]
    path = epath.Path(workdir).resolve() / "frozen" / name
    if not path.exists():
        ocp.PyTreeCheckpointer().save(path, flat(frozen))
    return name


def load_frozen(workdir: Path, name: str, like: Any) -> Any:
    """What save_frozen stored, with the shardings of `like`."""
    if not name:
        return like
    path = epath.Path(workdir).resolve() / "frozen" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the checkpoint needs these frozen arrays")
    wanted = flat(like)
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    return unflat(ocp.PyTreeCheckpointer().restore(path, wanted, restore_args=restore_args), like)


def load_params(workdir: Path, like: Any) -> dict[str, jax.Array]:
    """{path: array} of the newest checkpoint's parameters, its averages where it has them."""
    checkpoints = Checkpoints(workdir, write=False)
    try:
        found = checkpoints.restore({"params": like})
        if found is None:
            raise FileNotFoundError(f"config.init_from: {workdir} holds no checkpoint")
        values, meta = flat(found[0]["params"]), found[1]
        averaged = [k for k in flat(like) if f"ema/{k}" in meta["fingerprints"]]
        if averaged:
            shapes = {k: v for k, v in flat(like).items() if k in averaged}
            values |= checkpoints.restore({"ema": shapes}, step=meta["step"])[0]["ema"]
        return values
    finally:
        checkpoints.close()
