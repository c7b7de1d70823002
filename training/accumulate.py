"""Gradients of one step over micro-batches, in float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(batch: dict, parts: int) -> dict:
    """[B, ...] -> [parts, B // parts, ...] where part a holds rows a, a + parts, ...

    Consecutive rows lie on one device, so every device splits its own shard and nothing moves.
    """

    def one(key, x):
        if x.shape[0] % parts:
            raise ValueError(
                f"config.accumulate={parts} does not divide the {x.shape[0]} rows of batch key "
                f"{key!r}"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return {key: one(key, value) for key, value in batch.items()}


def value_and_grad(loss: Callable, params: Any, extra: Any, batch: dict, parts: int):
    """Sum of loss(params, extra, micro) over micro-batches -> (loss, metrics, extra, grads).

    loss returns (scalar, (metrics, extra)); scalars are already over global denominators, so they
    and the gradients add up. `extra` is threaded through the micro-batches in order.
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    to32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    if parts == 1:
        (value, (metrics, extra)), grads = grad(params, extra, batch)
        return value, metrics, extra, to32(grads)

    def body(carry, micro):
        extra, total = carry
        (value, (metrics, extra)), grads = grad(params, extra, micro)
        add = to32((value, metrics, grads))
        return (extra, jax.tree.map(jnp.add, total, add)), None

    micros = split(batch, parts)
    first = jax.tree.map(lambda x: x[0], micros)
    shape = jax.eval_shape(grad, params, extra, first)
    (value, (metrics, _)), grads = shape
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, metrics, grads))
    (extra, (value, metrics, grads)), _ = jax.lax.scan(body, (extra, zeros), micros)
    return value, metrics, extra, grads
