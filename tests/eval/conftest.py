"""A folder of plain pictures with captions and questions, a model that knows them by heart, and a
folder of texts."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.common import base
from configs.data import data_config
from eval import data
from inference import unified

SIZE = 8
COUNTS = {"train": 30, "test": 12, "validation": 2}
WORDS = ("the", "snail", "is", "a", "small", "animal", "that", "carries", "its", "house")


def picture(number: int) -> np.ndarray:
    """A picture no other number has: four quadrants of one colour each."""
    rng = np.random.default_rng(number)
    colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return colours.repeat(SIZE // 2, axis=0).repeat(SIZE // 2, axis=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rows, number = [], 0
    for split, count in COUNTS.items():
        for _ in range(count):
            Image.fromarray(picture(number)).save(root / f"{number}.png")
            questions = [
                {"kind": "count", "question": "how many?", "answer": str(1 + number % 2)},
                {"kind": "colour", "question": "which colour?", "answer": "red"},
            ]
            caption = {"en": f"thing {number}", "de": f"ding {number}"}
            row = dict(file=f"{number}.png", caption=caption, questions=questions, split=split)
            rows.append(json.dumps(row))
            number += 1
    (root / "captions.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def config(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "eval-cache"  # prepared once for all tests
    monkeypatch.setenv("UNIFLUD_CACHE", str(cache))
    config = base(
        data=data_config(
            source="folder", path=str(folder), image_size=SIZE, vocab_size=300,
            prompt_length=16, text_length=32, langs=("en", "de"),
        ),
        evaluation=dict(
            batch=8, captions=10, questions=12, prompts=10, draw_batch=8, candidates=16,
            languages=("en", "de", "ja"), pictures=10, language_glyphs=2,
            sheet=6, sheet_languages=("en", "de"),
        ),
        sample=dict(guidance=2.0, steps=3, unknown_to_the_sampler=1),
    )  # fmt: skip
    return config


class Oracle:
    """A fake model that answers and draws perfectly, or always the same; counts its calls."""

    def __init__(self, config, monkeypatch):
        self.config, self.perfect, self.calls, self.drawn_with = config, True, [], []
        self.answers, self.pictures = {}, {}
        tok = data.tokenizer(config)
        for name in ("train", "test"):
            examples = data.sources.load(config.data, name, SIZE)
            for i, item in enumerate(examples.items):
                pixels = examples.pictures.gather(np.array([i]))[0]
                for lang, text in item.captions.items():
                    self.answers[pixels.tobytes(), f"caption {lang}"] = text
                    self.pictures[text] = pixels
                for q in item.questions:
                    self.answers[pixels.tobytes(), q.question] = q.answer
        self.tok = tok
        monkeypatch.setattr(unified, "generate_text", self.generate_text)
        monkeypatch.setattr(unified, "generate_images", self.generate_images)
        self.model = SimpleNamespace(
            predict={
                "text_nll": text_nll,
                "encode_latents": encode_latents,
                "decode_latents": decode_latents,
            }
        )

    def generate_text(self, model, params, images, tokens, lengths, *, max_new):
        self.calls.append(len(images))
        out = np.zeros((len(images), max_new), np.int32)
        for row, (image, ids, length) in enumerate(zip(images, tokens, lengths)):
            question = self.tok.decode(ids[:length]).removesuffix("\n")
            answer = self.answers[image.tobytes(), question] if self.perfect else "red"
            said = [*self.tok.encode(answer), self.tok.eos]
            out[row, : len(said)] = said
        return jnp.asarray(out)

    def generate_images(self, model, params, tokens, lengths, rng, *, source=None, **options):
        self.calls.append(len(tokens))
        self.drawn_with.append(options)
        captions = [self.tok.decode(ids[:n]) for ids, n in zip(tokens, lengths)]
        images = np.stack([self.pictures[c if self.perfect else "thing 0"] for c in captions])
        return SimpleNamespace(images=jnp.asarray(images))


def text_nll(params, batch):
    """One nat per answer token, every token right."""
    count = (batch["und_length"] - batch["und_prefix"]).astype(jnp.float32)
    return {"nll": params["nats"] * count, "correct": count, "count": count}


def encode_latents(params, images):
    return images.reshape(images.shape[0], -1, 3)


def decode_latents(params, tokens):
    return tokens.reshape(tokens.shape[0], SIZE, SIZE, 3) + params["blur"]


@pytest.fixture
def oracle(config, monkeypatch):
    return Oracle(config, monkeypatch)


@pytest.fixture
def params():
    return {"nats": jnp.float32(1.0), "blur": jnp.float32(0.0)}


@pytest.fixture
def text_config(tmp_path, monkeypatch):
    """A folder of texts with characters of one to four bytes."""
    monkeypatch.setenv("UNIFLUD_CACHE", str(tmp_path / "cache"))
    rng, folder = np.random.default_rng(0), tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        words = rng.choice([*WORDS, "Schnecke", "Häuschen", "かたつむり", "🐌"], 80)
        (folder / f"{i}.txt").write_text(" ".join(words))
    data = data_config(
        name="text", text="folder", path=str(folder), length=32, vocab_size=400, prefetch=0
    )
    return base(data=data, evaluation=dict(batch=8, windows=16))
