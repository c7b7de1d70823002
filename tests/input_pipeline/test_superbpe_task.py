"""SuperBPE as a user runs it: inputs, counts on disk, kills, sweep, models; checks 7 to 9."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers as hf

from configs.common import load_config
from input_pipeline import text as packed
from input_pipeline import tokenizers
from input_pipeline.records import Skipped
from input_pipeline.superbpe import counting, reading, stage1, stage2, sweep, task, tokenizer_json
from input_pipeline.superbpe.bpe import Bpe, digest, read_merges
from input_pipeline.superbpe.rules import NO_VETO, PRESETS, S1, S2, Rules, Veto
from tests.input_pipeline.superbpe_texts import TEXT, config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "superbpe"


@pytest.fixture(scope="module")
def questions(public_data) -> str:
    return public_data("superbpe", "gsm8k_questions_train.txt").read_text("utf-8")


@pytest.mark.parametrize("engine", ["auto", "python"])
def test_counts_on_disk_give_the_same_merges(tmp_path, engine):
    """Many sorted parts, merged; stage 1 and stage 2 from them."""
    plain = stage1.train([TEXT], vocab_size=120)
    one = counting.count([TEXT], (S1,), tmp_path / "s1.tsv", memory_mb=0.001)
    assert counting.stage1_from_counts(
        counting.read_counts(one), vocab_size=120, engine=engine
    ).merges == plain.merges  # fmt: skip
    two = counting.count([TEXT], (S2,), tmp_path / "s2.tsv", memory_mb=0.001)
    assert set(tmp_path.iterdir()) == {one, two}  # and no parts
    found = stage2.train(
        counting.read_counts(two), plain.first(40), 150, counted=True, engine=engine
    )
    assert found.bpe == stage2.train([TEXT], plain.first(40), 150, engine=engine).bpe


def test_many_parts_are_merged_with_few_open_files(tmp_path):
    """Every piece a part of its own: thousands of them, far more than a process may open."""
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, usual[1]))
    try:
        many = counting.count([TEXT[:9000]], (S1,), tmp_path / "many.tsv", memory_mb=0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    one = counting.count([TEXT[:9000]], (S1,), tmp_path / "one.tsv")
    assert many.read_text() == one.read_text() and set(tmp_path.iterdir()) == {one, many}


def test_beam_refuses_before_it_reads(tmp_path):
    """Held-out shares and names are for counting here."""
    for fields, message in (
        (dict(held_out=0.05), "set held_out=0.0"),
        (dict(inputs=("gcide",)), "'gcide', which is no file: count='beam' counts files only"),
    ):
        with pytest.raises(ValueError, match=message):
            task.run(config(tmp_path / "nowhere", count="beam", **fields), tmp_path / "out")


def test_beam_reads_files_as_the_others_do(tmp_path):
    """Halves of surrogate pairs, rows without a text, normalisers; and little of a file here."""
    rows = ['{"text": "half \\ud800 a pair"}', '{"text": null}', '{"text": "A b A"}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    found = dict(counting._count_file(str(path), (S1,), 1, {"type": "Lowercase"}))
    assert found == {"half": 1, "Ġ?": 1, "Ġa": 2, "Ġpair": 1, "a": 1, "Ġb": 1}
    with pytest.raises(ValueError, match="max_unreadable=0 is passed"):
        list(counting._count_file(str(path), (S1,), 0, None))
    for name in "bc":
        (tmp_path / f"{name}.txt").write_text(TEXT, newline="")
    data = config(tmp_path).data
    some = list(reading.beginnings(data, 6000))
    assert [d.domain for d in some if d.domain != "b" and d.domain != "c"] == ["a", "a"]
    assert 2000 <= sum(len(d.text) for d in some if d.domain == "c") < 2500
    assert len(list(reading.beginnings(data, 0))) == len(list(reading.stream(data)))


def test_beam_counts_the_same(tmp_path):
    """The pipeline on this machine's runner; needs the extra "beam"."""
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT, newline="")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    parts = counting.count_with_beam(files, (S1,), tmp_path / "beam")
    one = counting.count([TEXT, TEXT], (S1,), tmp_path / "disk.tsv")
    assert sorted(counting.read_counts(parts)) == sorted(counting.read_counts(one))


