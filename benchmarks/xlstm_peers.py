"""The mLSTM and the tiny xLSTM, here and in their authors' packages, on the same two cores.

    python -m benchmarks.xlstm_peers [--torch-python=PYTHON] [--what SECTION ...] [--out=F]

| section | what takes turns |
| --- | --- |
| cell | forward and backward in chunks: ours, mlstm_kernels in torch (twice) and in JAX |
| model | a training step, a prompt, greedy tokens: ours, transformers' xLSTM in torch |
| scan | ours in chunks, ours token by token; temporary bytes, also of one chunk of all tokens |
| context | greedy tokens behind a short and a long text, ours |

float32. Inputs and weights are the same on both sides (weights exported under their published
names); outputs, losses, gradients and tokens are compared before anything is timed. The peers run
in processes of their own. scan and context need none.
On a machine with other load take --threads=1, for the reason that cpu_peers gives.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, peers
from export.weights import save_safetensors, to_published
from kernels.linear_attention import xla
from kernels.mlstm.api import mlstm
from models import language, xlstm

NAMES = ("q", "k", "v", "i", "f")


class Shape(NamedTuple):
    """Sizes of a cell's inputs."""

    rows: int
    heads: int
    length: int  # tokens
    k: int  # of a query and a key
    v: int  # of a value


class Sizes(NamedTuple):
    """Everything that --tiny makes small."""

    cells: dict[str, Shape]
    scans: tuple[Shape, ...]
    parallel: int  # tokens of the memory comparison with one chunk
    model: xlstm.XLSTMConfig
    batch: tuple[int, int]  # training rows and tokens
    prompts: tuple[tuple[int, int], ...]  # rows and tokens
    new: int  # tokens decoded
    contexts: tuple[int, int]


FULL = Sizes(
    cells={"165M's heads": Shape(2, 4, 2048, 96, 192), "7B's heads": Shape(1, 2, 2048, 256, 512)},
    scans=(Shape(1, 4, 2048, 96, 192), Shape(1, 1, 2048, 256, 512)),
    parallel=8192,
    model=xlstm.SIZES["tiny"],
    batch=(16, 256),
    # transformers takes the 16 tokens that 2,000 are beyond a multiple of its chunk one by one.
    prompts=((1, 2048), (1, 2000), (16, 128)),
    new=64,
    contexts=(128, 16_384),
)
TINY = Sizes(
    cells={"tiny": Shape(1, 2, 128, 16, 32)},
    scans=(Shape(1, 2, 128, 16, 32),),
    parallel=512,
    model=xlstm.SIZES["debug"],
    batch=(2, 64),
    prompts=((1, 72), (2, 64)),
    new=4,
    contexts=(16, 256),
)


# ---------------------------------------------------------------- the cell


def cell_inputs(shape: Shape) -> dict[str, np.ndarray]:
    """Random q, k, v, gates as a trained model has them, and dh, the cotangent of h."""
    rng, (rows, heads, length, k, v) = np.random.default_rng(0), shape
    widths = {"q": (k,), "k": (k,), "v": (v,), "i": (), "f": (), "dh": (v,)}
    arrays = {n: rng.normal(size=(rows, heads, length, *w)) for n, w in widths.items()}
    arrays["f"] += 4.0  # forget gates between those of the first and the last head at the start
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def gradients(run: Callable) -> Callable:
    """Jitted ([q, k, v, i, f], dh) -> h and the gradients of all inputs, by name."""

    def both(inputs, dh):
        h, pullback = jax.vjp(lambda *x: run(*x)[0], *inputs)
        return {"h": h, **dict(zip(NAMES, pullback(dh)))}

    return jax.jit(both)


def cell(args, sizes: Sizes, folder: Path) -> list[dict]:
    """Forward and backward in chunks of `args.chunk`, against all three of mlstm_kernels."""
    rows = []
    for name, shape in sizes.cells.items():
        arrays = cell_inputs(shape)
        inputs = jax.device_put(([arrays[n] for n in NAMES], arrays["dh"]))
        exact = gradients(functools.partial(mlstm, chunk=args.chunk))
        # The authors' written gradient leaves the denominator out: compared with ours that does.
        rough = gradients(functools.partial(mlstm, chunk=args.chunk, official_backward=True))
        path = str(folder / "cell.npz")
        np.savez(path, **arrays)
        packages = {}
        with peers.processes(
            args, "xlstm_torch.py", ("native_autograd", "native_custbw", "jax")
        ) as others:
            for kind, peer in others.items():
                options = dict(kind=kind, threads=args.threads, inputs=path, chunk=args.chunk)
                packages |= peer.ask("build", **options)
            same = {
                kind: peers.apart((rough if kind == "native_custbw" else exact)(*inputs), found)
                for kind, found in peers.answers(others, folder, "gradients").items()
            }
            temp = peers.answers({"jax": others["jax"]}, folder, "temp_bytes")["jax"]["bytes"]
            row = {"what": f"cell: forward and backward, {name}", **shape._asdict()}
            row |= {"chunk": args.chunk, "packages": packages, "largest_difference": same}
            row |= peers.turns(functools.partial(exact, *inputs), others, args.rounds, "gradients")
        mine = common.temp_bytes(exact.lower(*inputs).compile())
        row["temp_bytes"] = {"ours": mine, "jax": int(temp)}
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the model


