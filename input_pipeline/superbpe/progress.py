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
        """Shows how much is done and, from the pace so far, how long the rest will take.

        total 0: nobody knows yet.
        """
        now, terminal = time.monotonic(), sys.stderr.isatty()
        going = done < total or not total
        if done > 0 and going and now - self.told < (0.2 if terminal else LINE_EVERY):
            return
        self.told = now
        since, before = self.first = self.first or (now, done)
        if total:
            left = (now - since) * (total - done) / max(done - before, 1)
            rest = f"{_time(left)} left" if going else f"in {_time(now - self.began)}"
            bar = "#" * round(WIDTH * done / total)
            text = f"{self.name} [{bar:<{WIDTH}}] {done:,} of {total:,} {self.unit}, {rest}"
        else:
            text = f"{self.name}: {done:,} {self.unit} so far"
        sys.stderr.write(f"\r{text:<100}" if terminal else text + "\n")
        if terminal and not going:
            sys.stderr.write("\n")
        sys.stderr.flush()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
