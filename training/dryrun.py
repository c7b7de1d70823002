"""--mode=dryrun: compile the train step for accelerators that are not there, and say what fits.

The step is the one the loop jits, with the same shardings and the state donated. Nothing is
allocated: parameters, state and batch are shapes. The compilers need variables that are read when
jax is imported, so the work is done by a child process: python -m training.dryrun.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from training import topology as topologies
from training.dryrun_table import advice, table

ROOT = Path(__file__).resolve().parents[1]
KEYS = (
    "params", "topology", "devices", "argument_bytes", "temp_bytes", "total_bytes", "hbm_bytes",
    "fits", "flops_per_step", "estimated_step_seconds", "estimated_mfu", "compile_seconds",
    "moved_bytes", "sampler",
)  # fmt: skip


def run(config, workdir: str | os.PathLike, topology: str) -> dict[str, Any]:
    """Compiles in a child process, prints the table and writes workdir/dryrun.json."""
    parsed = topologies.parse(topology)
    topologies.check_installed(parsed)
    result = _in_child(config, parsed)
    print(table(result))
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    report = {key: result[key] for key in KEYS}
    (workdir / "dryrun.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _in_child(config, topology: topologies.Topology) -> dict[str, Any]:
    env = os.environ | topologies.environment(topology)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "training.dryrun", topology.name, str(out)]
        text = config.to_json_best_effort()
        child = subprocess.run(command, input=text, env=env, text=True, stderr=subprocess.PIPE)
        if out.exists():
            result = json.loads(out.read_text())
            if "error" in result:
                raise ValueError(result["error"])
            return result
    tail = "\n".join(child.stderr.splitlines()[-30:])
    raise RuntimeError(f"the compile process of the dry run ended with {child.returncode}:\n{tail}")


def main(argv: list[str]) -> None:
    """The child: topology and result file as arguments, the config as JSON on standard input."""
    from training.workdir import read_config

    name, out = argv
    config = read_config(json.load(sys.stdin))
    try:
        result = measure(config, name)
    except (ValueError, FileNotFoundError) as error:
        result = {"error": str(error)}
    Path(out).write_text(json.dumps(result))


class Built(NamedTuple):
    """A model with its plan and the loop's own jitted step, its arguments abstract and sharded."""

    model: Any
    plan: Any
    step: Any
    args: tuple
    batch_bytes: int  # of one device


def measure(config, name: str) -> dict[str, Any]:
    """Everything the table shows, as plain numbers; jax must be running on the CPU."""
    import jax

    from eval import flops
    from training.sharding import scope
    from training.state import count

    config, topology, mesh = _prepare(config, name)
    built = _build(config, mesh)
    counted = model_flops(config, mesh)
    with scope(mesh):
        traced = built.step.trace(*built.args)
        executed = flops.jaxpr_flops(traced.jaxpr.jaxpr)
        start = time.perf_counter()
        compiled, problem = _compile(traced, topology)
        seconds = time.perf_counter() - start
        sampler = _sampler(config, built, topology)
    arguments = sum(map(_shard_bytes, jax.tree.leaves(built.args)))
    result = dict(
        params=count(built.plan.params),
        topology=name,
        devices=topology.count,
        hbm_bytes=topology.chip.hbm,
        flops_per_step=counted,
        compile_seconds=round(seconds, 2),
        batch_bytes=built.batch_bytes,
        sampler=sampler,
        **_memory(compiled, arguments, problem, topology.chip),
    )
    result |= _speed(compiled, executed, result, topology)
    result["advice"] = [] if result["fits"] else advice(config, dict(mesh.shape), result)
    return result


def sampler(config, name: str) -> dict[str, Any] | None:
    """The sampling step alone, as `measure` gives it."""
    from training.sharding import scope

    config, topology, mesh = _prepare(config, name)
    built = _build(config, mesh)
    with scope(mesh):
        return _sampler(config, built, topology)


def _prepare(config, name: str) -> tuple:
    """(config, topology, mesh) once the config has been checked."""
    from training.setup import check
    from training.sharding import make_mesh

    if config.task != "train":
        raise ValueError(f"config.task={config.task!r}: --mode=dryrun compiles the task 'train'")
    check(config)
    topology = topologies.parse(name)
    config = _with_vocabulary(config)
    return config, topology, make_mesh(config.mesh, topologies.devices(topology))


