"""Evaluators. EVALUATORS[name](config) -> fn(model, params, *, step, rng, workdir) -> metrics.

Metrics are flat: {"test_loss": 2.3, "test_loss_unigram": 5.0}. A key that ends in one of
`eval.run.REFERENCES` is the chance level or baseline of the key before it. An evaluator that lacks
what it needs says so and returns None. Fits and reports take model=None and params=None.
"""

import importlib
from collections.abc import Callable

# Modules are imported when an evaluator is built: a run pays only for what it measures.
_MODULES = {
    "captioning": "eval.captioning",
    "questions": "eval.questions",
    "retrieval": "eval.retrieval",
    "reconstruction": "eval.reconstruction",
    "kid": "eval.kid",
    "gradients": "eval.gradients",
    "gradient_norms": "eval.gradient_norms",
    "losses": "eval.losses",
    "bits": "eval.bits",
    "bits_per_byte": "eval.bits_per_byte",
    "token_cost": "eval.token_cost",
    "ranked": "eval.ranked",
    "speed": "eval.speed",
    "attention": "eval.attention",
    "edits": "eval.edits",
    "sheets": "eval.sheets",
    "power_law": "eval.scaling.power_law",
    "ladder": "eval.scaling.ladder",
    "densing": "eval.scaling.densing_report",
    "densing_runs": "eval.scaling.densing_runs",
    "multi_power_law": "eval.scaling.multi_power_law",
    "multi_power_seeds": "eval.scaling.multi_power_seeds",
    "ablation_table": "eval.ablation_table",
}


def _builder(module: str) -> Callable:
    return lambda config: importlib.import_module(module).build(config)


EVALUATORS: dict[str, Callable] = {name: _builder(path) for name, path in _MODULES.items()}
