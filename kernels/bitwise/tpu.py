"""The bitwise head on TPUs: Pallas (Mosaic) kernels for the loss, its gradient, and draws.

Grid (rows, parts of a row, blocks of its tokens), the last in order. A block's x, all channels of
it, is read once; w stays in VMEM, and with it what a row's modulation makes of it, computed before
the row's first block. Forward one number per token is written, and the mean and rstd that the
gradient needs; no log odds reach HBM. Backward dx is written once, and P (tpu_kernels.py), d x C
float32, adds up in VMEM. A row has two parts, for chips with two cores, where its blocks divide.

Channels are padded to whole lanes (which copies x unless C is a multiple of 128), bits to 16, 32 or
64 sublanes; tokens are not padded unless a row has fewer than 128.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitwise import bits as packing
from kernels.bitwise import modulation, tpu_kernels
from kernels.bitwise.ref import Draw, Inputs
from kernels.bitwise.tpu_kernels import LANES, ONES, Options
from kernels.errors import NotSupported
from kernels.tpu_call import named_call

TILE = 256  # tokens: 1 MiB of bfloat16 at 2,048 channels
BYTES = 2 * 2**20  # of a block of x at most
VMEM = 64 * 2**20  # bytes that a kernel may take
WIDEST = 64  # bits


def cross_entropy(inputs: Inputs, *, chunk: int | None = None, interpret: bool = False):
    """The reference's function for float32 and bfloat16 and up to 64 bits.

    chunk: tokens of a block, a multiple of 128. interpret: on the CPU, for tests.
    """
    options, inputs = _prepared("bitwise_cross_entropy", inputs, chunk, interpret)
    return inputs.weights * _loss(options, inputs)[:, : inputs.weights.shape[1]]


def sample(inputs: Inputs, uncond, uniforms, draw: Draw, *, chunk=None, interpret=False):
    """The reference's function."""
    length, d = inputs.x.shape[1], inputs.w.shape[1]
    options, inputs = _prepared("sample_bits", inputs, chunk, interpret)
    if uncond is not None:
        _, uncond = _prepared("sample_bits", uncond, chunk, interpret)
    words = _sample(options, inputs, uncond, _by_bits(uniforms, options), jnp.stack(draw))
    words = jnp.swapaxes(words, 1, 2)[:, :length].astype(jnp.uint32)
    return words, packing.codes(packing.unpack(words, d))


def _prepared(op: str, inputs: Inputs, chunk, interpret: bool) -> tuple[Options, Inputs]:
    """Sizes, and inputs of whole lanes."""
    x = inputs.x
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotSupported(f"{op} on TPU takes float32 or bfloat16, not {x.dtype}")
    (_, length, channels), d = x.shape, inputs.w.shape[1]
    if d > WIDEST:
        raise NotSupported(f"{op} on TPU takes up to {WIDEST} bits, not {d}")
    tile = chunk or TILE
    if tile % LANES:
        raise NotSupported(f"{op} on TPU needs a chunk that is a multiple of 128, not {tile}")
    fits = BYTES // (x.dtype.itemsize * channels) // LANES * LANES
    tile = min(tile, max(fits, LANES), length + -length % LANES)
    x = jnp.pad(x, ((0, 0), (0, max(tile - length, 0)), (0, -channels % LANES)))
    parts = 2 if x.dtype == jnp.bfloat16 else 3
    rows = next(r for r in (16, 32, 64) if r >= d)
    normalised = inputs.scale is not None
    options = Options(d, rows, channels, x.shape[1], tile, parts, normalised, interpret)
    return options, inputs._replace(x=x)


def _by_bits(a, options: Options):
    """[B, T, d] -> [B, rows, tokens]: padded."""
    more = ((0, 0), (0, options.length - a.shape[1]), (0, options.rows - a.shape[2]))
    return jnp.swapaxes(jnp.pad(a, more), 1, 2)


def _by_words(inputs: Inputs, options: Options):
    """Labels as [B, words, tokens]."""
    more = ((0, 0), (0, options.length - inputs.bits.shape[1]), (0, 0))
    words = jax.lax.bitcast_convert_type(inputs.bits, jnp.int32)
    return jnp.swapaxes(jnp.pad(words, more), 1, 2)


