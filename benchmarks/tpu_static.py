"""What TPU compilers make of the kernels: schedules, slot use, spills; no TPU is needed.

    python -m benchmarks.tpu_static --out=benchmarks/results/tpu_static.json

For every kernel, shape and chip: VLIW bundles of one grid step (a bundle is a cycle, stalls aside),
how much of the matrix, vector and other slots they use, registers spilt and filled, and from these
a lower bound of the time (the larger of bundles and bytes) beside the roofline's (FLOPs over the
chip's peak, bytes over its memory bandwidth). Then the whole op, fusions around the kernels
included, beside the compiler's own estimate for the XLA formulation. The figures do not depend on
the machine's load. Needs the extra `aot`; two minutes a chip on two cores.
"""

import json
import tempfile
from pathlib import Path

from benchmarks import static

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
SLOTS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL")
SUFFIX = "final_hlo-static-per-bundle-utilization.txt"


# Cores of a chip that is one device to JAX: the compiler divides parallel grid cells among them.
CORES = {"v5p": 2}


def arguments(argv=None):
    """Command line of this benchmark."""
    parser = static.parser(__doc__)
    parser.add_argument("--topology", default=",".join(CHIPS))
    parser.add_argument("--chunk", type=int, default=256)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Compiles each chip's kernels in a process of its own."""
    args = arguments(argv)
    if args.one:
        print(json.dumps(one(args.topology, args.one, args.chunk, args.tokens)))
        return
    rows = [row for name in args.topology.split(",") for row in _process(name, args)]
    command = f"python -m benchmarks.tpu_static --chunk={args.chunk} --tokens={args.tokens}"
    static.report(rows, command, args.out)


def _process(name: str, args) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--one={folder}", f"--topology={name}"]
        flags += [f"--chunk={args.chunk}", f"--tokens={args.tokens}"]
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        printed = static.child("benchmarks.tpu_static", name, flags, {"LIBTPU_INIT_ARGS": dump})
        return json.loads(printed.splitlines()[-1])


def one(name: str, folder: str, chunk: int, tokens: int) -> list[dict]:
    """Rows of one chip."""
    import jax
    import jax.numpy as jnp

    from kernels.mlstm import mlstm
    from training import hlo, topology

    where = topology.parse(name)
    array, inputs = static.mlstm_7b(topology.devices(where)[0], tokens)
    b, h, t, _ = inputs[0].shape

    def forward(impl, size):
        return lambda *x: mlstm(*x, impl=impl, chunk=size)[0]

    def gradient(impl, size):
        # Of a weighted sum, so that the gradient of h is an array as in a model.
        def total(weight, *x):
            return (mlstm(*x, impl=impl, chunk=size)[0].astype(jnp.float32) * weight).sum()

        return jax.grad(total, argnums=(1, 2, 3, 4, 5))

    def program(function, *arrays):
        return hlo.analyse(jax.jit(function).lower(*arrays).compile().as_text(), 1)

    weighted = (array(*inputs[2].shape), *inputs)
    alone, both = (
        program(forward("tpu", chunk), *inputs),
        program(gradient("tpu", chunk), *weighted),
    )
    # The XLA formulation at the chunk that its own estimate likes best.
    sizes = (64, 128, 256)
    xla_forward = {n: program(forward("xla", n), *inputs).cycles for n in sizes}
    xla_both = {n: program(gradient("xla", n), *weighted).cycles for n in sizes}
    steps, chip = b * h * t // chunk, where.chip
    found = []
    for kernel in ("forward", "states", "backward"):
        schedule = read(folder, f"mlstm_{kernel}")
        (work,) = (x for x in both.kernels if f"mlstm_{kernel}" in x.name)
        matrix, memory = work.flops / chip.peak, work.moved / chip.hbm_rate
        seconds = steps * schedule["bundles"] / chip.clock / CORES.get(where.kind, 1)
        found.append(
            dict(op="mlstm", kernel=kernel, chip=where.kind, chunk=chunk, grid_steps=steps)
            | schedule
            | {
                "ms_bundles": _round(seconds * 1e3),
                "ms_matrix_unit": _round(matrix * 1e3),
                "ms_memory": _round(memory * 1e3),
                "over_bound": _round(max(seconds, memory) / max(matrix, memory)),
            }
        )
    times = [max(row["ms_bundles"], row["ms_memory"]) for row in found]
    # XLA's fusions, around the kernels as well, are taken to use both cores too; its estimate does
    # not say.
    rate = 1e-3 * chip.clock * CORES.get(where.kind, 1)
    for what, kernels, around, theirs in (
        ("forward", times[0], alone.cycles / rate, xla_forward),
        ("forward + backward", sum(times), both.cycles / rate, xla_both),
    ):
        best = min(theirs, key=theirs.get)
        ours, xla = kernels + around, theirs[best] / rate
        found.append(
            dict(op="mlstm", compare=what, chip=where.kind, tokens=t, ms_kernels=_round(kernels))
            | {"ms_around": _round(around), "ms_xla": _round(xla), "xla_chunk": best}
            | {"ratio": _round(xla / ours)}
        )
    return found


def read(folder: str, kernel: str) -> dict:
    """Bundles and slot use of a kernel, from the newest dump of its final schedule."""
    files = [p for p in Path(folder).glob(f"*{kernel}*{SUFFIX}") if "pre-delay" not in p.name]
    if not files:
        raise RuntimeError(f"the compiler left no schedule of {kernel!r} in its dump")
    lines = max(files, key=lambda p: p.stat().st_mtime_ns).read_text().splitlines()
    capacity = [int(x) for x in lines[2].split()]
    bundles = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    used = [sum(column) for column in zip(*bundles)]
    return {"bundles": len(bundles)} | {
        slot.lower(): used[i] if slot in ("FILL", "SPILL") else _round(used[i] / len(bundles) / n)
        for i, (slot, n) in enumerate(zip(SLOTS, capacity))
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
