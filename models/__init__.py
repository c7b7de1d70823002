"""Models: pure functions behind one seam. MODELS maps a name to a builder that takes the config."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Model(NamedTuple):
    """What the loop, the samplers, the evaluators and the exporters know of a model.

    init:    (rng) -> (params, extra). Params carry logical axis names; extra is state that no
             gradient reaches (running statistics, codebook usage), often {}.
    loss:    (params, extra, batch, rng, *, step, norms) -> (scalar, (metrics, extra)). The scalar
             and the metrics are sums over examples divided by norms, so micro-batches add up.
    norms:   (batch) -> {term: denominator}, taken over the whole global batch.
    predict: {name: pure function (params, ...)}.
    batches: {bucket: {key: jax.ShapeDtypeStruct}}, one global batch per shape bucket.
    weights: map between our names and the published ones, or None.
    """

    init: Callable[..., Any]
    loss: Callable[..., Any]
    norms: Callable[..., Any]
    predict: Mapping[str, Callable[..., Any]]
    batches: Mapping[str, Mapping[str, Any]]
    weights: Any = None


def sized(sizes: Mapping[str, Any], node, key: str):
    """A config node with `size` and overriding fields -> the dataclass of a SIZES table."""
    fields = dict(node)
    size = fields.pop("size")
    if size not in sizes:
        raise ValueError(f"config.{key}.size={size!r}: allowed are {', '.join(sizes)}")
    allowed = [f.name for f in dataclasses.fields(sizes[size])]
    for name in fields:
        if name not in allowed:
            raise ValueError(f"config.{key}.{name}: allowed are size, {', '.join(allowed)}")
    return dataclasses.replace(sizes[size], **fields)


def _unifluid(config):
    from models import unifluid_build

    return unifluid_build.build(config)


def _kl_vae(config):
    from models.tokenizers import kl_vae_model

    return kl_vae_model.build(config)


def _discrete_tokenizer(config):
    from models.tokenizers import discrete_model

    return discrete_model.build(config)


def _glyph_classifier(config):
    from models import glyph_classifier

    return glyph_classifier.build(config)


def _xlstm(config):
    from models import xlstm

    return xlstm.build(config)


def _llama(config):
    from models import llama

    return llama.build(config)


def _mamba(config):
    from models import mamba

    return mamba.build(config)


def _hymba(config):
    from models import hymba_build

    return hymba_build.build(config)


def _infinity(config):
    from models import infinity_build

    return infinity_build.build(config)


# Builders import lazily: a run pays only for the model it trains.
MODELS: dict[str, Callable[..., Model]] = {
    "unifluid": _unifluid,
    "kl_vae": _kl_vae,
    "bsq_vae": _discrete_tokenizer,
    "vqgan": _discrete_tokenizer,
    "glyph_classifier": _glyph_classifier,
    "xlstm": _xlstm,
    "llama": _llama,
    "mamba": _mamba,
    "hymba": _hymba,
    "infinity": _infinity,
}
