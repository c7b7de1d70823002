"""The command line: what it prints, how it fails, what it starts, and how quietly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main
from training import cli, platform

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "tests/training/toy.py"
CONFIG = f"--config={ROOT / 'tests/training/toy_config.py'}"


def call(*args: str) -> int:
    """main.main with these arguments."""
    return main.main([str(ROOT / "main.py"), *args])


def test_it_is_small():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 80
    assert set(main.TASKS) == {"train", "tokenizer", "fit", "curate", "runs"}


@pytest.mark.parametrize("task", sorted(main.TASKS))
def test_every_task_leads_somewhere(task):
    assert callable(cli.load(main.TASKS[task]))


def test_alone_it_lists_the_configs(capsys):
    assert call() == 0
    out = capsys.readouterr().out
    assert "configs/uniflud.py" in out and "UniFluid: one model draws pictures" in out
    assert "python main.py --config=configs/uniflud.py" in out
    assert all(len(line) < 140 for line in out.splitlines())


def test_help_is_short(capsys):
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 20 and "--mode" in out and "--config.optimizer.lr" in out
    assert "logtostderr" not in out and "--nodebug" not in out


MISTAKES = [
    (["--config=configs/uniflut.py"], "unknown config 'configs/uniflut.py'. Did you mean 'configs"),
    (["--config=configs/uniflud.py:debgu"], "variant 'debgu'. Did you mean 'debug'? Allowed:"),
    ([f"{CONFIG}:debug,widht=8"], "unknown config argument 'widht=8'. Allowed: width"),
    ([f"{CONFIG}:width=wide"], "config argument width='wide' must be a int"),
    ([CONFIG, "--config.stepz=3"], "unknown config key 'stepz'. Did you mean 'steps'? Allowed:"),
    ([CONFIG, "--config.optimizer.lrr=3"], "config key 'optimizer.lrr'. Did you mean 'lr'?"),
    ([CONFIG, "--config.steps=1e3"], "--config.steps=1e3: must be a whole number"),
    ([CONFIG, "--config.tensorboard=maybe"], "--config.tensorboard=maybe"),
    ([CONFIG, "--mdoe=eval"], "Unknown command line flag 'mdoe'. Did you mean: mode"),
    ([CONFIG, "--mode=evl"], "--mode=evl: value should be one of <train|eval|sample|"),
    ([CONFIG, "--step=x"], "--step=x"),
    ([CONFIG, "train"], "'train' is no flag"),
    (["--workdir=x"], "--config is missing. python main.py --config=configs/NAME.py"),
    (["--config"], "--config is missing"),
    ([CONFIG, "--config.task=trian"], "unknown config.task 'trian'. Did you mean 'train'?"),
    ([CONFIG, "--config.model.name=toyy"], "unknown config.model.name 'toyy'"),
    ([CONFIG, "--config.data.name=toyy"], "unknown config.data.name 'toyy'"),
    ([CONFIG, "--config.objective.name=modle"], "config.objective.name 'modle'. Did you mean 'mo"),
    ([CONFIG, "--config.evals=toy,fidd"], "unknown config.evals 'fidd'"),
    (
        [CONFIG, "--config.accumulate=3"],
        "config.batch_size=16 must be a multiple of hosts x config",
    ),
    ([CONFIG, "--config.precision=fp16"], "config.precision='fp16' must be float32 or bfloat16"),
    ([CONFIG, "--config.mesh.fsdp=16"], "config.mesh={"),
    ([CONFIG, "--config.steps=0"], "config.steps=0 must be at least 1"),
    ([CONFIG, "--config.checkpoint.keep=0"], "config.checkpoint.keep=0 must be at least 1"),
    (["--config=configs/loss_curve.py", "--mode=eval"], "--mode=eval is for configs of task train"),
    ([CONFIG, "--mode=eval"], "holds no checkpoint; train first"),
]


@pytest.mark.parametrize("args, line", MISTAKES, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_a_mistake_is_one_line(args, line, capsys, tmp_path):
    """Exit code 2; one line on stderr with the key, the value and what is allowed."""
    sys.modules.get("uniflud_toy") or _register()
    if args != ["--workdir=x"]:
        args = [*args, f"--workdir={tmp_path}"]
    assert call(*args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert line in captured.err and captured.out == "", captured
    assert "Traceback" not in captured.err


def _register():
    import importlib.util

    spec = importlib.util.spec_from_file_location("uniflud_toy", TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["uniflud_toy"] = module
    spec.loader.exec_module(module)
    module.register()


def test_debug_errors_shows_the_traceback(capsys):
    assert call(CONFIG, "--config.stepz=3", "--debug_errors") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: unknown config key")


def test_programming_errors_are_not_hidden(monkeypatch):
    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(cli, "load", lambda name: broken)
    with pytest.raises(TypeError, match="a bug"):
        call(CONFIG)


@pytest.mark.parametrize(
    "error, code", [(OSError("no space"), 1), (FloatingPointError("nan"), 1), (ValueError("x"), 2)]
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "load", lambda name: fail)
    assert call(CONFIG) == code
    assert capsys.readouterr().err == f"error: {error}  (--debug_errors shows where)\n"


def test_modes_get_their_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "load", lambda name: lambda *a: seen.append((name, a[1:])))
    monkeypatch.setattr(platform, "join_hosts", lambda: None)
    spec = f"{CONFIG}:debug,width=8"
    place = Path("runs/toy_config-debug,width=8")
    assert call(spec) == 0
    assert call(spec, "--mode=eval", "--step=4") == 0
    assert call(spec, "--mode=sample", "--prompt=a, b", "--prompt=c", "--image=x.png") == 0
    assert call(spec, "--mode=export", "--workdir=there") == 0
    assert call("--config", spec.partition("=")[2], "--mode=dryrun", "--topology=v5e:2x2") == 0
    assert seen == [
        ("training.loop:train", (place,)),
        ("training.loop:evaluate", (place, 4)),
        ("training.loop:sample", (place, None, ["a, b", "c"], ["x.png"])),
        ("export.run:run", (Path("there"), None)),
        ("training.dryrun:run", (place, "v5e:2x2")),
    ]


def test_nothing_heavy_is_imported_before_it_is_needed():
    """The list, the help and every mistake in the config come without jax."""
    code = (
        "import sys, main; main.main(['main.py']); main.main(['main.py', '--help']); "
        "main.main(['main.py', '--config=configs/uniflud.py:debug', '--config.stepz=1']); "
        "heavy = {'jax', 'flax', 'grain', 'orbax', 'matplotlib', 'torch', 'tensorflow'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quiet_on_a_machine_without_accelerator(tmp_path):
    """libtpu and the CUDA plug-in may be installed: not a word on stderr, and the CPU is used."""
    if platform.accelerators():
        pytest.skip("this machine has an accelerator")
    env = {
        k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL")
    }
    done = subprocess.run(
        [sys.executable, TOY, CONFIG, "--config.steps=2", f"--workdir={tmp_path}"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "1 cpu device(s)" in done.stdout and "finished: 2 steps" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_freed_memory_is_used_again():
    """64 MB freed and asked for again faults in no page by page, as it does without the setting."""
    code = """
