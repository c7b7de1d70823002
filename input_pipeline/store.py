"""Where prepared data sets live, and how two processes can prepare one without harm."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

SPLITS = ("train", "validation", "test")


def data_dir(data) -> Path:
    """Folder of prepared data sets: the env var UNIFLUD_CACHE, else `config.data.dir`."""
    path = Path(os.environ.get("UNIFLUD_CACHE") or data.dir).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"config.data.dir={str(path)!r} cannot be created ({error.strerror}); "
            "name a writable folder there or in UNIFLUD_CACHE"
        ) from error
    return path


def check_split(split: str) -> None:
    """Raises unless `split` is one of train, validation, test."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:  # the kernel drops the lock when the process dies
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_once(data, key: str, make: Callable[[Path], None]) -> Path:
    """Returns `data_dir/key`, a folder (or file) that `make(temporary path)` wrote completely.

    A process that finds another one preparing waits for it. The result appears by one rename, so
    a kill leaves either nothing or everything.
    """
    root = data_dir(data)
    final = root / key
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock(final.parent / f".{final.name}.lock"):
        if final.exists():
            return final
        logging.info("preparing %s", final)
        for left in final.parent.glob(f".{final.name}.*.part"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
        try:
            make(scratch / "made")
            try:
                os.rename(scratch / "made", final)
            except OSError:  # file systems without locks: another process was faster
                if not final.exists():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final
