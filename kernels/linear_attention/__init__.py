"""Gated linear attention in chunks: what the mLSTM and Mamba-2's SSD share.

A token writes k vᵀ into a memory C [K, V] per head, which decays, and reads it with q:

    C_t = exp(log_f_t) C_{t-1} + gain_t exp(i_t) k_t v_tᵀ        num_t = scale C_tᵀ q_t

Two ops are built on it; everything that distinguishes them is in `form.py` and in what is None:

    mLSTM    input gate i, normaliser n and gauge m: h = num / max(|den|, exp(-m))
    SSD      none of the three: h = num; a gain of each token; heads of a group share q and k

The implementations `xla`, `tpu` and `gpu` have the same signature; `gates` has the exponentials,
`blocks` the shapes that accelerators want, `context` rows that several devices share.
"""

from kernels.linear_attention.form import Form, State, gained

__all__ = ["Form", "State", "gained"]
