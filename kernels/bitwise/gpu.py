"""The bitwise head on Hopper GPUs: Pallas (Mosaic GPU) kernels for the loss, dx, and draws.

Forward reads x once and writes three numbers a token. The gradient's kernel reads a block's x
twice, the second time from the cache between, and writes dx and the gradient of the log odds, 64
float32 numbers a token (6 % of x at 2,048 channels); the sums over tokens that dw and
the modulation's gradients need are one matrix product of XLA's with x. A multiprocessor could not
hold that sum, d x C float32, and one block of threads per multiprocessor would leave it idle.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch
from kernels.bitwise import bits as packing
from kernels.bitwise import gpu_kernels, modulation
from kernels.bitwise.gpu_kernels import BITS, PIECE, SLOTS, TOKENS, Options
from kernels.bitwise.ref import Draw, Inputs
from kernels.errors import NotSupported

HOPPER = ("NVIDIA H100", "NVIDIA H20", "NVIDIA GH200")


def cross_entropy(inputs: Inputs, *, chunk: int | None = None, interpret: bool = False):
    """The reference's function for bfloat16 and up to 64 bits; chunk: 64 is the only one."""
    options, inputs = _prepared("bitwise_cross_entropy", inputs, chunk, interpret)
    return inputs.weights * _loss(options, inputs)[:, : inputs.weights.shape[1]]


def sample(inputs: Inputs, uncond, uniforms, draw: Draw, *, chunk=None, interpret=False):
    """The reference's function."""
    length, d = inputs.x.shape[1], inputs.w.shape[1]
    options, inputs = _prepared("sample_bits", inputs, chunk, interpret)
    given = [*_head(inputs, options)]
    if uncond is not None:
        _, uncond = _prepared("sample_bits", uncond, chunk, interpret)
        given += _head(uncond, options)
    uniforms = _columns(jnp.pad(uniforms, ((0, 0), (0, options.length - length), (0, 0))), options)
    kernel = functools.partial(gpu_kernels.sample, options, uncond is not None)
    scratch = _scratch(options) * (1 if uncond is None else 2)
    out = jax.ShapeDtypeStruct(uniforms.shape, jnp.float32)
    call = _call(kernel, "sample", options, inputs, out, scratch)
    bits = call(jnp.stack(draw), uniforms, *given)[:, :length, :d]
    return packing.pack(bits > 0), packing.codes(bits > 0)


def _prepared(op: str, inputs: Inputs, chunk, interpret: bool) -> tuple[Options, Inputs]:
    """Sizes, and inputs of whole pieces."""
    x = inputs.x
    (_, length, channels), d = x.shape, inputs.w.shape[1]
    if x.dtype != jnp.bfloat16:
        raise NotSupported(f"{op} on GPU takes bfloat16, not {x.dtype}")
    if not interpret and not dispatch.device_kind().startswith(HOPPER):
        raise NotSupported(f"{op} on GPU takes Hopper (H100, H200): wgmma is of no other")
    if d > BITS:
        raise NotSupported(f"{op} on GPU takes up to {BITS} bits, not {d}")
    if chunk not in (None, TOKENS):
        raise NotSupported(f"{op} on GPU has chunks of {TOKENS}, not {chunk}")
    # TMA moves tiles of 8 tokens; XLA can let what makes x write it so.
    more = max(TOKENS - length, -length % 8)
    x = jnp.pad(x, ((0, 0), (0, more), (0, -channels % PIECE)))
    options = Options(d, channels, x.shape[1], inputs.scale is not None, interpret)
    return options, inputs._replace(x=x)


def _columns(a, options: Options):
    """[..., d] -> [..., 64], twice if they fit."""
    bits = BITS // 2 if options.twice else BITS
    a = jnp.pad(a, (*((0, 0),) * (a.ndim - 1), (0, bits - options.d)))
    return jnp.concatenate([a, a], -1) if options.twice else a


