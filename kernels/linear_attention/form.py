"""The types that every implementation of the chunkwise form takes."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Form(NamedTuple):
    """What distinguishes the ops besides their inputs; fixed when compiling."""

    name: str  # of the op, in messages and in the names of kernels
    scale: float  # of q
    eps: float = 0.0  # added to the denominator
    official_backward: bool = False  # of the mLSTM; see kernels/linear_attention/xla.py


class State(NamedTuple):
    """Memory, normaliser and gauge of every row and head; float32 (float64 of float64 inputs).

    (C, n, m) and (C e^c, n e^c, m - c) are the same state. Ops without a normaliser have neither
    n nor m.
    """

    C: Float[Array, "b h k v"]
    n: Float[Array, "b h k"] | None = None
    m: Float[Array, "b h"] | None = None


def gained(v: Float[Array, "b h t v"], gain: Float[Array, "b h t"] | None):
    """v times the gain of its token, in the type of v."""
    return v if gain is None else (gain[..., None] * v).astype(v.dtype)
