"""What must be decided before jax is imported, and right after: devices, hosts, compile cache."""

import contextlib
import ctypes
import glob
import os
import sys
from pathlib import Path

NVIDIA = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/gpus/*")
AMD = ("/dev/kfd",)
# Seen on jax 0.12.0: with several virtual CPU devices, executables read back from the compile cache
# start their collectives in a different order on each device and wait for each other for ever.
SAFE_COLLECTIVES = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# glibc's settings for one arena that keeps what is freed: variable -> (number in <malloc.h>, value)
MALLOC = {
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
    "MALLOC_ARENA_MAX": (-8, 1),
}
# Products with gathered weights stay whole. Broken into loops of permutes, as is the TPU compiler's
# default, the step of configs/ladder.py:190m on 16 v5e takes 2.5 times as long by its own estimate.
LIBTPU_ARGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
TPU = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def accelerators() -> list[str]:
    """Kinds of accelerator this machine shows, by device files; nothing is imported."""
    kinds = {"tpu": TPU, "cuda": NVIDIA, "rocm": AMD}
    found = [kind for kind, files in kinds.items() if any(glob.glob(f) for f in files)]
    if "tpu" not in found and os.environ.get("TPU_WORKER_HOSTNAMES"):
        found.append("tpu")
    return found


def before_jax() -> None:
    """Environment for a quiet start: the CPU, without a word, where there is no accelerator.

    libtpu and CUDA plug-ins may be installed for ahead-of-time compilation; jax would try them
    and complain at length.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("LIBTPU_INIT_ARGS", LIBTPU_ARGS)
    # scipy's optimisers factor tiny matrices; on a busy machine OpenBLAS's threads wait for each
    # other longer than that takes (2 ms instead of 10 us for a step of L-BFGS-B). XLA has its own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "JAX_PLATFORMS" not in os.environ and sys.platform != "darwin" and not accelerators():
        os.environ["JAX_PLATFORMS"] = "cpu"
    xla = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" in xla and SAFE_COLLECTIVES not in xla:
        os.environ["XLA_FLAGS"] = f"{xla} {SAFE_COLLECTIVES}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path.home() / ".cache" / "uniflud" / "jax"
        with contextlib.suppress(OSError):  # no home to write to: no cache
            cache.mkdir(parents=True, exist_ok=True)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc reuse the large buffers that XLA's CPU backend frees after every step.

    By default each goes back to the kernel and faults in again page by page: 100,000 faults and a
    quarter of the step of configs/uniflud.py on two cores. MALLOC_* and GLIBC_TUNABLES win.
    """
    chosen = any(k.startswith("MALLOC_") for k in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform != "linux" or chosen or accelerators():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    for number, value in MALLOC.values():
        mallopt(number, value)


def join_hosts() -> None:
    """jax.distributed.initialize() when the environment describes several processes."""
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        import jax

        try:
            count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS={env['JAX_COORDINATOR_ADDRESS']} also needs the integers "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from error
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index)
    elif (
        int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
    ):
        import jax

        jax.distributed.initialize()  # jax reads the rest from the cluster's own variables
    elif "tpu" in accelerators() and "TPU_WORKER_HOSTNAMES" not in env:
        import jax

        # On Google's TPU VMs nothing in the environment names the hosts: jax asks the metadata
        # server. Where none answers (a notebook, a single board) this is one host.
        with contextlib.suppress(ValueError, OSError):
            jax.distributed.initialize()
