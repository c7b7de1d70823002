"""Where a language model looks: share of attention on the meta tokens, on the first token of the
document, on the query itself and on the rest, and the entropy of the weights, in nats.

Means over held-out windows, heads and layers; layers one by one in samples/attention.png. Hymba's
claim (arXiv 2411.13676, on meta tokens) is that they take attention from the first token and that
the entropy falls.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eval import common
from eval.scaling.report import figure as figure_at
from input_pipeline import text
from kernels.attention import MaskSpec

PLACES = ("meta", "first", "self", "rest")


def weights(
    q: Float[Array, "b t h k"], k: Float[Array, "b s g k"], mask: MaskSpec
) -> Float[Array, "b g r t s"]:
    """Softmax weights of every query, float32; r query heads share a key head."""
    b, t, h, size = q.shape
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], size)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32)
    visible = mask.dense(t, k.shape[1])[:, None, None]
    return jax.nn.softmax(jnp.where(visible, scores * size**-0.5, -jnp.inf), axis=-1)


def shares(
    p: Float[Array, "b g r t s"], first: Int[Array, "b t"], counts: Float[Array, "b t"]
) -> Float[Array, "b 6"]:
    """Sums per row over the counted queries, means over heads: PLACES, entropy, count.

    first: place in the row of the first token of each token's document.
    """
    meta = p.shape[-1] - p.shape[-2]
    p, text = p.mean((1, 2)), -jax.scipy.special.xlogy(p, p).sum(-1).mean((1, 2))
    own = jnp.arange(p.shape[1])[:, None] + meta
    parts = [
        p[..., :meta].sum(-1),
        jnp.take_along_axis(p, first[..., None] + meta, axis=2)[..., 0],
        jnp.take_along_axis(p, jnp.broadcast_to(own, (*p.shape[:2], 1)), axis=2)[..., 0],
    ]
    parts += [1.0 - sum(parts), text]
    sums = [(part * counts).sum(-1) for part in parts]
    return jnp.stack([*sums, counts.sum(-1)], axis=-1)


def draw(path: Path, table: Float[np.ndarray, "layers 5"]) -> None:
    """Shares as stacked bars, entropy as a line, layer by layer."""
    layers, base = np.arange(len(table)), np.zeros(len(table))
    with figure_at(path, size=(5, 3)) as figure:
        axes = figure.add_subplot()
        for place, share in zip(PLACES, table.T):
            axes.bar(layers, share, bottom=base, label=place, width=0.7)
            base = base + share
        axes.set(xlabel="attending layer", ylabel="share of attention", xticks=layers, ylim=(0, 1))
        right = axes.twinx()
        right.plot(layers, table[:, 4], "k.-", label="entropy")
        right.set_ylabel("entropy (nats)")
        figure.legend(loc="outside upper center", ncols=5, fontsize=8)


@functools.lru_cache(maxsize=8)
def summing(attended: Callable) -> Callable:
    """(params, batch) -> `shares` of every layer [b, layers, 6], compiled once per model."""

    def sums(params, batch):
        # The first token of a document sees only itself and the meta tokens: not counted.
        counts = ((batch["segment_ids"] > 0) & (batch["positions"] > 0)).astype(jnp.float32)
        first = jnp.arange(batch["tokens"].shape[1]) - batch["positions"]
        layers = [shares(weights(*seen), first, counts) for seen in attended(params, batch)]
        return jnp.stack(layers, axis=1)

    return jax.jit(sums)


def build(config):
    """Evaluator "attention" over the first config.evaluation.windows held-out windows."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        if "attended" not in model.predict:
            print(f"attention: {config.model.name} does not say what it attends to", flush=True)
            return None
        sums = summing(model.predict["attended"])
        windows, _, _ = text.windows(config.data, options.held_out)
        rows = min(options.windows, len(windows.tokens))

        def read(index):
            return sums(params, {k: np.asarray(v[index]) for k, v in windows._asdict().items()})

        total = common.in_batches(read, rows, options.batch, lambda index: index).sum(0)
        table = total[:, :5] / total[:, 5:]
        if jax.process_index() == 0:
            draw(Path(workdir) / "samples" / "attention.png", table)
        return dict(zip((*PLACES, "entropy"), table.mean(0).tolist()))

    return evaluate