def test_task_with_beam_equals_task_on_disk(tmp_path):
    """The whole command; needs the extra "beam"."""
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT, newline="")
    found = []
    for count in ("beam", "disk"):
        inputs = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
        over = config(tmp_path, "data.vocab_size=340", inputs=inputs, count=count)
        task.run(over, tmp_path / count)
        found.append(read_merges(tmp_path / count / "merges.txt"))
    assert found[0] == found[1]


def test_counts_do_not_end_at_two_to_the_31():
    """Weights of a corpus of terabytes; ties and order hold."""
    big = 3 * 2**31
    rows = [("ab", big), ("cd", big + 1), ("abcd", 1)]
    for engine in ("auto", "python"):
        found = counting.stage1_from_counts(rows, vocab_size=7, engine=engine)
        assert found.merges == (("c", "d"), ("a", "b"), ("ab", "cd"))


def test_task_on_disk_equals_task_in_memory(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT, newline="")
    over = ("data.vocab_size=340",)
    found = {}
    for count in ("memory", "disk"):
        task.run(config(tmp_path / "in.txt", *over, count=count), tmp_path / count)
        found[count] = read_merges(tmp_path / count / "merges.txt")
    assert found["memory"] == found["disk"]


def test_task_leaves_what_it_says(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT, newline="")
    told = task.run(config(tmp_path / "in.txt", "data.vocab_size=340"), tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(told))
    assert told["measured_on"] == "the training text"
    assert told["bytes_per_token"]["all"] > told["bytes_per_token_bpe"]["all"]
    assert not any(told["vocabulary"]["broken_rules"].values())
    for name in ("report.png", "report.md", "superwords.txt", "merges.txt", "vocab.json"):
        assert (out / name).stat().st_size > 0, name
    assert "·of·the" in (out / "superwords.txt").read_text()
    inner = hf.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert json.loads((out / "vocab.json").read_text()).items() <= inner.get_vocab().items()


def test_vetoes_are_the_presets_unless_the_config_gives_them():
    """What the config gives is taken although it is what other presets have."""
    for texts, expected in (
        (("rules=repo",), Veto()),
        (("rules=none",), Veto(digits=False)),
        (("rules=none", "digits=True", "colon=False"), Veto(colon=False)),
        (("rules=bpe",), NO_VETO),
        (("rules=bpe", "max_words=4", "punctuation=True"), Veto(4, False, False, False, True)),
    ):
        over = [f"data.superbpe.{text}" for text in texts]
        options = load_config("configs/superbpe.py:debug", *over).data.superbpe
        assert task._rules(options).veto == expected, texts


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(t=5000), "superbpe.t=5000: allowed are -1 and 0 to 339"),
        (dict(t=-3), "superbpe.t=-3: allowed are -1 and 0 to 339"),
        (dict(t=200), "superbpe.t=200: allowed are -1 and 0 to 74, the merges that stage 1 found"),
        (dict(share=1.5), "superbpe.share=1.5: allowed are 0 to 1"),
        (dict(sweep=(0.5, 2.0)), "superbpe.sweep has 2.0: shares lie in"),
        (dict(keep=True), "keep=True keeps the whole vocabulary of `start`: it needs start=FILE"),
        (dict(count="dusk"), "count='dusk': allowed are memory, disk, beam"),
    ],
)
def test_numbers_that_cannot_be_are_explained(tmp_path, fields, message):
    (tmp_path / "in.txt").write_text(TEXT, newline="")
    with pytest.raises(ValueError, match=message):
        task.run(config(tmp_path / "in.txt", "data.vocab_size=340", **fields), tmp_path / "out")


def test_stage_2_without_room_is_explained(tmp_path):
    """A share of 1 leaves nothing to it; one merge less is enough."""
    (tmp_path / "in.txt").write_text(TEXT, newline="")
    over = config(tmp_path / "in.txt", "data.vocab_size=300", t=44)
    with pytest.raises(ValueError, match="begins with 300 tokens .t=44., so at least 301"):
        task.run(over, tmp_path / "out")
    over.data.superbpe.t = 43
    assert task.run(over, tmp_path / "out")["t"] == 43


