"""Infinity's transformer, here and as it is published in plain torch, on the same two cores.

    python -m benchmarks.infinity_peers [--torch-python=PYTHON] [--what SECTION ...] [--out=F]

| section | what takes turns |
| --- | --- |
| train | an AdamW step on given codes of all scales |
| draw | pictures' bits scale by scale, keys and values cached, guidance 3, without the decoder |

Six blocks of width 512, 256 px: 7 scales, 521 tokens of 16 bits; float32. The torch side is
benchmarks/infinity_torch.py: dense attention under the mask of scales, all logits held. Weights are
the same (exported under their published names); loss, gradients and bits are compared before
anything is timed. On a machine with other load take --threads=1, for the reason that cpu_peers
gives.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, peers
from benchmarks.scales import small_config, without_decoder
from export.weights import save_safetensors, to_published
from inference.infinity import compiled_images
from kernels.bitwise.bits import pack, unpack
from models import MODELS, infinity_build, infinity_weights
from models.blocks.common import row_keys
from models.infinity_scales import rope2d, scale_ids
from models.tokenizers.quantisers.schedules import tokens

GUIDANCE = 3.0


class Sizes(NamedTuple):
    """What --tiny makes small."""

    rows: int
    width: int
    depth: int
    heads: int
    pixels: int


FULL, TINY = Sizes(4, 512, 6, 8, 256), Sizes(2, 128, 2, 2, 64)


def config_of(sizes: Sizes):
    """benchmarks.scales's, with the text's vectors given."""
    config = small_config(sizes.rows)
    with config.unlocked():
        config.model.text = dict(name="t5", size="small")
        config.data.text_embeddings, config.data.image_size = "given", sizes.pixels
        config.data.prompt_length = 24
        own = sizes._asdict()
        config.model.transformer.update({k: own[k] for k in ("width", "depth", "heads")})
        config.model.transformer.chunks = 1
        if sizes is TINY:
            config.model.tokenizer = dict(size="small_32", z=16, scales=4)
    return config


class Ours:
    """Our side, with the calls of the other side."""

    def __init__(self, sizes: Sizes):
        model = without_decoder(MODELS["infinity"](config_of(sizes)))
        self.system = model.predict["scale_step"].args[0]
        self.cfg = self.system.cfg.transformer
        self.schedule = model.predict["layout"]().tokens
        self.params = common.random_params(lambda key: model.init(key)[0])
        self.arrays = self._arrays(sizes.rows)
        self.given = jax.device_put({k: self.arrays[k] for k in ("text", "lengths", "inputs")})
        self.given["labels"] = pack(jnp.asarray(self.arrays["labels"]) != 0)
        self.tx = optax.adamw(1e-4, b1=0.9, b2=0.97, eps=1e-8, weight_decay=0.01)
        own = self.params["transformer"]
        self.trained, self.opt = jax.tree.map(jnp.copy, own), self.tx.init(own)
        self._value_and_grad = jax.jit(jax.value_and_grad(self._loss))
        self._step = jax.jit(self._train, donate_argnums=(0, 1))
        scales = len(self.schedule)
        run = compiled_images(model, guidance=GUIDANCE)
        guidance, greedy = np.full(scales, GUIDANCE, np.float32), np.zeros(scales, np.float32)
        given = (
            self.given["text"],
            self.given["lengths"],
            row_keys(jax.random.key(0), jnp.arange(sizes.rows)),
        )
        self._draw = functools.partial(run, self.params, *given, guidance, greedy, 1.0)

    def _arrays(self, rows: int) -> dict[str, np.ndarray]:
        """Everything that both sides read."""
        rng, cfg = np.random.default_rng(0), self.cfg
        words, length = 24, tokens(self.schedule)
        rope = rope2d(self.schedule, cfg.head_dim)
        return dict(
            text=rng.normal(size=(rows, words, cfg.text_width)).astype(np.float32),
            lengths=(np.arange(rows, dtype=np.int32) * 7 % words + 1).astype(np.int32),
            inputs=rng.normal(size=(rows, length - 1, cfg.bits)).astype(np.float32),
            labels=rng.integers(0, 2, (rows, length, cfg.bits)).astype(np.int32),
            weight=infinity_build.token_weights(self.system.cfg, self.schedule),
            cos=rope.cos[:, 0],
            sin=rope.sin[:, 0],
            schedule=np.array(self.schedule),
            guidance=np.float32(GUIDANCE),
        )

    def _loss(self, own, given):
        system, params = self.system, self.params | {"transformer": own}
        text = infinity_build.encode_text(system, params, given["text"], given["lengths"])
        condition = infinity_build.condition(system, params, *text)
        hidden = infinity_build.states(system, params, condition, given["inputs"], self.schedule)
        head = infinity_build.apply(system, params, "head", condition)
        weight = infinity_build.token_weights(system.cfg, self.schedule)
        nll = infinity_build.weighted_nll(head, self.cfg.bits, hidden, given["labels"], weight)
        return nll.sum() / len(hidden)

    def _train(self, own, opt, given):
        loss, grads = jax.value_and_grad(self._loss)(own, given)
        updates, opt = self.tx.update(grads, opt, own)
        return optax.apply_updates(own, updates), opt, loss

    def published(self, own) -> dict[str, np.ndarray]:
        """A tree of the transformer's shapes by published name."""
        return to_published(own, infinity_weights.weight_map(self.cfg))

    def gradients(self) -> dict:
        """Loss and gradients by published name, before any step; not of the table without text,
        which this loss does not read."""
        loss, grads = self._value_and_grad(self.params["transformer"], self.given)
        found = self.published(grads)
        del found["cfg_uncond"]
        return {"loss": loss, **found}

    def train(self) -> dict:
        """One AdamW step."""
        self.trained, self.opt, loss = self._step(self.trained, self.opt, self.given)
        return {"loss": loss}

    def draw(self) -> dict:
        """Likelier bits [b, l, d] of all scales."""
        return {"bits": unpack(self._draw().bits, self.cfg.bits).astype(jnp.int32)}


