"""bitwise_cross_entropy() and sample_bits(): several implementations, chosen by platform."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from kernels import dispatch, shard
from kernels.bitwise import bits as packing
from kernels.bitwise import ref, tpu, xla
from kernels.bitwise.ref import Draw, Inputs


def _on_gpu(name, *args, **options):
    # Imported when used: Mosaic GPU is not part of every jaxlib.
    from kernels.bitwise import gpu

    return getattr(gpu, name)(*args, **options)


IMPLEMENTATIONS = {
    "ref": ref.cross_entropy,
    "xla": xla.cross_entropy,
    "tpu": tpu.cross_entropy,
    "tpu_interpret": functools.partial(tpu.cross_entropy, interpret=True),  # on the CPU, for tests
    "gpu": functools.partial(_on_gpu, "cross_entropy"),
    "gpu_interpret": functools.partial(_on_gpu, "cross_entropy", interpret=True),
}
SAMPLERS = {
    "ref": ref.sample,
    "xla": xla.sample,
    "tpu": tpu.sample,
    "tpu_interpret": functools.partial(tpu.sample, interpret=True),
    "gpu": functools.partial(_on_gpu, "sample"),
    "gpu_interpret": functools.partial(_on_gpu, "sample", interpret=True),
}
# Tried in this order by impl="auto"; the last one takes everything.
AUTO = {"tpu": ("tpu", "xla"), "cpu": ("xla",)}


def bitwise_cross_entropy(
    x: Float[Array, "*n c"],
    w: Float[Array, "c d"],
    b: Float[Array, " d"],
    bits: UInt32[Array, "*n words"],
    *,
    weights: Float[Array, "*n"] | None = None,
    scale: Float[Array, "b c"] | None = None,
    shift: Float[Array, "b c"] | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> Float[Array, "*n"]:
    """Loss of every token, float32: mean over its d bits of the cross-entropy, times its weight.

    x [B, T, C] or [N, C]; w and b are what a bit's two columns ("1" minus "0") differ by, so that
    the log odds are x w + b; bits as kernels/bitwise/bits.py packs them. With scale and shift, one
    of each per row, x is layer-normalised (without affine, eps 1e-6), times 1 + scale, plus shift.
    Gradients flow to all but the bits. chunk: tokens of a row that an implementation takes at once.
    """
    _check("bitwise_cross_entropy", x, w, b, scale, shift, bits=bits, weights=weights)
    lead, wide = x.shape[:-1], jnp.promote_types(x.dtype, jnp.float32)
    weights = jnp.ones(lead, wide) if weights is None else weights.astype(wide)
    run, name = dispatch.choose("bitwise_cross_entropy", impl, IMPLEMENTATIONS, AUTO)
    options = {} if name == "ref" else dict(chunk=chunk)
    inputs = _inputs(x, w, b, scale, shift)._replace(
        bits=_rows(bits, bits.shape[-1]), weights=_rows(weights)
    )

    def part(inputs):
        return run(inputs, **options)

    names = _names(x, inputs)
    loss = shard.call(part, (inputs,), (names,), inputs.weights, names.weights)
    return loss.reshape(lead)


def sample_bits(
    x: Float[Array, "*n c"],
    w: Float[Array, "c d"],
    b: Float[Array, " d"],
    uniforms: Float[Array, "*n d"],
    *,
    x_uncond: Float[Array, "*n c"] | None = None,
    guidance: float | Float[Array, ""] = 1.0,
    temperature: float | Float[Array, ""] = 1.0,
    top_p: float | Float[Array, ""] = 1.0,
    scale: Float[Array, "b c"] | None = None,
    shift: Float[Array, "b c"] | None = None,
    scale_uncond: Float[Array, "b c"] | None = None,
    shift_uncond: Float[Array, "b c"] | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[UInt32[Array, "*n words"], Float[Array, "*n d"]]:
    """(packed bits, codes ±1 / sqrt(d) in float32) of every token; no gradient flows.

    Log odds z = x w + b as in the loss; with x_uncond, guidance z + (1 - guidance) z_uncond; then
    divided by the temperature (0: the likelier value). A bit is 1 where its uniform number in
    [0, 1) is less than sigmoid(z), unless the less likely value's probability is at most 1 - top_p:
    then the bit is the likelier one. The three numbers may be traced. The unconditional tokens have
    the modulation scale_uncond and shift_uncond, by default that of the others.
    """
    _check("sample_bits", x, w, b, scale, shift, uniforms=uniforms, x_uncond=x_uncond)
    if x_uncond is None and isinstance(guidance, (int, float)) and guidance != 1:
        raise ValueError(f"sample_bits: guidance={guidance} needs x_uncond")
    inputs, uncond = _inputs(x, w, b, scale, shift), None
    if x_uncond is not None:
        modulation = scale_uncond, shift_uncond
        if all(a is None for a in modulation):
            modulation = scale, shift
        _check("sample_bits, unconditional", x_uncond, w, b, *modulation)
        if (modulation[0] is None) != (scale is None):
            raise ValueError("sample_bits: scale_uncond and shift_uncond need scale and shift")
        uncond = _inputs(x_uncond.astype(x.dtype), w, b, *modulation)
    run, name = dispatch.choose("sample_bits", impl, SAMPLERS, AUTO)
    options = {} if name == "ref" else dict(chunk=chunk)
    wide, names = inputs.wide, _names(x, inputs)
    draw = Draw(*(jnp.asarray(a, wide) for a in (guidance, temperature, top_p)))
    uniforms = _rows(uniforms.astype(wide), uniforms.shape[-1])
    given = jax.lax.stop_gradient((inputs, uncond, uniforms, draw))
    out_names = names.x, names.x

    def part(inputs, uncond, uniforms, draw):
        return run(inputs, uncond, uniforms, draw, **options)

    like = jax.eval_shape(ref.sample, *given)
    in_names = (names, None if uncond is None else names, names.x, Draw((), (), ()))
    bits, codes = shard.call(part, given, in_names, like, out_names)
    return tuple(a.reshape(*x.shape[:-1], a.shape[-1]) for a in (bits, codes))


def _rows(x, *last: int):
    """[B, T, ...] as it is, of [N, ...] one row."""
    return x[None] if x.ndim - len(last) == 1 else x


def _inputs(x, w, b, scale, shift) -> Inputs:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    modulation = (None if a is None else a.astype(wide) for a in (scale, shift))
    return Inputs(_rows(x, x.shape[-1]), w.astype(wide), b.astype(wide), *modulation)


def _names(x, inputs: Inputs) -> Inputs:
    """Logical axes of every array; tokens without a row are cut as rows are."""
    lead = ("batch", "length") if x.ndim == 3 else (None, "batch")
    of_row = (lead[0], None)
    names = Inputs((*lead, None), (None, None), (None,), of_row, of_row, (*lead, None), lead)
    return Inputs(*(n if a is not None else None for n, a in zip(names, inputs)))


def _check(op, x, w, b, scale, shift, **per_token):
    lead, channels = x.shape[:-1], x.shape[-1]
    d = w.shape[-1]
    row = (lead[0] if x.ndim == 3 else 1, channels)
    want = dict(x=(*lead, channels), w=(channels, d), b=(d,), scale=row, shift=row)
    want |= dict(bits=(*lead, packing.words(d)), weights=lead)
    want |= dict(uniforms=(*lead, d), x_uncond=x.shape)
    given = dict(x=x, w=w, b=b, scale=scale, shift=shift, **per_token)
    given = {name: a.shape for name, a in given.items() if a is not None}
    together = (scale is None) == (shift is None)
    if not (x.ndim in (2, 3) and x.size and together) or any(given[n] != want[n] for n in given):
        shapes = ", ".join(f"{name} {shape}" for name, shape in given.items())
        raise ValueError(
            f"{op} takes x, x_uncond [B,T,C] or [N,C] that are not empty, w [C,d], b [d], bits "
            "[...,ceil(d/32)], weights [...], uniforms [...,d], scale and shift [B,C], both or "
            f"neither, not {shapes}"
        )
