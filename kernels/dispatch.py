"""How every op chooses among its implementations."""

import logging
from collections.abc import Callable, Mapping, Sequence

import jax

from kernels.errors import NotSupported

# Ops whose Pallas kernel "auto" takes on a GPU: {op: {device kind: the committed file that shows it
# faster than XLA, benchmarks/results/accelerator-DEVICE.json}}. For the others impl="gpu" has to be
# asked for. An H100 is the processor of an H200 with slower memory, and the kernels were more than
# twice as fast as XLA while using a fifth of that memory's rate at most.
H200_TIMES = "benchmarks/results/accelerator-nvidia-h200.json"
HOPPER = dict.fromkeys(("NVIDIA H200", "NVIDIA H100 80GB HBM3"), H200_TIMES)
MEASURED: dict[str, dict[str, str]] = {"selective_scan": HOPPER, "ssd": HOPPER}

_logged: set[tuple[str, str]] = set()


def _device():
    """What is compiled for: the devices of the mesh that is set, attached or not, or JAX's own."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform() -> str:
    """cpu, gpu or tpu."""
    return _device().platform


def device_kind() -> str:
    """The device's name, as "NVIDIA H100 80GB HBM3"."""
    return _device().device_kind


def choose(
    op: str,
    impl: str,
    implementations: Mapping[str, Callable],
    auto: Mapping[str, Sequence[str]],
) -> tuple[Callable, str]:
    """(function, name) of a named implementation, or one that tries those of `auto` in order.

    auto: names by platform; "cpu" stands for every platform that is not there. Pallas kernels for
    GPUs are not among them: they come first where MEASURED says so.

    A named implementation never falls back; "auto" goes on to the next only on NotSupported, and
    logs once what it took.
    """
    if impl != "auto":
        if impl not in implementations:
            allowed = ", ".join(implementations)
            raise ValueError(f"{op}: impl={impl!r}, allowed: auto, {allowed}")
        return implementations[impl], impl

    def first_that_can(*args, **kwargs):
        reasons = []
        for name in _order(op, auto):
            try:
                out = implementations[name](*args, **kwargs)
            except NotSupported as error:
                reasons.append(f"{name}: {error}")
                continue
            if (op, name) not in _logged:
                _logged.add((op, name))
                logging.info("%s: impl=auto takes %s", op, name)
            return out
        raise NotSupported(f"{op}: no implementation takes this ({'; '.join(reasons)})")

    return first_that_can, "auto"


def _order(op: str, auto: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """What "auto" tries here."""
    names = auto.get(platform(), auto["cpu"])
    if platform() == "gpu" and device_kind() in MEASURED.get(op, {}):
        return ("gpu", *names)
    return names
