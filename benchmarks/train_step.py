"""The loop's own training step of any config, compiled on a random batch."""

import jax

from benchmarks import common
from eval import hlo
from eval.flops import count_flops
from models import MODELS
from training.objectives import OBJECTIVES
from training.sharding import global_batch, make_mesh, scope
from training.state import INIT, create, key_for, plan
from training.step import build_train_step, jit_train_step


class Step:
    """Call it for a step; the state moves on. flops: the step's products, recomputation too."""

    def __init__(self, config):
        self.mesh, self.rows = make_mesh(config.mesh), config.batch_size
        model = MODELS[config.model.name](config)
        objective = OBJECTIVES[config.objective.name](model, config)
        with scope(self.mesh):
            parts = plan(model, objective, config, self.mesh)
            step = build_train_step(model, objective, parts, config)
            self.state, self.frozen = create(parts, key_for(config, INIT), {})
            batch = common.random_batch(next(iter(model.batches.values())), config.model.vocab_size)
            batch.pop("example")  # the step adds it
            self.batch = global_batch(batch, self.mesh)
            self.flops = count_flops(step, self.state, self.frozen, self.batch)
            jitted = jit_train_step(step, parts)
            self.compiled = jitted.lower(self.state, self.frozen, self.batch).compile()

    def __call__(self):
        """Metrics of one step."""
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        return metrics

    def numbers(self) -> dict:
        """What the compiler says."""
        memory = self.compiled.memory_analysis()
        program = hlo.analyse(self.compiled.as_text(), jax.device_count())
        cost = self.compiled.cost_analysis()
        return {
            "gflop": common.digits(self.flops / 1e9),
            "bytes_accessed_per_device_loops_once": int(cost.get("bytes accessed", 0)),
            "argument_bytes_per_device": memory.argument_size_in_bytes,
            "temp_bytes_per_device": memory.temp_size_in_bytes,
            "collectives": {k: list(v) for k, v in hlo.summarise(program.collectives).items()},
        }