class Ours:
    """Our side of the model comparison, with the calls of the other side."""

    def __init__(self, cfg: xlstm.XLSTMConfig, tokens, prompt, new: int):
        self.net, self.new = xlstm.XLSTM(cfg), new
        one = jnp.zeros((1, 2), jnp.int32)
        self.params = common.random_params(
            lambda key: self.net.init(key, one, method="text")["params"]
        )
        tokens, self.prompt = jnp.asarray(tokens), jnp.asarray(prompt)
        self.batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
        self.tx = optax.adamw(1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01)
        self.opt, self.trained = self.tx.init(self.params), jax.tree.map(jnp.copy, self.params)
        self.states: dict[tuple[int, int], Any] = {}
        self._value_and_grad = jax.jit(jax.value_and_grad(self._loss))
        self._step = jax.jit(self._train, donate_argnums=(0, 1))
        self._prefill = jax.jit(functools.partial(language.prefill, self.net))
        self._decode = jax.jit(self._greedy)

    def _loss(self, params, batch):
        norms = language.norms(batch)
        return language.loss(self.net, params, {}, batch, None, step=0, norms=norms)[0]

    def _train(self, params, opt, batch):
        loss, grads = jax.value_and_grad(self._loss)(params, batch)
        updates, opt = self.tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    def _greedy(self, params, token, state):
        def body(carry, _):
            scores, state = language.extend(self.net, params, *carry)
            token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            return (token, state), token

        return jax.lax.scan(body, (token, state), length=self.new)[1].T

    def train(self) -> dict:
        """One AdamW step."""
        self.trained, self.opt, loss = self._step(self.trained, self.opt, self.batch)
        return {"loss": loss}

    def gradients(self) -> dict:
        """Loss and gradients by published name, before any step."""
        loss, grads = self._value_and_grad(self.params, self.batch)
        return {"loss": loss, **to_published(grads, xlstm.weight_map(self.net.cfg))}

    def prefill(self, rows: int, length: int) -> dict:
        """Scores [rows, V] behind the first `length` tokens of the prompt."""
        empty = xlstm.init_state(self.net.cfg, rows)
        lengths = jnp.full((rows,), length, jnp.int32)
        tokens = self.prompt[:rows, :length]
        scores, self.states[rows, length] = self._prefill(self.params, tokens, lengths, empty)
        return {"logits": scores}

    def decode(self, rows: int, length: int) -> dict:
        """Greedy tokens [rows, new] after one more token, behind an earlier `prefill`."""
        state = self.states[rows, length]
        return {"tokens": self._decode(self.params, self.prompt[:rows, -1], state)}


def random_tokens(cfg: xlstm.XLSTMConfig, rows: int, length: int) -> np.ndarray:
    """Token ids."""
    return np.random.default_rng(0).integers(3, cfg.vocab_size, (rows, length), dtype=np.int32)


def torch_config(cfg: xlstm.XLSTMConfig) -> dict:
    """The same sizes as transformers' xLSTMConfig spells them."""
    return dict(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_heads=cfg.heads,
        qk_dim_factor=cfg.qk_factor,
        # Its rounding makes 512 of 2.667 x 192; ours, as the authors' JAX code's, makes 576.
        ffn_proj_factor=cfg.ffn / cfg.width,
        ffn_round_up_to_multiple_of=cfg.ffn_multiple,
        gate_soft_cap=cfg.gate_cap,
        output_logit_soft_cap=cfg.logit_cap,
        norm_eps=cfg.norm_eps,
        autocast_kernel_dtype="float32",
    )


