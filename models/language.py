"""What every autoregressive language model shares: loss, generation, the seam of models/__init__.

A model is a linen module, a `Net`, with one call for training, prompts and single tokens,

    net(tokens, state, segment_ids, valid, positions, keep_state=...) -> (hidden, state)

and a function init_state(params, rows, max_len). What the state is, a cache, a memory or both, is
its own business. `state=None` reads texts from their start, several documents to a row where
`segment_ids` change. With a state a call continues it: tokens where `valid` is False (right
padding) leave it exactly as it is. `positions` count within documents.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import Model, sized
from models.blocks import losses
from models.blocks.common import constrain

CHECKED = ("recall", "needle")  # data sets whose batches say which targets count


class Net(nn.Module):
    """Embedding and head around the layers that a model adds; the head is tied unless `table`
    says otherwise. `float32` names layers whose kernels are multiplied in it whatever `dtype`."""

    cfg: Any
    dtype: Any = jnp.float32
    remat: str = "none"
    impl: str = "auto"
    apart: bool = False  # stacks of layers, as over_layers takes them and `decoding` makes them
    float32 = ()

    def rows(self, name: str, init: Callable) -> Float[Array, "v d"]:
        """One row for each entry of the vocabulary; for `setup`."""
        init = nn.with_logical_partitioning(init, ("vocab", "embed"))
        return self.param(name, init, (self.cfg.vocab_size, self.cfg.width), jnp.float32)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Rows of the embedding in the compute type."""
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return constrain(x, "batch", "length", "act_embed")

    def table(self) -> Float[Array, "v d"]:
        """Output rows, float32."""
        return self.embedding

    @property
    def softcap(self) -> float | None:
        """Cap of the scores."""
        return None

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Scores of every vocabulary row, float32."""
        hidden, table = hidden.astype(self.dtype), self.table().astype(self.dtype)
        out = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return self.softcap * jnp.tanh(out / self.softcap) if self.softcap else out

    def text(self, tokens: Int[Array, "b t"], segment_ids=None) -> Float[Array, "b t v"]:
        """Logits; also the method that initialises every parameter."""
        return self.logits(self(tokens, None, segment_ids)[0])


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


def apply(net: Net, params, *args, method=None, **kwargs):
    """net.apply with bare parameters."""
    return net.apply({"params": params}, *args, method=method, **kwargs)


STACK = re.compile(r"layers|run\d+")  # names of the stacks of layers that models have
PIECE = re.compile(r"(layers|run\d+)_0")


def taken_apart(params, cut: Callable[[Array], Sequence]):
    """Parameters with every stack of layers as layers of their own: layers -> layers_0, layers_1...

    cut: a stacked leaf -> one for each layer, with a layers axis of one.
    """
    found = {}
    for name, inner in params.items():
        if not isinstance(inner, Mapping):
            found[name] = inner
        elif not STACK.fullmatch(name):
            found[name] = taken_apart(inner, cut)
        else:
            leaves, structure = jax.tree.flatten(inner)
            for i, layer in enumerate(zip(*map(cut, leaves), strict=True)):
                found[f"{name}_{i}"] = jax.tree.unflatten(structure, layer)
    return found


def is_apart(params) -> bool:
    """Whether `taken_apart` made them."""
    inner = [x for x in params.values() if isinstance(x, Mapping)]
    return any(map(PIECE.fullmatch, params)) or any(map(is_apart, inner))


def read(net: Net, params, batch) -> Float[Array, "b t d"]:
    """Hidden states of a batch's rows."""
    positions = batch.get("positions")
    return apply(net, params, batch["tokens"], None, batch["segment_ids"], None, positions)[0]


def norms(batch) -> dict[str, Float[Array, ""]]:
    """Targets of the whole batch."""
    return {"text": jnp.maximum(next_tokens(batch)[1].sum(), 1.0)}


def loss(net: Net, params, extra, batch, rng, *, step, norms, z_loss: float = 0.0):
    """Mean cross-entropy of the next token, nats; no array of logits.

    z_loss times the mean square of the log-normaliser is added (OLMo 2: 1e-5); metric "loss" is
    without it.
    """
    nll, correct, logsumexp, weights = _scored(net, params, batch)
    mean = lambda x: jnp.sum(x * weights) / norms["text"]  # noqa: E731
    total, metrics = mean(nll), {"loss": mean(nll), "accuracy": mean(correct)}
    if z_loss:
        metrics["z"] = mean(jnp.square(logsumexp))
        total += z_loss * metrics["z"]
    return total, (metrics, extra)


