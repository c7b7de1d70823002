"""How the cost of drawing and of a training step grows with tokens, batch and devices.

    python -m benchmarks.scaling [--config=configs/uniflud.py] [--out=FILE]

FLOPs are counted through loops (eval/flops.py); bytes of temporaries and of arguments are the
compiler's, per device; collectives are read from the compiled program. Seconds are medians of runs
in turns. Virtual devices share the processor: their rows show how work, memory and traffic divide,
not a speed. `repeats` compares 1 and 4 diffusion repeats per token, `vocabulary` the loss in slices
and at once.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.train_step import Step
from configs.common import load_config
from eval.flops import count_flops
from inference import unified
from models import MODELS, unifluid
from models.blocks.losses import plain_cross_entropy
from training.sharding import scope

ROOT = Path(__file__).resolve().parents[1]


def make_config(args, **overrides):
    """The config without data: moments instead of pictures, no weights to load."""
    fixed = {"model.vocab_size": args.vocabulary, "init_from": "", "data.latents": "given"}
    return load_config(args.config, **fixed, **overrides)


class Draw:
    """The product's sampler on random prompts."""

    def __init__(self, config, batch: int):
        model = MODELS[config.model.name](config)
        self.params = common.random_params(lambda key: model.init(key)[0])
        s = config.sample
        self.run = unified.compiled_images(
            model, guidance=s.guidance, steps=s.steps, schedule=s.schedule, order=s.order,
            x0_clip=s.x0_clip,
        )  # fmt: skip
        length = config.data.prompt_length
        tokens = jnp.full((batch, length), 5, jnp.int32)
        lengths = jnp.full((batch,), length * 3 // 4, jnp.int32)
        keys = jax.random.split(jax.random.key(0), batch)
        self.inputs = (self.params, tokens, lengths, None, keys, jnp.float32(1.0))
        self.compiled = self.run.lower(*self.inputs).compile()
        self.flops = count_flops(self.run, *self.inputs)

    def __call__(self):
        """All pictures of the batch."""
        return self.compiled(*self.inputs)

    def numbers(self) -> dict:
        """What the compiler says."""
        temporaries = common.temp_bytes(self.compiled)
        return {"gflop": common.digits(self.flops / 1e9), "temp_bytes_per_device": temporaries}


def compare(what: str, key: str, cases: dict, rounds: int) -> list[dict]:
    """One row per case, timed in turns."""
    times = common.interleave(cases, rounds)
    return [
        {"what": what, key: name, **cases[name].numbers(), "seconds": common.spread(values)}
        for name, values in times.items()
    ]


def tokens(args) -> list[dict]:
    """Image tokens per picture: 8 pixels of the tokenizer to one."""
    configs = {
        (side // 8) ** 2: make_config(args, **{"model.image_size": side, "batch_size": args.batch})
        for side in args.sides
    }
    train = {n: Step(config) for n, config in configs.items()}
    rows = compare("training step", "tokens", train, args.rounds)
    del train
    draw = {n: Draw(config, args.pictures) for n, config in configs.items()}
    return rows + compare(f"drawing {args.pictures} pictures", "tokens", draw, args.rounds)


def batches(args) -> list[dict]:
    """Examples per step and pictures per call."""
    train = {n: Step(make_config(args, batch_size=n)) for n in args.batches}
    rows = compare("training step", "batch", train, args.rounds)
    del train
    draw = {n: Draw(make_config(args), n) for n in args.batches}
    return rows + compare("drawing", "batch", draw, args.rounds)


def repeats(args) -> list[dict]:
    """Diffusion repeats per token and step (4 are MAR's choice)."""
    cases = {
        n: Step(make_config(args, **{"batch_size": args.batch, "model.diffusion_mul": n}))
        for n in (1, 4)
    }
    return compare("training step", "diffusion repeats", cases, args.rounds)


def vocabulary(args) -> list[dict]:
    """The text loss in slices, as it is, and with all scores at once."""
    large = argparse.Namespace(**vars(args) | {"vocabulary": args.large_vocabulary})
    config = make_config(large, batch_size=args.batch)
    cases = {"in slices": Step(config)}
    with mock.patch.object(unifluid, "chunked_cross_entropy", plain_cross_entropy):
        cases["at once"] = Step(config)
    return compare(f"training step, {args.large_vocabulary} words", "loss", cases, args.rounds)


def devices(args) -> list[dict]:
    """One child process for each number of virtual devices and mesh."""
    rows = []
    for mesh in args.meshes:
        count = int(np.prod([int(part.partition("=")[2]) for part in mesh.split(",")]))
        flags = f"--xla_force_host_platform_device_count={count} "
        flags += "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.scaling", f"--config={args.config}"]
        command += [f"--worker={mesh}", f"--batch={args.batch}", f"--rounds={args.rounds}"]
        child = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)
        if child.returncode:
            raise RuntimeError(f"mesh {mesh}: {child.stderr[-2000:]}")
        rows.append(json.loads(child.stdout.splitlines()[-1]))
    return rows


def worker(args) -> None:
    """One mesh such as data=2,fsdp=2: prints one row."""
    sizes = dict(part.split("=") for part in args.worker.split(","))
    mesh = {f"mesh.{axis}": sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor", "seq")}
    step = Step(make_config(args, batch_size=args.batch, **mesh))
    with scope(step.mesh):
        common.show(compare("training step", "mesh", {args.worker: step}, args.rounds)[0])


SECTIONS = (tokens, batches, repeats, vocabulary, devices)


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/uniflud.py")
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128], help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="examples of a training step")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--large_vocabulary", type=int, default=65_536)
    parser.add_argument(
        "--meshes", nargs="+", default=["data=1", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """The chosen sections."""
    args = arguments(argv)
    if args.worker:
        return worker(args)
    rows = []
    for section in SECTIONS:
        if section.__name__ in args.sections:
            for row in section(args):
                common.show(row)
                rows.append(row)
    options = f"--config={args.config} --batch={args.batch} --rounds={args.rounds}"
    common.save(args.out, f"python -m benchmarks.scaling {options}", rows)


if __name__ == "__main__":
    main()
