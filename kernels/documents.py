"""Documents packed in a row, by their segment ids: ids may come back, which does not join them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def fresh(
    segment_ids: Int[Array, "b t"], state_segment: Int[Array, " b"] | None = None
) -> Bool[Array, "b t"]:
    """Tokens that do not belong to the document before them; before the first one it is that of
    the state, by default the first token's."""
    before = segment_ids[:, 0] if state_segment is None else state_segment
    return jnp.diff(segment_ids, axis=1, prepend=before[:, None]) != 0


def numbers(
    segment_ids: Int[Array, "b t"] | None, state_segment: Int[Array, " b"] | None = None
) -> Int[Array, "b t"] | None:
    """Documents counted along each row from the state's, which is 0; no ids are one document."""
    if segment_ids is None:
        return None
    return jnp.cumsum(fresh(segment_ids, state_segment), axis=1, dtype=jnp.int32)
