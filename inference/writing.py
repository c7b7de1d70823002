"""What a language model writes after a user's prompts, as files."""

import json
from pathlib import Path

import jax

from inference import text


def is_writer(model) -> bool:
    """Whether inference/text.py can continue texts with it; a unified model has caches instead."""
    return "init_state" in model.predict


def write(
    config, model, params, *, tokenizer, prompts, rng, path: Path, stream=False
) -> list[Path]:
    """Continues every prompt by the settings of config.sample; the texts go to `path` and, as
    records, to the .json file beside it. A single prompt is shown as it is written."""
    settings = {k: config.sample[k] for k in text.Sampling._fields}
    ids = [[tokenizer.bos, *tokenizer.encode(p)] for p in prompts]
    first, alone = jax.process_index() == 0, len(prompts) == 1
    emit = None
    if stream and alone and first:
        print(prompts[0], end="", flush=True)
        emit = lambda row, more: print(more, end="", flush=True)  # noqa: E731
    # A tokenizer may take the space off a text's front; behind a character it is kept.
    front = tokenizer.encode("a")
    decode = lambda ids: tokenizer.decode([*front, *ids])[1:]  # noqa: E731
    sampling = text.Sampling(**settings | {"stop": tuple(settings["stop"])})
    out = text.generate(model, params, ids, rng, sampling, decode=decode, emit=emit)
    texts = [decode(row) if p else decode(row).removeprefix(" ") for p, row in zip(prompts, out)]
    if stream and first:
        print("" if emit else "\n\n".join(p + t for p, t in zip(prompts, texts)), flush=True)
    files = [path, path.with_suffix(".json")]
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(p + t for p, t in zip(prompts, texts)) + "\n", "utf-8")
        records = [
            {"prompt": p, "text": t, "tokens": len(row)} for p, t, row in zip(prompts, texts, out)
        ]
        files[1].write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return files
