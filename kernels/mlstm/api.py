"""mlstm() and mlstm_step(): one call, several implementations, chosen by platform and shape.

All but the reference are gated linear attention in chunks (kernels/linear_attention) with an input
gate and a normaliser.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch, documents, shard
from kernels.linear_attention import Form, State, context, tpu, xla
from kernels.mlstm import ref, tpu_step
from kernels.mlstm.ref import EPS, empty_state


def _on_gpu(*args, **options):
    # Imported when used: Mosaic GPU is not part of every jaxlib.
    from kernels.linear_attention import gpu

    return gpu.linear_attention(*args, **options)


def _step_on_gpu(*args, **options):
    from kernels.mlstm import gpu_step

    return gpu_step.step(*args, **options)


def _chunked(linear_attention, interpret=False):
    """The reference's function from an implementation in chunks.

    chunk: tokens of one. official_backward: see kernels/linear_attention/xla.py.
    """

    def run(q, k, v, i, f, state, documents, *, eps=EPS, chunk=None, official_backward=False):
        form = Form("mlstm", q.shape[-1] ** -0.5, eps, official_backward)
        gates = i.astype(state.C.dtype), _log_forget(f, state)
        options = dict(interpret=True) if interpret else {}
        return linear_attention(form, q, k, v, *gates, state, documents, chunk=chunk, **options)

    return run


def _log_forget(f, state):
    return jax.nn.log_sigmoid(f.astype(state.C.dtype))


IMPLEMENTATIONS = {
    "ref": ref.mlstm,
    "xla": _chunked(xla.linear_attention),
    "tpu": _chunked(tpu.linear_attention),
    "tpu_interpret": _chunked(tpu.linear_attention, interpret=True),  # on the CPU, for tests
    "gpu": _chunked(_on_gpu),
    "gpu_interpret": _chunked(_on_gpu, interpret=True),
}
STEPS = {
    "ref": ref.step,
    "xla": ref.step,
    "tpu": tpu_step.step,
    "tpu_interpret": functools.partial(tpu_step.step, interpret=True),
    "gpu": _step_on_gpu,
    "gpu_interpret": functools.partial(_step_on_gpu, interpret=True),
}
# Tried in this order by impl="auto"; the last one takes everything.
AUTO = {"tpu": ("tpu", "xla"), "cpu": ("xla",)}


def mlstm(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b h t k"],
    v: Float[Array, "b h t v"],
    i: Float[Array, "b h t"],
    f: Float[Array, "b h t"],
    *,
    state: State | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    state_segment: Int[Array, "b"] | None = None,
    chunk: int | None = None,
    official_backward: bool = False,
    eps: float = EPS,
    impl: str = "auto",
) -> tuple[Float[Array, "b h t v"], State]:
    """h and the last state; i, f are pre-activations after any cap, q is scaled inside.

    segment_ids: documents packed in a row; where the id changes the state starts afresh, exactly.
    `state` continues the document `state_segment`, by default that of the first token.
    Masked tokens: i = -1e30 and f = 1e30 leave the state untouched, exactly.
    chunk, official_backward: of the chunked implementations; see kernels/linear_attention/xla.py.
    """
    _check(q, k, v, i, f)
    rows, heads, _, width = q.shape
    if state is None:
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        state = empty_state(rows, heads, width, v.shape[-1], dtype)
    state = State(*state)
    numbers = documents.numbers(segment_ids, state_segment)
    run, name = dispatch.choose("mlstm", impl, IMPLEMENTATIONS, AUTO)
    options = dict(eps=eps)
    if name != "ref":
        options |= dict(chunk=chunk, official_backward=official_backward)
    elif official_backward:
        raise ValueError("mlstm: impl='ref' has no official_backward")
    return _on_mesh(functools.partial(run, **options), q, k, v, i, f, state, numbers)


def _on_mesh(run, q, k, v, i, f, state, documents):
    """Rows, heads and tokens cut as the mesh says; one device's part each."""
    seq = shard.mesh_axes("length", q.shape[2])
    tokens = ("batch", "act_heads", "length")
    memory = State(("batch", "act_heads", None, None), ("batch", "act_heads", None), tokens[:2])
    names = (*((*tokens, None),) * 3, tokens, tokens, memory, ("batch", "length"))
    inputs = (q, k, v, i, f, state, documents)
    if documents is None:
        names, inputs = names[:-1], inputs[:-1]

    def part(q, k, v, i, f, state, documents=None):
        if not seq:
            return run(q, k, v, i, f, state, documents)
        wide = i.astype(state.C.dtype), _log_forget(f, state)
        state, last, documents = context.states(seq, k, v, *wide, state, documents)
        h, _ = run(q, k, v, i, f, state, documents)
        return h, last

    return shard.call(part, inputs, names, (v, state), (names[2], memory))


def mlstm_step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    i: Float[Array, "b h"],
    f: Float[Array, "b h"],
    state: State,
    *,
    eps: float = EPS,
    impl: str = "auto",
) -> tuple[Float[Array, "b h v"], State]:
    """One token of decoding: each state is read and written once."""
    run, _ = dispatch.choose("mlstm_step", impl, STEPS, AUTO)
    head, state = ("batch", "act_heads"), State(*state)
    inputs = (q, k, v, i, f, state)
    memory = State((*head, None, None), (*head, None), head)
    names = (*((*head, None),) * 3, head, head, memory)
    run = functools.partial(run, eps=eps)
    return shard.call(run, inputs, names, (v, state), (names[2], memory))


def _check(q, k, v, i, f):
    if q.shape != k.shape or q.shape[:3] != v.shape[:3] or not i.shape == f.shape == q.shape[:3]:
        shapes = ", ".join(f"{n} {x.shape}" for n, x in zip("qkvif", (q, k, v, i, f)))
        raise ValueError(
            f"mlstm takes q, k [B,H,T,K], v [B,H,T,V], i, f [B,H,T] with T > 0, not {shapes}"
        )
    if not q.shape[2]:
        raise ValueError("mlstm: a row needs at least one token")
