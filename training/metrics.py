"""Where numbers go: metrics.jsonl, optionally tensorboardX and wandb, and the progress line."""

import json
import os
import resource
import time
from pathlib import Path

import jax

# Dense bf16 peak of one device in FLOP/s, by jax's device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


class Metrics:
    """Appends rows {"step": int, "train/loss": float, ...}; only process 0 writes."""

    def __init__(self, workdir: Path, config, start: int):
        """Rows after step `start` (made by a run that was killed) are dropped."""
        self._file = self._board = self._wandb = None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        keep_rows(path, start)
        self._file = path.open("a")
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        if config.wandb:
            self._wandb = _wandb_run(workdir, config)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row."""
        if self._file is None:
            return
        row = {"step": step} | {key: float(value) for key, value in values.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._file.name} cannot be written: {error.strerror}") from error
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(key, float(value), step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and close every sink."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def read_rows(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def keep_rows(path: Path, last: int) -> None:
    """Rewrite a metrics.jsonl without the rows after step `last`."""
    rows = [row for row in read_rows(path) if row["step"] <= last]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _wandb_run(workdir: Path, config):
    """The wandb run of this workdir; its id is kept, so that a resumed run continues it."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"config.wandb={config.wandb!r} needs: pip install wandb") from error
    path = workdir / "wandb_id.txt"
    if not path.exists():
        write_text(path, wandb.util.generate_id())
    return wandb.init(
        project=config.wandb,
        id=path.read_text().strip(),
        resume="allow",
        dir=str(workdir),
        name=workdir.name,
        config=config.to_dict(),
    )


class Clock:
    """Time of training alone: compiles, evaluations and saves are taken out by `pause`."""

    def __init__(self):
        self._since = time.perf_counter()
        self._paused = self._waited = 0.0
        self._steps = 0
        self._last = {"steps_per_s": 0.0, "data_wait": 0.0}

    def pause(self, seconds: float) -> None:
        """Leave these seconds out of the rates."""
        self._paused += seconds

    def step(self, waited: float) -> None:
        """Count a step that waited this long for its batch."""
        self._steps += 1
        self._waited += waited

    def lap(self) -> dict[str, float]:
        """steps_per_s and data_wait (share of the time) since the last lap that had steps."""
        now = time.perf_counter()
        if self._steps:
            busy = max(now - self._since - self._paused, 1e-9)
            wait = min(self._waited / busy, 1.0)
            self._last = {"steps_per_s": self._steps / busy, "data_wait": wait}
        self._since, self._paused, self._waited, self._steps = now, 0.0, 0.0, 0
        return dict(self._last)


def memory_bytes() -> int:
    """Peak bytes in use on this process's first device, or of the process where unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mfu(flops_per_step: float, steps_per_s: float) -> float | None:
    """Share of the devices' bf16 peak that the model's own FLOPs use; None where unknown."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if not peak or not flops_per_step:
        return None
    return flops_per_step * steps_per_s / (peak * jax.device_count())


def progress(step: int, steps: int, values: dict[str, float]) -> str:
    """One line: step, %, loss, lr, steps/s, examples/s, MFU, memory, data wait, ETA.

    No rates as long as only steps that compiled are behind.
    """
    rate = values["steps_per_s"]
    parts = [
        f"step {step}/{steps} {100 * step / steps:.0f}%",
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.2e}",
    ]
    if not rate:
        return "  ".join([*parts, f"memory {values['memory_gib']:.2f} GiB"])
    parts += [
        f"{rate:.3g} steps/s",
        f"{values['examples_per_s']:.3g} examples/s",
        f"memory {values['memory_gib']:.2f} GiB",
        f"data wait {100 * values['data_wait']:.0f}%",
        f"ETA {duration((steps - step) / rate)}",
    ]
    if "mfu" in values:
        parts.insert(5, f"MFU {100 * values['mfu']:.1f}%")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """'1h02m', '3m20s' or '12s'."""
    s = int(round(seconds))
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"
