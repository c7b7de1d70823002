"""What every block needs: sharding constraints, a linear layer, checkpointing policies."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import shard

# Gemma's projections: truncated normal, variance 1 / fan-in (building_blocks 1.5).
fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def constrain(x: Array, *names: str | None) -> Array:
    """Shards x by logical axis names; a no-op without a mesh or without rules.

    A dimension that its mesh axes do not divide is left whole (one kv head on two devices).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not nn.get_logical_axis_rules() or mesh.empty or mesh.are_all_axes_manual:
        return x
    return jax.lax.with_sharding_constraint(x, shard.spec(names, x.shape))


# A stack of up to this many scan steps is written out: XLA then keeps what the backward pass
# needs where it is instead of copying it into stacked arrays (a third of a small model's step).
UNROLLED = 6


def remat_block(block: type[nn.Module], policy: str, *, looped: bool = False) -> Any:
    """`block` under the checkpointing policy that config.remat names; looped: in a real loop.

    none: keep everything. dots: keep the outputs of matrix products with no batch dimension
    (projections, not attention scores). full: keep the block's input only.
    """
    match policy:
        case "none":
            return block
        case "dots":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        case "full":
            keep = jax.checkpoint_policies.nothing_saveable
        case _:
            raise ValueError(f"config.remat={policy!r}, allowed: none, dots, full")
    # A loop by itself keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(block, policy=keep, prevent_cse=not looped)


def scan_layers(body: type[nn.Module], length: int, in_axes: Any, *, unroll: bool = False) -> Any:
    """`body` scanned over `length` steps with parameters stacked on a leading "layers" axis.

    unroll=True writes the steps of a short stack out (see UNROLLED); the parameters are the same.
    """
    return nn.scan(
        body,
        variable_axes={"params": 0, "attended": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
        unroll=length if unroll and length <= UNROLLED else 1,
    )


def over_layers(stack: Callable, name: str, length: int, carry, states, *, apart: bool):
    """(carry, states) behind `length` layers: stack(name, count, carry, states) runs `count` of
    them, whose parameters are under `name`.

    apart: each layer has its own parameters, name_0 to name_<length - 1>, and its own entry in the
    tuple `states`, each still with a layers axis, of one. A loop over stacked arrays copies a
    layer's part out of them before it is multiplied: nothing beside a training step, twice what a
    decoded token reads besides.
    """
    if not apart:
        return stack(name, length, carry, states)
    left = []
    for i in range(length):
        carry, one = stack(f"{name}_{i}", 1, carry, None if states is None else states[i])
        left.append(one)
    return carry, tuple(left)


def state_of_layers(make: Callable[[int], Any], length: int, apart: bool) -> Any:
    """The states that over_layers takes; make(count) gives those of `count` layers as stacked."""
    return tuple(make(1) for _ in range(length)) if apart else make(length)


def row_keys(rng: Array, example: Array) -> Array:
    """One key per example of the global batch, whatever the micro-batch or shard it lies in."""
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(example)


class Linear(nn.Module):
    """y = x W (+ b) over the last `ins` axes of x; W is [*in, *features] in float32."""

    features: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names of W's axes
    dtype: Any = jnp.float32
    ins: int = 1
    bias: bool = False
    kernel_init: Callable | None = None  # called with the matrix [prod(in), prod(out)]
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        into = x.shape[x.ndim - self.ins :]
        init = self.kernel_init or fan_in_normal
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(matrix_init(init, self.ins), self.axes),
            (*into, *self.features),
            jnp.float32,
        )
        y = _product(x.astype(self.dtype), kernel.astype(self.dtype), self.ins)
        if self.bias:
            axes = self.axes[self.ins :]
            init = nn.with_logical_partitioning(self.bias_init, axes)
            y = y + self.param("bias", init, self.features, jnp.float32).astype(self.dtype)
        return y


def _product(x, kernel, ins):
    """Contracts the last `ins` axes of x with the first of kernel, as one matrix product.

    XLA's CPU backend transposes and recomputes its inputs for a weight gradient that sums over
    two axes: flat tokens halve the cost of an MLP's training step. Merging tokens would gather
    a length that is split over devices, so that case keeps its axes.
    """
    lead, into, out = x.shape[: x.ndim - ins], kernel.shape[:ins], kernel.shape[ins:]
    if shard.mesh_axes("length"):
        contract = (tuple(range(len(lead), x.ndim)), tuple(range(ins)))
        return jax.lax.dot_general(x, kernel, (contract, ((), ())))
    x = x.reshape(math.prod(lead), math.prod(into))
    return (x @ kernel.reshape(math.prod(into), math.prod(out))).reshape(*lead, *out)


def matrix_init(init: Callable, ins: int) -> Callable:
    """Initialiser of a [*in, *out] tensor that draws the matrix [prod(in), prod(out)]."""

    def draw(key, shape, dtype):
        matrix = (math.prod(shape[:ins]), math.prod(shape[ins:]))
        return init(key, matrix, dtype).reshape(shape)

    return draw
