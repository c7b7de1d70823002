"""Text encoders behind one interface, as Infinity conditions on them: vectors of every token."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from export.weights import WeightMap, plain
from kernels.attention import MaskSpec
from models import sized, t5
from models.blocks import decoder_weights
from models.blocks.decoder import SIZES as DECODERS
from models.blocks.decoder import Decoder


class TextEncoder(NamedTuple):
    """A text encoder as pure functions.

    init:    (rng) -> boxed parameters.
    encode:  (params, tokens [b, p], valid [b, p]) -> vectors [b, p, width].
    width:   numbers of a token's vector.
    weights: map of its published names.
    """

    init: Callable[..., Any]
    encode: Callable[..., Any]
    width: int
    weights: WeightMap


def build(config) -> TextEncoder:
    """The encoder that config.model.text names.

    decoder: a small stack trained along. t5: Flan-T5, frozen; batches bring what it says of the
    captions (config.data.text_embeddings), and it is no part of the model. label: one vector for
    the whole caption, the mean of its tokens' rows of a table; a class where captions name classes.
    """
    node = dict(config.model.text)
    name, embedded = node.pop("name"), config.data.text_embeddings
    if name not in ENCODERS:
        raise ValueError(f"config.model.text.name={name!r}: allowed are {', '.join(ENCODERS)}")
    if (name == "t5") != bool(embedded):
        raise ValueError(
            f"config.model.text.name={name!r} with config.data.text_embeddings={embedded!r}: t5 "
            "needs the folder of the published encoder, the others none"
        )
    return ENCODERS[name](config, node)


def _embedded(config, node) -> TextEncoder:
    """Vectors in place of tokens."""
    del config
    cfg = sized(t5.SIZES, node, "model.text")
    return TextEncoder(
        lambda rng: {}, lambda params, vectors, valid: vectors, cfg.width, WeightMap({})
    )


def _decoder(config, node) -> TextEncoder:
    """The stack of models/blocks/decoder.py, every token seeing the whole caption."""
    cfg = sized(DECODERS, node, "model.text")
    vocabulary = config.model.vocab_size or cfg.vocab_size
    cfg = dataclasses.replace(cfg, vocab_size=vocabulary, pattern=("global",))
    net = Decoder(cfg, jnp.dtype(config.precision), config.remat)

    def run(net, tokens, valid):
        mask = MaskSpec(causal=False, kv_valid=valid)
        return net(net.embed(tokens), mask)[0]

    def init(rng):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return net.init(rng, tokens, jnp.ones((1, 1), bool), method=run)["params"]

    def encode(params, tokens, valid):
        return net.apply({"params": params}, tokens, valid, method=run)

    return TextEncoder(init, encode, cfg.width, decoder_weights.weight_map(cfg))


def _label(config, node) -> TextEncoder:
    """The same vector in every place of a caption, whatever the order of its words."""
    width = node["width"]
    shape = (config.model.vocab_size, width)

    def init(rng):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        return {"table": init(rng, shape, jnp.float32)}

    def encode(params, tokens, valid):
        rows = jnp.where(valid[..., None], params["table"][tokens], 0.0)
        mean = rows.sum(1, keepdims=True) / jnp.maximum(valid.sum(1), 1)[:, None, None]
        return jnp.broadcast_to(mean, rows.shape)

    return TextEncoder(init, encode, width, WeightMap({"table": plain("class_emb.weight")}))


ENCODERS = {"decoder": _decoder, "t5": _embedded, "label": _label}
