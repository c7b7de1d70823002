"""SuperBPE: text tokenizers whose tokens may be several words; up to a third fewer tokens.

    python main.py --config=configs/superbpe.py
    python main.py --config=configs/llama.py --config.data.tokenizer=runs/superbpe/tokenizer.json

Aims at the tokenizers of arXiv 2503.13423: 200K tokens of which t come from ordinary BPE, 6.09 to
6.63 bytes of English each where BPE has 4.46. Extra `superbpe` (numba) makes stage 2 fast; without
it the same merges take longer. Expected: a minute or two on two CPU cores; `report.md` and
`report.png` compare with BPE of the same size, `superwords.txt` lists what was learnt.

| variant | trains on | where |
| --- | --- | --- |
| (none) | 13.7 MB of English (GCIDE, extra `text`; else Python's source), 16,384 tokens | minutes |
| debug | Python's documentation, 1,000 tokens | seconds |
| sweep | 6.3 MB of the same texts, t at nine shares of the vocabulary, the best is kept | minutes |
| code | Python's standard library | minutes |
| mixed | captions in 14 languages and installed gettext catalogues | minutes |
| 200k, 200k_t80k, 128k | your texts (data.path), t = 180,000, 80,000, 100,000 | servers |

Your own texts: --config.data.superbpe.inputs="('en=FOLDER','code=FILE.jsonl')". To go on from a
tokenizer: --config.data.superbpe.start=FILE/tokenizer.json --config.data.vocab_size=N.
"""

import importlib.util

from ml_collections.config_dict import placeholder

from configs import common
from configs.data import data_config

PUBLISHED = {"200k": (200_000, 180_000), "200k_t80k": (200_000, 80_000), "128k": (128_000, 100_000)}
VARIANTS = ("debug", "sweep", "code", "mixed", *PUBLISHED)


def superbpe_config(**overrides) -> dict:
    """The defaults of config.data.superbpe, the only place where they are written down."""
    return (
        dict(
            inputs=("",)[:0],  # names or paths, "DOMAIN=" in front; () = data.text, or data.path
            sample_mb=200.0,  # most text trained on with count=memory, drawn by hash; 0: all
            held_out=0.05,  # share of your own documents that is measured on, not trained on
            held_out_mb=5.0,  # most of it
            t=-1,  # merges of stage 1; -1: share * data.vocab_size, or all that `start` has
            share=0.4,
            sweep=(0.0,)[:0],  # shares at which stage 2 branches off; the best t is kept
            rules="repo",  # repo | paper (digits are the only border) | none | bpe
            # What stage 2 may not merge; None: as `rules` has it, in brackets for repo and paper.
            max_words=placeholder(int),  # of a token (4); 0: any number
            colon=placeholder(bool),  # no token holds ": " (True)
            newlines=placeholder(bool),  # a newline only at the end of a token (True)
            digits=placeholder(bool),  # digits join digits only, at most three (True)
            punctuation=placeholder(bool),  # none in tokens of several words (False)
            all_bytes=True,  # the alphabet is all 256 bytes; False: those seen
            start="",  # tokenizer.json, or merges.txt with `alphabet`, that stage 2 goes on from
            alphabet="",
            keep=False,  # the vocabulary of `start` stays whole and keeps its ids
            save_every=10.0,  # seconds of stage 2 between two files to go on from
            engine="auto",  # auto | numba | python
            # memory | disk (pieces counted in files) | beam (on many machines). Stage 2 holds every
            # different line in memory whichever it is: 50 MB of text took 1.1 GB.
            count="memory",
            count_memory_mb=512.0,  # of pieces before they go to disk
            beam=("",)[:0],  # options of the Beam pipeline: ("--runner=...",)
            specials=("<pad>", "<eos>", "<bos>", "<unused0>"),  # get ids after the vocabulary
        )
        | overrides
    )


def get_config(arg=""):
    """The config of one variant; see the table above."""
    variant = common.parse_arg(arg, VARIANTS).variant
    text, size, more = "gcide" if importlib.util.find_spec("dictionary") else "stdlib", 16_384, {}
    if variant in PUBLISHED:
        size, t = PUBLISHED[variant]
        # Ten gigabytes were read for the paper, of documents cut at their 99th percentile.
        text, more = "folder", dict(t=t, sample_mb=10_240.0, held_out_mb=100.0)
    match variant:
        case "debug":
            text, size = "docs", 1000
            more = dict(sample_mb=0.5, held_out_mb=0.1)
        case "sweep":
            more = dict(sample_mb=6.0, held_out_mb=0.5)
            more |= dict(sweep=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0))
        case "code":
            text = "stdlib"
        case "mixed":
            more = dict(inputs=("captions", "catalogues"))
    data = data_config(name="text", text=text, vocab_size=size, superbpe=superbpe_config(**more))
    return common.base(task="tokenizer", data=data)