class _Plan:
    """The grid of a call; block specs of every kind of array."""

    def __init__(self, options: Options, inputs: Inputs):
        self.tile, self.wide, self.rows = options.tile, inputs.x.shape[2], options.rows
        blocks = -(-options.length // options.tile)
        self.parts = 2 - blocks % 2
        self.grid = (inputs.x.shape[0], self.parts, blocks // self.parts)

    def _at(self, part, step):
        return part * self.grid[2] + step

    def x(self):
        """[rows, tokens, C]."""
        shape = (None, self.tile, self.wide)
        return pl.BlockSpec(shape, lambda b, p, s: (b, self._at(p, s), 0))

    def tokens(self, rows: int):
        """[rows, a few, tokens]."""
        return pl.BlockSpec((None, rows, self.tile), lambda b, p, s: (b, 0, self._at(p, s)))

    def row(self):
        """[rows, 1, C]."""
        return pl.BlockSpec((None, 1, self.wide), lambda b, p, s: (b, 0, 0))

    def shared(self, *shape):
        """The same for all."""
        return pl.BlockSpec(shape, lambda b, p, s: (0,) * len(shape))

    def sums(self, *shape):
        """[rows, parts, ...]: stays in VMEM while blocks stream through."""
        return pl.BlockSpec((None, None, *shape), lambda b, p, s: (b, p, *(0 for _ in shape)))

    def given(self, inputs: Inputs, name="") -> dict:
        """x, and of its rows what they are modulated with: {name: (array, spec)}."""
        given = {f"x{name}": (inputs.x, self.x())}
        if inputs.scale is not None:
            more = ((0, 0), (0, self.wide - inputs.scale.shape[1]))
            for what in ("scale", "shift"):
                array = jnp.pad(getattr(inputs, what), more)[:, None]
                given[f"{what}{name}"] = array, self.row()
        return given

    def head(self, inputs: Inputs) -> dict:
        """w with bits first, and b."""
        channels, d = inputs.w.shape
        w = jnp.pad(inputs.w.T, ((0, self.rows - d), (0, self.wide - channels)))
        b = jnp.pad(inputs.b, (0, self.rows - d))[:, None]
        return dict(w=(w, self.shared(*w.shape)), b=(b, self.shared(*b.shape)))

    def scratch(self, options: Options, name="", gradient=False) -> dict:
        """W's parts, ones below them, and sums over its lanes."""
        rows = options.products if gradient else options.parts * options.rows
        rows += ONES if options.normalised else 0
        return {
            f"W{name}": pltpu.VMEM((rows, self.wide), jnp.bfloat16),
            f"W{name} sums": pltpu.VMEM((2, self.rows, LANES), jnp.float32),
        }


def _call(kernel, options, plan: _Plan, inputs: Mapping, outputs: Mapping, scratch: Mapping, flops):
    """One named_call; flops per token, channel and bit."""
    tokens = math.prod(plan.grid) * options.tile
    return named_call(
        kernel,
        f"bitwise_{kernel.func.__name__}",
        plan.grid,
        inputs,
        outputs,
        scratch,
        flops=flops * tokens * plan.wide * options.d,
        exponentials=2 * tokens * options.rows,
        vmem=VMEM,
        interpret=options.interpret,
    )


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, inputs: Inputs):
    return _forward(options, inputs)[0]


def _forward(options, inputs):
    """Loss before weights [rows, tokens], for the gradient also (mean, rstd) [rows, 2, tokens]."""
    plan, rows = _Plan(options, inputs), inputs.x.shape[0]
    words = _by_words(inputs, options)
    given = plan.given(inputs) | plan.head(inputs) | dict(bits=(words, plan.tokens(words.shape[1])))
    outputs = dict(loss=(_shape(rows, 1, options.length), plan.tokens(1)))
    if options.normalised:
        outputs["stats"] = _shape(rows, 2, options.length), plan.tokens(2)
    scratch = plan.scratch(options)
    kernel = functools.partial(tpu_kernels.forward, options)
    found = _call(kernel, options, plan, given, outputs, scratch, 2)
    return found["loss"][:, 0], (inputs, found.get("stats"))


def _backward(options, residuals, dloss):
    inputs, stats = residuals
    plan, rows, wide = _Plan(options, inputs), inputs.x.shape[0], inputs.x.shape[2]
    words = _by_words(inputs, options)
    given = plan.given(inputs) | plan.head(inputs) | dict(bits=(words, plan.tokens(words.shape[1])))
    given["dloss"] = dloss[:, None], plan.tokens(1)
    if options.normalised:
        given["stats"] = stats, plan.tokens(2)
    outputs = dict(
        dx=(_shape(*inputs.x.shape, dtype=inputs.x.dtype), plan.x()),
        P=(_shape(rows, plan.parts, options.rows, wide), plan.sums(options.rows, wide)),
        sums=(
            _shape(rows, plan.parts, 2, options.rows, LANES),
            plan.sums(2, options.rows, LANES),
        ),
    )
    scratch = plan.scratch(options, gradient=True)
    kernel = functools.partial(tpu_kernels.backward, options)
    found = _call(kernel, options, plan, given, outputs, scratch, 6)
    P = found["P"].sum(1)[:, : options.d, : options.channels]
    g, mean_h = jnp.moveaxis(found["sums"].sum((1, 4))[..., : options.d], 1, 0)
    zeros = jax.tree.map(jnp.zeros_like, inputs._replace(bits=None))
    grads = zeros._replace(x=found["dx"], b=g.sum(0), w=P.sum(0).T)
    if options.normalised:
        grads = grads._replace(**modulation.gradients(inputs, P - mean_h[..., None], g))
    return (grads,)


_loss.defvjp(_forward, _backward)


def _sample(options: Options, inputs: Inputs, uncond: Inputs | None, uniforms, draw):
    plan, guided = _Plan(options, inputs), uncond is not None
    given = plan.given(inputs) | plan.head(inputs)
    scratch = plan.scratch(options)
    if guided:
        given |= plan.given(uncond, " uncond")
        scratch |= plan.scratch(options, " uncond")
    given["uniforms"] = uniforms, plan.tokens(options.rows)
    given["draw"] = draw, pl.BlockSpec(memory_space=pltpu.SMEM)
    count = packing.words(options.d)
    words = _shape(inputs.x.shape[0], count, options.length, dtype=jnp.int32), plan.tokens(count)
    kernel = functools.partial(tpu_kernels.sample, options, guided)
    flops = 4 if guided else 2
    return _call(kernel, options, plan, given, dict(words=words), scratch, flops)["words"]