@functools.cache
def ours(sizes: Sizes) -> Ours:
    """Built once for both sections."""
    return Ours(sizes)


def _against(what: str, checked: str, args, sizes: Sizes, folder: Path) -> list[dict]:
    """Turns of one call, once the answers of `checked` agree."""
    mine = ours(sizes)
    weights, arrays = str(folder / "weights.safetensors"), str(folder / "inputs.npz")
    save_safetensors(weights, mine.published(mine.params["transformer"]))
    np.savez(arrays, **mine.arrays)
    ids = scale_ids(mine.schedule)
    row = dict(what=what, **sizes._asdict(), scales=len(mine.schedule), tokens=len(ids))
    # Between small operators torch's threads wait for each other: with one it may be faster.
    threads = {f"torch threads={n}": n for n in sorted({1, args.threads})}
    with peers.processes(args, "infinity_torch.py", threads) as others:
        for name, peer in others.items():
            row["packages"] = peer.ask(
                "build", kind="infinity", threads=threads[name], weights=weights, arrays=arrays,
                depth=sizes.depth, heads=sizes.heads, pool_heads=mine.cfg.pool_heads,
            )  # fmt: skip
        own = getattr(mine, checked)()
        theirs = peers.answers(others, folder, checked)
        row["largest_difference"] = {k: peers.apart(own, found) for k, found in theirs.items()}
        return [row | peers.turns(getattr(mine, what), others, args.rounds, what)]


SECTIONS = {
    "train": functools.partial(_against, "train", "gradients"),
    "draw": functools.partial(_against, "draw", "draw"),
}


def arguments(argv=None):
    """Command line of this benchmark."""
    return peers.parser(__doc__, SECTIONS).parse_args(argv)


def run(args) -> list[dict]:
    """The rows of the chosen sections."""
    return peers.run(args, SECTIONS, TINY if args.tiny else FULL)


def main(argv=None) -> None:
    """Measure and save."""
    peers.measure(arguments(argv), run, "benchmarks.infinity_peers")


if __name__ == "__main__":
    main()
