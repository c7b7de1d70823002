"""Mixed batches: what is in them, on any number of processes, and after a restart."""

import threading

import grain
import numpy as np
import pytest

from input_pipeline import DATASETS, image_text, openmoji, scenes


def build(config, index=0, count=1, split="train", seed=0):
    return DATASETS["image_text"](
        config, split=split, seed=seed, process_index=index, process_count=count
    )


def equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_shapes_and_types(make_config, take):
    config = make_config(16, prompt_length=20, text_length=24, und_size=64)
    (batch,) = take(build(config), 1)
    described = (f"{k} {v.dtype}{list(v.shape)}" for k, v in sorted(batch.items()))
    assert ", ".join(described) == (
        "gen_image uint8[8, 32, 32, 3], gen_length int32[8], gen_tokens int32[8, 20], "
        "und_image uint8[8, 64, 64, 3], und_length int32[8], und_prefix int32[8], "
        "und_tokens int32[8, 24]"
    )
    assert (batch["gen_length"] <= 20).all() and (batch["und_prefix"] < batch["und_length"]).all()


def test_every_row_belongs_to_its_picture(make_config, take):
    config = make_config(32, source="openmoji+scenes", text_length=64, prompt_length=64)
    pipeline = build(config)
    tok, data = pipeline.tokenizer, config.data
    captions: dict[bytes, set] = {}
    answers: dict[bytes, set] = {}
    glyphs = openmoji.load(data, "train", 32)
    drawn = scenes.load(data, "train", 32)
    for found in (glyphs, drawn):
        for i, item in enumerate(found.items):
            key = found.pictures.gather(np.array([i])).tobytes()
            captions.setdefault(key, set()).update(item.captions.items())
            answers.setdefault(key, set()).update((q.question, q.answer) for q in item.questions)
    langs = set()
    for batch in take(pipeline, 10):
        for tokens, image in zip(batch["gen_tokens"], batch["gen_image"]):
            texts = {text for _, text in captions[image.tobytes()]}
            assert tok.decode(tokens) in texts
        for row, image in enumerate(batch["und_image"]):
            ids, prefix = batch["und_tokens"][row], batch["und_prefix"][row]
            end = batch["und_length"][row]
            question = tok.decode(ids[: prefix - 1])
            answer = tok.decode(ids[prefix:end])
            assert ids[end - 1] == tok.eos and ids[prefix - 1] == tok.newline[0]
            if row < 8:
                lang = question.removeprefix("caption ")
                langs.add(lang)
                assert (lang, answer) in captions[image.tobytes()]
            else:
                assert (question, answer) in answers[image.tobytes()]
    assert len(langs) >= 10


def test_mix_decides_the_rows(make_config):
    assert image_text.rows(make_config(64)) == (32, 16, 16)
    only = make_config(8, mix=dict(t2i=1.0, caption=0.0, vqa=0.0))
    assert image_text.rows(only) == (8, 0, 0)
    assert image_text.rows(make_config(8, mix=dict(t2i=0.0, caption=1.0, vqa=3.0))) == (0, 2, 6)
    with pytest.raises(ValueError, match="config.data.mix="):
        image_text.rows(make_config(8, mix=dict(t2i=0.0, caption=0.0, vqa=0.0)))


def test_several_questions_share_a_picture(make_config, take):
    """Every packed pair is one of the picture's, none twice, prefixes and segments are right."""
    config = make_config(
        32, source="openmoji+scenes", captioned="openmoji", text_length=64, questions=4
    )
    pipeline = build(config)
    tok, data = pipeline.tokenizer, config.data
    right: dict[bytes, set] = {}
    for found in (openmoji.load(data, "train", 32), scenes.load(data, "train", 32)):
        for i, item in enumerate(found.items):
            known = right.setdefault(found.pictures.gather(np.array([i])).tobytes(), set())
            known.update((q.question, q.answer) for q in item.questions)
            known.update((f"caption {k}", text) for k, text in item.captions.items())
    counts = []
    for batch in take(pipeline, 4):
        for row, image in enumerate(batch["und_image"]):
            segments, prefix = batch["und_segments"][row], batch["und_prefix"][row]
            said = []
            for k in range(1, segments.max() + 1):
                ids, first = batch["und_tokens"][row][segments == k], prefix[segments == k]
                assert (first == first[0]).all() and ids[0] == tok.bos and ids[-1] == tok.eos
                said.append((tok.decode(ids[1 : first[0] - 1]), tok.decode(ids[first[0] :])))
            assert len(set(said)) == len(said) and set(said) <= right[image.tobytes()]
            counts.append(len(said))
    assert max(counts) == 4 and np.mean(counts) > 2


@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_single_task(make_config, take, mix):
    config = make_config(4, mix=dict(zip(("t2i", "caption", "vqa"), mix)))
    (batch,) = take(build(config), 1)
    assert ("gen_tokens" in batch) == bool(mix[0]) and ("und_tokens" in batch) != bool(mix[0])


