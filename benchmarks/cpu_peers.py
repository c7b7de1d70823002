"""One Gemma-2 block stack, here and in torch through transformers, on the same two cores.

    python -m benchmarks.cpu_peers [--torch-python=PYTHON] [--dtype=DTYPE] [--threads=2] [--out=F]

Training: one AdamW step on 8 x 256 tokens. Decoding: 16 prompts of 64 tokens, 64 greedy tokens
more, keys and values cached. The weights are the same on both sides (exported under their published
names), so are losses and decoded tokens, which is checked first. torch runs in a process of its
own, eager and sdpa attention in turn with ours; the faster of the two counts.
On a machine with other load take --threads=1: torch's threads wait for each other at every
operator, so that a busy second core slows torch far more than ours.
bfloat16: float32 parameters and bfloat16 products in training (autocast there), bfloat16 throughout
in decoding.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from training import platform

ATTENTION = ("eager", "sdpa")


class Peer:
    """A script of this folder in a process of its own; ask(op, **arguments) -> its answer."""

    def __init__(self, python: str, script: str = "torch_peer.py"):
        script = Path(__file__).with_name(script)
        pipe = subprocess.PIPE
        # What training.platform tells the C library on our side is told on the other side too.
        env = {name: str(value) for name, (_, value) in platform.MALLOC.items()} | os.environ
        self.process = subprocess.Popen(
            [python, str(script)], stdin=pipe, stdout=pipe, text=True, env=env
        )

    def ask(self, op: str, **arguments) -> dict:
        """Send one request and wait for the answer."""
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(f"the other side: {answer['error']}")
        return answer

    def close(self) -> None:
        """End of input ends the process."""
        self.process.stdin.close()
        self.process.wait()


def pin(threads: int) -> None:
    """Keep this process, and those it starts, on so many cores, whatever the machine has."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def sizes(tiny: bool):
    """(decoder config, training rows, length, prompts, prompt length, new tokens)."""
    from models.blocks.decoder import DecoderConfig

    gemma2 = dict(attn_softcap=50.0, final_softcap=30.0, post_norms=True, window=4096)
    if tiny:
        cfg = DecoderConfig(256, 64, 2, 128, heads=2, kv_heads=1, head_dim=32, **gemma2)
        return cfg, 2, 16, 2, 8, 8
    cfg = DecoderConfig(8192, 512, 6, 2048, heads=8, kv_heads=4, head_dim=64, **gemma2)
    return cfg, 8, 256, 16, 64, 64


def torch_config(cfg) -> dict:
    """The same sizes as transformers' Gemma2Config spells them."""
    return dict(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        query_pre_attn_scalar=cfg.head_dim,
        sliding_window=cfg.window,
        attn_logit_softcapping=cfg.attn_softcap,
        final_logit_softcapping=cfg.final_softcap,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=1024,
        attention_dropout=0.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


class Ours:
    """Our side of the comparison, with the calls of the other side."""

    def __init__(self, cfg, tokens, prompt, new, dtype):
        import jax.numpy as jnp

        from benchmarks.language import LanguageModel

        self.model = LanguageModel(cfg, dtype)
        self.tokens, self.prompt, self.new = jnp.asarray(tokens), jnp.asarray(prompt), new
        self.params = self.model.init()
        self.state, self.cast = self.model.state(self.params), self.model.cast(self.params)

    def train(self) -> float:
        """One step; returns its loss."""
        self.state, loss = self.model.step(self.state, self.tokens)
        return float(loss)

    def decode(self):
        """Greedy tokens [rows, new]."""
        return self.model.decode(self.cast, self.prompt, self.new)


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of both sides, by CPU affinity")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--what", nargs="+", choices=("train", "decode"), default=["train", "decode"]
    )
    parser.add_argument("--profile", action="store_true", help="operators of the torch side")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", default="", help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Build, check that both sides compute the same, then take turns."""
    args = arguments(argv)
    pin(args.threads)
    peers = {name: Peer(args.torch_python) for name in ATTENTION}
    try:
        compare(args, peers)
    finally:
        for peer in peers.values():
            peer.close()


def compare(args, peers: dict[str, Peer]) -> None:
    """Everything after the processes were started."""
    import numpy as np

    from benchmarks import common
    from export.weights import save_safetensors, to_published
    from models.blocks import decoder_weights

    cfg, rows, length, prompts, prompt_length, new = sizes(args.tiny)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, cfg.vocab_size, (rows, length + 1), dtype=np.int32)
    prompt = rng.integers(3, cfg.vocab_size, (prompts, prompt_length), dtype=np.int32)
    ours = Ours(cfg, tokens, prompt, new, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.safetensors")
        save_safetensors(weights, to_published(ours.params, decoder_weights.weight_map(cfg)))
        built = {
            name: peer.ask(
                "build", config=torch_config(cfg), weights=weights, tokens=tokens.tolist(),
                prompt=prompt.tolist(), new=new, dtype=args.dtype, attention=name,
                threads=args.threads,
            )
            for name, peer in peers.items()
        }  # fmt: skip
    common.show({"torch": built, "machine": common.machine()})
    results = [
        measure(what, args, ours, peers, tokens=rows * length if what == "train" else prompts * new)
        for what in args.what
    ]
    if args.profile:
        for what in args.what:
            for name, peer in peers.items():
                common.show({"profile": what, "torch": name, **peer.ask("profile", what=what)})
    options = [f"--dtype={args.dtype}", f"--threads={args.threads}", f"--rounds={args.rounds}"]
    common.save(args.out, f"python -m benchmarks.cpu_peers {' '.join(options)}", results)


def measure(what: str, args, ours: Ours, peers: dict[str, Peer], tokens: int) -> dict:
    """Check one round of results, then interleaved seconds, tokens per second and the ratio."""
    import numpy as np

    from benchmarks import common

    mine = getattr(ours, what)()
    theirs = {name: peer.ask(what) for name, peer in peers.items()}
    if what == "train":
        agreement = {n: abs(a["loss"] - mine) / abs(mine) for n, a in theirs.items()}
    else:
        same = {n: np.asarray(a["tokens"]) == np.asarray(mine) for n, a in theirs.items()}
        agreement = {n: float(s.mean()) for n, s in same.items()}
    cases = {"ours": functools.partial(common.clock, getattr(ours, what))}
    for name, peer in peers.items():
        cases[name] = lambda peer=peer: peer.ask(what)["seconds"]
    seconds = common.take_turns(cases, args.rounds)
    best = min(peers, key=lambda name: np.median(seconds[name]))
    row = {
        "what": what,
        "dtype": args.dtype,
        "loss_difference" if what == "train" else "equal_tokens": agreement,
        "seconds": {name: common.spread(values) for name, values in seconds.items()},
        "tokens_per_s": common.digits(tokens / np.median(seconds["ours"])),
        "torch": best,
        "ratio": common.ratio(seconds[best], seconds["ours"]),
    }
    common.show(row)
    return row


if __name__ == "__main__":
    main()
