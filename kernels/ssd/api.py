"""ssd() and ssd_step(): one call, several implementations, chosen by platform and shape.

All but the reference are gated linear attention in chunks (kernels/linear_attention), without input
gate, normaliser and gauge:

    q = C    k = B    v = x    gain = Δ    log f = Δ A    memory [N, P] = hᵀ

What is one number per token and head or per entry of x (softplus, Δ A, D x, the gate) is plain JAX
around it, gradients included.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import dispatch, documents, shard
from kernels.linear_attention import Form, State, context, gained, tpu, xla
from kernels.ssd import ref


def _on_gpu(*args, **options):
    # Imported when used: Mosaic GPU is not part of every jaxlib.
    from kernels.linear_attention import gpu

    return gpu.linear_attention(*args, **options)


def _chunked(linear_attention, **fixed):
    """The reference's function from an implementation in chunks; chunk: tokens of one."""

    def run(x, delta, A, B, C, D, z, h, numbers, *, chunk=None):
        core = functools.partial(linear_attention, Form("ssd", 1.0), chunk=chunk, **fixed)
        y, h = _on_mesh(core, C, B, x, delta, delta * A, h, numbers)
        y = y.astype(h.dtype) + D[:, None] * x
        if z is not None:
            y = y * jax.nn.silu(z.astype(h.dtype))
        return y.astype(x.dtype), h

    return run


IMPLEMENTATIONS = {
    "ref": ref.ssd,
    "xla": _chunked(xla.linear_attention),
    "tpu": _chunked(tpu.linear_attention),
    "tpu_interpret": _chunked(tpu.linear_attention, interpret=True),  # on the CPU, for tests
    "gpu": _chunked(_on_gpu),
    "gpu_interpret": _chunked(_on_gpu, interpret=True),
}
STEPS = {"ref": ref.step, "xla": ref.step}
# Tried in this order by impl="auto"; the last one takes everything.
AUTO = {"tpu": ("tpu", "xla"), "cpu": ("xla",)}
STEPS_AUTO = {"cpu": ("xla",)}


def ssd(
    x: Float[Array, "b t h p"],
    delta: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    *,
    z: Float[Array, "b t h p"] | None = None,
    delta_bias: Float[Array, " h"] | None = None,
    h0: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    state_segment: Int[Array, " b"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """y in the type of x, and the last state in float32.

    A is negative (-exp(A_log)); z gates y by silu(z); softplus is applied to delta + delta_bias.
    segment_ids: documents packed in a row; where the id changes the state starts afresh, exactly.
    `h0` continues the document `state_segment`, by default that of the first token.
    mask: tokens where it is False leave the state untouched, exactly (Δ = 0); y there is what the
    state gives. chunk: tokens of one, of the chunked implementations.
    """
    _check(x, delta, A, B, C, D, z)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    step = _step_size(delta, delta_bias, wide)
    if mask is not None:
        step = jnp.where(mask[..., None], step, 0.0)
    rows, _, heads, width = x.shape
    h = jnp.zeros((rows, heads, width, B.shape[-1])) if h0 is None else h0
    run, name = dispatch.choose("ssd", impl, IMPLEMENTATIONS, AUTO)
    options = {} if name == "ref" else dict(chunk=chunk)
    numbers = documents.numbers(segment_ids, state_segment)
    A, D = A.astype(wide), D.astype(wide)
    return run(x, step, A, B, C, D, z, h.astype(wide), numbers, **options)


def ssd_step(
    x: Float[Array, "b h p"],
    delta: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    D: Float[Array, " h"],
    h: Float[Array, "b h p n"],
    *,
    z: Float[Array, "b h p"] | None = None,
    delta_bias: Float[Array, " h"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One token of decoding: (y, state)."""
    run, _ = dispatch.choose("ssd_step", impl, STEPS, STEPS_AUTO)
    return run(x, _step_size(delta, delta_bias, h.dtype), A, B, C, D, z, h)


def _step_size(delta, bias, wide):
    """Δ."""
    delta = delta.astype(wide)
    return jax.nn.softplus(delta if bias is None else delta + bias.astype(wide))


def _on_mesh(core, C, B, x, delta, log_f, h, numbers):
    """(scores v, last state); rows, heads and tokens cut as the mesh says, one device's part each.

    Arrays as those of `ssd`; a device's heads need their own groups of B and C with them.
    """
    groups, seq = B.shape[2], shard.mesh_axes("length", x.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[a] for a in shard.mesh_axes("act_heads", x.shape[2]))
    if groups % parts:
        B, C = (jnp.repeat(a, math.lcm(groups, parts) // groups, axis=2) for a in (B, C))
    first = lambda a: jnp.moveaxis(a, 2, 1)  # noqa: E731
    tokens = ("batch", "act_heads", "length")
    memory = ("batch", "act_heads", None, None)
    inputs = (*map(first, (C, B, x, delta, log_f)), h.swapaxes(2, 3), numbers)
    names = (*((*tokens, None),) * 3, tokens, tokens, memory, ("batch", "length"))
    if numbers is None:
        inputs, names = inputs[:-1], names[:-1]

    def part(q, k, v, gain, log_f, C, numbers=None):
        state, last = State(C), None
        if seq:
            written = gained(v, gain)
            state, last, numbers = context.states(seq, k, written, None, log_f, state, numbers)
        y, own = core(q, k, v, None, log_f, state, numbers, gain=gain)
        return y, (last or own).C

    y, memory = shard.call(part, inputs, names, (inputs[2], inputs[5]), (names[2], memory))
    return first(y), memory.swapaxes(2, 3)


def _check(x, delta, A, B, C, D, z):
    given = dict(x=x, delta=delta, A=A, B=B, C=C, D=D, z=x if z is None else z)
    rows, length, heads, _ = x.shape
    want = dict(x=x.shape, delta=x.shape[:3], A=(heads,), D=(heads,), z=x.shape)
    want |= dict(B=(rows, length, *B.shape[2:]), C=B.shape)
    wrong = any(a.shape != want[name] for name, a in given.items()) or not length
    if wrong or B.ndim != 4 or heads % B.shape[2]:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in given.items())
        raise ValueError(
            "ssd takes x, z [B,T,H,P], delta [B,T,H], A, D [H], B, C [B,T,G,N] with T > 0 and G "
            f"dividing H, not {shapes}"
        )
