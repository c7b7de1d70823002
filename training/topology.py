"""Named accelerator slices that a CPU-only machine can compile for, and what their chips can do.

v5e:16x16   256 TPU v5e chips        v5p:4x4x4   64 TPU v5p chips
v6e:8x8      64 TPU v6e chips        h100:16     two nodes of eight H100s
"""

import importlib.util
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from training.platform import LIBTPU_ARGS

GIB = 2**30
INSTALL = "install the ahead-of-time compilers: pip install -e '.[aot]'"


class Chip(NamedTuple):
    """One device. Rates are the vendor's peaks, in bytes or FLOPs a second.

    link is what one ring of a collective can use in one direction inside a node or slice; network
    is the same between nodes of `node` devices (0: the links reach every device of the slice).
    clock turns the TPU compiler's cycle estimates into seconds. efficiency is the share of the peak
    that large matrix products reach where the compiler gives no estimate (GPUs).
    """

    platform: str
    hbm: int
    peak: float  # bf16
    hbm_rate: float
    link: float
    clock: float = 0.0
    efficiency: float = 1.0
    network: float = 0.0
    node: int = 0


CHIPS = {
    # HBM as the TPU compiler's own limit reports it.
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 819e9, 100e9, clock=1.5e9),
    "v5p": Chip("tpu", int(95.73 * GIB), 459e12, 2765e9, 200e9, clock=1.75e9),
    "v6e": Chip("tpu", int(31.24 * GIB), 918e12, 1640e9, 200e9, clock=1.75e9),
    # SXM5 80 GB; NVLink 4 inside a node, one 400 Gbit/s port a GPU between nodes.
    "h100": Chip(
        "cuda", int(79.1 * GIB), 989e12, 3352e9, 450e9, efficiency=0.7, network=50e9, node=8
    ),
}


class Topology(NamedTuple):
    """A parsed name: chip kind and the number of chips along each axis of the slice."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def parse(name: str) -> Topology:
    """'v5e:16x16' or 'h100:8' -> Topology; one line says what is allowed otherwise."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name or "")
    if match and match[1] in CHIPS:
        shape = tuple(int(n) for n in match[2].split("x"))
        axes = {"v5p": 3, "h100": 1}.get(match[1], 2)
        if len(shape) == axes and all(shape):
            return Topology(name, match[1], shape)
    raise ValueError(
        f"--topology={name!r}: allowed are v5e:AxB, v5p:AxBxC, v6e:AxB (chips along each axis, as "
        "v5e:16x16, v5p:4x4x4, v6e:8x8) and h100:N"
    )


def environment(topology: Topology) -> dict[str, str]:
    """Variables a process must have before it imports jax to compile for this topology."""
    env = {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for absent devices cannot be reloaded
    }
    if topology.chip.platform == "tpu":  # no metadata server to ask, no chip to lock
        env |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        env["LIBTPU_INIT_ARGS"] = os.environ.get("LIBTPU_INIT_ARGS", LIBTPU_ARGS)
    return env


def compiler_options(topology: Topology) -> dict[str, Any]:
    """Options of .compile() that a machine without the accelerator needs."""
    if topology.chip.platform == "tpu":
        return {}
    options = {"xla_gpu_autotune_level": 0}  # autotuning would run candidates, which takes a GPU
    if cuda := _cuda_root():
        options["xla_gpu_cuda_data_dir"] = cuda
    return options


def check_installed(topology: Topology) -> None:
    """One line that says what to install when the compiler for this platform is absent."""
    if topology.chip.platform == "tpu":
        if not _found("libtpu"):
            raise ValueError(f"--topology={topology.name} needs libtpu; {INSTALL}")
        return
    if not (_found("jax_plugins.xla_cuda13") or _found("jax_plugins.xla_cuda12")):
        raise ValueError(f"--topology={topology.name} needs jax-cuda13-plugin; {INSTALL}")


def devices(topology: Topology) -> list[Any]:
    """The slice's devices: described, not attached."""
    from jax.experimental.topologies import get_topology_desc

    check_installed(topology)
    try:
        if topology.chip.platform == "tpu":
            return list(get_topology_desc(topology.name, platform="tpu").devices)
        node = topology.chip.node
        if topology.count > node and topology.count % node:
            raise ValueError(f"more than one node takes a multiple of {node} GPUs")
        nodes, each = max(topology.count // node, 1), min(topology.count, node)
        target = (Path(__file__).parent / "h100.txtpb").read_text()
        described = get_topology_desc(
            topology.name, platform="cuda", target_config=target, topology=f"1x{nodes}x{each}"
        )
        return list(described.devices)
    except (ValueError, RuntimeError) as error:  # e.g. v5e:3x5, which is no slice
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={topology.name} is refused: {reason}") from None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _cuda_root() -> str:
    """Folder that holds bin/ptxas: CUDA_HOME, the PATH, or the nvidia-cuda-nvcc wheel; '' if none.

    XLA links a PTX compiler of its own and does without, but uses a newer ptxas when it finds one.
    """
    roots = [os.environ.get("CUDA_HOME", "")]
    if ptxas := shutil.which("ptxas"):
        roots.append(str(Path(ptxas).resolve().parents[1]))
    if _found("nvidia"):
        found = importlib.util.find_spec("nvidia").submodule_search_locations
        roots += [str(Path(where) / "cu13") for where in found]
    return next((r for r in roots if r and (Path(r) / "bin" / "ptxas").is_file()), "")
