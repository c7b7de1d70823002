"""model.predict functions as portable StableHLO files, for cpu, cuda and tpu from a CPU.

A file is a deployment artefact, not an archive: jax keeps it loadable for about six months. It
takes (params, inputs), both flat dicts: params as the safetensors file named in index.json spells
them, inputs and outputs as index.json lists them.

    import jax.export, safetensors.numpy
    function = jax.export.deserialize(open("text_logits.stablehlo", "rb").read())
    function.call(safetensors.numpy.load_file("model.safetensors"), inputs)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export  # not an attribute of jax until it is imported
import jax.numpy as jnp

from export.weights import unflatten

PLATFORMS = ("cpu", "cuda", "tpu")


class Function(NamedTuple):
    """One function to export.

    call:   (params as a nested dict, inputs as a flat dict) -> flat dict of outputs.
    inputs: {name: ShapeDtypeStruct}.
    doc:    what it computes, for index.json.
    """

    call: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    doc: str


def functions(model, config, params: Any) -> dict[str, Function]:
    """What a model can have exported, by what its predict dict offers; batch size is 1.

    params: nested dict of arrays or ShapeDtypeStructs.
    """
    from export import drawing  # imports the samplers

    found: dict[str, Function] = {}
    offered = model.predict.keys()
    if {"logits", "understanding_prefix"} <= offered:
        found["text_logits"] = _text_logits(model)
    elif {"logits", "init_state"} <= offered:  # a language model
        found["text_logits"] = _language_logits(model)
        found |= _decoding(model, config, params)
    if drawing.possible(model.predict):
        found |= drawing.functions(model, config, params)
    return found


def one_row(spec: Any) -> jax.ShapeDtypeStruct:
    """The shape of a batch key for a batch of one."""
    return jax.ShapeDtypeStruct((1, *spec.shape[1:]), spec.dtype)


def _text_logits(model) -> Function:
    batch = next(iter(model.batches.values()))
    inputs = {key: one_row(spec) for key, spec in batch.items() if key.startswith("und_")}

    def call(params, inputs):
        return {"logits": model.predict["logits"](params, inputs)}

    doc = "logits [1, tokens, vocabulary] after each text token of picture, question and answer"
    return Function(call, inputs, doc)


def _language_logits(model) -> Function:
    inputs = {"tokens": one_row(model.batches["text"]["tokens"])}

    def call(params, inputs):
        return {"logits": model.predict["logits"](params, inputs)}

    return Function(call, inputs, "logits [1, tokens, vocabulary] of the token after each token")


def _decoding(model, config, params) -> dict[str, Function]:
    """decode_start and decode_step: config.sample.rows rows of up to config.data.length tokens."""
    rows, length = config.sample.rows, config.data.length

    def start(params):
        return model.predict["init_state"](params, rows, length)

    leaves, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(start, params))
    names = [f"state/{jax.tree_util.keystr(k, simple=True, separator='/')}" for k, _ in leaves]

    def flat(state):
        return dict(zip(names, jax.tree.leaves(state)))

    def step(params, inputs):
        state = tree.unflatten([inputs[name] for name in names])
        logits, state = model.predict["extend"](params, inputs["token"], state)
        return flat(state) | {"logits": logits}

    inputs = {name: leaf for name, (_, leaf) in zip(names, leaves)}
    inputs["token"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    one = "logits [rows, vocabulary] of the token after `token` [rows], and the state after it"
    return {
        "decode_start": Function(
            lambda params, inputs: flat(start(params)), {}, "the state before any token"
        ),
        "decode_step": Function(step, inputs, one),
    }


def serialise(function: Function, params: Mapping[str, Any]) -> tuple[bytes, dict]:
    """(file contents, entry of index.json); params is flat and may be abstract."""
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}

    def call(params, inputs):
        return dict(function.call(unflatten(params), inputs))

    exported = jax.export.export(jax.jit(call), platforms=PLATFORMS)(shapes, dict(function.inputs))
    outputs = jax.eval_shape(call, shapes, dict(function.inputs))
    entry = {
        "doc": function.doc,
        "platforms": list(PLATFORMS),
        "inputs": {name: _describe(x) for name, x in function.inputs.items()},
        "outputs": {name: _describe(x) for name, x in outputs.items()},
    }
    return bytes(exported.serialize()), entry


def _describe(x: Any) -> str:
    """'float32[1,16]'; a scalar is 'float32[]'."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
