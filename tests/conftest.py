"""Test setup: CPU only, one device, persistent compile cache, parsed absl flags."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as training/platform.py sets it
# Most of the suite's time is compiling what then runs on a few numbers once: a third less so.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Pallas interprets a program for each thread of a GPU block, and threads meet at barriers. With as
# many threads as two cores get (NPROC says how many XLA starts), programs that wait hold the places
# of those that are waited for, for ever.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
# Subprocesses that tests start inherit the cache through the environment. JAX writes its files in
# place, so processes that run at the same time must not read each other's.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
    Path(tempfile.gettempdir()) / "uniflud-test-jax-cache"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(CACHE) / WORKER)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags; outside absl.app nobody parses them

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A file's compiled programs go with it.

    Each holds about three memory maps. A whole suite in one process comes to Linux's 65,530
    (vm.max_map_count), and there XLA's compiler segfaults or stands still.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def public_data() -> Callable[..., Path]:
    """("folder", ...) -> that path in the public data sets (UNIFLUD_DATA).

    A test that needs one that is not there is skipped, as the architecture page asks.
    """
    root = Path(os.environ.get("UNIFLUD_DATA", ROOT.parent / "shared" / "data"))

    def find(*parts: str) -> Path:
        path = root.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"public data: {'/'.join(parts)} is not in UNIFLUD_DATA={root}")
        return path

    return find