def test_a_run_is_finished_when_its_last_file_is_there(tmp_path, monkeypatch):
    """Empty texts are passed over; report.json, which says "finished", comes last."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT, newline="")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": ""}\n')
    over, out = config(tmp_path / "in", "data.vocab_size=340"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(task.report, "plot", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            task.run(over, out)
    assert not (out / "report.json").exists()
    told = task.run(over, out)
    assert (out / "report.png").exists() and told["bytes_per_token"]["all"] > 4
    nothing = told | {"bytes_per_token": {"all": 0.0}}
    assert "| all |" in task.report.markdown(nothing, "no tokens")


def test_a_killed_run_goes_on_with_the_same_merges(tmp_path):
    """SIGKILL inside stage 2; the same command continues from what was saved."""
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(400)]
    lines = [" ".join(rng.choices(names, k=12)) + "\n" for _ in range(2500)]
    (tmp_path / "in.txt").write_text("".join(lines))
    command = [
        sys.executable, str(ROOT / "main.py"), "--config=configs/superbpe.py:debug",
        f"--workdir={tmp_path / 'out'}", "--config.data.vocab_size=6000",
        f"--config.data.superbpe.inputs=('{tmp_path / 'in.txt'}',)",
        "--config.data.superbpe.held_out=0.0", "--config.data.superbpe.engine=python",
        "--config.data.superbpe.save_every=0.1", "--config.data.superbpe.share=0.1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out" / "stage2-t600.partial.json"
    end = time.monotonic() + 300
    while not partial.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and partial.exists()
    done = len(json.loads(partial.read_text())["merges"])
    finished = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "goes on after" in finished and not partial.exists()
    merges = read_merges(tmp_path / "out" / "merges.txt")
    texts = list(reading.read_file(tmp_path / "in.txt", Skipped(0)))
    plain = stage1.train(texts, vocab_size=6000, all_bytes=True)
    whole = stage2.train(texts, plain.first(600), 6000, all_bytes=True).bpe
    assert merges == whole.merges and 600 < done < len(merges)
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "finished before" in again


def test_check_7_interior_optimum_of_t(questions):
    """1.4 MB, 4,000 tokens: some t between nothing and all is best, and BPE lowest (the sweep
    over 6.3 MB of English is test_check_7_committed_sweep)."""
    cut = questions.rindex("\n\n", 0, 1_200_000)
    held = questions[cut + 2 :].split("\n\n")
    plain = stage1.train([questions[:cut]], vocab_size=4000)
    rows = []
    for t in (0, 600, 1600, 3000, len(plain.merges)):
        if t == len(plain.merges):
            inner = tokenizer_json.build(plain, (S1,))
        else:
            bpe = stage2.train([questions[:cut]], plain.first(t), 4000).bpe
            inner = tokenizer_json.build(bpe, (S2,))
        value = tokenizer_json.bytes_per_token(inner, held)
        rows.append(dict(t=t, bytes_per_token=value, plain=t == len(plain.merges), superwords=0))
    assert 0 < sweep.best(rows)["t"] < len(plain.merges)
    assert min(rows, key=lambda row: row["bytes_per_token"])["plain"]
    assert sweep.table(rows, 4000).count("**") == 2


def test_check_7_committed_sweep():
    rows = json.loads((RESULTS / "sweep.json").read_text())
    top = sweep.best(rows)
    assert rows[0]["t"] == 0 < top["t"] < rows[-1]["t"] and rows[-1]["plain"]
    assert min(rows, key=lambda row: row["bytes_per_token"]) is rows[-1]


@pytest.mark.slow
def test_check_7_sweep(tmp_path):
    """python main.py --config=configs/superbpe.py:sweep; its table is docs/results/superbpe."""
    task.run(load_config("configs/superbpe.py:sweep"), tmp_path)
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert rows[0]["t"] == 0 < sweep.best(rows)["t"] < rows[-1]["t"] and rows[-1]["plain"]
    assert min(rows, key=lambda row: row["bytes_per_token"]) is rows[-1]


@pytest.mark.slow
def test_check_8_growth(tmp_path):
    """python -m benchmarks.superbpe --parts growth: 50 MB below 2 GB and 5 minutes."""
    from benchmarks import superbpe

    check_growth({row["mb"]: row for row in superbpe.growth(tmp_path)})


def check_growth(growth):
    """Linear in the tokens of the text at first; code has twice a dictionary's in a megabyte."""
    assert growth[50]["peak_rss_gb"] < 2 and growth[50]["wall_seconds"] < 300
    each = {mb: row["cpu_seconds"] / row["tokens_before"] for mb, row in growth.items()}
    assert each[50] < 1.25 * each[5]