import resource, numpy, sys
from training import platform
if sys.argv[1] == "kept":
    platform._keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(2**23)
before = faults()
for _ in range(8):
    numpy.ones(2**23)
print(faults() - before)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, how], env=env, cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout)
        for how in ("kept", "plain")
    )  # fmt: skip
    assert kept < 100 and given_back > 10 * (kept + 1)


def test_platform_is_chosen_by_device_files(monkeypatch, tmp_path):
    for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(platform, "NVIDIA", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr(platform, "TPU", (str(tmp_path / "accel[0-9]*"),))
    monkeypatch.setattr(platform, "AMD", ())
    assert platform.accelerators() == ["cuda"]
    platform.before_jax()
    assert "JAX_PLATFORMS" not in os.environ  # jax finds the GPU itself
    assert os.environ["LIBTPU_INIT_ARGS"] == "--mine"
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    platform.before_jax()
    assert os.environ["LIBTPU_INIT_ARGS"] == platform.LIBTPU_ARGS
    (tmp_path / "accel0").touch()
    (tmp_path / "nvidia0").unlink()
    assert platform.accelerators() == ["tpu"]
    (tmp_path / "accel0").unlink()
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    platform.before_jax()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert platform.SAFE_COLLECTIVES in os.environ["XLA_FLAGS"]
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert platform.accelerators() == ["tpu"]


@pytest.mark.parametrize(
    "env, wanted",
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ()),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ()),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, ()),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (
            dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="8", JAX_PROCESS_ID="3"),
            ("a:1", 8, 3),
        ),
    ],
)
def test_hosts_are_joined_when_the_environment_says_so(env, wanted, monkeypatch):
    import jax

    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: calls.append(a))
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    platform.join_hosts()
    assert calls == ([] if wanted is None else [wanted])


def test_half_a_cluster_description_is_named(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS=a:1 also needs the integers"):
        platform.join_hosts()
