"""The dry run: topologies, the HLO reader, and whole train steps compiled for absent devices."""

import importlib.util
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import models
from configs.common import base, load_config
from eval import hlo
from models import Model
from training import dryrun, topology
from training.dryrun_table import advice

TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is absent: pip install -e '.[aot]'"
)
CUDA = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="jax-cuda13-plugin is absent: pip install -e '.[aot]'",
)
# In this process, unlike in the child, the compile cache is on; it cannot reload such programs.
UNCACHED = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
LAYERS, WIDTH, MLP, VOCAB, LENGTH = 6, 256, 512, 1024, 64


class Block(nn.Module):
    """Pre-norm MLP; stands in for a decoder layer."""

    @nn.compact
    def __call__(self, x, _):
        def kernel(name, shape, *axes):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
            return self.param(name, init, shape).astype(x.dtype)

        h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        h = jax.nn.gelu(h @ kernel("up", (WIDTH, MLP), "embed", "mlp"))
        return x + h @ kernel("down", (MLP, WIDTH), "mlp", "embed"), None


class Stack(nn.Module):
    """Embedding, scanned blocks, tied logits."""

    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, tokens):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("table", init, (VOCAB, WIDTH)).astype(self.dtype)
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False)
        stack = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )  # fmt: skip
        x = nn.with_logical_constraint(table[tokens], ("batch", "length", "act_embed"))
        return stack(name="layers")(x, None)[0] @ table.T


def build(config):
    net = Stack(jnp.dtype(config.precision), config.remat)

    def init(rng):
        return net.init(rng, jnp.zeros((1, 2), jnp.int32))["params"], {}

    def loss(params, extra, batch, rng, *, step, norms):
        logits = net.apply({"params": params}, batch["tokens"][:, :-1]).astype(jnp.float32)
        target = batch["tokens"][:, 1:, None]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), target, -1).sum() / norms["text"]
        return nll, ({"nll": nll}, extra)

    batch = {"tokens": jax.ShapeDtypeStruct((config.batch_size, LENGTH + 1), jnp.int32)}
    norms = lambda batch: {"text": jnp.float32(batch["tokens"].size)}  # noqa: E731
    return Model(init, loss, norms, {}, {"text": batch})


def small(monkeypatch, **overrides):
    monkeypatch.setitem(models.MODELS, "small_lm", build)
    mesh = dict(data=1, fsdp=-1, tensor=1, seq=1)
    defaults = dict(batch_size=16, mesh=mesh, remat="full", precision="bfloat16")
    return base(model=dict(name="small_lm"), **(defaults | overrides))


PARAMS = LAYERS * 2 * WIDTH * MLP + VOCAB * WIDTH
# forward and two products of the backward pass, over the predicted tokens
FLOPS = 3 * 2 * 16 * LENGTH * PARAMS


@pytest.mark.parametrize("name", ["", "v5e", "v5e:0x2", "v5e:2x2x2", "v5p:4x4", "a100:8", "h100:x"])
def test_unknown_topologies_say_what_is_allowed(name):
    with pytest.raises(ValueError, match="allowed are v5e:AxB, v5p:AxBxC") as caught:
        topology.parse(name)
    assert "\n" not in str(caught.value)


def test_known_topologies():
    assert topology.parse("v5p:4x4x4").count == 64
    assert topology.parse("h100:16") == topology.Topology("h100:16", "h100", (16,))
    assert topology.parse("v6e:8x8").chip.hbm > 31 * 2**30


def test_absent_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology, "_found", lambda module: False)
    for name in ("v5e:2x2", "h100:8"):
        with pytest.raises(ValueError, match=r"pip install -e '.\[aot\]'"):
            dryrun.run(None, "unused", name)


MODULE = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_cond (p: (s32[], f32[8,4])) -> pred[] {
  %bound = u32[] constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %cp = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %x)
}

