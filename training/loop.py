"""The training loop: the only one. `train` is mode train, `evaluate` is mode eval."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from eval.flops import count_flops
from models import MODELS
from training import init_from, metrics, state
from training.checkpoint import Checkpoints
from training.frozen import save_frozen
from training.objectives import OBJECTIVES
from training.preemption import Preempted, Watch
from training.setup import Setup, load_for_use, prepare, restore, use_params
from training.sharding import global_batch, scope
from training.step import build_train_step, count_examples, jit_train_step
from training.workdir import claim, write_config


def train(config, workdir) -> None:
    """Train to config.steps in `workdir`, continuing what is there."""
    workdir = Path(workdir)
    with claim(workdir), Watch() as watch:
        run = prepare(config)
        try:
            with scope(run.mesh):
                _Loop(run, workdir, watch).run()
        finally:
            run.pipeline.close()


def evaluate(config, workdir, step: int | None = None) -> None:
    """Every evaluator of the config on the newest checkpoint, or that of `step`."""
    if not config.evals:
        raise ValueError("config.evals=() is empty: there is nothing to evaluate")
    run, params, at = load_for_use(config, workdir, step)
    with scope(run.mesh):
        run_evals(run, params, at, Path(workdir))
    run.pipeline.close()


def sample(config, workdir, step: int | None, prompts, images) -> None:
    """Mode sample: draw the prompts, or answer about (edit) the pictures at these paths."""
    from inference.sample import respond

    run, params, at = load_for_use(config, workdir, step)
    rng = jax.random.fold_in(state.key_for(run.config, state.SAMPLE), at)
    with scope(run.mesh):
        files = respond(
            run.config,
            run.model,
            params,
            tokenizer=run.pipeline.tokenizer,
            step=at,
            rng=rng,
            workdir=workdir,
            prompts=prompts,
            images=images,
        )
    run.pipeline.close()
    for path in files:
        say(str(path))


def run_evals(run: Setup, params: Any, step: int, workdir: Path) -> dict[str, float]:
    """Results of config.evals at `step`; also in workdir/eval/<step>.json."""
    from eval.run import run_all

    rng = jax.random.fold_in(state.key_for(run.config, state.EVAL), step)
    return run_all(run.config, run.model, params, step=step, rng=rng, workdir=workdir)


class _Loop:
    """One run from its start or resume to its end; holds what the steps share."""

    def __init__(self, run: Setup, workdir: Path, watch: Watch):
        self.run_, self.config, self.workdir, self.watch = run, run.config, workdir, watch
        c = self.config.checkpoint
        self.checkpoints = Checkpoints(workdir / "checkpoints", c.keep, c.keep_every)
        self.iterator = iter(run.pipeline.dataset)
        found = restore(run, workdir, self.checkpoints, self.iterator)
        self.resumed = found is not None
        if found is None:
            rng = state.key_for(self.config, state.INIT)
            loaded = init_from.load(self.config, run.model, run.plan.params)
            for part in init_from.random_parts(self.config, loaded):
                say(f"warning: {part!r} is frozen as it starts, at random: nothing loads it")
            self.state, self.frozen = state.create(run.plan, rng, loaded)
            self.frozen_name = save_frozen(workdir, self.frozen)
            self.done = 0
        else:
            self.state, self.frozen, meta = found
            self.frozen_name, self.done = meta["frozen"], meta["step"]
        write_config(workdir, self.config)
        self.log = metrics.Metrics(workdir, self.config, self.done)
        self.clock = metrics.Clock()
        self.buckets: dict[tuple, float] = {}  # batch shapes seen -> FLOPs of their step
        self.pending: tuple[int, dict] | None = None
        step = build_train_step(run.model, run.objective, run.plan, self.config)
        self.jitted = jit_train_step(step, run.plan)

    def run(self) -> None:
        """Steps, with everything that is due between them."""
        steps = self.config.steps
        fresh = self.done < steps
        self._announce()
        try:
            self.watch.guard = True
            if self.resumed:
                self._between(self.done, resuming=True)
            self.clock.lap()
            with jax.transfer_guard("disallow"):
                while self.done < steps:
                    self._step()
                    self._between(self.done)
            self.checkpoints.wait()
        except BaseException:
            # Whatever fails while closing is a consequence; the first error is the one to read.
            with contextlib.suppress(Exception):
                self._close()
            raise
        self._close()
        if fresh:
            samples = self.workdir / "samples"
            where = f"; to look at: {samples}" if samples.is_dir() else ""
            say(f"finished: {steps} steps in {self.workdir}{where}")

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            stack.callback(self.log.close)
            stack.callback(profile_stop, self)

    def _announce(self) -> None:
        c = self.config
        if self.done >= c.steps:
            say(f"already finished: step {self.done} of {c.steps} in {self.workdir}")
            return
        say(
            f"{c.model.name}: {state.count(self.run_.plan.state['params']):,} trained parameters, "
            f"{jax.device_count()} {jax.devices()[0].platform} device(s), workdir {self.workdir}"
        )
        if self.resumed:
            say(f"continuing from the checkpoint of step {self.done}")

    def _step(self) -> None:
        """Fetch a batch, start a step on the device, look at the numbers of the step before."""
        begin = time.perf_counter()
        batch = self._next_batch()
        waited = time.perf_counter() - begin
        shapes = tuple((k, v.shape) for k, v in batch.items())
        profile_tick(self)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.done):
            if shapes not in self.buckets:
                self._first_of_bucket(shapes, batch)
            else:
                self.state, values = self.jitted(self.state, self.frozen, batch)
                self._flush()  # waits for the step before; this one is under way
                self.clock.step(waited)
                self.pending = (self.done + 1, values)
        self.shapes = shapes
        self.done += 1

    def _first_of_bucket(self, shapes: tuple, batch: dict) -> None:
        """A step that compiles; its time is not training time."""
        begin = time.perf_counter()
        self._flush()
        with jax.transfer_guard("allow"):  # building a model may put constants on the device
            self.buckets[shapes] = self._flops(batch)
        self.state, values = self.jitted(self.state, self.frozen, batch)
        self.pending = (self.done + 1, jax.block_until_ready(values))
        seconds = time.perf_counter() - begin
        self.clock.pause(seconds)
        if len(self.buckets) == 1:
            say(f"first step after {seconds:.1f} s (compiled)")

    def _flops(self, batch: dict) -> float:
        """FLOPs of the model in one step, recomputation left out; 0 where no peak is known."""
        if jax.devices()[0].device_kind not in metrics.PEAK_FLOPS:
            return 0.0
        plain = self.config.copy_and_resolve_references()
        plain.remat = "none"
        model = MODELS[plain.model.name](plain)
        objective = OBJECTIVES[plain.objective.name](model, plain)
        step = build_train_step(model, objective, self.run_.plan, plain)
        return float(count_flops(step, self.state, self.frozen, batch))

    def _next_batch(self) -> dict[str, jax.Array]:
        try:
            local = next(self.iterator)
        except StopIteration:
            raise ValueError(
                f"config.data.name={self.config.data.name!r} ended at step {self.done} of "
                f"{self.config.steps}: the data set must repeat"
            ) from None
        if self.run_.objective.rollout is None:  # else these are prompts, not a batch yet
            local = match_bucket(local, self.run_.model.batches)
        return global_batch(local, self.run_.mesh)

    def _flush(self) -> None:
        """Fetch the numbers of the step before; stop when they are not finite; log them."""
        if self.pending is None:
            return
        step, values = self.pending
        self.pending = None
        values = {key: float(value) for key, value in jax.device_get(values).items()}
        broken = [key for key, value in values.items() if not np.isfinite(value)]
        if {"loss", "grad_norm"} & set(broken):
            self.checkpoints.wait()  # a save of an earlier step may be under way
            kept = self.checkpoints.steps
            last = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint yet"
            shown = ", ".join(f"{key}={values[key]}" for key in broken)
            raise FloatingPointError(f"step {step}: {shown} is not finite; stopped, {last}")
        c = self.config
        if step % c.log_every == 0 or step in (1, c.steps):
            self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        values |= self.clock.lap()
        values["examples_per_s"] = values["steps_per_s"] * count_examples(dict(self.shapes))
        values["memory_gib"] = metrics.memory_bytes() / 2**30
        use = metrics.mfu(self.buckets[self.shapes], values["steps_per_s"])
        if use is not None:
            values["mfu"] = use
        self.log.write(step, {f"train/{key}": value for key, value in values.items()})
        if jax.process_index() == 0:
            print(metrics.progress(step, self.config.steps, values), flush=True)

    def _between(self, step: int, resuming: bool = False) -> None:
        """Saving, evaluating, sampling and stopping after `step`, as far as due.

        Resuming: what was due at the checkpoint's own step and had not been done.
        """
        c, begin = self.config, time.perf_counter()
        evals = self._due(c.evals, c.eval_every, step)
        samples = self._due(c.sample.prompts, c.sample_every, step)
        if resuming:
            evals, samples = evals and self._lacks("eval/"), samples and self._lacks("sample/")
        stop = self.watch.asked(step)
        save = not resuming and (step >= c.steps or stop or step % c.checkpoint.every == 0)
        if not (save or evals or samples or stop):
            return
        self._flush()
        if save:
            self.checkpoints.save(step, self.state, self.iterator, self._meta(), wait=stop)
        with jax.transfer_guard("allow"):
            if (evals or samples) and not stop:
                params = use_params(self.run_, self.state, self.frozen)
                with self.watch.interruptible():
                    self._look(step, params, evals, samples)
        stop = stop or self.watch.asked(step)
        if stop:
            # What was interrupted is made again when the run continues.
            self.checkpoints.save(step, self.state, self.iterator, self._meta(), wait=True)
            raise Preempted(self.watch.signum, step)
        self.clock.pause(time.perf_counter() - begin)

    def _due(self, what, every: int, step: int) -> bool:
        return bool(what) and (step >= self.config.steps or (every > 0 and step % every == 0))

    def _lacks(self, prefix: str) -> bool:
        """Whether the log has no such row for the current step; the first host's word counts."""
        rows = metrics.read_rows(self.workdir / "metrics.jsonl")
        here = (row for row in rows if row["step"] == self.done)
        lacks = not any(key.startswith(prefix) for row in here for key in row)
        if jax.process_count() > 1:
            lacks = bool(multihost_utils.broadcast_one_to_all(np.array(lacks)))
        return lacks

    def _look(self, step: int, params: Any, evals: bool, samples: bool) -> None:
        """Evaluators and samples on `params`; changes nothing of the run."""
        run = self.run_
        if evals:
            results = run_evals(run, params, step, self.workdir)
            self.log.write(step, {f"eval/{key}": value for key, value in results.items()})
        if samples:
            from inference import sample

            begin = time.perf_counter()
            rng = jax.random.fold_in(state.key_for(run.config, state.SAMPLE), step)
            sample.write(
                run.config,
                run.model,
                params,
                tokenizer=run.pipeline.tokenizer,
                step=step,
                rng=rng,
                workdir=self.workdir,
            )
            self.log.write(step, {"sample/seconds": time.perf_counter() - begin})

    def _meta(self) -> dict:
        """What is saved beside the arrays."""
        return dict(
            config=json.loads(self.config.to_json_best_effort()),
            frozen=self.frozen_name,
            hosts=jax.process_count(),
            mesh=dict(self.run_.mesh.shape),
        )