def model(args, sizes: Sizes, folder: Path) -> list[dict]:
    """Training, prompts and greedy tokens against transformers."""
    cfg, (batch, length) = sizes.model, sizes.batch
    tokens = random_tokens(cfg, batch, length)
    widest, longest = (max(x) for x in zip(*sizes.prompts))
    prompt = random_tokens(cfg, widest, longest)
    ours = Ours(cfg, tokens, prompt, sizes.new)
    weights, arrays = str(folder / "weights.safetensors"), str(folder / "model.npz")
    save_safetensors(weights, to_published(ours.params, xlstm.weight_map(cfg)))
    np.savez(arrays, tokens=tokens, prompt=prompt, new=sizes.new)
    calls = [("gradients", {}), ("train", {})]
    calls += [("prefill", dict(rows=r, length=t)) for r, t in sizes.prompts]
    calls += [("decode", dict(rows=r, length=t)) for r, t in dict(sizes.prompts).items()]
    rows = []
    # Between small operators torch's threads wait for each other: with one it may be faster.
    threads = {f"torch threads={n}": n for n in sorted({1, args.threads})}
    with peers.processes(args, "xlstm_torch.py", threads) as others:
        for name, peer in others.items():
            options = dict(kind="model", threads=threads[name], weights=weights, arrays=arrays)
            packages = peer.ask("build", config=torch_config(cfg), **options)
        for what, options in calls:
            call = functools.partial(getattr(ours, what), **options)
            mine = call()
            theirs = peers.answers(others, folder, what, **options)
            same = {name: peers.apart(mine, found) for name, found in theirs.items()}
            row = {"what": f"model: {what}", **options, "packages": packages}
            row |= {"largest_difference": same}
            if what != "gradients":  # timed as a part of the step
                row |= peers.turns(call, others, args.rounds, what, **options)
            rows.append(row)
    return rows


# ---------------------------------------------------------------- ours alone


def scan(args, sizes: Sizes, folder: Path) -> list[dict]:
    """Chunks against the recurrence in seconds and bytes, and against a single chunk in bytes."""
    forms = {
        "chunkwise": functools.partial(mlstm, chunk=args.chunk),
        "recurrent": functools.partial(mlstm, impl="ref"),
    }
    both = {name: gradients(run) for name, run in forms.items()}
    rows = []
    for shape in sizes.scans:
        arrays = cell_inputs(shape)
        inputs = jax.device_put(([arrays[n] for n in NAMES], arrays["dh"]))
        same = peers.apart(both["chunkwise"](*inputs), both["recurrent"](*inputs))
        cases = {
            "forward": {n: functools.partial(jax.jit(run), *inputs[0]) for n, run in forms.items()},
            "forward and backward": {n: functools.partial(run, *inputs) for n, run in both.items()},
        }
        for what, runs in cases.items():
            row = {"what": f"scan: {what}", **shape._asdict(), "largest_difference": same}
            rows.append(row | peers.report(common.interleave(runs, args.rounds), "chunkwise"))
        rows.append(memory(shape, both))
    long = sizes.scans[0]._replace(length=sizes.parallel)
    # With a single chunk nothing is recurrent: the fully parallel form.
    one = gradients(functools.partial(mlstm, chunk=long.length))
    rows.append(memory(long, {"chunkwise": both["chunkwise"], "parallel": one}))
    return rows


def memory(shape: Shape, programs: Mapping[str, Any]) -> dict:
    """Bytes of temporaries of jitted programs, the first one's share of the others'; none runs."""
    what = "scan: temporary bytes of forward and backward"
    arrays = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in cell_inputs(shape).items()}
    inputs = [arrays[n] for n in NAMES], arrays["dh"]
    temp = {n: common.temp_bytes(run.lower(*inputs).compile()) for n, run in programs.items()}
    first, *others = temp
    shares = {f"{first} / {n}": common.digits(temp[first] / temp[n]) for n in others}
    return {"what": what, **shape._asdict(), "temp_bytes": temp, **shares}


def context(args, sizes: Sizes, folder: Path) -> list[dict]:
    """One row's greedy tokens behind a short and a long text, by the same program, in turns."""
    prompt = random_tokens(sizes.model, 1, max(sizes.contexts))
    ours, cases = Ours(sizes.model, prompt, prompt, sizes.new), {}
    for length in sizes.contexts:
        ours.prefill(1, length)
        cases[str(length)] = functools.partial(ours.decode, 1, length)
    seconds = common.interleave(cases, 3 * args.rounds)  # 5 % is little: more rounds
    tokens = {"tokens": sizes.new, "state_bytes": state_bytes(sizes.model)}
    row = {
        "what": "context: greedy tokens",
        **tokens,
        **peers.report(seconds, str(min(sizes.contexts))),
    }
    return [row]


def state_bytes(cfg: xlstm.XLSTMConfig) -> int:
    """Bytes of one text's memory, however long it is."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: xlstm.init_state(cfg, 1)))
    return sum(x.size * x.dtype.itemsize for x in leaves)


SECTIONS = {"cell": cell, "model": model, "scan": scan, "context": context}


def arguments(argv=None):
    """Command line of this benchmark."""
    parser = peers.parser(__doc__, SECTIONS)
    parser.add_argument("--chunk", type=int, default=xla.CHUNK, help="of every side's cell")
    return parser.parse_args(argv)


def run(args) -> list[dict]:
    """The rows of the chosen sections."""
    return peers.run(args, SECTIONS, TINY if args.tiny else FULL)


def main(argv=None) -> None:
    """Measure and save."""
    args = arguments(argv)
    peers.measure(args, run, f"benchmarks.xlstm_peers --chunk={args.chunk}")


if __name__ == "__main__":
    main()