def test_a_source_without_questions_is_explained(make_config):
    with pytest.raises(ValueError, match="config.data.mix.vqa=1.0 but source 'openmoji' has no"):
        build(make_config(source="openmoji"))
    with pytest.raises(ValueError, match="config.data.source='open': 'open' is none of openmoji"):
        build(make_config(source="open"))
    # A user's own pictures would be neither drawn nor captioned.
    with pytest.raises(
        ValueError, match="captioned='openmoji': 'openmoji' is no part of .*'scenes'"
    ):
        build(make_config(source="scenes", captioned="openmoji"))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batch(make_config, take, count):
    config = make_config(32)
    whole = take(build(config), 4)
    parts = [take(build(config, i, count), 4) for i in range(count)]
    for step, batch in enumerate(whole):
        joined = {k: np.concatenate([p[step][k] for p in parts]) for k in batch}
        equal(joined, batch)
        first, second = parts[0][step], parts[1][step]
        assert any((first[k] != second[k]).any() for k in batch)  # each reads its own share


def test_processes_that_cannot_share_are_explained(make_config):
    with pytest.raises(ValueError, match="gives 8 rows per batch, which 3 processes"):
        build(make_config(16), 0, 3)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resumes_anywhere(make_config, prefetch):
    pipeline = build(make_config(8, prefetch=prefetch))
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.LimitIterDataset(pipeline.dataset, 6)
    )
    pipeline.close()


def test_state_moves_between_process_counts(make_config):
    config = make_config(16)
    first = iter(build(config, 0, 2).dataset)
    for _ in range(3):
        next(first)
    state = first.get_state()
    alone = iter(build(config).dataset)
    alone.set_state(state)
    expected = [next(first) for _ in range(2)]
    assert any((expected[0][k] != expected[1][k]).any() for k in expected[0])
    for want in expected:
        got = next(alone)
        equal({k: v[: len(want[k])] for k, v in got.items()}, want)


def test_seed_decides_order_and_language(make_config, take):
    config = make_config(16)
    a, b, c = take(build(config), 2), take(build(config), 2), take(build(config, seed=1), 2)
    for x, y in zip(a, b):
        equal(x, y)
    assert (a[0]["gen_tokens"] != c[0]["gen_tokens"]).any()


def test_languages_change_over_epochs(make_config, take):
    config = make_config(4, source="openmoji", mix=dict(t2i=1.0, caption=0.0, vqa=0.0))
    pipeline = build(config)
    seen: dict[bytes, set] = {}
    for batch in take(pipeline, 150):  # five epochs of the 110 or so food glyphs
        for image, tokens in zip(batch["gen_image"], batch["gen_tokens"]):
            seen.setdefault(image.tobytes(), set()).add(pipeline.tokenizer.decode(tokens))
    assert np.mean([len(v) for v in seen.values()]) > 3


def test_families_are_drawn_as_often_as_single_pictures(make_config, take):
    """An epoch shows every family once; its members by turns, each with its own captions."""
    only = dict(t2i=1.0, caption=0.0, vqa=0.0)
    tones = dict(categories=("people",), source="openmoji", mix=only, prompt_length=64)
    config = make_config(50, families=True, **tones)
    items = openmoji.load(config.data, "train", 32).items
    families: dict[str, set] = {}
    for item in items:
        base = openmoji.base_glyph(openmoji.characters(item.id))
        families.setdefault(base, set()).update(item.captions.values())
    assert len(items) > 3 * len(families) > 1000
    pipeline = build(config)
    batches = take(pipeline, 2 * len(families) // 50)
    texts = [pipeline.tokenizer.decode(t) for b in batches for t in b["gen_tokens"]]
    counted = [sum(t in captions for t in texts) for captions in families.values()]
    # Names shared by several families make some counts larger; without them it is one per epoch.
    assert np.median(counted) == 2 and np.percentile(counted, 80) <= 4
    toned = [t for t in texts if "skin tone" in t]
    assert len({t.split(":")[-1] for t in toned}) >= 5
    food = tones | dict(categories=("food",))
    single, plain = (build(make_config(50, families=f, **food)) for f in (True, False))
    equal(take(single, 1)[0], take(plain, 1)[0])  # no families, no difference


def test_too_long_texts_are_cut_and_counted(make_config, take):
    pipeline = build(make_config(32, prompt_length=4, text_length=12))
    got = take(pipeline, 5)
    assert pipeline.counts["truncated"] > 10
    assert all((b["gen_length"] <= 4).all() and (b["und_length"] <= 12).all() for b in got)
    assert "truncated" not in build(make_config(8, prompt_length=200, text_length=200)).counts


def test_edits(make_config, take):
    pipeline = build(make_config(16, edit=True, scenes=40, source="scenes"))
    (batch,) = take(pipeline, 1)
    assert batch["gen_source_image"].shape == batch["gen_image"].shape == (8, 32, 32, 3)
    assert (batch["gen_source_image"] != batch["gen_image"]).any(axis=(1, 2, 3)).all()
    verbs = {pipeline.tokenizer.decode(t).split()[0] for t in batch["gen_tokens"]}
    assert verbs <= {"make", "remove", "replace", "add"}


def test_closing_stops_the_threads(make_config):
    def prefetching():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    before = len(prefetching())
    pipeline = build(make_config(8, prefetch=2))
    iterator = iter(pipeline.dataset)
    next(iterator)
    assert len(prefetching()) > before
    pipeline.close()
    for thread in prefetching()[before:]:
        thread.join(timeout=10)
    assert len(prefetching()) == before