def match_bucket(local: dict, batches: dict) -> dict:
    """The keys of the shape bucket this host's batch belongs to."""
    hosts = jax.process_count()
    for bucket in batches.values():
        if all(
            key in local and tuple(local[key].shape) == (want.shape[0] // hosts, *want.shape[1:])
            for key, want in bucket.items()
        ):
            return {key: local[key] for key in bucket}
    shown = {
        key: (np.shape(value)[0] * hosts, *np.shape(value)[1:]) for key, value in local.items()
    }
    wanted = " or ".join(
        str({key: tuple(want.shape) for key, want in bucket.items()}) for bucket in batches.values()
    )
    raise ValueError(f"config.data gives batches of {shown}, but config.model takes {wanted}")


def profile_tick(loop: _Loop) -> None:
    """Start and stop the trace that config.profile = (after, steps) asks for."""
    after, count = loop.config.profile
    if not count:
        return
    if loop.done == max(after, 1) and not getattr(loop, "tracing", False):
        jax.profiler.start_trace(str(loop.workdir / "profile"))
        loop.tracing = True
    elif loop.done >= max(after, 1) + count:
        profile_stop(loop)


def profile_stop(loop: _Loop) -> None:
    """End a trace that is running."""
    if getattr(loop, "tracing", False):
        jax.block_until_ready(loop.state["step"])
        jax.profiler.stop_trace()
        loop.tracing = False
        say(f"profile written to {loop.workdir / 'profile'}")


def say(text: str) -> None:
    """Print on the first host."""
    if jax.process_index() == 0:
        print(text, flush=True)
