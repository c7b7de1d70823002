"""selective_scan() and selective_scan_step(): several implementations, chosen by platform."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import dispatch, documents, shard
from kernels.selective_scan import context, ref, tpu, xla
from kernels.selective_scan.ref import Inputs
from kernels.selective_scan.xla import NEVER


def _on_gpu(*args, **options):
    # Imported when used: Mosaic GPU is not part of every jaxlib.
    from kernels.selective_scan import gpu

    return gpu.selective_scan(*args, **options)


def _step_on_gpu(*args, **options):
    from kernels.selective_scan import gpu_step

    return gpu_step.step(*args, **options)


IMPLEMENTATIONS = {
    "ref": ref.selective_scan,
    "xla": xla.selective_scan,
    "tpu": tpu.selective_scan,
    "tpu_interpret": functools.partial(tpu.selective_scan, interpret=True),  # on the CPU, for tests
    "gpu": _on_gpu,
    "gpu_interpret": functools.partial(_on_gpu, interpret=True),
}
STEPS = {
    "ref": ref.step,
    "xla": ref.step,  # one fusion over the state, in place
    "gpu": _step_on_gpu,
    "gpu_interpret": functools.partial(_step_on_gpu, interpret=True),
}
# Tried in this order by impl="auto"; the last one takes everything.
AUTO = {"tpu": ("tpu", "xla"), "cpu": ("xla",)}
STEPS_AUTO = {"cpu": ("xla",)}


def selective_scan(
    u: Float[Array, "b t e"],
    delta: Float[Array, "b t e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    D: Float[Array, " e"],
    *,
    z: Float[Array, "b t e"] | None = None,
    delta_bias: Float[Array, " e"] | None = None,
    h0: Float[Array, "b e n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    state_segment: Int[Array, " b"] | None = None,
    reset_to: Float[Array, "r e n"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """y in the type of u, and the last state in float32.

    A is negative (-exp(A_log)); z gates y by silu(z); softplus is applied to delta + delta_bias.
    segment_ids: documents packed in a row; where the id changes the state becomes `reset_to` (one
    for all rows or one each, 0 by default), exactly, and a gradient flows into it. `h0` continues
    the document `state_segment`, by default that of the first token.
    mask: tokens where it is False leave the state untouched, exactly (Δ = 0); y there is finite and
    means nothing. A document must not begin with such a token.
    chunk: of the implementations with chunks: tokens of one; see their files.
    """
    _check(u, delta, A, B, C, D, z)
    run, name = dispatch.choose("selective_scan", impl, IMPLEMENTATIONS, AUTO)
    rows, _, channels = u.shape
    wide = jnp.promote_types(u.dtype, jnp.float32)
    state = (channels, A.shape[1])
    if mask is not None:
        delta = jnp.where(mask[..., None], delta, jnp.asarray(NEVER, delta.dtype))
    inputs = Inputs(
        *(u, delta, B, C, z),
        None if segment_ids is None else documents.fresh(segment_ids, state_segment),
        A.astype(wide),
        D.astype(wide),
        jnp.zeros(channels, wide) if delta_bias is None else delta_bias.astype(wide),
        jnp.zeros((rows, *state), wide) if h0 is None else h0.astype(wide),
        jnp.zeros((1, *state), wide) if reset_to is None else reset_to.astype(wide),
    )
    return _on_mesh(run if name == "ref" else functools.partial(run, chunk=chunk), inputs)


def _on_mesh(run, inputs: Inputs):
    """Rows, tokens and channels cut as the mesh says; one device's part each."""
    seq = shard.mesh_axes("length", inputs.u.shape[1])
    wide, narrow = ("batch", "length", "act_mlp"), ("batch", "length", None)
    state = ("batch", "act_mlp", None)
    names = Inputs(
        *(wide, wide, narrow, narrow, wide, narrow[:2]), state[1:], wide[2:], wide[2:], state, state
    )
    given = [i for i, x in enumerate(inputs) if x is not None]

    def part(*arrays):
        filled = Inputs(*(arrays[given.index(i)] if i in given else None for i in range(11)))
        return context.along(seq, run, filled) if seq else run(filled)

    arrays = tuple(inputs[i] for i in given)
    like = (inputs.u, inputs.h0)
    return shard.call(part, arrays, tuple(names[i] for i in given), like, (wide, state))


def selective_scan_step(
    u: Float[Array, "b e"],
    delta: Float[Array, "b e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b n"],
    C: Float[Array, "b n"],
    D: Float[Array, " e"],
    h: Float[Array, "b e n"],
    *,
    z: Float[Array, "b e"] | None = None,
    delta_bias: Float[Array, " e"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "b e"], Float[Array, "b e n"]]:
    """One token of decoding: (y, state); each state is read and written once."""
    run, _ = dispatch.choose("selective_scan_step", impl, STEPS, STEPS_AUTO)
    wide, narrow, weight = ("batch", "act_mlp"), ("batch", None), ("act_mlp",)
    state = ("batch", "act_mlp", None)
    bias = jnp.zeros(u.shape[1], h.dtype) if delta_bias is None else delta_bias.astype(h.dtype)
    inputs = [u, delta, B, C, A.astype(h.dtype), D.astype(h.dtype), bias, h]
    names = [wide, wide, narrow, narrow, state[1:], weight, weight, state]
    if z is not None:
        inputs.append(z)
        names.append(wide)

    def part(u, delta, B, C, A, D, bias, h, z=None):
        return run(u, delta, B, C, z, A, D, bias, h)

    return shard.call(part, tuple(inputs), tuple(names), (u, h), (wide, state))


def _check(u, delta, A, B, C, D, z):
    (rows, length, channels), states = u.shape, A.shape[1]
    wide, narrow = (rows, length, channels), (rows, length, states)
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}
    want = {"u": wide, "delta": wide, "A": (channels, states), "B": narrow, "C": narrow}
    want["D"] = (channels,)
    if z is not None:
        given["z"], want["z"] = z, wide
    if any(x.shape != want[name] for name, x in given.items()) or not length:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in given.items())
        raise ValueError(
            "selective_scan takes u, delta, z [B,T,E], A [E,N], B, C [B,T,N], D [E] with T > 0, "
            f"not {shapes}"
        )
