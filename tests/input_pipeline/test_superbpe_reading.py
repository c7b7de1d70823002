"""SuperBPE's texts: every kind of file, what cannot be read, samples, counts that are kept."""

import gzip
import json
import random

import pytest

from input_pipeline.records import Skipped, Unreadable
from input_pipeline.superbpe import reading, task
from tests.input_pipeline.superbpe_texts import TEXT, config


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    """Text, jsonl, gz, ArrayRecord; blank lines part documents and no character is lost."""
    from array_record.python.array_record_module import ArrayRecordWriter

    skipped = Skipped(0)
    (tmp_path / "a.txt").write_text(TEXT, newline="")
    blocks = list(reading.read_file(tmp_path / "a.txt", skipped))
    assert "".join(blocks) == TEXT and len(blocks) > 30
    rows = "".join(json.dumps({"text": block}) + "\n" for block in blocks)
    (tmp_path / "a.jsonl").write_text(rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(rows)
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for i, block in enumerate(blocks):
        writer.write(block.encode() if i % 2 else json.dumps({"text": block}).encode())
    writer.close()
    for name in ("a.jsonl", "a.jsonl.gz", "a.array_record"):
        assert list(reading.read_file(tmp_path / name, skipped)) == blocks, name


def test_tfds_folders_are_read(make_config, cache):
    """A stored set of this repository is a TFDS set."""
    from input_pipeline import documents

    path = documents.prepare(make_config(name="text", text="docs").data)
    found = set(reading.read_file(path, Skipped(0)))
    assert found > set(documents.load(make_config(name="text", text="docs").data, "test")[0])


def test_bad_rows_are_counted_and_bad_inputs_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"txt": 1}\nnonsense\n')
    skipped = Skipped(5)
    assert list(reading.read_file(tmp_path / "a.jsonl", skipped)) == ["good"]
    assert skipped.counts == {"unreadable": 2}
    (tmp_path / "b.jsonl").write_text('{"text": "half \\ud800 a pair"}\n')
    found = [d.text for d in reading.stream(config(tmp_path / "b.jsonl").data)]
    assert found == ["half ? a pair"]
    with pytest.raises(FileNotFoundError, match="inputs='nowhere' is no text file.*catalogues"):
        list(reading.stream(config("nowhere").data))
    with pytest.raises(ValueError, match="vocab_size=200: more than the 256 bytes"):
        task.run(config(tmp_path / "b.jsonl", "data.vocab_size=200"), tmp_path / "out")
    with pytest.raises(ValueError, match="rules='repa' is none of repo, paper"):
        task.run(config(tmp_path / "b.jsonl", rules="repa"), tmp_path / "out")


def write_records(path, records) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def read(path, limit=10) -> tuple[list[str], int]:
    """(texts, how many items were left out)."""
    skipped = Skipped(limit)
    return list(reading.read_file(path, skipped)), len(skipped.names)


def test_one_bad_item_costs_one_item(tmp_path):
    """A line that is no UTF-8, a row or record whose "text" is no string."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nba\xffd\nfine\n\x0b\xe2\x80\xa8still\n")
    assert read(path) == (["good\n\n", "fine\n\x0b\u2028still\n"], 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": null}\n{"text": "ok"}\n\n[1]\n{"text": "\xff"}\n{"text": ""}\n')
    assert read(path) == (["ok"], 3)
    with pytest.raises(Unreadable, match="max_unreadable=2 is passed.*a.jsonl:1"):
        read(path, limit=2)
    path = tmp_path / "a.array_record"
    write_records(path, [b'{"text": null}', b"plain", b"\xff", b'{"x": 1}', b"{ code }"])
    assert read(path) == (["plain", '{"x": 1}', "{ code }"], 2)


def test_a_broken_file_costs_its_rest(tmp_path):
    """Cut off and damaged archives, of any kind of damage."""
    good = gzip.compress(TEXT.encode())
    broken = {"cut.txt.gz": good[:300], "none.txt.gz": b"no gzip"}
    broken["bits.txt.gz"] = good[:10] + b"\xff" * 20 + good[30:]  # zlib.error
    broken["none.array_record"] = b"junk" * 40_000
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name)[1] == 1, name
    rng = random.Random(0)
    write_records(tmp_path / "a.array_record", [f"record {i}".encode() for i in range(200)])
    whole = (tmp_path / "a.array_record").read_bytes()
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "b.array_record").write_bytes(damaged)
        read(tmp_path / "b.array_record", limit=1000)


def domains(*inputs) -> dict[str, str]:
    data = config("nowhere", inputs=tuple(map(str, inputs))).data
    return {d.domain: d.text for d in reading.stream(data)}


def test_paths_may_hold_the_sign_that_parts_domains(tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    (folder / "c=d.txt").write_text("text")
    assert domains(folder) == domains(folder / "c=d.txt") == {"c=d": "text"}
    assert domains(f"en={folder}") == domains(f"en={folder / 'c=d.txt'}") == {"en": "text"}
    found = reading.input_files(config("nowhere", inputs=(f"en={folder}",)).data)
    assert found == [("en", folder / "c=d.txt")]
    with pytest.raises(FileNotFoundError, match="inputs='' is no text file"):
        list(reading.stream(config("").data))


def test_shards_and_stored_sets_are_found_in_folders(tmp_path, make_config, cache):
    """x.array_record-00000-of-00001, of texts and of a TFDS set, alone and below a folder."""
    import shutil

    from input_pipeline import documents

    write_records(tmp_path / "x.array_record-00000-of-00001", [b"one", b"two"])
    (tmp_path / "about.array_record.md").write_text("three")
    stored = tmp_path / "sets" / "docs"
    shutil.copytree(documents.prepare(make_config(name="text", text="docs").data), stored)
    assert reading._files(str(tmp_path)) == [
        tmp_path / "about.array_record.md", stored, tmp_path / "x.array_record-00000-of-00001",
    ]  # fmt: skip
    assert read(tmp_path / "x.array_record-00000-of-00001") == (["one", "two"], 0)
    whole, left_out = read(stored)
    shards = [text for p in sorted(stored.glob("*.array_record*")) for text in read(p)[0]]
    assert sorted(shards) == sorted(whole) and len(whole) > 100 and not left_out


def test_kept_counts_depend_on_what_named_inputs_read():
    """Languages, and versions of the packages; not only files' sizes and times."""

    def stamp(*over, **fields):
        return reading.stamp(config("", *over, **fields).data)

    for name in ("captions", "catalogues"):
        more = stamp("data.langs=('en','fr')", inputs=(name,))
        assert more == stamp("data.langs=('en','fr')", inputs=(name,))
        assert more != stamp("data.langs=('en','de')", inputs=(name,))
    assert any("17.0.0" in str(row) for row in stamp(inputs=("captions",)))


def sample(rows, limit, seed):
    kept = reading.Sample(limit, seed)
    for row in rows:
        kept.add(*row)
    return kept.texts()


def test_sample_is_bounded_and_does_not_depend_on_the_order():
    rows = [("x", f"document {i} " * (1 + i % 7)) for i in range(500)]
    kept = sample(rows, 5000, 0)
    assert 4000 < sum(len(t) for _, t in kept) <= 5000
    assert sample(rows[::-1], 5000, 0) == kept != sample(rows, 5000, 1)
    assert sample(rows, 0, 0) == rows
