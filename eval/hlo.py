"""What a compiled program does in one step, read from XLA's text of it.

XLA's cost analysis counts the body of a loop once. Here every computation is weighted by how often
it runs: loops by their trip count, which scans keep in the program.
"""

import functools
import math
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


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
# Instructions that move nothing themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "partition-id", "replica-id", "add-dependency",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written over the first


class Instruction(NamedTuple):
    """One line: %name = shape opcode(operands), rest; rest begins with the operands."""

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names of the instructions it takes."""
        depth, end = 1, 0
        for end, letter in enumerate(self.rest):  # noqa: B007
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                break
        return re.findall(r"%([\w.\-]+)", self.rest[:end])


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
    """cycles: the compiler's own estimate over all fusions (TPU; 0 elsewhere), loops unrolled.

    accessed: bytes that fusions, kernels and copies of one run read and write, in XLA's way of
    counting ("bytes accessed") but with every turn of a loop: an array that two fusions read counts
    twice, of a slice only the slice, of an update in place what is new. Sizes are without the
    padding of tiles; all branches of a conditional count. moved: those of them in the device's main
    memory, without what the TPU compiler keeps on the chip.
    """

    collectives: list[Collective]
    cycles: float
    kernels: list[Kernel]
    accessed: float
    moved: float


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
    accessed, moved = _traffic(computations, entry, times)
    return Program(list(collectives.values()), cycles, kernels, accessed, moved)


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
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
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
    return Instruction(match[2], rest[:end], opcode, tail, bool(match[1]))


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
    # What starts carries (operands, results, ...); an all-reduce the results alone.
    if started and kind != "all-reduce" and len(shapes) > 1:
        shapes = shapes[1:2]
    size = sum(map(shape_bytes, shapes))
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


def shape_bytes(shape: str, everywhere: bool = True) -> float:
    """Of all its arrays, or of those in the main memory: S(1), S(2), ... in a layout are others."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)  # bf16, f8e4m3fn, s32, ...
        size = _BYTES.get(dtype, int(bits[1]) / 8 if bits else 4)
        if everywhere or "S(" not in layout:
            total += size * _count(dims)
    return total


def _count(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)


def _elements(shape: str) -> int:
    return sum(_count(dims) for _, dims, _ in _ARRAY.findall(shape))


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


def _traffic(computations, entry: str, times) -> tuple[float, float]:
    """(accessed, moved) of a Program."""
    shapes = {i.name: i.shape for body in computations.values() for i in body}
    fused = functools.cache(lambda name: _shares(computations[name], shapes, fused))
    total = [0.0, 0.0]
    for name in _unfused(computations, entry):
        for instruction in computations[name]:
            for n, amount in enumerate(_moves(instruction, shapes, fused)):
                total[n] += times[name] * amount
    return tuple(total)


def _unfused(computations, entry: str) -> set[str]:
    """Computations whose instructions each go through memory: entry, loops, branches, calls."""
    found, pending = set(), [entry] if entry else []
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        for i in computations[name]:
            if i.opcode in ("while", "conditional", "call"):
                callees = _CALLS.findall(i.rest)
                for group in _BRANCHES.findall(i.rest):
                    callees += re.findall(r"[\w.\-]+", group)
                pending += [callee for callee in callees if callee in computations]
    return found


def _moves(instruction: Instruction, shapes, fused) -> tuple[float, float]:
    """(bytes read and written, those of them in the main memory) by one unfused instruction."""
    opcode, rest = instruction.opcode, instruction.rest
    allocates = 'custom_call_target="AllocateBuffer"' in rest
    if opcode in _FREE or opcode.endswith("-done") or allocates:
        return 0.0, 0.0
    if opcode == "custom-call" and "cost_estimate" in rest:
        return (_estimate(rest)[1],) * 2
    result = instruction.shape
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        members = _tuple(result)  # (operands, result, ...), but copies: (result, operand, ...)
        result = members[min(opcode != "copy-start", len(members) - 1)]
    reads, written = _parts(instruction, 1.0, shapes, fused)
    inputs = list(zip((shapes.get(name, "") for name in instruction.operands), reads))
    outputs = list(zip(_tuple(result), written)) if len(written) > 1 else [(result, written[0])]
    both = inputs + outputs
    return tuple(sum(shape_bytes(x, where) * part for x, part in both) for where in (True, False))


def _parts(user: Instruction, need: float, shapes, fused) -> tuple[list[float], list[float]]:
    """(share of each operand that is read, share of each result that is written) by an instruction
    of whose result `need` is used."""
    opcode, names = user.opcode, user.operands
    called = re.search(r"\bcalls=%?([\w.\-]+)", user.rest)
    if called and opcode.removesuffix("-start") in ("fusion", "async"):
        reads, written = fused(called[1])
        return [reads.get(n, 0.0) * bool(need) for n in range(len(names))], written
    own, sizes = _elements(user.shape), [_elements(shapes.get(name, "")) for name in names]
    reads = [need if size == own else float(need > 0) for size in sizes]
    base, written = opcode.removesuffix("-start"), 1.0
    if base in _SLICES and sizes:
        own = own if base == opcode else _elements(_tuple(user.shape)[1])
        reads[0] = need * min(own / max(sizes[0], 1), 1.0)
    elif opcode in _IN_PLACE and len(sizes) > _IN_PLACE[opcode]:
        reads[0], written = 0.0, sizes[_IN_PLACE[opcode]] / max(own, 1)
    if aliases := re.search(r"\boutput_to_operand_aliasing=\{(.*?)\}(?:, [a-z]|$)", user.rest):
        for operand in re.findall(r"\((\d+), \{", aliases[1]):
            reads[int(operand)] = 0.0  # counts as a result
    return reads, [written]


def _shares(body: list[Instruction], shapes, fused) -> tuple[dict[int, float], list[float]]:
    """({parameter: share of it that a fusion reads}, share of each result that it writes)."""
    by_name = {i.name: i for i in body}
    root = next(i for i in body if i.root)
    needs: dict[str, float] = defaultdict(float, {root.name: 1.0})
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    in_place, written = set(), []
    for result in results:
        while result.opcode == "bitcast" and result.operands[0] in by_name:
            result = by_name[result.operands[0]]
        in_place.add(result.name)
        written += _parts(result, 1.0, shapes, fused)[1] if result.opcode != "tuple" else [1.0]
    reads = {}
    for i in reversed(body):
        need = min(needs[i.name], 1.0)
        if i.opcode == "parameter":
            reads[int(i.rest.partition(")")[0])] = need
            continue
        parts, _ = _parts(i, need, shapes, fused)
        if i.opcode in _IN_PLACE and i.name not in in_place:
            parts[0] = need  # what is kept is read
        for name, part in zip(i.operands, parts):
            needs[name] += part
    return reads, written