def _scored(net: Net, params, batch) -> tuple[Float[Array, "b t"], ...]:
    """losses.token_nll of every position's next token, and the weights of those targets."""
    hidden = read(net, params, batch)
    targets, weights = next_tokens(batch)
    found = losses.token_nll(
        hidden.reshape(-1, hidden.shape[-1]),
        apply(net, params, method="table"),
        targets.reshape(-1),
        softcap=net.softcap,
    )
    return *(x.reshape(weights.shape) for x in found), weights


def token_nll(net: Net, params, batch) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """(nats of every position's next token, whether that is a target)."""
    nll, _, _, weights = _scored(net, params, batch)
    return nll, weights


def text_nll(net: Net, params, batch) -> dict[str, Float[Array, "b"]]:
    """Sums per row over its targets: nll (nats), correct, count."""
    nll, correct, _, weights = _scored(net, params, batch)
    return losses.row_sums(nll, correct, weights)


def prefill(net: Net, params, tokens, length, state) -> tuple[Float[Array, "b v"], Any]:
    """(scores of the next token, state) after the first `length` of right-padded tokens [b, t]."""
    valid = jnp.arange(tokens.shape[1]) < length[:, None]
    hidden, state = apply(net, params, tokens, state, None, valid, keep_state=True)
    last = jnp.maximum(length - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return apply(net, params, hidden, method="logits"), state


def extend(net: Net, params, token, state) -> tuple[Float[Array, "b v"], Any]:
    """(scores of the next token, state) after one more token [b]."""
    hidden, state = apply(net, params, token[:, None], state, keep_state=True)
    return apply(net, params, hidden[:, 0], method="logits"), state


def rounded(net: Net, params):
    """The parameters with every matrix in the type that it is multiplied in.

    The same numbers come out: each use would round it. A token then reads half the bytes of
    float32 parameters. Not to be jitted: that would copy what stays.
    """

    def one(path, x):
        *_, owner, name = ("", *(key.key for key in path))
        matrix = name in ("embedding", "head") or (name == "kernel" and owner not in net.float32)
        return x.astype(net.dtype) if matrix and x.dtype != net.dtype else x

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.jit, static_argnums=1)
def _split(x, count: int):
    return jnp.split(x, count)


def decoding(net: Net, params):
    """The parameters as decoding reads them: `rounded`, and every layer's by itself.

    A token then reads half the bytes of float32 parameters, and copies no layer's part out of a
    stack. Not to be jitted, as `rounded`.
    """
    return taken_apart(rounded(net, params), lambda x: _split(x, x.shape[0]))


def predict(net: Net, init_state: Callable, **more: Callable) -> dict[str, Callable]:
    """What samplers, evaluators and exporters call; more: others of (net, params, ...)."""

    def logits(net, params, batch):
        return apply(net, params, read(net, params, {"segment_ids": None} | batch), method="logits")

    def bound(function):
        def call(params, *args, **kwargs):
            return function(net.clone(apart=is_apart(params)), params, *args, **kwargs)

        return call

    functions = dict(text_nll=text_nll, token_nll=token_nll, decoding=decoding, logits=logits)
    functions |= dict(prefill=prefill, extend=extend, init_state=init_state, **more)
    return {name: bound(function) for name, function in functions.items()}


def init(net: Net, rng):
    """Parameters, with logical axis names; net.text is the method that touches all of them."""
    return net.init(rng, jnp.zeros((1, 2), jnp.int32), method="text")["params"]


def build(
    config, sizes, module: type[Net], init_state: Callable, weights: Callable, **more: Callable
) -> Model:
    """The language model behind the seam of models/__init__.py.

    sizes: what config.model.<name>.size chooses from; init_state(net, params, rows, max_len);
    weights(cfg): the map to published names; more: see `predict`.
    """
    name = config.model.name
    cfg = sized(sizes, config.model[name], f"model.{name}")
    if config.model.vocab_size:
        cfg = dataclasses.replace(cfg, vocab_size=config.model.vocab_size)
    net = module(cfg, jnp.dtype(config.precision), config.remat)

    def ints(rows):
        return jax.ShapeDtypeStruct((rows, config.data.length), jnp.int32)

    batches = {"text": config.batch_size} | {f"text_{rows}": rows for rows, _ in config.ramp}
    keys = ("tokens", "segment_ids", "positions")
    if config.data.name in CHECKED:
        keys += ("scored",)
    return Model(
        init=lambda rng: (init(net, rng), {}),
        loss=functools.partial(loss, net, z_loss=config.model.get("z_loss", 0.0)),
        norms=norms,
        predict=predict(net, init_state, **more),
        batches={name: dict.fromkeys(keys, ints(rows)) for name, rows in batches.items()},
        weights=weights(cfg),
    )
