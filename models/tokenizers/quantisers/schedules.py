"""Scale schedules ((h, w), ...): the sides of every scale of a picture, coarse to fine.

Infinity's 15 aspect ratios at four budgets of pixels (arXiv 2412.04431; spec section 2.5), the
dense schedules its tokenizers train with, VAR's (arXiv 2404.02905), and any number of scales for
small grids.
"""

from collections.abc import Iterable

Schedule = tuple[tuple[int, int], ...]

# h / w -> the 13 scales of about one megapixel; the other ratios are these transposed.
_TALL = {
    1.000: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.250: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.500: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.750: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.000: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.500: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.000: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
BUDGETS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}  # scales of each
DENSE = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)
VAR = {
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


def _parse(text: str) -> Schedule:
    return tuple((int(h), int(w)) for h, w in (pair.split("x") for pair in text.split()))


def _ratios() -> dict[float, Schedule]:
    table = {}
    for ratio, text in _TALL.items():
        table[ratio] = _parse(text)
        if ratio != 1:
            table[int(1 / ratio * 1000) / 1000] = tuple((w, h) for h, w in table[ratio])
    return table


RATIOS: dict[float, Schedule] = _ratios()


def infinity(ratio: float, budget: str = "1M") -> Schedule:
    """Infinity's scales of one of the 15 ratios h / w at a budget of pixels."""
    if ratio not in RATIOS or budget not in BUDGETS:
        raise ValueError(
            f"no schedule for h / w = {ratio} at {budget!r}: ratios are "
            f"{', '.join(map(str, sorted(RATIOS)))}, budgets {', '.join(BUDGETS)}"
        )
    return RATIOS[ratio][: BUDGETS[budget]]


def nearest_ratio(aspect: float) -> float:
    """The ratio of the template that an image of this height / width goes to."""
    return min(RATIOS, key=lambda ratio: abs(aspect - ratio))


def tokens(schedule: Schedule) -> int:
    """Vectors over all scales."""
    return sum(h * w for h, w in schedule)


def split(codes, schedule: Schedule) -> list:
    """Codes [b, n, ...] of all scales to those of each, [b, h, w, ...]."""
    if codes.shape[1] != tokens(schedule):
        raise ValueError(f"codes hold {codes.shape[1]} tokens, {schedule} {tokens(schedule)}")
    out, begin = [], 0
    for h, w in schedule:
        out.append(codes[:, begin : begin + h * w].reshape(-1, h, w, *codes.shape[2:]))
        begin += h * w
    return out


def doubled(schedule: Schedule) -> Schedule:
    """The tokenizer's scales where the transformer sees 2 x 2 latents as one token (8B)."""
    return tuple((2 * h, 2 * w) for h, w in schedule)


_BY_GRID = {scales[:n][-1]: scales[:n] for scales in RATIOS.values() for n in BUDGETS.values()}


def dynamic(grid: tuple[int, int]) -> Schedule:
    """Infinity's schedule that ends in this grid."""
    if grid not in _BY_GRID:
        raise ValueError(
            f"schedule 'dynamic' has no grid {grid[0]} x {grid[1]} of latents; square ones have "
            "sides 16, 32, 48 or 64"
        )
    return _BY_GRID[grid]


def _square(sides: Iterable[int], grid: tuple[int, int], name: str) -> Schedule:
    sides = tuple(s for s in sides if s <= grid[0])
    if grid[0] != grid[1] or grid[0] not in sides:
        raise ValueError(
            f"schedule {name!r} has no grid {grid[0]} x {grid[1]} of latents: it is for squares of "
            "one of its sides"
        )
    return tuple((s, s) for s in sides)


def geometric(grid: tuple[int, int], scales: int) -> Schedule:
    """`scales` scales from 1 x 1 to the grid, each side growing by about the same factor.

    8 x 8 in four: 1, 2, 4, 8. One scale is the grid alone.
    """
    longest = max(grid)
    if not 1 <= scales <= longest:
        raise ValueError(
            f"scales={scales}: a grid of {grid[0]} x {grid[1]} latents takes 1 to {longest} scales"
        )
    if scales == 1:
        return (grid,)
    sides = [round(longest ** (k / (scales - 1))) for k in range(scales)]
    for k in range(1, scales):
        sides[k] = max(sides[k], sides[k - 1] + 1)
    for k in range(scales - 2, -1, -1):  # room for the finer ones
        sides[k] = min(sides[k], longest - (scales - 1 - k))
    sides[-1] = longest
    return tuple(tuple(max(1, round(s * side / longest)) for side in grid) for s in sides)


def schedule_for(
    name: str, grid: tuple[int, int], scales: int = 1, *, key: str = "model.tokenizer.schedule"
) -> Schedule:
    """The schedule `name` of a grid of latents: single | dynamic | dense | var | geometric.

    key: where the config has the name, for the error.
    """
    match name:
        case "single":
            return (tuple(grid),)
        case "dynamic":
            return dynamic(tuple(grid))
        case "dynamic_2x2":
            return doubled(dynamic((grid[0] // 2, grid[1] // 2)))
        case "dense":
            return _square(DENSE, grid, name)
        case "var":
            return _square(VAR.get(grid[0], ()), grid, name)
        case "geometric":
            return geometric(tuple(grid), scales)
    raise ValueError(
        f"config.{key}={name!r}: allowed are single, dynamic, dynamic_2x2, dense, var, geometric"
    )
