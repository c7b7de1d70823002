"""Captions of training and held-out pictures in several languages: loss and exact matches.

loss: nats per answer token (EOS included), beside a unigram model of the training captions of the
same language; bits_per_char: the same nats in bits over the characters of the caption; accuracy: a
greedy caption equals one of ALL names of the picture's group in that language, beside naming a
random glyph of the data.
"""

import numpy as np

from eval import common, data
from inference import unified
from input_pipeline.layout import caption_question


def pairs(config, examples) -> list[tuple[int, str]]:
    """(row, language) of the captions evaluated: the languages in turn over chosen pictures."""
    options = config.evaluation
    langs = data.languages(config, options.languages)
    out = []
    for i, row in enumerate(common.choose(len(examples), options.captions, options.seed)):
        lang = langs[i % len(langs)]
        out.append((row, lang if lang in examples.items[row].captions else langs[0]))
    return [(r, k) for r, k in out if k in examples.items[r].captions]


def likelihoods(config, model, params, images, asked, answers) -> dict[str, np.ndarray]:
    """nll, correct, count per answer (sums over its tokens), over padded batches."""
    rows = data.answered(config, asked, answers)
    nll = common.need(model, "text_nll")
    parts = []
    for index, real in common.padded(len(answers), config.evaluation.batch):
        batch = {k: v[index] for k, v in rows.items()} | {"und_image": images[index]}
        sums = nll(params, batch)
        parts.append({k: common.to_host(v)[:real] for k, v in sums.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def answers_of(config, model, params, images, asked) -> list[str]:
    """Greedy answers to questions about pictures uint8 [n, s, s, 3], over padded batches."""
    tokens, lengths = data.questions(config, asked)
    ids = []
    for index, real in common.padded(len(asked), config.evaluation.batch):
        batch = (images[index], tokens[index], lengths[index])
        out = unified.generate_text(model, params, *batch, max_new=config.data.text_length)
        ids.append(common.to_host(out)[:real])
    return data.texts_of(config, np.concatenate(ids))


def unigram_nll(config, train, langs, answers) -> np.ndarray:
    """Nats of each answer and its EOS under the unigram model of its language."""
    tok = data.tokenizer(config)
    tables = {
        lang: data.unigram(config, [e.captions[lang] for e in train.items if lang in e.captions])
        for lang in sorted(set(langs))
    }
    room = config.data.text_length
    return np.array(
        [
            -tables[lang][[*tok.encode(text), tok.eos][:room]].sum()
            for lang, text in zip(langs, answers)
        ]
    )


def _scores(mask, found) -> dict[str, float]:
    """Metrics of the captions where mask holds."""
    part = {k: np.asarray(v, np.float64)[mask] for k, v in found.items()}
    return {
        "loss": part["nll"].sum() / part["count"].sum(),
        "loss_unigram": part["unigram"].sum() / part["count"].sum(),
        "bits_per_char": part["nll"].sum() / np.log(2) / part["chars"].sum(),
        "bits_per_char_unigram": part["unigram"].sum() / np.log(2) / part["chars"].sum(),
        "accuracy": part["hit"].mean(),
        "accuracy_chance": part["chance"].mean(),
    }


def evaluate_split(config, model, params, name, names) -> dict[str, float]:
    """Metrics of one split, over all languages and for each."""
    examples = data.captioned(config, name, data.und_size(config))
    chosen = pairs(config, examples)
    if not chosen:
        return {}
    images = examples.pictures.gather(np.array([r for r, _ in chosen]))
    langs = np.array([k for _, k in chosen])
    answers = [examples.items[r].captions[k] for r, k in chosen]
    asked = [caption_question(k) for k in langs]
    found = likelihoods(config, model, params, images, asked, answers)
    train = data.captioned(config, "train", data.und_size(config))
    found["unigram"] = unigram_nll(config, train, langs, answers)
    found["chars"] = np.array([len(a) for a in answers])
    right = [
        names.get(examples.items[r].group, {}).get(k) or {examples.items[r].captions[k]}
        for r, k in chosen
    ]
    said = answers_of(config, model, params, images, asked)
    found["hit"] = np.array([text in ok for text, ok in zip(said, right)])
    found["chance"] = np.array([len(ok) for ok in right]) / max(len(names), 1)
    metrics = _scores(np.ones(len(chosen), bool), found)
    for lang in dict.fromkeys(langs.tolist()):
        scores = _scores(langs == lang, found)
        metrics |= {f"{k}_{lang}": scores[k] for k in ("loss", "accuracy")}
    return {f"{name}_{k}": float(v) for k, v in metrics.items()} | {
        f"{name}_captions": float(len(chosen))
    }


def build(config):
    """Evaluator "captioning": keys train_... and held_out_..., with _en, _es, ... per language."""

    def evaluate(model, params, *, step, rng, workdir):
        names = data.right_names(config)
        metrics = {}
        for split in data.SPLITS:
            metrics |= evaluate_split(config, model, params, split, names)
        return metrics

    return evaluate
