"""What a compiled program does in one step, read from XLA's text of it.

XLA's cost analysis counts the body of a loop once. Here every computation is weighted by how often
it runs: loops by their trip count, which scans keep in the program.
"""

import re
from collections import defaultdict
from typing import NamedTuple

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0}
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line: %name = shape opcode(...) rest."""

    name: str
    shape: str
    opcode: str
    rest: str


class Collective(NamedTuple):
    """One collective: how many bytes each device sends each time, and how often a step runs it.

    spread is how many consecutive devices one group spans: more than a node crosses the network.
    hidden: issued asynchronously, so that computation can go on meanwhile.
    """

    kind: str
    bytes: float
    times: float
    spread: int
    hidden: bool


class Kernel(NamedTuple):
    """A custom kernel that carries a cost estimate; all its runs in one run of the program."""

    name: str
    flops: float
    moved: float  # bytes


class Program(NamedTuple):
    """cycles: the compiler's own estimate over all fusions (TPU; 0 elsewhere), loops unrolled."""

    collectives: list[Collective]
    cycles: float
    kernels: list[Kernel]


def analyse(text: str, devices: int) -> Program:
    """Collectives, cycles and kernels of one run of a compiled module."""
    computations, entry = _parse(text)
    times = _times(computations, entry)
    collectives: dict[tuple, Collective] = {}
    cycles, kernels = 0.0, []
    for name, instructions in computations.items():
        if not times[name]:
            continue
        for instruction in instructions:
            if match := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
                cycles += times[name] * int(match[1])
            if instruction.opcode == "custom-call" and "cost_estimate" in instruction.rest:
                flops, moved = _estimate(instruction.rest)
                runs = times[name]
                kernels.append(Kernel(instruction.name, runs * flops, runs * moved))
            found = _collective(name, instruction, times[name], devices)
            if found is None:
                continue
            # The TPU compiler repeats an asynchronous collective, under the same channel, in the
            # fusions that start it, overlap it and wait for it.
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (found.kind, channel[1] if channel else (name, instruction.name))
            before = collectives.get(key)
            if before is None or found.times > before.times:
                collectives[key] = found
    return Program(list(collectives.values()), cycles, kernels)


def summarise(collectives: list[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (times a step, bytes each device sends a step)}."""
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for one in collectives:
        total[one.kind][0] += one.times
        total[one.kind][1] += one.times * one.bytes
    return {kind: (int(n), int(moved)) for kind, (n, moved) in sorted(total.items())}


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """{computation: its instructions} and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = rest.find(" ")
    if rest.startswith("("):  # a tuple shape: up to its closing parenthesis
        depth = 0
        for end, letter in enumerate(rest):  # noqa: B007
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                break
        end += 1
    opcode, _, tail = rest[end:].strip().partition("(")
    return Instruction(match[1], rest[:end], opcode, tail)


def _times(computations: dict[str, list[Instruction]], entry: str) -> dict[str, float]:
    """How often each computation runs in one run of the module."""
    times: dict[str, float] = dict.fromkeys(computations, 0.0)
    if entry:
        times[entry] = 1.0
    # Callees are printed before their callers, so one pass from the back is enough.
    for name in reversed(list(computations)):
        for instruction in computations[name]:
            callees = _CALLS.findall(instruction.rest)
            for group in _BRANCHES.findall(instruction.rest):
                callees += re.findall(r"[\w.\-]+", group)
            trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
            for callee in callees:
                if callee in times:
                    times[callee] += times[name] * trips
    return times


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Trip count of a while: annotated, or the one bound its condition compares with; else 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    pending, bounds = [condition[1]] if condition else [], set()
    while pending:
        for instruction in computations.get(pending.pop(), []):
            pending += _CALLS.findall(instruction.rest)
            if instruction.opcode == "constant" and re.match("[su]\\d", instruction.shape):
                bounds.add(int(instruction.rest.partition(")")[0]))
    return bounds.pop() if len(bounds) == 1 else 1


def _collective(where: str, instruction: Instruction, times: float, devices: int):
    """The Collective of an instruction, or None."""
    started = instruction.opcode.endswith("-start")
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    shapes = _tuple(instruction.shape)
    # Asynchronous gathers and permutes carry (operands, results, ...).
    if started and kind in ("all-gather", "collective-permute") and len(shapes) > 1:
        shapes = shapes[1:2]
    size = sum(map(_shape_bytes, shapes))
    group, spread = _group(instruction.rest, devices)
    if where.startswith("all-reduce-scatter"):  # the TPU compiler's form of a reduce-scatter
        kind, size = "reduce-scatter", size / group
    share = (group - 1) / group  # of the whole, what one member of a ring sends
    sent = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * group * share,
        "all-to-all": size * share,
    }.get(kind, size)
    hidden = started or where.startswith(("async_collective", "async_computation", "fused_"))
    return Collective(kind, sent, times, spread, hidden)


def _tuple(shape: str) -> list[str]:
    """Top-level members of a tuple shape; a plain shape is its own member."""
    if not shape.startswith("("):
        return [shape]
    members, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            members.append(shape[start:i])
            start = i + 1
    return members


def _shape_bytes(shape: str) -> float:
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)  # bf16, f8e4m3fn, s32, ...
        size = _BYTES.get(dtype, int(bits[1]) / 8 if bits else 4)
        for n in filter(None, dims.split(",")):
            size *= int(n)
        total += size
    return total


def _group(rest: str, devices: int) -> tuple[int, int]:
    """(members of one group, consecutive devices it spans) from replica_groups or pairs."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest):
        ends = [tuple(map(int, pair.split(","))) for pair in pairs[1].split("},{")]
        return max(len(ends), 2), max(abs(a - b) for a, b in ends) + 1
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        members = [int(n) for n in listed[1].split(",")]
        return len(members), max(members) - min(members) + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[[\d,]+\](T?)", rest):
        return int(iota[2]), devices if iota[3] else int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        group, used = 1, []
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]):
            group *= int(part or sizes[axis])
            used.append(list(sizes).index(axis))
        spread = 1
        for n in list(sizes.values())[min(used, default=0) :]:
            spread *= n
        return group, spread
    return devices, devices


def _estimate(rest: str) -> tuple[float, float]:
    """(FLOPs, bytes) of a custom kernel's cost_estimate."""
    values = [re.search(rf'"{key}":"?(\d+)', rest) for key in ("flops", "bytes_accessed")]
    return tuple(float(v[1]) if v else 0.0 for v in values)