def _speed(compiled, executed: int, result: dict, topology) -> dict[str, Any]:
    """Collectives, bytes and the estimate of a compiled step; empty for one that does not compile.

    moved_bytes: what one device reads and writes of its memory in a step (hlo.Program.moved).
    """
    from eval import flops, hlo

    if compiled is None:
        nothing = dict.fromkeys(("estimated_step_seconds", "estimated_mfu", "moved_bytes"))
        return dict(collectives={}, **nothing)
    program = hlo.analyse(compiled.as_text(), topology.count)
    parts = estimate(program, executed, topology)
    peak, seconds = topology.chip.peak, parts["seconds"]
    return dict(
        collectives=hlo.summarise(program.collectives),
        estimated_step_seconds=seconds,
        estimated_mfu=flops.mfu(result["flops_per_step"], seconds, topology.count, peak),
        moved_bytes=program.moved,
        parts=parts,
    )


def _with_vocabulary(config):
    """The data set is asked for its vocabulary only where the config leaves it open."""
    from input_pipeline import DATASETS
    from training.setup import with_vocabulary

    if config.model.get("vocab_size", 1):
        return config
    options = dict(split="train", seed=config.seed, process_index=0, process_count=1)
    pipeline = DATASETS[config.data.name](config, **options)
    try:
        return with_vocabulary(config, pipeline)
    finally:
        pipeline.close()


def _build(config, mesh) -> Built:
    """What the loop builds, for the largest shape bucket: that one decides what fits."""
    import jax

    from models import MODELS
    from training.objectives import OBJECTIVES
    from training.sharding import batch_sharding, scope
    from training.state import plan as make_plan
    from training.step import build_train_step, jit_train_step

    model = MODELS[config.model.name](config)
    objective = OBJECTIVES[config.objective.name](model, config)
    with scope(mesh):
        plan = make_plan(model, objective, config, mesh)
    shapes = max(model.batches.values(), key=lambda batch: sum(x.size for x in batch.values()))
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(x.shape, mesh, key))
        for key, x in shapes.items()
    }
    step = jit_train_step(build_train_step(model, objective, plan, config), plan)
    batch_bytes = sum(map(_shard_bytes, batch.values()))
    return Built(model, plan, step, (plan.state, plan.frozen, batch), batch_bytes)


def model_flops(config, mesh) -> int:
    """FLOPs without recomputation: the same step traced with remat off."""
    from eval.flops import jaxpr_flops
    from training.sharding import scope

    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.remat = "none"
    built = _build(config, mesh)
    with scope(mesh):
        return jaxpr_flops(built.step.trace(*built.args).jaxpr.jaxpr)


def _shard_bytes(leaf) -> int:
    """Bytes of one device's part of an abstract array."""
    size = leaf.dtype.itemsize
    for n in leaf.sharding.shard_shape(leaf.shape):
        size *= n
    return size


def _compile(traced, topology) -> tuple[Any, str]:
    """(compiled, '') or (None, the compiler's out-of-memory message)."""
    from jax.errors import JaxRuntimeError

    try:
        lowered = traced.lower(lowering_platforms=(topology.chip.platform,))
        return lowered.compile(compiler_options=topologies.compiler_options(topology)), ""
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None, str(error)
        raise


def _memory(compiled, arguments: int, problem: str, chip) -> dict[str, Any]:
    """temp_bytes, total_bytes and fits; the total is read off the message when it overflows."""
    if compiled is None:
        needed = needed_bytes(problem)
        temporaries = None if needed is None else max(needed - arguments, 0)
        total = max(arguments, needed or 0, chip.hbm + 1)
        sizes = dict(argument_bytes=arguments, temp_bytes=temporaries, total_bytes=total)
        return sizes | dict(fits=False)
    m = compiled.memory_analysis()
    kept = m.output_size_in_bytes - m.alias_size_in_bytes  # results not written over arguments
    temporaries = m.temp_size_in_bytes + m.generated_code_size_in_bytes + max(kept, 0)
    total = m.argument_size_in_bytes + temporaries
    return dict(
        argument_bytes=m.argument_size_in_bytes, temp_bytes=temporaries, total_bytes=total,
        fits=total <= chip.hbm,
    )  # fmt: skip


def needed_bytes(message: str) -> int | None:
    """Bytes that an out-of-memory message of the TPU compiler asks for, arguments included."""
    found = re.search(r"total memory required[^(]*\(([\d.]+)([KMGT])", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT])\w* of", message)
    if not found:
        return None
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))


