"""What every autoregressive language model shares: loss, generation, the seam of models/__init__.

A model is a linen module, its `net`, with

    net(tokens, state, segment_ids, valid, positions, keep_state=...) -> (hidden, state)
    net.logits(hidden) -> float32 scores;  net.table() -> the float32 rows [V, D] that make them
    net.softcap: cap of the scores, or None
    net.float32: names of the layers whose kernels are multiplied in float32 whatever the precision

and a function init_state(params, rows, max_len). What the state is, a cache, a memory or both, is
its own business. `state=None` reads texts from their start, several documents to a row where
`segment_ids` change. With a state a call continues it: tokens where `valid` is False (right
padding) leave it exactly as it is. `positions` count within documents.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import Model
from models.blocks.losses import chunked_cross_entropy, row_nll

CHECKED = ("recall", "needle")  # data sets whose batches say which targets count


def next_tokens(batch) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """(target, weight) of every position: the next token of the same document.

    batch["scored"], where there is one, says at which positions the target counts.
    """
    tokens, segments = batch["tokens"], batch["segment_ids"]
    after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    weights = (segments == after) & (segments > 0)
    if "scored" in batch:
        weights &= batch["scored"] > 0
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), weights.astype(jnp.float32)


def apply(net: nn.Module, params, *args, method=None, **kwargs):
    """net.apply with bare parameters."""
    return net.apply({"params": params}, *args, method=method, **kwargs)


def scores(hidden: Float[Array, "... d"], table: Float[Array, "v d"], dtype):
    """hidden tableᵀ [..., v] in float32, products in `dtype`."""
    hidden, table = hidden.astype(dtype), table.astype(dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def read(net: nn.Module, params, batch) -> Float[Array, "b t d"]:
    """Hidden states of a batch's rows."""
    positions = batch.get("positions")
    return apply(net, params, batch["tokens"], None, batch["segment_ids"], None, positions)[0]


def norms(batch) -> dict[str, Float[Array, ""]]:
    """Targets of the whole batch."""
    return {"text": jnp.maximum(next_tokens(batch)[1].sum(), 1.0)}


def loss(net: nn.Module, params, extra, batch, rng, *, step, norms):
    """Mean cross-entropy of the next token, nats; no array of logits."""
    hidden = read(net, params, batch)
    targets, weights = next_tokens(batch)
    nll, correct = chunked_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        apply(net, params, method="table"),
        targets.reshape(-1),
        weights.reshape(-1),
        softcap=net.softcap,
    )
    total = nll / norms["text"]
    return total, ({"loss": total, "accuracy": correct / norms["text"]}, extra)


def text_nll(net: nn.Module, params, batch) -> dict[str, Float[Array, "b"]]:
    """Sums per row over its targets: nll (nats), correct, count."""
    hidden = read(net, params, batch)
    table = apply(net, params, method="table")
    return row_nll(hidden, table, *next_tokens(batch), softcap=net.softcap)


def prefill(net: nn.Module, params, tokens, length, state) -> tuple[Float[Array, "b v"], Any]:
    """(scores of the next token, state) after the first `length` of right-padded tokens [b, t]."""
    valid = jnp.arange(tokens.shape[1]) < length[:, None]
    hidden, state = apply(net, params, tokens, state, None, valid, keep_state=True)
    last = jnp.maximum(length - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return apply(net, params, hidden, method="logits"), state


def extend(net: nn.Module, params, token, state) -> tuple[Float[Array, "b v"], Any]:
    """(scores of the next token, state) after one more token [b]."""
    hidden, state = apply(net, params, token[:, None], state, keep_state=True)
    return apply(net, params, hidden[:, 0], method="logits"), state


def rounded(net: nn.Module, params):
    """The parameters with every matrix in the type that it is multiplied in.

    The same numbers come out: each use would round it. A token then reads half the bytes of
    float32 parameters. Not to be jitted: that would copy what stays.
    """

    def one(path, x):
        *_, owner, name = ("", *(key.key for key in path))
        matrix = name in ("embedding", "head") or (name == "kernel" and owner not in net.float32)
        return x.astype(net.dtype) if matrix and x.dtype != net.dtype else x

    return jax.tree_util.tree_map_with_path(one, params)


def predict(net: nn.Module, init_state: Callable) -> dict[str, Callable]:
    """What samplers, evaluators and exporters call."""

    def logits(params, batch):
        return apply(net, params, read(net, params, {"segment_ids": None} | batch), method="logits")

    functions = dict(text_nll=text_nll, prefill=prefill, extend=extend, rounded=rounded)
    bound = {name: functools.partial(f, net) for name, f in functions.items()}
    return bound | {"logits": logits, "init_state": init_state}


def init(net: nn.Module, rng):
    """Parameters, with logical axis names; net.text is the method that touches all of them."""
    return net.init(rng, jnp.zeros((1, 2), jnp.int32), method="text")["params"]


def model(config, net: nn.Module, init_state: Callable, weights) -> Model:
    """The language model behind the seam of models/__init__.py."""

    def ints(rows):
        return jax.ShapeDtypeStruct((rows, config.data.length), jnp.int32)

    sizes = {"text": config.batch_size} | {f"text_{rows}": rows for rows, _ in config.ramp}
    keys = ("tokens", "segment_ids", "positions")
    if config.data.name in CHECKED:
        keys += ("scored",)
    return Model(
        init=lambda rng: (init(net, rng), {}),
        loss=functools.partial(loss, net),
        norms=norms,
        predict=predict(net, init_state),
        batches={name: dict.fromkeys(keys, ints(rows)) for name, rows in sizes.items()},
        weights=weights,
    )
