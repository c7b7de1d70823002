"""Writes text_metrics.json: reference values of CIDEr-D and of VQAv2's normalisation and accuracy.

    pip install --no-deps pycocoevalcap==1.2      # Cider scorer only, no Java
    python tests/golden/make_text_metrics.py VQAV2_PY

VQAV2_PY is big_vision/evaluators/proj/paligemma/transfers/vqav2.py of google-research/big_vision,
commit 0127fb6b337ee2a27bf4e54dea79cff176527356; only its text functions are executed.
"""

import json
import random
import re
import sys
from pathlib import Path

CAPTIONS = [
    ("a red apple on a table", ["a red apple on a table", "one apple on a wooden table"]),
    ("a dog dog dog", ["a dog runs on grass", "the dog is running", "a brown dog on grass"]),
    ("two cats", ["two cats sleep on a sofa", "a pair of cats on a sofa"]),
    ("", ["a blue car", "a car parked near a house"]),
    ("car", ["a blue car parked near a house"]),
    ("a man with a red hat rides a horse on a beach at sunset near the sea", ["a man on a horse"]),
    ("snail", ["snail"]),
    ("an apple and a dog on a sofa", ["a dog next to an apple on a sofa", "a sofa", "apple dog"]),
]
TEXTS = [
    "The cat,the dog", "1,000 dogs", "it's 5.5 meters", "None.", "a  Two-tone? car/bike", "dont",
    "yall'd've", "U.S.A.", "well... no", "somebody'd go", "What's (that) thing?", "ten", "3 , 4",
    'say "hi" @ noon', "an hour & a half", "twas", "couldn'tve", "1.5,2.5 cm", "x_y=z;", "Hi\tyou",
]  # fmt: skip


def vqa_functions(path: str) -> dict:
    source = Path(path).read_text()
    names = {"re": re}
    exec(source[source.index("def stripspace_vqav2") :], names)
    return names


def vqa_reference(functions, answer, truths):
    """The arithmetic of the evaluator's run method, on one question."""
    strip, clean = functions["stripspace_vqav2"], functions["postprocess_vqav2_text"]
    answer, truths = strip(answer), [strip(t) for t in truths]
    if len(set(truths)) > 1:
        answer, truths = clean(answer), [clean(t) for t in truths]
    hits = [answer == t for t in truths]
    left_out = [sum(hits) - h for h in hits]
    return sum(min(1.0, n / 3) for n in left_out) / len(hits)


def main(path):
    from pycocoevalcap.cider.cider import Cider

    mean, scores = Cider().compute_score(
        {i: refs for i, (_, refs) in enumerate(CAPTIONS)},
        {i: [text] for i, (text, _) in enumerate(CAPTIONS)},
    )
    functions, rng = vqa_functions(path), random.Random(0)
    questions = []
    for _ in range(24):
        pool = rng.sample(TEXTS, 3) + ["Two", "2"]
        truths = [rng.choice(pool) for _ in range(10)]
        answer = rng.choice(pool)
        questions.append([answer, truths, vqa_reference(functions, answer, truths)])
    questions.append(["two", ["two"] * 10, vqa_reference(functions, "two", ["two"] * 10)])
    questions.append(["2", ["two"] * 10, vqa_reference(functions, "2", ["two"] * 10)])
    golden = {
        "cider": {"captions": CAPTIONS, "mean": float(mean), "scores": [float(s) for s in scores]},
        "vqa_clean": [[t, functions["postprocess_vqav2_text"](t)] for t in TEXTS],
        "vqa_accuracy": questions,
    }
    target = Path(__file__).with_name("text_metrics.json")
    target.write_text(json.dumps(golden, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