%fused_start (q: f32[8,4]) -> (f32[8,4], f32[32,4]) {
  %ag.1 = f32[32,4]{1,0} all-gather(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = (f32[8,4], f32[32,4]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%fused_done (q: f32[8,4]) -> f32[32,4] {
  ROOT %ag.2 = f32[32,4]{1,0} all-gather(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (q: f32[32,4]) -> f32[8,4] {
  %ar = f32[32,4]{1,0} all-reduce(%q), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %ds = f32[8,4] dynamic-slice(%ar, %i)
}

%outer_cond (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %j), direction=LT
}

%outer_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %f1 = (f32[8,4], f32[32,4]) fusion(%x), kind=kLoop, calls=%fused_start, backend_config={"window_config":{"estimated_cycles":"100"}}
  %f2 = f32[32,4] fusion(%x), kind=kLoop, calls=%fused_done
  %w = (s32[], f32[8,4]) while(%t), condition=%inner_cond, body=%inner_body
  %rs = f32[8,4] fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.1
  %k = f32[8,4] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"cost_estimate":{"flops":"70","transcendentals":"0","bytes_accessed":"9"}}}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %rs)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %ar2 = (f32[2]{0}, bf16[2]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %rss = ((f32[32,4]{1,0}, f32[16]{0}), (f32[8,4]{1,0}, f32[4]{0})) reduce-scatter-start(%y, %z), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %r = f32[8,4] copy(%y), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_hlo_is_weighted_by_trip_counts():
    program = hlo.analyse(MODULE, 8)
    assert program.cycles == 3 * 100 + 7
    assert program.kernels == [("k", 3 * 70, 3 * 9)]
    assert hlo.summarise(program.collectives) == {
        "all-gather": (3, 3 * 512 * 3 / 4),  # one channel, started and finished in two fusions
        "all-reduce": (1, 2 * 12 * 3 / 4),
        "collective-permute": (15, 15 * 128),  # 3 trips of 5 trips
        "reduce-scatter": (4, (3 * 512 + 512 + 64) * 3 / 4),  # GPUs: started with its operands
    }
    spread = {(one.kind, one.hidden): one.spread for one in program.collectives}
    assert spread == {
        ("all-gather", True): 4, ("all-reduce", False): 4, ("collective-permute", True): 4,
        ("reduce-scatter", False): 7, ("reduce-scatter", True): 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "message, needed",
    [
        ("the total memory required for HLO temporaries (768.00G) exceeds", 768 * 2**30),
        ("Ran out of memory in memory space hbm. Used 20.50M of 15.75G hbm", 20.5 * 2**20),
        ("something else", None),
    ],
)
def test_out_of_memory_messages(message, needed):
    assert dryrun.needed_bytes(message) == needed


@TPU
@UNCACHED
@pytest.mark.aot
def test_a_small_model_on_a_tpu_slice(monkeypatch):
    result = dryrun.measure(small(monkeypatch), "v5e:2x2")
    assert result["params"] == PARAMS and result["devices"] == 4 and result["fits"]
    # parameters and two moments in float32, split over four chips, and the batch
    state = 3 * 4 * PARAMS / 4
    assert state < result["argument_bytes"] < 1.1 * state
    assert result["flops_per_step"] == pytest.approx(FLOPS, rel=0.01)
    times, moved = result["collectives"]["all-gather"]
    gathered = 2 * LAYERS * 2 * WIDTH * MLP * 3 / 4  # bf16 weights of every layer, once
    assert times >= 2 * LAYERS and moved >= gathered
    assert 0 < result["estimated_mfu"] < 1
    # Weights are read forward and backward, moments read and written.
    assert result["moved_bytes"] > 2 * state
    text = dryrun.table(result)
    assert "fits" in text and "all-gather" in text and "memory traffic per device" in text


@CUDA
@UNCACHED
@pytest.mark.aot
def test_a_small_model_on_h100s(monkeypatch):
    result = dryrun.measure(small(monkeypatch), "h100:8")
    assert result["fits"] and result["devices"] == 8
    assert result["flops_per_step"] == pytest.approx(FLOPS, rel=0.01)
    assert result["collectives"]["all-gather"][0] >= LAYERS
    assert 0 < result["estimated_mfu"] < 1


@TPU
@pytest.mark.aot
def test_what_does_not_fit_names_the_keys(monkeypatch):
    mesh = dict(data=-1, fsdp=1, tensor=1, seq=1)
    config = small(
        monkeypatch, batch_size=2**19, remat="none", precision="float32", mesh=mesh
    )  # fmt: skip
    result = dryrun.measure(config, "v5e:2x2")
    assert not result["fits"] and result["total_bytes"] > result["hbm_bytes"]
    text = dryrun.table(result)
    for key in ("mesh.fsdp", "mesh.tensor", "remat", "accumulate", "precision", "batch_size"):
        assert f"  {key} (now" in text
    assert "does NOT fit, by" in text and "GiB more than a device has" in text


@pytest.mark.parametrize("state, said", [(17, True), (0.1, False)])
def test_a_state_that_so_many_parts_do_not_divide_is_named(state, said):
    """1,600 wide over 256 devices: nothing is cut, and no key but a smaller fsdp helps."""
    config = load_config("configs/hymba.py:1.5b_8k")
    result = dict(devices=256, batch_bytes=0, argument_bytes=int(state * 2**30), temp_bytes=2**30)
    lines = advice(config, dict(fsdp=256, tensor=1), result | dict(params=1_522_797_824))
    assert any("divide few of its arrays" in line for line in lines) == said


@TPU
@UNCACHED
@pytest.mark.aot
def test_a_decoding_step_and_its_bytes():
    """Caches are read once a step and layer, whatever XLA counts of the scan over layers."""
    changes = {"data.length": 1024, "batch_size": 1, "sample.rows": 8}
    found = dryrun.sampler(load_config("configs/llama.py:debug", **changes), "v5e:1x1")
    assert found["name"] == "decode_step" and found["rows"] == 8
    assert found["state_bytes"] < found["moved_bytes"] < 3 * found["state_bytes"]
    assert found["weight_bytes"] + found["state_bytes"] < found["total_bytes"]


@TPU
@pytest.mark.aot
def test_child_process_writes_exactly_the_keys(tmp_path, capfd):
    config = load_config("configs/glyph_classifier.py:debug")
    dryrun.run(config, tmp_path, "v5e:2x2")
    report = json.loads((tmp_path / "dryrun.json").read_text())
    assert tuple(report) == dryrun.KEYS and report["fits"] is True
    captured = capfd.readouterr()
    assert "step time (estimate)" in captured.out and not captured.err


@TPU
@pytest.mark.aot
def test_mistakes_come_back_from_the_child_as_one_line(tmp_path):
    config = load_config("configs/glyph_classifier.py:debug", **{"mesh.fsdp": 3})
    with pytest.raises(ValueError, match="config.mesh=.*does not fit 4 devices"):
        dryrun.run(config, tmp_path, "v5e:2x2")
    config = load_config("configs/glyph_classifier.py:debug")
    with pytest.raises(ValueError, match="--topology=v5e:3x5 is refused"):
        dryrun.run(config, tmp_path, "v5e:3x5")
    assert not os.listdir(tmp_path)