def estimate(program, executed: int, topology) -> dict[str, float]:
    """Seconds of one step from rates that are nowhere measured here: an estimate.

    TPU: cycles the compiler expects for its fusions, plus kernels at the roofline of their own
    cost estimates. GPU: the products at chip.efficiency of the peak, or what all its kernels read
    and write at the memory's rate, whichever is longer. Asynchronous collectives hide behind that,
    the others add to it.
    """
    chip = topology.chip
    if chip.clock:
        limits = [(k.flops / chip.peak, k.moved / chip.hbm_rate) for k in program.kernels]
        kernels = sum(map(max, limits))
        compute = program.cycles / chip.clock + kernels
    else:
        products = executed / topology.count / (chip.peak * chip.efficiency)
        compute = max(products, program.moved / chip.hbm_rate)
    hidden = exposed = 0.0
    for one in program.collectives:
        crosses = chip.node and one.spread > chip.node
        seconds = one.times * one.bytes / (chip.network if crosses else chip.link)
        hidden, exposed = hidden + seconds * one.hidden, exposed + seconds * (not one.hidden)
    seconds = max(compute, hidden) + exposed
    return dict(seconds=seconds, compute=compute, hidden=hidden, exposed=exposed)


SAMPLER_STEPS = ("image_token_step", "decode_step")


def _sampler(config, built: Built, topology) -> dict[str, Any] | None:
    """Memory, bytes and estimated time of one sampling step, or of a whole picture where scales are
    drawn after each other, if the model has either: of a device, but for the weights and the state
    that is carried along, which are whole. Parameters are as samplers take them.
    """
    import jax

    from eval import flops, hlo

    drawn = "layout" in built.model.predict
    name, call, params, inputs = (_picture if drawn else _sampling_step)(config, built)
    if call is None:
        return None
    rows = inputs["token"].shape[0] if "token" in inputs else 1
    state = {} if drawn else {key: x for key, x in inputs.items() if key != "token"}
    weights, held = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (params, state)
    )
    result = dict(name=name, rows=rows, weight_bytes=weights, state_bytes=held)
    traced = jax.jit(call, donate_argnums=() if drawn else 1).trace(params, inputs)
    compiled, _ = _compile(traced, topology)
    if compiled is None:
        return result | dict(total_bytes=None, moved_bytes=None, seconds=None)
    memory = _memory(compiled, 0, "", topology.chip)
    program = hlo.analyse(compiled.as_text(), topology.count)
    executed = flops.jaxpr_flops(traced.jaxpr.jaxpr) * topology.count  # every device does it all
    seconds = estimate(program, executed, topology)["seconds"]
    total = memory["total_bytes"]
    return result | dict(total_bytes=total, moved_bytes=program.moved, seconds=seconds)


def _sampling_step(config, built: Built) -> tuple:
    """(name, call, parameters, inputs) of the step to export; no call where there is none."""
    import jax

    from export.functions import functions
    from models.language import taken_apart

    params = built.plan.params
    if "decoding" in built.model.predict:
        placed = taken_apart(params, lambda x: [x] * x.shape[0])
        params = _placed(jax.eval_shape(built.model.predict["decoding"], params), placed)
    found = functions(built.model, config, params)
    name = next((n for n in SAMPLER_STEPS if n in found), None)
    if name is None:
        return "", None, params, {}
    return name, found[name].call, params, dict(found[name].inputs)


def _placed(shapes, like):
    """Shapes with the shardings of another tree."""
    import jax

    return jax.tree.map(lambda x, p: x.update(sharding=p.sharding), shapes, like)


def _picture(config, built: Built) -> tuple:
    """The same of one picture, from its text to its pixels."""
    import jax
    import jax.numpy as jnp

    from inference.infinity import compiled_images, per_scale

    sample, model = config.sample, built.model
    options = dict(guidance=sample.guidance, insertion=sample.insertion, aspect=sample.aspect)
    run = compiled_images(model, **options)
    scales = len(model.predict["layout"](sample.aspect).tokens)
    guidance, temperature = (
        per_scale(sample[key], scales, key) for key in ("guidance", "temperature")
    )
    batch = next(iter(model.batches.values()))
    text = batch.get("gen_text", batch["gen_tokens"])
    inputs = dict(
        text=jax.ShapeDtypeStruct((1, *text.shape[1:]), text.dtype),
        lengths=jax.ShapeDtypeStruct((1,), jnp.int32),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)),
    )

    def call(params, inputs):
        own = (inputs["text"], inputs["lengths"], inputs["keys"])
        return run(params, *own, guidance, temperature, jnp.float32(sample.top_p)).images

    params = _placed(
        jax.eval_shape(model.predict["decoding"], built.plan.params), built.plan.params
    )
    return "picture", call, params, inputs


if __name__ == "__main__":
    main(sys.argv[1:])
