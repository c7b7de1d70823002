"""Pictures drawn for a fixed set of captions, once per evaluation; retrieval, kid and sheets share
them through workdir/eval/drawn.npz."""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval import common, data
from inference import pictures


class Drawn(NamedTuple):
    """Captions with their real and their generated pictures.

    split is "train", "held_out" or "languages" (a few training pictures asked for in every
    language; only the sheets show them).
    """

    captions: list[str]
    split: np.ndarray  # str [n]
    group: np.ndarray  # int [n]: equal pictures share a group
    real: np.ndarray  # uint8 [n, h, w, 3]
    images: np.ndarray  # uint8 [n, h, w, 3]

    def of(self, split: str) -> "Drawn":
        """The rows of one split."""
        rows = np.flatnonzero(self.split == split)
        captions = [self.captions[i] for i in rows]
        return Drawn(captions, *(x[rows] for x in self[1:]))

    def splits(self) -> list[str]:
        """The splits that have any picture, "train" first."""
        return [s for s in data.SPLITS if (self.split == s).any()]


def draw(config, model, params, captions, rng, *, source=None) -> np.ndarray:
    """uint8 [n, h, w, 3]: one picture per caption, config.evaluation.draw_batch per call.

    source: (pictures uint8 [n, s, s, 3], tokens [n, N, C]) when the captions are edits.
    """
    tokens, lengths = data.prompts(config, captions)
    size = min(config.evaluation.draw_batch, len(captions))
    images = []
    for index, real in common.padded(len(captions), size):
        made = pictures.generate(
            config,
            model,
            params,
            tokens[index],
            lengths[index],
            jax.random.fold_in(rng, int(index[0])),
            source=None if source is None else tuple(x[index] for x in source),
            shown=False,
        )
        images.append(common.to_host(made.images)[:real])
    return np.concatenate(images)


def _chosen(glyphs, rows, captions, split: str) -> Drawn:
    """Captions of rows of the data, with `images` still empty."""
    real = glyphs.pictures.gather(np.asarray(rows, np.int64))
    group = np.array([data.group_of(glyphs, r) for r in rows], np.int64)
    return Drawn(captions, np.array([split] * len(rows)), group, real, real[:0])


def prompts(config) -> Drawn:
    """The captions that every evaluation of this config draws, with `images` still empty."""
    options, parts = config.evaluation, []
    langs = data.languages(config, options.prompt_languages)
    for split in data.SPLITS:
        glyphs = data.captioned(config, split, config.data.image_size)
        rows = data.one_per_group(glyphs, options.prompts, options.seed)
        if len(rows):
            asked = [
                data.caption(glyphs.items[r], langs[i % len(langs)]) for i, r in enumerate(rows)
            ]
            parts.append(_chosen(glyphs, rows, asked, split))
        if split == "train":
            every = config.data.langs
            whole = [r for r in rows if all(k in glyphs.items[r].captions for k in every)]
            whole = whole[: options.language_glyphs]
            asked = [glyphs.items[r].captions[k] for r in whole for k in every]
            several = _chosen(glyphs, np.repeat(whole, len(every)), asked, "languages")
    parts += [several] if several.captions else []
    return Drawn(
        [c for p in parts for c in p.captions],
        *(np.concatenate([p[i] for p in parts]) for i in range(1, len(Drawn._fields))),
    )


def drawn(config, model, params, *, step, rng, workdir) -> Drawn:
    """The pictures of this model for `prompts(config)`; read from disk when they are there."""
    wanted = prompts(config)
    path = Path(workdir) / "eval" / "drawn.npz"
    options = pictures.options(config, model, shown=False)
    mark = _fingerprint(options, params, wanted, step, rng)
    images = _read(path, mark)
    if images is None:
        images = draw(config, model, params, wanted.captions, jax.random.fold_in(rng, 1))
        _write(path, mark, images)
    return wanted._replace(images=images)


@jax.jit
def _magnitude(params):
    return sum(jnp.abs(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(params))


def _fingerprint(options, params, wanted: Drawn, step, rng) -> str:
    """Text that differs whenever other pictures would be drawn."""
    magnitude = float(common.to_host(_magnitude(params)))
    key = np.asarray(jax.random.key_data(rng)).tolist()
    state = [step, magnitude, key, options, wanted.captions]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _read(path: Path, mark: str) -> np.ndarray | None:
    if jax.process_count() > 1 or not path.is_file():  # hosts may not share the folder
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["images"] if str(stored["mark"]) == mark else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # cut short by a kill
        return None


def _write(path: Path, mark: str, images: np.ndarray) -> None:
    if jax.process_count() > 1:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp.npz")
    np.savez_compressed(scratch, mark=np.array(mark), images=images)
    os.replace(scratch, path)
