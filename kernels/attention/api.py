"""attention(): one call, several implementations, chosen by platform and shape."""

from jaxtyping import Array, Float

from kernels import dispatch
from kernels.attention import ref, xla
from kernels.attention.mask import MaskSpec

IMPLEMENTATIONS = {"ref": ref.attention, "xla": xla.attention}
# Tried in this order by impl="auto"; the last one takes everything.
AUTO = {"cpu": ("xla",)}


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    mask: MaskSpec | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Float[Array, "b t h v"]:
    """Grouped-query attention, softmax(mask(softcap(q kᵀ scale))) v; scale defaults to K^-1/2.

    impl="auto" falls through implementations that raise NotSupported; a named one never does.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads do not divide into {k.shape[2]}")
    options = dict(scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap)
    run, _ = dispatch.choose("attention", impl, IMPLEMENTATIONS, AUTO)
    return run(q, k, v, mask, **options)
