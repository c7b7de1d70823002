"""Question answering on held-out scenes: accuracy by kind, beside the majority answer's."""

from collections import Counter

import numpy as np

from eval import common, data
from eval.captioning import answers_of
from input_pipeline import sources


def asked_questions(config) -> tuple[np.ndarray, list]:
    """(pictures uint8 [n, s, s, 3], questions): as many of each kind as there is room for."""
    options, size = config.evaluation, data.und_size(config)
    examples = sources.load(config.data, data.split_name(config, "held_out"), size)
    by_kind: dict[str, list] = {}
    rng = np.random.default_rng(options.seed)
    for row in common.choose(len(examples), len(examples), options.seed):
        questions = examples.items[row].questions
        for kind in dict.fromkeys(q.kind for q in questions):
            same = [q for q in questions if q.kind == kind]
            by_kind.setdefault(kind, []).append((row, same[rng.integers(len(same))]))
    share = -(-options.questions // max(len(by_kind), 1))
    chosen = [pair for kind in sorted(by_kind) for pair in by_kind[kind][:share]]
    if not chosen:
        return np.zeros((0, size, size, 3), np.uint8), []
    images = examples.pictures.gather(np.array([row for row, _ in chosen]))
    return images, [question for _, question in chosen]


def by_kind(questions, answers) -> dict[str, float]:
    """Accuracy of each kind and their mean, beside the kind's most common right answer."""
    metrics = {}
    for kind in sorted({q.kind for q in questions}):
        pairs = [(q.answer, a) for q, a in zip(questions, answers) if q.kind == kind]
        common_answer = Counter(truth for truth, _ in pairs).most_common(1)[0][1]
        metrics[kind] = float(np.mean([truth == a for truth, a in pairs]))
        metrics[f"{kind}_majority"] = common_answer / len(pairs)
    if metrics:
        kinds = sorted({q.kind for q in questions})
        metrics["accuracy"] = float(np.mean([metrics[k] for k in kinds]))
        metrics["accuracy_majority"] = float(np.mean([metrics[f"{k}_majority"] for k in kinds]))
    return metrics


def build(config):
    """Evaluator "questions": accuracy by kind and their mean, each with its _majority."""

    def evaluate(model, params, *, step, rng, workdir):
        images, questions = asked_questions(config)
        if not questions:
            return {}
        answers = answers_of(config, model, params, images, [q.question for q in questions])
        return by_kind(questions, answers) | {"questions": float(len(questions))}

    return evaluate
