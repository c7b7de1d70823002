"""What the H100 compilers make of the kernels: registers, spills, wgmma, TMA; no GPU is needed.

    python -m benchmarks.gpu_static --out=benchmarks/results/gpu_static.json

For every kernel of the mLSTM, forward and backward and for one token, at xLSTM 7B's head sizes:
ptxas's report, wgmma and TMA instructions in the PTX, and the least time that the chip's peak and
memory bandwidth allow for the FLOPs and bytes of the whole call. For one token also how often the
compiled program reads or writes each head's memory, with the kernel and with XLA. How long it
takes, only a GPU can say (`python -m benchmarks.accelerator`). Needs the extra `aot`.
"""

import functools
import json
import math
import re

from benchmarks import static

CHIP = "h100:1"
ENTRY = re.compile(r"^\.visible \.entry mlstm_(\w+?)_mosaic_gpu_kernel", re.M)
# Kernels of each program; C is computed again for the gradient.
USES = {
    "forward": ["C", "h"],
    "forward + backward": ["C", "C", "dC", "dk", "dq", "dv", "h"],
    "step": ["step"],
}
LAYERS = 32  # of xLSTM 7B


def arguments(argv=None):
    """Command line of this benchmark."""
    return static.parser(__doc__).parse_args(argv)


def main(argv=None) -> None:
    """Compiles each program in a process of its own."""
    args = arguments(argv)
    if args.one == "step":
        return compile_step()
    if args.one == "passes":
        return compile_passes()
    if args.one:
        return compile_one(args.one, args.tokens)
    rows = [row for program in USES for row in _program(program, args.tokens)]
    rows += json.loads(static.child("benchmarks.gpu_static", CHIP, ["--one=passes"], {}))
    static.report(rows, f"python -m benchmarks.gpu_static --tokens={args.tokens}", args.out)


def _program(program: str, tokens: int) -> list[dict]:
    flags = [f"--one={program}", f"--tokens={tokens}"]
    dumps = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    printed = static.child("benchmarks.gpu_static", CHIP, flags, dumps)
    rows = kernels(printed)
    if sorted(row["kernel"] for row in rows) != USES[program]:
        raise SystemExit(f"{program}: the kernels are {[row['kernel'] for row in rows]}")
    rows.append(json.loads(printed.splitlines()[-1]))
    return [dict(program=program) | row for row in rows]


def kernels(text: str) -> list[dict]:
    """One row per kernel, from the PTX and ptxas's reports that were printed."""
    starts = [m.start() for m in ENTRY.finditer(text)]
    rows = []
    for begin, end in zip(starts, [*starts[1:], len(text)]):
        part = text[begin:end]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        rows.append(
            dict(
                kernel=ENTRY.match(part)[1],
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


@functools.cache  # every call of JAX's describes another device
def _device():
    """(topology, its first device)."""
    from training import topology

    where = topology.parse(CHIP)
    return where, topology.devices(where)[0]


def _compile(function, *inputs, donate=()):
    import jax

    from training import topology

    where, device = _device()
    with jax.set_mesh(jax.sharding.Mesh([device], ("data",))):
        traced = jax.jit(function, donate_argnums=donate).trace(*inputs)
        lowered = traced.lower(lowering_platforms=("cuda",))
        return lowered.compile(topology.compiler_options(where))


def compile_one(program: str, tokens: int) -> None:
    """Compiles one program; its last line is its cost beside the chip's limits."""
    import jax
    import jax.numpy as jnp

    from kernels.mlstm import mlstm

    where, device = _device()
    _, inputs = static.mlstm_7b(device, tokens)
    (b, h, t, k), v, length = inputs[0].shape, inputs[2].shape[3], 128

    def loss(*x):
        return (mlstm(*x, impl="gpu")[0].astype(jnp.float32) ** 2).sum()

    backward = program != "forward"
    function = jax.grad(loss, argnums=(0, 1, 2, 3, 4)) if backward else loss
    compiled = _compile(function, *inputs)
    # Per token and head: products of 2 FLOPs; half of the scores are never needed.
    scores, values, memory = length * k, length * v, k * v
    flops, moved = scores + values + 4 * memory, 2 * (2 * k + 2 * v)
    if backward:
        flops += 3 * scores + 3 * values + 10 * memory
        moved += 2 * (4 * k + 3 * v)
    chip = where.chip
    row = dict(
        tokens=t,
        ms_matrix_unit=round(b * h * t * flops / chip.peak * 1e3, 3),
        ms_memory=round(b * h * t * moved / chip.hbm_rate * 1e3, 3),
        temporary_mib=round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
    )
    print("\n" + json.dumps(row))


def compile_step() -> None:
    """Compiles one token of one row; its last line is the least that has to be moved."""
    from kernels.mlstm import mlstm_step

    where, device = _device()
    *inputs, state = _token(device, 1)
    _compile(functools.partial(mlstm_step, impl="gpu"), *inputs, state)
    heads, k, v = state.C.shape[1:]
    moved = 2 * 4 * heads * k * v
    row = dict(bytes_per_head=moved // heads, ms_memory=moved / where.chip.hbm_rate * 1e3)
    print("\n" + json.dumps(row | {"ms_memory": round(row["ms_memory"], 4)}))


def _token(device, rows: int, *layers: int):
    """(q, k, v, i, f, state) of one token, the state for each layer."""
    import jax.numpy as jnp

    from kernels.mlstm import State

    array, inputs = static.mlstm_7b(device, 1)
    heads, k, v = inputs[0].shape[1], inputs[0].shape[3], inputs[2].shape[3]
    inputs = (array(rows, heads, *x.shape[3:], dtype=x.dtype) for x in inputs)
    lead = (*layers, rows, heads)
    state = (array(*lead, *rest, dtype=jnp.float32) for rest in ((k, v), (k,), ()))
    return *inputs, State(*state)


def compile_passes() -> None:
    """Prints a list of rows: passes over C, alone and as models call it, in a scan over layers
    whose states are donated."""
    import jax

    from kernels.mlstm import mlstm_step

    _, device = _device()

    def layers(impl, q, k, v, i, f, states):
        return jax.lax.scan(lambda v, s: mlstm_step(q, k, v, i, f, s, impl=impl), v, states)

    found = []
    for rows in (1, 8):
        one, stack = _token(device, rows), _token(device, rows, LAYERS)
        size = math.prod(one[-1].C.shape)
        for impl in ("xla", "gpu"):
            call = functools.partial(mlstm_step, impl=impl)
            alone = _compile(call, *one).as_text()
            launches = len(
                re.findall(r" (?:fusion|custom-call|copy)\(", alone[alone.index("ENTRY") :])
            )
            scan = _compile(functools.partial(layers, impl), *stack, donate=5).as_text()
            inside, around = passes(scan, size, LAYERS)
            row = dict(program="step", rows=rows, impl=impl, launches=launches)
            row |= dict(passes=sum(passes(alone, size)), passes_in_scan=inside)
            found.append(row | dict(passes_around_scan=around))
    print(json.dumps(found))


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
