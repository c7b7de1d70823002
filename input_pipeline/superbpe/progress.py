"""A bar with the time that is left, on stderr: rewritten in place, or a line now and then."""

import sys
import time

WIDTH = 24
LINE_EVERY = 10.0  # seconds between lines where stderr is a file


class Bar:
    """tell(done, total) as often as you like."""

    def __init__(self, name: str, unit: str):
        self.name, self.unit = name, unit
        self.began = self.told = time.monotonic()
        self.first: tuple[float, int] | None = None  # when the first was told, and how much

    def tell(self, done: int, total: int) -> None:
        """Shows how much is done and, from the pace so far, how long the rest will take."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if 0 < done < total and not terminal and now - self.told < LINE_EVERY:
            return
        self.told = now
        since, before = self.first = self.first or (now, done)
        share = done / max(total, 1)
        left = (now - since) * (total - done) / max(done - before, 1)
        rest = f"{_time(left)} left" if done < total else f"in {_time(now - self.began)}"
        bar = "#" * round(WIDTH * share)
        text = f"{self.name} [{bar:<{WIDTH}}] {done:,} of {total:,} {self.unit}, {rest}"
        sys.stderr.write(f"\r{text:<100}" if terminal else text + "\n")
        if terminal and done >= total:
            sys.stderr.write("\n")
        sys.stderr.flush()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
