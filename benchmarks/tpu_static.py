"""What TPU compilers make of the kernels: schedules, slot use, spills; no TPU is needed.

    python -m benchmarks.tpu_static --out=benchmarks/results/tpu_static.json

For every kernel, shape and chip: VLIW bundles of one grid step (a bundle is a cycle, stalls aside),
how much of the matrix, vector and other slots they use, registers spilt and filled, and from these
a lower bound of the time (the larger of bundles and bytes) beside the roofline's (FLOPs over the
chip's peak, bytes over its memory bandwidth). Then the whole op, fusions around the kernels
included, beside the compiler's own estimate for the XLA formulation. What is compiled of each op
says benchmarks/static_ops. The figures do not depend on the machine's load. Needs the extra `aot`;
two minutes a chip and op on two cores.
"""

import json
import re
import tempfile
from pathlib import Path

from benchmarks import static, static_ops

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
SLOTS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL")
SUFFIX = "final_hlo-static-per-bundle-utilization.txt"

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|\d+) +(\w\w)? *: (>*) *\{")

# Cores of a chip that is one device to JAX: the compiler divides parallel grid cells among them.
CORES = {"v5p": 2}


def arguments(argv=None):
    """Command line of this benchmark."""
    parser = static.parser(__doc__, static_ops.TPU)
    parser.add_argument("--topology", default=",".join(CHIPS))
    parser.add_argument("--chunk", type=int, default=0, help="0: each op's own")
    parser.add_argument(
        "--kernels-only", action="store_true", help="no comparison with XLA, most of the time"
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Compiles each chip's kernels in a process of its own."""
    args = arguments(argv)
    if args.one:
        print(json.dumps(one(args)))
        return
    chunk = f" --chunk={args.chunk}" if args.chunk else ""
    command = f"python -m benchmarks.tpu_static{chunk} --tokens={args.tokens}"
    for op in args.op.split(","):
        for chip in args.topology.split(","):  # what is done is written
            static.report(_process(op, chip, args), command, args.out)


def _process(op: str, chip: str, args) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--one={folder}", f"--op={op}", f"--topology={chip}"]
        flags += [f"--chunk={args.chunk}", f"--tokens={args.tokens}"]
        flags += ["--kernels-only"] * args.kernels_only
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        printed = static.child("benchmarks.tpu_static", chip, flags, {"LIBTPU_INIT_ARGS": dump})
        return json.loads(printed.splitlines()[-1])


def one(args) -> list[dict]:
    """Rows of one op on one chip."""
    import jax

    from eval import hlo
    from training import topology

    where = topology.parse(args.topology)
    device = topology.devices(where)[0]
    op = static_ops.TPU[args.op](where, device, args)
    label = dict(op=args.op)

    def compiled(program):
        with jax.set_mesh(jax.sharding.Mesh([device], ("data",))):  # ops see what they run on
            run = jax.jit(program.function, donate_argnums=program.donate)
            text = run.lower(*program.arrays).compile().as_text()
        return hlo.analyse(text, 1)

    programs = {what: compiled(program) for what, program in op.programs.items()}
    # The XLA formulation at the chunk that its own estimate likes best.
    xla = {
        what: {chunk: compiled(program).cycles for chunk, program in each.items()}
        for what, each in op.xla.items()
        if not args.kernels_only
    }
    cores, chip = CORES.get(where.kind, 1), where.chip
    found, times = [], {}
    for row, kernel in op.kernels.items():
        schedule, capacity = read(args.one, kernel.name, kernel.trips)
        # A kernel of several programs is the same in all of them.
        works = (x for program in [*programs.values()][::-1] for x in program.kernels)
        work = next(x for x in works if kernel.name in x.name)
        matrix, memory = work.flops / chip.peak, work.moved / chip.hbm_rate
        slots = max(kernel.vector / capacity["VALU"], kernel.exponentials / capacity["EUP"])
        vector = slots / chip.clock / cores
        seconds = kernel.steps * schedule["bundles"] / chip.clock
        seconds /= cores if kernel.parallel else 1
        times[row] = _round(max(seconds, memory) * 1e3)
        found.append(
            label
            | dict(kernel=row, chip=where.kind, **op.columns, grid_steps=kernel.steps)
            | schedule
            | {
                "ms_bundles": _round(seconds * 1e3),
                "ms_matrix_unit": _round(matrix * 1e3),
                "ms_memory": _round(memory * 1e3),
            }
            | ({"ms_vector_unit": _round(vector * 1e3)} if vector else {})
            | {"over_bound": _round(max(seconds, memory) / max(matrix, memory, vector))}
        )
    # XLA's fusions, around the kernels as well, are taken to use both cores too; its estimate does
    # not say.
    rate = 1e-3 * chip.clock * cores
    for what in xla:
        program = programs[what]
        kernels, around = sum(times[row] for row in op.uses[what]), program.cycles / rate
        best = min(xla[what], key=xla[what].get)
        theirs = xla[what][best] / rate
        found.append(
            label
            | dict(compare=what, chip=where.kind, tokens=args.tokens, ms_kernels=_round(kernels))
            | {"ms_around": _round(around), "ms_xla": _round(theirs), "xla_chunk": best}
            | {"ratio": _round(theirs / (kernels + around))}
        )
    return found


def read(folder: str, kernel: str, trips=()) -> tuple[dict, dict]:
    """(bundles of a grid step and their slot use, slots of a bundle), from the newest dump of a
    kernel's final schedule; bundles of its loops count as often as they run."""
    lines = _newest(folder, kernel, SUFFIX)
    capacity = dict(zip(SLOTS, map(int, lines[2].split())))
    bundles = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    times = [1] * len(bundles)
    if trips:
        times = _times(_newest(folder, kernel, "final_bundles.txt"), trips)
    total = sum(times)
    used = [sum(n * x for n, x in zip(times, column)) for column in zip(*bundles, strict=True)]
    return {"bundles": round(total)} | {
        slot.lower(): round(used[i]) if slot in ("FILL", "SPILL") else _round(used[i] / total / n)
        for i, (slot, n) in enumerate(capacity.items())
    }, capacity


def _newest(folder: str, kernel: str, suffix: str) -> list[str]:
    files = Path(folder).glob(f"*{kernel}*[0-9]-{suffix}")
    newest = max(files, key=lambda p: p.stat().st_mtime_ns, default=None)
    if newest is None:
        raise RuntimeError(f"the compiler left no schedule of {kernel!r} in its dump")
    return newest.read_text().splitlines()


def _times(lines: list[str], trips) -> list[int]:
    """How often each bundle runs in a grid step: `LB: >>` begins a loop inside the grid's, and
    bundles of its body are marked with two arrows; with one where each core has one grid step."""
    bundles = [m.groups() for line in lines if (m := BUNDLE.match(line))]
    grid = any(mark == "LB" and len(depth) > 1 for mark, depth in bundles)
    times, loop = [], -1
    for mark, depth in bundles:
        inside = len(depth) > grid
        loop += inside and mark == "LB"
        times.append(trips[loop] if inside and loop < len(trips) else 1)
    if loop + 1 != len(trips):
        raise RuntimeError(f"the kernel has {loop + 1} loops, not {len(trips)}")
    return times


def _round(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
