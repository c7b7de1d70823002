"""Pictures a person can look at: drawn captions, captions and answers about real pictures, curves.

Writes into samples/: generated-<step>.png, languages-<step>.png, understanding-<step>.png (and .txt
with every script in full, since a machine may lack fonts) and curves.png.
"""

from pathlib import Path

import jax
import numpy as np
from absl import logging

from eval import common, data, generation
from eval.captioning import answers_of
from eval.questions import asked_questions
from inference import drawing, pictures
from input_pipeline.layout import caption_question


def build(config):
    """Evaluator "sheets": draws, and measures nothing."""

    def evaluate(model, params, *, step, rng, workdir):
        folder = Path(workdir) / "samples"
        drawn = generation.drawn(config, model, params, step=step, rng=rng, workdir=workdir)
        reads = not pictures.only_draws(model)
        captioned = _captioned_rows(config, model, params) if reads else []
        answered = _answered_rows(config, model, params) if reads else []
        if jax.process_index() == 0:
            generated_sheet(folder / f"generated-{step}.png", drawn, step, config.evaluation.sheet)
            languages_sheet(folder / f"languages-{step}.png", config, drawn, step)
            if reads:
                path = folder / f"understanding-{step}.png"
                understanding_sheet(path, captioned, answered, step)
            curves(folder / "curves.png", Path(workdir) / "metrics.jsonl")
            logging.info("sheets are in %s", folder)
        return {}

    return evaluate


def generated_sheet(path, drawn, step, most: int, columns: int = 6) -> None:
    """Contact sheet: each drawn picture beside its real one, training and held-out captions."""
    headings = {"train": "captions of training pictures", "held_out": "held-out captions"}
    sections = []
    for split in drawn.splits():
        part = drawn.of(split)
        cells = [
            ((image, real), caption)
            for image, real, caption in zip(part.images, part.real, part.captions)
        ]
        sections.append((headings[split], cells[:most]))
    title = f"step {step}: drawn by the model (left) beside the real picture (right)"
    drawing.picture_grid(path, title, sections, columns=columns)


def languages_sheet(path, config, drawn, step) -> None:
    """The same few pictures asked for in every language; nothing where there is one language."""
    part, langs = drawn.of("languages"), config.data.langs
    if len(part.captions) <= 1 or len(langs) == 1:
        return
    sections = []
    for group in dict.fromkeys(part.group.tolist()):
        rows = np.flatnonzero(part.group == group)
        cells = [((part.real[rows[0]],), "real")]
        for lang, r in zip(langs, rows):
            cells.append(((part.images[r],), drawing.label(lang, part.captions[r])))
        sections.append((part.captions[rows[0]], cells))
    title = f"step {step}: training pictures drawn from their names in every language"
    drawing.picture_grid(path, title, sections, columns=-(-(len(langs) + 1) // 2))


def _captioned_rows(config, model, params) -> list:
    """[(split, picture, [(lang, caption by the model, right ones)])] of a few pictures."""
    options = config.evaluation
    langs = data.languages(config, options.sheet_languages)
    names, rows = data.right_names(config), []
    for split in data.SPLITS:
        examples = data.captioned(config, split, data.und_size(config))
        chosen = data.one_per_group(examples, max(1, options.sheet // 3), options.seed)
        if not len(chosen):
            continue
        images = examples.pictures.gather(chosen)
        asked = [caption_question(k) for _ in chosen for k in langs]
        said = answers_of(config, model, params, np.repeat(images, len(langs), axis=0), asked)
        for i, row in enumerate(chosen):
            item = examples.items[row]
            lines = []
            for k, text in zip(langs, said[i * len(langs) :]):
                right = names.get(item.group, {}).get(k) or {item.captions.get(k, "")}
                lines.append((k, text, sorted(right)))
            rows.append((split, images[i], lines))
    return rows


def _answered_rows(config, model, params) -> list:
    """[(picture, question, answer by the model, right answer)] about held-out scenes."""
    images, questions = asked_questions(config)
    most = max(1, config.evaluation.sheet // 2)
    # Every len/most-th of them: the list is ordered by kind.
    rows = np.unique(np.linspace(0, len(questions) - 1, most).round().astype(int))
    rows = rows[rows >= 0] if questions else rows[:0]
    if not len(rows):
        return []
    asked = [questions[r].question for r in rows]
    said = answers_of(config, model, params, images[rows], asked)
    return [(images[r], questions[r].question, s, questions[r].answer) for r, s in zip(rows, said)]


def understanding_sheet(path, captioned, answered, step) -> None:
    """Sheet and text file of what the model says about real pictures; green is right."""
    rows, texts = [], []
    for split, picture, lines in captioned:
        name = lines[0][2][0]
        shown = [drawing.Line(f"{name}  ({split.replace('_', ' ')})", drawing.GREY)]
        for lang, said, right in lines:
            colour = drawing.GOOD if said in right else drawing.BAD
            shown.append(drawing.Line(drawing.label(lang, said), colour))
            texts.append(f"{split}\t{lang}\t{said}\t{' | '.join(right)}")
        rows.append((picture, shown))
    for picture, question, said, right in answered:
        colour = drawing.GOOD if said == right else drawing.BAD
        lines = [drawing.Line(question), drawing.Line(said, colour)]
        if said != right:
            lines.append(drawing.Line(f"right: {right}", drawing.GREY))
        rows.append((picture, lines))
        texts.append(f"question\t{question}\t{said}\t{right}")
    title = f"step {step}: real pictures, what the model says about them (green: right)"
    drawing.text_rows(path, title, rows)
    Path(path).with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def curves(path, log) -> None:
    """PNG of every loss-like series of a metrics.jsonl, training and evaluation in one panel."""
    series = read_series(log)
    names = [n for n in PANELS if any(f"train/{n}" == k for k in series)]
    if not names:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(names), 3.2), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        for key in (f"train/{name}", *(k for k in PANELS[name] if k in series)):
            steps, values = np.array(series[key]).T
            marker = "" if key.startswith("train/") else "o"
            axes.plot(steps, values, marker=marker, label=key.removeprefix("eval/"))
        axes.set(title=name, xlabel="step", yscale="linear" if name in LINEAR else "log")
        axes.legend(fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# Panels of the curves: training metric -> evaluations drawn into the same panel.
PANELS = {
    "loss": (),
    "mse": (),
    "vb": (),
    "text": (
        "eval/captioning/train_loss",
        "eval/captioning/held_out_loss",
        "eval/captioning/train_loss_unigram",
    ),
    "text_accuracy": (),
    "bit_nll": ("eval/bits/train_nll", "eval/bits/held_out_nll"),
}

LINEAR = ("text_accuracy",)


def read_series(log) -> dict[str, list[tuple[float, float]]]:
    """{key: [(step, value)]} of a metrics.jsonl; empty when there is none."""
    series: dict[str, list] = {}
    for row in common.read_rows(log):
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                series.setdefault(key, []).append((row["step"], value))
    return series