def _head(inputs: Inputs, options: Options) -> tuple:
    """(x, W [rows, parts of bits, C], its sums over channels, shift w + b), of every row."""
    w, offset = inputs.w[None], inputs.b[None]
    if options.normalised:
        offset = offset + jnp.einsum("bc,cd->bd", inputs.shift, inputs.w, precision="highest")
        w = w * (1.0 + inputs.scale[..., None])
    bits = BITS // 2 if options.twice else BITS
    more = ((0, 0), (0, inputs.x.shape[2] - options.channels), (0, bits - options.d))
    high, low = modulation.split(jnp.pad(w, more), 2)
    sums = (high.astype(jnp.float32) + low.astype(jnp.float32)).sum(1)[..., : options.d]
    parts = [high, low, high] if options.twice else [high, low]
    W = jnp.swapaxes(jnp.concatenate(parts, 2), 1, 2)
    return inputs.x, W, _columns(sums, options), _columns(offset, options)


def _words(inputs: Inputs, options: Options):
    """Labels as [rows, words, tokens]."""
    more = ((0, 0), (0, options.length - inputs.bits.shape[1]), (0, 0))
    words = jax.lax.bitcast_convert_type(inputs.bits, jnp.int32)
    return jnp.swapaxes(jnp.pad(words, more), 1, 2)


def _scratch(options: Options) -> tuple:
    """A ring of pieces of x and W."""
    return (
        gpu_kernels.pieces(SLOTS, TOKENS),
        gpu_kernels.pieces(SLOTS, options.rows),
        plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
    )


def _call(kernel, name: str, options: Options, inputs: Inputs, outputs, scratch):
    """plgpu.kernel over rows and blocks of tokens."""
    rows = inputs.x.shape[0]
    return plgpu.kernel(
        kernel,
        kernel_name=f"bitwise_{name}",
        out_type=outputs,
        scratch_types=[scratch],
        grid=(rows, -(-options.length // TOKENS)),
        grid_names=("row", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if options.interpret else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, inputs: Inputs):
    return _forward(options, inputs)[0]


def _forward(options, inputs):
    """Loss before weights [rows, tokens], for the gradient also mean and rstd."""
    kernel = functools.partial(gpu_kernels.forward, options)
    out = [jax.ShapeDtypeStruct(inputs.x.shape[:2], jnp.float32)] * 3
    call = _call(kernel, "forward", options, inputs, out, _scratch(options))
    loss, *stats = call(*_head(inputs, options), _words(inputs, options))
    return loss, (inputs, stats)


def _backward(options, residuals, dloss):
    inputs, stats = residuals
    kernel = functools.partial(gpu_kernels.backward, options)
    shape = inputs.x.shape
    out = [
        jax.ShapeDtypeStruct(shape, inputs.x.dtype),
        jax.ShapeDtypeStruct((*shape[:2], BITS), jnp.float32),
    ]
    scratch = (*_scratch(options), *[gpu_kernels.pieces(TOKENS)] * 3)
    call = _call(kernel, "backward", options, inputs, out, scratch)
    dx, g = call(*_head(inputs, options), _words(inputs, options), dloss, *stats)
    g = g[..., : options.d]
    mean, rstd = stats
    h = g * rstd[..., None] if options.normalised else g
    parts = jnp.concatenate(modulation.split(h, 2), -1)
    P = jnp.einsum("btr,btc->brc", parts, inputs.x, preferred_element_type=jnp.float32)
    P = sum(jnp.split(P[..., : options.channels], 2, axis=1))
    zeros = jax.tree.map(jnp.zeros_like, inputs._replace(bits=None))
    grads = zeros._replace(x=dx, b=g.sum((0, 1)), w=P.sum(0).T)
    if options.normalised:
        G = P - (mean[..., None] * h).sum(1)[..., None]
        grads = grads._replace(**modulation.gradients(inputs, G, g.sum(1)))
    return (grads,)


_loss.defvjp(_forward, _backward)
