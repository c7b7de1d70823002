"""The benchmarks parse their command lines, take turns fairly, and run in their smallest form."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
    accelerator,
    accelerator_models,
    common,
    cross_entropy,
    gpu_static,
    infinity_peers,
    peers,
    quantiser_entropy,
    scales,
    scan_peers,
    xlstm_peers,
)
from models.blocks.common import row_keys
from tests.models import infinity_case

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"python -m benchmarks\.(\w+)([^`\n|]*)")


def commands():
    """(where, module, arguments) of every benchmark command in the docs and in the results."""
    texts = [ROOT / "docs" / "benchmarks.md", *(ROOT / "benchmarks" / "results").glob("*.json")]
    for path in texts:
        for module, options in COMMAND.findall(path.read_text()):
            yield path.name, module, shlex.split(options.partition('"')[0])


def test_every_command_that_is_written_down_parses():
    found = list(commands())
    assert {"generation", "cpu_peers", "accelerator"} <= {module for _, module, _ in found}
    for where, module, options in found:
        if module == "loader":
            assert set(options) <= {"--full"}, where
        else:
            importlib.import_module(f"benchmarks.{module}").arguments(options)


def test_what_is_read_from_ptx_and_ptxas():
    kernel = """.visible .entry mlstm_{name}_mosaic_gpu_kernel(
$L1:
  wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16
  cp.async.bulk.tensor.2d
  bra.uni {target};
$L2:
ptxas info    : Function properties for mlstm_{name}_mosaic_gpu_kernel
    8 bytes stack frame, {spilt} bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
    text = kernel.format(name="sweep", target="$L1", spilt=4)
    text += kernel.format(name="product", target="$L2", spilt=8)
    rows = gpu_static.kernels(text, "mlstm")
    assert [row["kernel"] for row in rows] == ["sweep", "product"]
    assert [row["spill_stores"] for row in rows] == [4, 8]
    assert [row["spills_in_loops"] for row in rows] == [True, False]
    assert all((row["registers"], row["wgmma"], row["tma"]) == (168, 1, 1) for row in rows)


def test_passes_over_an_array_are_counted():
    """Layers of 8 x 4: a fusion in the loop reads an operand and a slice and writes a layer;
    outside the stack of three is copied. Arrays of other sizes do not count."""
    text = """HloModule m

%fused (p: f32[3,8,4], u: f32[8,4]) -> f32[3,8,4] {
  %p = f32[3,8,4]{2,1,0} parameter(0)
  %u = f32[8,4]{1,0} parameter(1)
  %other = f32[8,5]{1,0} parameter(2)
  %s = f32[1,8,4]{2,1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,4}
  ROOT %d = f32[3,8,4]{2,1,0} dynamic-update-slice(%p, %u, %i)
}

%body (t: (f32[3,8,4])) -> (f32[3,8,4]) {
  %f = f32[3,8,4]{2,1,0} fusion(%a, %b), kind=kLoop, calls=%fused
}

ENTRY %main (a: f32[3,8,4]) -> f32[3,8,4] {
  %w = (f32[3,8,4]{2,1,0}) while(%t), condition=%cond, body=%body
  ROOT %c = f32[3,8,4]{2,1,0} copy(%g)
}
"""
    assert gpu_static.passes(text, 32, 3) == (3, 2)
    alone = "ENTRY %main () -> f32[8,4] {\n  %k = f32[8,4] custom-call(%a), "
    alone += "operand_layout_constraints={f32[8,4]{1,0}, f32[8]{0}}\n}"
    assert sum(gpu_static.passes(alone, 32)) == 2


def test_interleave_turns_the_order_round():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = common.interleave(cases, rounds=3, warmup=0)
    assert "".join(calls) == "abcbcacab"
    assert {len(values) for values in times.values()} == {3}


def test_ratio_pairs_the_rounds():
    """A load that slows a whole round by ten changes nothing."""
    fast = [1.0, 10.0, 1.0]
    assert common.ratio([2.0 * x for x in fast], fast) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_quick_accelerator_section_and_its_file(tmp_path, capsys):
    out = tmp_path / "result.json"
    sections = ["device", "check_cross_entropy", "check_sample_bits", "sample_bits"]
    assert accelerator.main(["--quick", "--sections", *sections, f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    rows = {(row["section"], row.get("what", row.get("check"))): row for row in result["rows"]}
    assert rows["check_cross_entropy", "cross-entropy and its gradients"]["passed"]
    assert rows["check_sample_bits", "sample_bits"]["passed"]
    assert rows["sample_bits", "sample bits xla"]["seconds"] > 0
    assert result["machine"]["devices"] >= 1
    assert "check_cross_entropy" in capsys.readouterr().out


def test_sections_not_asked_for_keep_their_rows(tmp_path):
    """Of such a device only; in the order of the sections."""
    out = tmp_path / "result.json"
    assert accelerator.main(["--quick", "--sections", "check_sample_bits", f"--out={out}"]) == 0
    both = ["check_sample_bits", "device"]
    assert accelerator.earlier(str(out), ["check_sample_bits"]) == []
    accelerator.main(["--quick", "--sections", "device", f"--out={out}"])
    sections = [row["section"] for row in json.loads(out.read_text())["rows"]]
    assert sections == sorted(sections, reverse=True) and set(sections) == set(both)
    other = json.loads(out.read_text())
    other["machine"]["device"] = "another"
    out.write_text(json.dumps(other))
    assert accelerator.earlier(str(out), []) == []


@pytest.mark.long
def test_quick_sections_of_whole_models():
    """Both language models behind a long text, and Infinity: what a GPU's minutes would pay for."""
    peaks = {"flops": 1e12, "bytes": 1e11}
    decoded = accelerator.SECTIONS["long_decode"](True, peaks)
    assert [row["rows"] for row in decoded[:2]] == [4, 4] and decoded[2]["ratio"] > 0
    drawn, trained = accelerator.SECTIONS["infinity"](True, peaks)
    assert drawn["seconds_per_image"] > 0 and trained["examples_per_s"] > 0


def test_long_decode_halves_its_rows_until_they_fit(monkeypatch):
    """By the device's own limit, before anything is compiled."""
    asked = []

    def decoding(spec, rows, *rest):
        asked.append(rows)
        if rows > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: does not fit")
        return {"tokens_per_s": 8.0 / rows}

    monkeypatch.setattr(accelerator_models, "_decoding", decoding)
    hymba, llama, ratio = accelerator_models.long_decode(True, {})
    assert asked == [4, 2, 4, 2] and hymba["rows"] == llama["rows"] == 2 and ratio["ratio"] == 1.0


def test_failing_section_is_reported_and_the_next_one_runs(monkeypatch):
    def broken(quick, peaks):
        raise RuntimeError("no memory")

    monkeypatch.setitem(accelerator.SECTIONS, "device", broken)
    argv = ["--quick", "--sections", "device", "check_cross_entropy", "--out="]
    assert accelerator.main(argv) == 1


def test_unknown_section_is_refused():
    with pytest.raises(SystemExit):
        accelerator.arguments(["--sections", "nothing"])


def test_cross_entropy_memory_row_counts_the_scores():
    row = cross_entropy.memory(64, 16, 32_000, "float32")
    assert row["plain"] >= 64 * 32_000 * 4
    assert row["chunked"] < row["plain"]
    assert row["chunked / plain"] == pytest.approx(row["chunked"] / row["plain"], rel=1e-3)


def test_quantiser_entropy_counts_all_codes_and_times_what_fits(monkeypatch):
    monkeypatch.setattr(quantiser_entropy, "BITS", (4, 8, 32))
    rows = quantiser_entropy.compiled("")
    found = {(r["quantiser"], r["bits"]): r.get("temporary_bytes") for r in rows}
    tokens = quantiser_entropy.PICTURES * quantiser_entropy.SIDE**2
    assert found["lfq", 8] >= 4 * tokens * 2**8 > found["bsq", 8]
    assert found["lfq", 32] is None and found["bsq", 32] < 9 * found["bsq", 4]
    limit = found["lfq", 8]  # the larger ones of LFQ are left out
    timed = quantiser_entropy.timed(rows, limit, 1)
    assert [(r["what"], r.get("quantiser"), r["bits"]) for r in timed] == [
        ("seconds", "bsq", 4), ("seconds", "lfq", 4), ("lfq / bsq, seconds", None, 4),
        ("seconds", "bsq", 8), ("seconds", "bsq", 32),
    ]  # fmt: skip


@pytest.mark.long
def test_scales_recomputed_draws_what_the_cache_draws():
    """Every bit; the second with nothing kept of the scales before."""
    model, params = infinity_case.tiny()
    batch, model = infinity_case.batch_of(model), scales.without_decoder(model)
    keys = row_keys(jax.random.key(0), np.arange(8))
    given = (params, batch["gen_tokens"], batch["gen_length"], keys)
    want, got = (scales.drawing(one, 2.0)(*given).bits for one in (model, scales.recomputed(model)))
    np.testing.assert_array_equal(got, want)


def test_digits_keep_four():
    assert common.digits(0.00123456) == 0.001235
    assert common.spread(np.arange(5.0)) == {"median": 2.0, "low": 1.0, "high": 3.0}


@pytest.mark.long
def test_xlstm_alone():
    """The sections that need no other package."""
    argv = ["--tiny", "--rounds=1", "--what", "scan", "context"]
    forward, both, memory, parallel, context = xlstm_peers.run(xlstm_peers.arguments(argv))
    assert both["largest_difference"] < 1e-4
    assert set(forward["seconds"]) == {"chunkwise", "recurrent"}
    assert memory["chunkwise / recurrent"] < 0.5
    assert parallel["chunkwise / parallel"] < 0.5
    assert set(context["seconds"]) == {"16", "256"}


def test_scan_peers_measure_ours():
    """The sections without another side: three ways of a scan agree, chunks keep least."""
    argv = ["--what", "associative", "window", "--tiny", "--rounds=2"]
    ways, window = scan_peers.run(scan_peers.arguments(argv))
    assert ways["largest_difference"] < 1e-5
    bytes_of = ways["temp_bytes"]
    assert bytes_of["chunks"] < bytes_of["token by token"] < bytes_of["one associative scan"]
    assert ways["one associative scan / chunks"]["median"] > 0
    assert window["whole row / window of 8"]["median"] > 0


@pytest.mark.skipif(not importlib.util.find_spec("mlstm_kernels"), reason="needs the bench extra")
def test_xlstm_peers_compute_the_same():
    argv = ["--tiny", "--rounds=1", "--what", "cell", "model"]
    rows = xlstm_peers.run(xlstm_peers.arguments(argv))
    assert max(max(row["largest_difference"].values()) for row in rows) < 1e-3


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs the bench extra")
def test_infinity_peers_compute_the_same():
    argv = ["--tiny", "--rounds=1", "--threads=1"]
    step, drawing = infinity_peers.run(infinity_peers.arguments(argv))
    assert max(step["largest_difference"].values()) < 1e-4
    assert set(drawing["largest_difference"].values()) == {0.0}


def test_sides_that_compute_different_things_are_refused():
    one = {"h": np.ones(3), "tokens": np.arange(3)}
    assert peers.apart(one, one) == 0
    for other in (
        {"h": np.ones(3) + 0.01},
        {"tokens": np.zeros(3, int)},
        {"h": np.full(3, np.nan)},
    ):
        with pytest.raises(ValueError, match="compute different"):
            peers.apart(one, one | other)
