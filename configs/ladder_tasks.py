"""What a model ladder predicts, and how its evaluator is set. Not a config.

A task: (name, columns of its loss with their weights, columns of its score, score of guessing).
"""

from configs import common

MMLU = dict(stem=0.215, humanities=0.335, social_sciences=0.219, other=0.231)
OLMES = {  # task: keys with their weights, score of guessing
    "MMLU": ({f"mmlu_{part}_test": weight for part, weight in MMLU.items()}, 0.25),
    "HellaSwag": ({"hellaswag_val": 1.0}, 0.25),
    "ARC-C": ({"arc_challenge_test": 1.0}, 0.25),
    "ARC-E": ({"arc_easy_test": 1.0}, 0.25),
    "PIQA": ({"piqa_val": 1.0}, 0.5),
    "CSQA": ({"csqa_val": 1.0}, 0.2),
    "SocialIQA": ({"socialiqa_val": 1.0}, 1 / 3),
    "OpenBookQA": ({"openbookqa_test": 1.0}, 0.25),
}
LOSS, SCORE = "eval/downstream_bpb/{}_rc_5shot_bpb", "eval/downstream/{}_rc_5shot_len_norm"
LOSSES = {"bpb": "", "c4": "eval/c4_en-validation/CrossEntropyLoss"}
OWN = tuple(  # name, columns of the loss and of the score with their weights, score of guessing
    (name, ((f"eval/ranked/{name}_bpb", 1.0),), ((f"eval/ranked/{name}_len_norm", 1.0),), 0.25)
    for name in ("continuation", "order")
) + (
    (
        "text",
        (("eval/bits_per_byte/bits_per_byte", 1.0),),
        (("eval/bits_per_byte/accuracy", 1.0),),
        0.0,
    ),
)


def fit_options(tasks, **given) -> dict:
    """config.fit of the evaluator "ladder"."""
    options = dict(
        runs="",  # JSON list of runs, or a folder of runs; "" = the runs of this workdir
        folder="",  # where the files of a JSON list lie, if not where it says
        held_out=("",)[:0],  # targets: runs whose names begin so; () = the largest size
        targets=((),)[:0],  # more targets: ((name, N, tokens), ...)
        tasks=tasks,  # (name, ((loss column, weight), ...), ((score column, weight), ...), chance)
        last=5,  # step 1 takes the mean of so many last evaluations
        skip=0.1,  # step 2 leaves out this share at the start of each run ...
        window=5,  # ... and takes trailing means of so many evaluations
        level=0.9,  # of the intervals
        reach=10.0,  # N or tokens beyond so many times the largest seen are called too far
        noise=0.006,  # standard deviation of a task's loss between evaluations: too noisy
        backtest=0.02,  # relative error on the ladder's own largest size: model error
    )
    return options | given


def olmes(loss: str = "bpb") -> tuple:
    """config.fit.tasks of the published tables; loss: of the right answers, or C4's."""
    if loss not in LOSSES:
        raise ValueError(common.unknown("config argument loss", loss, LOSSES))

    def one(keys):
        own = tuple((LOSS.format(key), weight) for key, weight in keys.items())
        score = tuple((SCORE.format(key), weight) for key, weight in keys.items())
        return (((LOSSES[loss], 1.0),) if LOSSES[loss] else own), score

    return tuple((name, *one(keys), chance) for name, (keys, chance) in OLMES.items())


def smoothing(own: bool) -> dict:
    """Our runs are evaluated five times, and the last evaluation is that of the annealed model."""
    return dict(last=1, window=1, skip=0.0) if own else {}
