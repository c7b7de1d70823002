"""What the H100 compilers make of the kernels: registers, spills, wgmma, TMA; no GPU is needed.

    python -m benchmarks.gpu_static --out=benchmarks/results/gpu_static.json

For every kernel of every op, forward and backward and for one token, at a published model's sizes
(benchmarks/static_ops): ptxas's report, wgmma and TMA instructions in the PTX, and the least time
that the chip's peak and memory bandwidth allow for the FLOPs and bytes of the whole call. For one
token of the mLSTM also how often the compiled program reads or writes each head's memory, with the
kernel and with XLA. How long it takes, only a GPU can say (`python -m benchmarks.accelerator`).
Needs the extra `aot`.
"""

import json
import math
import re

from benchmarks import static, static_ops

CHIP = "h100:1"
ENTRY = re.compile(r"^\.visible \.entry (\w+?)_mosaic_gpu_kernel", re.M)


def arguments(argv=None):
    """Command line of this benchmark."""
    return static.parser(__doc__, static_ops.GPU).parse_args(argv)


def main(argv=None) -> None:
    """Compiles each program in a process of its own."""
    args = arguments(argv)
    if args.one:
        return _child(args)
    rows = [row for op in args.op.split(",") for row in _op(op, args.tokens)]
    static.report(rows, f"python -m benchmarks.gpu_static --tokens={args.tokens}", args.out)


def _op(op: str, tokens: int) -> list[dict]:
    rows = []
    for program in static_ops.GPU[op]:
        rows += [dict(op=op, program=program) | row for row in _program(op, program, tokens)]
    if op in static_ops.GPU_ROWS:
        rows += [dict(op=op) | row for row in json.loads(_run(op, "rows", tokens))]
    return rows


def _run(op: str, what: str, tokens: int) -> str:
    flags = [f"--one={what}", f"--op={op}", f"--tokens={tokens}"]
    dumps = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"} if what != "rows" else {}
    return static.child("benchmarks.gpu_static", CHIP, flags, dumps)


def _program(op: str, program: str, tokens: int) -> list[dict]:
    printed = _run(op, program, tokens)
    rows, last = kernels(printed, op), json.loads(printed.splitlines()[-1])
    if sorted(row["kernel"] for row in rows) != last.pop("kernels"):
        raise SystemExit(f"{op}, {program}: the kernels are {[row['kernel'] for row in rows]}")
    return [*rows, last]


def _child(args) -> None:
    """Compiles one program; its last line is its cost beside the chip's limits."""
    from training import topology

    where = topology.parse(CHIP)
    device = topology.devices(where)[0]  # every call describes another device
    if args.one == "rows":
        print(json.dumps(static_ops.GPU_ROWS[args.op](where, device, args)))
        return
    program = static_ops.GPU[args.op][args.one](where, device, args)
    compiled = static.compile_gpu(where, device, program.function, *program.arrays)
    row = dict(kernels=program.kernels) | program.columns
    if program.temporaries:
        mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
        row |= dict(temporary_mib=round(mib, 1))
    print("\n" + json.dumps(row))


def kernels(text: str, op: str) -> list[dict]:
    """One row per kernel, from the PTX and ptxas's reports that were printed."""
    starts = [m.start() for m in ENTRY.finditer(text)]
    rows = []
    for begin, end in zip(starts, [*starts[1:], len(text)]):
        part = text[begin:end]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        rows.append(
            dict(
                kernel=ENTRY.match(part)[1].removeprefix(f"{op}_"),
                registers=int(re.search(r"Used (\d+) registers", part)[1]),
                spill_stores=int(spills[1]),
                spill_loads=int(spills[2]),
                spills_in_loops=_in_loops(part) and int(spills[1]) > 0,
                wgmma=len(re.findall(r"wgmma\.mma_async", part)),
                tma=len(re.findall(r"cp\.async\.bulk\.tensor", part)),
            )
        )
    return rows


def _in_loops(ptx: str) -> bool:
    """Whether a wgmma stands between a label and a later jump back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.M)}
    for jump in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx):
        begin = labels.get(jump[1], len(ptx))
        if begin < jump.start() and "wgmma.mma_async" in ptx[begin : jump.start()]:
            return True
    return False


def passes(text: str, size: int, layers: int = 1) -> tuple[int, int]:
    """How often a compiled program reads or writes float32 arrays of `size` numbers: (in a loop's
    body, elsewhere); a stack of `layers` of them counts as one."""
    computations = _computations(text)
    callers = {
        callee: name
        for name, lines in computations.items()
        for callee in re.findall(r"\bcalls=%?([\w.\-]+)", "\n".join(lines))
    }
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    inside = outside = 0
    for name, lines in computations.items():
        found = sum(_touched(line, size, size * layers, name in callers) for line in lines)
        if callers.get(name, name) in bodies:
            inside += found
        else:
            outside += found
    return inside, outside


def _computations(text: str) -> dict[str, list[str]]:
    """{name: lines} of an HLO module's text."""
    found, lines = {}, []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            lines = found.setdefault(header[1], [])
        else:
            lines.append(line)
    return found


def _touched(line: str, size: int, stack: int, fused: bool) -> int:
    """How many arrays of one layer's size an instruction takes from memory or gives to it."""
    match = re.match(r"\s+(ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(", line)
    if not match:
        return 0
    root, shapes, opcode = match.groups()

    def count(text, *sizes):
        arrays = re.findall(r"\bf32\[([\d,]+)\]", text)
        return sum(math.prod(map(int, dims.split(","))) in sizes for dims in arrays)

    if opcode == "dynamic-update-slice":  # in place: one layer is written
        return count(shapes, stack)
    if fused and opcode in ("parameter", "dynamic-slice"):  # of a stack a slice is read
        return count(shapes, size)
    if fused:  # the rest of a fusion stays in registers, except what it returns
        return count(shapes, size, size if opcode == "tuple" else stack) if root else 0
    if opcode == "custom-call":
        operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", line)
        return count(shapes, size) + count(operands[1] if operands else "", size)
    return 2 * count(shapes, size, stack) if opcode == "copy" else 0


if __name__ == "__main__":
    main()
