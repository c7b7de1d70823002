"""impl="auto" on GPUs: a Pallas kernel only where a committed measurement shows it faster."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels import dispatch
from kernels.bitwise import bitwise_cross_entropy, sample_bits
from kernels.errors import NotSupported
from kernels.mlstm import State, mlstm, mlstm_step
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.ssd import ssd

ROOT = Path(__file__).resolve().parents[2]
H100 = "NVIDIA H100 80GB HBM3"


def on(kind, platform="gpu"):
    """The context of programs for a device that is not there."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def arrays(*shapes, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def wide(*shapes):
    return arrays(*shapes, dtype=jnp.float32)


TOKENS, LEAD = 256, (1, 2)
WEIGHTS = wide((128, 16), (128,))  # of the scans: A, D
OPS = {
    "mlstm": (mlstm, arrays(*((*LEAD, TOKENS, 64),) * 3) + wide(*((*LEAD, TOKENS),) * 2)),
    "mlstm_step": (
        lambda q, k, v, i, f, *state: mlstm_step(q, k, v, i, f, State(*state)),
        arrays(*((*LEAD, 64),) * 3) + wide(LEAD, LEAD, (*LEAD, 64, 64), (*LEAD, 64), LEAD),
    ),
    "ssd": (
        lambda x, delta, B, C, A, D: ssd(x, delta, A, B, C, D),
        arrays((1, TOKENS, 2, 64), (1, TOKENS, 2), *((1, TOKENS, 1, 64),) * 2) + wide((2,), (2,)),
    ),
    "selective_scan": (
        lambda u, delta, B, C, A, D: selective_scan(u, delta, A, B, C, D),
        arrays(*((1, TOKENS, 128),) * 2, *((1, TOKENS, 16),) * 2) + WEIGHTS,
    ),
    "selective_scan_step": (
        lambda u, delta, B, C, A, D, h: selective_scan_step(u, delta, A, B, C, D, h),
        arrays(*((1, 128),) * 2, *((1, 16),) * 2) + WEIGHTS + wide((1, 128, 16)),
    ),
    "bitwise_cross_entropy": (
        bitwise_cross_entropy,
        arrays((TOKENS, 128)) + wide((128, 32), (32,)) + arrays((TOKENS, 1), dtype=jnp.uint32),
    ),
    "sample_bits": (sample_bits, arrays((TOKENS, 128)) + wide((128, 32), (32,), (TOKENS, 32))),
}


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_a_gpu_kernel_only_where_it_was_measured(op, monkeypatch):
    """Hopper without an entry, with one, and a device of another name."""
    run, inputs = OPS[op]

    def takes_a_kernel(kind):
        jax.clear_caches()  # what was traced does not look again
        with on(kind):
            return "run_scoped" in str(jax.make_jaxpr(run)(*inputs))

    monkeypatch.setattr(dispatch, "MEASURED", {})
    assert not takes_a_kernel(H100)
    monkeypatch.setattr(dispatch, "MEASURED", {op: {H100: "a file"}})
    assert takes_a_kernel(H100)
    assert not takes_a_kernel("NVIDIA H200")


def test_a_measured_kernel_still_leaves_what_it_cannot_take(monkeypatch):
    """A typed NotSupported goes on to the next; platforms and names as before."""

    def refuses(x):
        raise NotSupported("odd")

    made = {"gpu": refuses, "tpu": lambda x: "tpu", "xla": lambda x: "xla"}
    auto = {"tpu": ("tpu", "xla"), "cpu": ("xla",)}
    monkeypatch.setattr(dispatch, "MEASURED", {"an op": {H100: "a file"}})
    run, _ = dispatch.choose("an op", "auto", made, auto)
    with on(H100):
        assert run(0) == "xla"
        with pytest.raises(NotSupported, match="odd"):
            dispatch.choose("an op", "gpu", made, auto)[0](0)
    made["gpu"] = lambda x: "gpu"
    with on(H100):
        assert run(0) == "gpu"
    with on("TPU v5 lite", "tpu"):
        assert run(0) == "tpu"
    assert run(0) == "xla"


def slower_or_missing(op, path):
    """Why a committed file is no reason for an entry of MEASURED; empty where it is one."""
    if not path.is_file():
        return [f"{path} is not there"]
    label, rows = op.replace("_", " "), json.loads(path.read_text())["rows"]

    def seconds(impl):
        parts = ("length", "rows", "pass")
        found = [row for row in rows if row.get("what") == f"{label} {impl}" and "seconds" in row]
        return {tuple(row.get(part) for part in parts): row["seconds"] for row in found}

    ours, theirs = seconds("gpu"), seconds("xla")
    slower = [case for case in ours if case in theirs and ours[case] >= theirs[case]]
    return [f"{op} is slower at {slower}"] * bool(slower) or (
        [] if ours.keys() & theirs.keys() else [f"{path} times no kernel of {op} beside XLA"]
    )


def test_entries_name_files_that_show_it(tmp_path):
    """And what such a file has to look like (rows of benchmarks/accelerator.py)."""
    for op, devices in dispatch.MEASURED.items():
        for name in devices.values():
            assert not slower_or_missing(op, ROOT / name)
    assert "not there" in slower_or_missing("mlstm", tmp_path / "none.json")[0]

    def file(**seconds):
        common = {"length": 8192, "rows": 8, "pass": "forward"}
        rows = [{"what": f"mlstm step {k}", "seconds": v} | common for k, v in seconds.items()]
        path = tmp_path / "rows.json"
        path.write_text(json.dumps({"rows": rows}))
        return path

    assert not slower_or_missing("mlstm_step", file(xla=2.0, gpu=1.0))
    assert "slower" in slower_or_missing("mlstm_step", file(xla=1.0, gpu=1.5))[0]
    assert "no kernel of mlstm_step" in slower_or_missing("mlstm_step", file(xla=1.0))[0]
