"""What a tokenizer does with held-out text, in numbers, lists and plots.

Bytes per token by domain, beside plain BPE of the same size and the limit of any tokenizer that
keeps stage 1's borders (one token for each piece); how many words a token has; how evenly hard
tokens are: -log2 of a token's share of the text. A tokenizer whose text is full of "the" and "of"
has many tokens that say little.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from input_pipeline.superbpe import tokenizer_json
from input_pipeline.superbpe.bpe import Bpe, unspell
from input_pipeline.superbpe.rules import NEWLINE, NUMERALS, S1, SPACE, is_superword, words

Texts = Sequence[tuple[str, str]]  # (domain, text)
CHEAP = 8.0  # bits: a token that is at least 1/256 of the text


def by_domain(texts: Texts) -> dict[str, list[str]]:
    """The texts of each domain, all together under "all"."""
    found: dict[str, list[str]] = defaultdict(list)
    for domain, text in texts:
        found["all"].append(text)
        found[domain].append(text)
    return dict(found) if len(found) > 2 else {"all": found["all"]}


def efficiency(inner: tokenizers.Tokenizer, texts: Texts) -> dict[str, float]:
    """Bytes per token of each domain and of all."""
    return {d: tokenizer_json.bytes_per_token(inner, some) for d, some in by_domain(texts).items()}


def limit(texts: Texts) -> float:
    """Bytes per token if every piece of stage 1 were one token."""
    cutter = tokenizer_json.cutter((S1,))
    pieces = sum(len(cutter.pre_tokenize_str(text)) for _, text in texts)
    return sum(len(text.encode()) for _, text in texts) / max(pieces, 1)


def difficulty(inner: tokenizers.Tokenizer, texts: Texts) -> dict:
    """How the surprise of tokens, -log2 of their share of the text, is spread over the text.

    histogram: share of the text's tokens with a surprise of 0 to 1 bits, 1 to 2, ...
    """
    counts: Counter[int] = Counter()
    for one in inner.encode_batch_fast([t for _, t in texts], add_special_tokens=False):
        counts.update(one.ids)
    number = np.array(list(counts.values()), float)
    share = number / max(number.sum(), 1)
    bits = -np.log2(share)
    mean = float(share @ bits)
    size = sum(len(t.encode()) for _, t in texts)
    return {
        "mean_bits": mean,
        "std_bits": float(np.sqrt(share @ (bits - mean) ** 2)),
        "std_over_mean": float(np.sqrt(share @ (bits - mean) ** 2) / (mean or 1)),
        "bits_per_byte": mean * number.sum() / max(size, 1),
        "cheap_tokens": float(share[bits < CHEAP].sum()),
        "ten_commonest": float(np.sort(share)[-10:].sum()),
        "distinct_used": float(len(counts)),
        "histogram": np.bincount(bits.astype(int), share).round(5).tolist(),
    }


def shape(bpe: Bpe, inherited: int) -> dict:
    """What the vocabulary is made of; `inherited` merges came from stage 1."""
    new = list(dict.fromkeys(left + right for left, right in bpe.merges[inherited:]))
    superwords = [token for token in bpe.vocab if is_superword(token)]
    return {
        "vocabulary": len(bpe.vocab),
        "alphabet": len(bpe.alphabet),
        "merges": len(bpe.merges),
        "superwords": len(superwords),
        "words_per_token": dict(sorted(Counter(map(words, bpe.vocab)).items())),
        "first_new": [show(token) for token in new[:20]],
        "broken_rules": broken(new),
    }


def broken(products: Sequence[str]) -> dict[str, int]:
    """Products of stage 2 that break a rule of the paper; all 0 unless the rules were changed."""
    mixed = [p for p in products if NUMERALS.intersection(p) and not NUMERALS.issuperset(p)]
    return {
        "colon_space": sum(":" + SPACE in p for p in products),
        "more_than_4_words": sum(words(p) > 4 for p in products),
        "digits_with_others": len(mixed),
        "newline_inside": sum(NEWLINE in p[:-1] for p in products),
    }


def show(token: str) -> str:
    """A token as text for people."""
    return unspell(token).decode(errors="replace")


def superwords(bpe: Bpe) -> str:
    """One superword a line in the order in which they were learnt, spaces as "·"."""
    found = [show(token).replace(" ", "·") for token in bpe.vocab if is_superword(token)]
    return "\n".join(repr(s)[1:-1] for s in found) + "\n"


def curve(
    bpe: Bpe,
    patterns,
    texts: Texts,
    sizes: Sequence[int],
    like: tokenizer_json.Loaded | None = None,
) -> dict[int, float]:
    """Bytes per token when the vocabulary had these sizes; like: of tokenizer_json.build."""
    some = [text for _, text in texts]
    return {
        size: tokenizer_json.bytes_per_token(
            tokenizer_json.build(bpe.sized(size), patterns, like=like), some
        )
        for size in sizes
    }


def markdown(report: Mapping, title: str) -> str:
    """The report for people."""
    mine, plain = report["bytes_per_token"], report["bytes_per_token_bpe"]
    rows = [f"# {title}", "", f"Bytes per token, {report['measured_on']}.", ""]
    rows += ["| text | BPE | SuperBPE | tokens saved |", "| --- | --- | --- | --- |"]
    for d in mine:
        saved = 1 - plain[d] / mine[d] if mine[d] else 0.0
        rows.append(f"| {d} | {plain[d]:.4f} | {mine[d]:.4f} | {saved:.1%} |")
    rows += ["", f"One token for each piece of stage 1: {report['limit']:.4f}.", ""]
    rows += ["| spread of difficulty | BPE | SuperBPE |", "| --- | --- | --- |"]
    for key, value in report["difficulty"].items():
        if key == "histogram":
            continue
        rows.append(f"| {key} | {report['difficulty_bpe'][key]:.4g} | {value:.4g} |")
    made = report["vocabulary"]
    rows += ["", f"{made['superwords']} superwords; words per token: {made['words_per_token']}."]
    rows += [f"Broken rules: {made['broken_rules']}. Stage 2 began with {made['first_new']}."]
    return "\n".join(rows) + "\n"


def plot(path: Path, report: Mapping, title: str) -> None:
    """Bytes per token by domain and by vocabulary size, words per token, surprise of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (left, middle), (right, last) = figure.subplots(2, 2)
    mine, plain = report["bytes_per_token"], report["bytes_per_token_bpe"]
    at = np.arange(len(mine))
    left.bar(at - 0.2, list(plain.values()), 0.4, label="BPE")
    left.bar(at + 0.2, list(mine.values()), 0.4, label="SuperBPE")
    left.set_xticks(at, list(mine), rotation=60 if len(mine) > 4 else 0)
    left.set_ylabel("bytes per token")
    left.legend()
    for name, key in (("BPE", "curve_bpe"), ("SuperBPE", "curve")):
        middle.plot(list(map(int, report[key])), list(report[key].values()), "o-", label=name)
    middle.axhline(report["limit"], ls=":", color="grey", label="one token a piece of stage 1")
    middle.set_xscale("log")
    middle.set_xlabel("vocabulary")
    middle.legend()
    counted = report["vocabulary"]["words_per_token"]
    right.bar(list(map(str, counted)), list(counted.values()))
    right.set_yscale("log")
    right.set_xlabel("words in a token")
    right.set_ylabel("tokens")
    for name, key in (("BPE", "difficulty_bpe"), ("SuperBPE", "difficulty")):
        shares = report[key]["histogram"]
        last.step(range(len(shares)), shares, where="post", label=name)
    last.set_xlabel("surprise of a token, bits (by its share of the text)")
    last.set_ylabel("share of the text's tokens")
    last.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def write(workdir: Path, report: Mapping, bpe: Bpe, title: str) -> None:
    """report.md, report.png and superwords.txt."""
    (workdir / "report.md").write_text(markdown(report, title), "utf-8")
    (workdir / "superwords.txt").write_text(superwords(bpe), "utf-8")
    plot(workdir / "report.png", report, title)
