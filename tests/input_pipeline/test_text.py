"""Packed text: nothing is lost, segments are documents, every source, resume."""

import json

import grain
import numpy as np
import pytest

from input_pipeline import DATASETS, documents, records, text, tokenizers


def build(config, index=0, count=1):
    return DATASETS["text"](config, split="train", seed=0, process_index=index, process_count=count)


@pytest.fixture
def corpus(tmp_path):
    """A folder of texts: 30 files, one of them in jsonl."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["snail", "volcano", "otter", "fluß", "漢字", "\n", "a", "the"]
    for i in range(29):
        body = " ".join(words[j] for j in rng.integers(0, 8, rng.integers(5, 120)))
        (folder / f"t{i:02}.txt").write_text(f"document {i} {body}", "utf-8")
    rows = [json.dumps({"text": f"row {i}"}) for i in range(5)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def config(make_config, corpus, fresh_cache):
    return make_config(4, name="text", text="folder", path=str(corpus), length=64)


def test_packing_keeps_every_token_once(config):
    texts, _ = documents.load(config.data, "train")
    found, tok, _ = text.windows(config.data, "train")
    assert found.tokens.shape == found.positions.shape == found.segment_ids.shape
    assert found.tokens.shape[1] == 64
    stream = found.tokens[found.segment_ids > 0].tolist()
    stored = []
    while stream:
        end = stream.index(tok.eos) + 1
        row, stream = stream[:end], stream[end:]
        assert row[0] == tok.bos
        stored.append(tok.decode(row))
    assert sorted(stored) == sorted(texts)
    padding = found.segment_ids == 0
    assert padding.sum() < 64 and (found.tokens[padding] == tok.pad).all()


def test_segments_and_positions(config):
    found, tok, _ = text.windows(config.data, "train")
    for tokens, segments, positions in zip(*found):
        real = segments > 0
        starts = np.flatnonzero(real & (positions == 0))
        assert segments[starts].tolist() == list(range(1, len(starts) + 1))
        for segment in np.unique(segments[real]):
            rows = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(positions[rows], np.arange(len(rows)))
            assert (tokens[rows[1:]] != tok.bos).all()


def test_batches_resume_and_are_shared(config, take):
    pipeline = build(config)
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.LimitIterDataset(pipeline.dataset, 5)
    )
    whole, halves = take(pipeline, 3), [take(build(config, i, 2), 3) for i in range(2)]
    for step, batch in enumerate(whole):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: ((4, 64), np.dtype(np.int32)) for k in ("tokens", "segment_ids", "positions")
        }
        for key in batch:
            joined = np.concatenate([half[step][key] for half in halves])
            np.testing.assert_array_equal(joined, batch[key])


def test_broken_texts_are_skipped_and_named(config, corpus, caplog):
    (corpus / "t01.txt").write_bytes(b"\xff\xfe\x00bad")
    (corpus / "bad.jsonl").write_text('{"no": "text"}')
    with caplog.at_level("WARNING"):
        pipeline = build(config)
    assert pipeline.counts == {"unreadable": 2}
    assert "t01.txt" in caplog.text and "bad.jsonl" in caplog.text
    config.data.max_unreadable = 1
    (corpus / "t02.txt").write_text("changed")
    with pytest.raises(records.Unreadable, match="config.data.max_unreadable=1 is passed"):
        build(config)


def test_captions_use_the_tokenizer_of_the_pictures(make_config):
    config = make_config(4, name="text", text="captions", length=64, langs=("en", "de"))
    pictures = make_config(4)
    assert (
        tokenizers.load(config.data).inner.to_str() == tokenizers.load(pictures.data).inner.to_str()
    )
    texts, _ = documents.load(config.data, "train")
    assert "snail" in texts and "schnecke" in texts
    assert any(" on " in t for t in texts)
    assert "Kuwait" not in texts and "caracol" not in texts


def test_docs_of_the_standard_library(make_config):
    texts, _ = documents.load(make_config(name="text", text="docs").data, "test")
    assert len(texts) > 100 and not any("\ndef " in t and "import os\n" in t[:40] for t in texts)
    every = sum(
        sum(map(len, documents.load(make_config(name="text", text="docs").data, s)[0]))
        for s in ("train", "validation", "test")
    )
    assert 1_500_000 < every < 4_000_000  # 1.7 MB of docstrings and 0.5 MB of reference in 3.12


def test_mistakes_are_explained(make_config, tmp_path):
    with pytest.raises(ValueError, match="config.data.text='wiki' is none of stdlib, docs, gcide"):
        build(make_config(name="text", text="wiki"))
    with pytest.raises(FileNotFoundError, match="config.data.path=.* holds no .txt"):
        build(make_config(name="text", text="folder", path=str(tmp_path)))


def staged(make_config, corpus, **changes):
    """Two folders with documents of their own, in two stages: a alone, then a and b."""
    for name in ("a", "b"):
        (corpus / name).mkdir(exist_ok=True)
        for i in range(40):
            (corpus / name / f"{i}.txt").write_text(f"{name} " * (30 + i))
    stages = ((3, (("a", 1.0),)), (9, (("a", 0.25), ("b", 0.75))))
    config = make_config(4, name="text", text="folder", path=str(corpus), length=64, stages=stages)
    config.update(changes)
    return config


def first_letters(batch, tok):
    return [tok.decode(row).split()[-1] for row in batch["tokens"]]


def test_ramp_and_stages(make_config, corpus, fresh_cache):
    """Batches of 4, 8, then 16 rows; all of folder a for 3 steps, then three quarters of b."""
    config = staged(make_config, corpus, batch_size=16, ramp=((4, 2), (8, 2)))
    pipeline = build(config)
    iterator = iter(pipeline.dataset)
    batches = [next(iterator) for _ in range(8)]
    assert [len(b["tokens"]) for b in batches] == [4, 4, 8, 8, 16, 16, 16, 16]
    letters = [first_letters(b, pipeline.tokenizer) for b in batches]
    assert set(sum(letters[:3], [])) == {"a"}
    later = sum(letters[3:], [])
    assert later.count("b") == 0.75 * len(later)
    # The same on two processes, and from a saved position.
    halves = [
        [next(it) for _ in range(8)] for it in (iter(build(config, i, 2).dataset) for i in (0, 1))
    ]
    for whole, *parts in zip(batches, *halves, strict=True):
        joined = np.concatenate([p["tokens"] for p in parts])
        np.testing.assert_array_equal(joined, whole["tokens"])
    again = iter(build(config).dataset)
    for _ in range(3):
        next(again)
    saved, fresh = again.get_state(), iter(build(config).dataset)
    fresh.set_state(saved)
    np.testing.assert_array_equal(next(fresh)["tokens"], batches[3]["tokens"])


def test_stages_say_what_is_wrong(make_config, corpus, fresh_cache):
    config = staged(make_config, corpus)
    config.data.stages = ((3, (("c", 1.0),)),)
    with pytest.raises(FileNotFoundError, match="holds no .txt"):
        build(config)
    config.data.stages = ((3, (("a", -1.0),)),)
    with pytest.raises(ValueError, match="config.data.stages has .*share > 0"):
        build(config)