def test_check_8_committed_growth():
    """50 MB in less than 2 GB and 5 minutes, at least 30 times the plain reference."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "superbpe.json").read_text())["rows"]
    growth = {row["mb"]: row for row in rows if row["what"] == "stage 2"}
    assert set(growth) == {5, 10, 20, 50}
    check_growth(growth)
    (speed,) = [row for row in rows if row["what"] == "against the plain reference"]
    assert speed["ratio"]["median"] > 30


def test_check_9_committed_language_models():
    """What the committed runs say: three seeds each, equal FLOPs and bytes of context to a
    hundredth, SuperBPE cheaper a byte and more even. Nothing is trained here."""
    groups = json.loads((RESULTS / "language_models.json").read_text())["groups"]
    bpe, superbpe = groups["bpe"], groups["superbpe"]
    for key in ("token_cost/context_bytes", "token_cost/training_petaflops"):
        assert abs(superbpe[key]["mean"] / bpe[key]["mean"] - 1) < 0.01, key
    assert all(metric["n"] == 3 for group in groups.values() for metric in group.values())
    for key in ("token_cost/flops_per_byte", "token_cost/std_over_mean"):
        assert superbpe[key]["mean"] < bpe[key]["mean"], key


def test_language_models_read_the_file(make_config, tmp_path, fresh_cache):
    """config.data.tokenizer names it: windows are packed with it, bits per byte count its bytes."""
    from eval.bits_per_byte import byte_lengths

    data = make_config(name="text", text="docs", length=32).data
    plain = stage1.train([TEXT], vocab_size=320, all_bytes=True)
    bpe = stage2.train([TEXT], plain.first(20), 340, all_bytes=True).bpe
    for marks in (tokenizer_json.SPECIALS, ("<|endoftext|>",)):  # ours, and published ones'
        folder = tmp_path / str(len(marks))
        folder.mkdir()
        built = tokenizer_json.build(bpe, PRESETS["repo"].encode, marks)
        built.save(str(folder / "tokenizer.json"))
        data.tokenizer = str(folder)
        loaded = tokenizers.load(data)
        assert loaded.vocab_size == 340 + len(marks) and loaded.eos >= 340
        assert loaded.decode(loaded.encode(TEXT)) == TEXT
        lengths = byte_lengths(loaded)
        assert lengths[loaded.encode(TEXT)].sum() == len(TEXT.encode())
    windows, _, _ = packed.windows(data, "test")
    assert windows.tokens.shape[1] == 32 and windows.tokens.max() < 341


def test_any_number_of_cores_gives_the_same(monkeypatch):
    found = []
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        plain = stage1.train([TEXT] * 3, vocab_size=120)
        found.append((plain, stage2.train([TEXT] * 3, plain.first(40), 200)))
    assert found[0] == found[1]


def test_without_numba_the_same_merges(monkeypatch):
    """engine=auto takes plain Python where numba is not installed."""
    plain = stage1.train([TEXT], vocab_size=120)
    expected = stage2.train([TEXT], plain.first(30), 200).bpe
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not stage2.has_numba()
    assert digest(stage2.train([TEXT], plain.first(30), 200).bpe.merges) == digest(expected.merges)
    nothing = Rules((), (), NO_VETO)
    assert stage2.train(["ab"], Bpe.of((), ()), 100, nothing).bpe.merges == (("a", "b"),)
    with pytest.raises(ValueError, match="no text to train on"):
        stage2.train([], Bpe.of((), ()), 100, nothing)
