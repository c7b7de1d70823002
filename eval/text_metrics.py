"""Text metrics as pure functions: CIDEr-D, VQA accuracy, ANLS (offline ports, parity-tested)."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

# What the Penn Treebank tokenizer of the caption benchmarks drops after splitting.
_PTB_DROPPED = "\" '' ' `` ` ( ) { } . ? ! , : - -- ... ;"
_PTB_PUNCTUATION = frozenset(_PTB_DROPPED.split())
_PTB_PIECES = re.compile(
    r"\.\.\.|--|\w+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*|[^\w\s]"
)


def ptb_like_tokens(text: str) -> str:
    """Lower-cased words without punctuation, space-joined.

    An offline stand-in for the Java PTB tokenizer: equal on plain captions, not on every clitic.
    """
    pieces = _PTB_PIECES.findall(text.lower())
    return " ".join(p for p in pieces if p not in _PTB_PUNCTUATION)


def _ngrams(text: str, n_max: int) -> list[Counter]:
    words = text.split()
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for n in range(1, n_max + 1)
    ]


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, n_max=4, sigma=6.0
) -> np.ndarray:
    """CIDEr-D of each candidate [n] against its references; texts are already tokenized.

    Papers print the mean times 100. The "length" of the penalty is the number of bigrams.
    """
    cooked = [[_ngrams(r, n_max) for r in refs] for refs in references]
    document_frequency = Counter()
    for refs in cooked:  # once per picture, whatever its number of references
        document_frequency.update({g for ref in refs for counts in ref for g in counts})
    log_documents = math.log(len(references))

    def weigh(counts):
        return {
            g: c * (log_documents - math.log(max(1.0, document_frequency[g])))
            for g, c in counts.items()
        }

    def similarity(hypothesis, reference):
        gap = sum(hypothesis[1].values()) - sum(reference[1].values())
        total = 0.0
        for h, r in zip(map(weigh, hypothesis), map(weigh, reference)):
            clipped = sum(min(w, r.get(g, 0.0)) * r.get(g, 0.0) for g, w in h.items())
            norm = math.sqrt(sum(w * w for w in h.values()) * sum(w * w for w in r.values()))
            total += clipped / norm if norm else clipped
        return total / n_max * math.exp(-(gap**2) / (2 * sigma**2))

    return np.array(
        [
            10.0 * np.mean([similarity(_ngrams(text, n_max), ref) for ref in refs])
            for text, refs in zip(candidates, cooked)
        ]
    )


_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {w: str(i) for i, w in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
# Contracted words of the official normalisation; a word that lost exactly one of its apostrophes
# gets it back.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i in range(len(word))
    if word[i] == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def vqa_clean(text: str) -> str:
    """The official VQA normalisation: punctuation, articles, number words, contractions."""
    digit_comma = re.search(r"\d,\d", text) is not None
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        # The official code drops every mark once any digits are joined by a comma; so do we.
        glue = digit_comma or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if glue else " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)  # official pattern, its odd lookahead included
    words = (w for w in out.lower().split() if w not in _ARTICLES)
    return " ".join(_NUMBERS.get(w, _CONTRACTIONS.get(w, w)) for w in words)


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """VQAv2: mean over the leave-one-out subsets of min(1, matches / 3)."""

    def strip(text):
        return text.replace("\n", " ").replace("\t", " ").strip()

    answer, truths = strip(answer), [strip(t) for t in truths]
    if len(set(truths)) > 1:
        answer, truths = vqa_clean(answer), [vqa_clean(t) for t in truths]
    matches = np.array([answer == t for t in truths], np.float64)
    return float(np.clip((matches.sum() - matches) / 3.0, 0.0, 1.0).mean())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """DocVQA's normalised similarity: 1 - edits / longer length, 0 from `threshold` edits on."""

    def one(truth):
        if not truth:
            return float(answer == "")
        ratio = edit_distance(truth, answer) / max(len(truth), len(answer))
        return 1.0 - ratio if ratio < threshold else 0.0

    return max(map(one, truths))
