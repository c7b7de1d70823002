"""Makes ssd.npz: the Mamba-2 scan and step of the transformers package, in torch.

    python tests/golden/make_ssd.py            (needs torch and transformers; made with 5.24.0)

Inputs are recipes.normal(1.., ...): 2 rows of 23 tokens, 4 heads of 6, 2 groups, states of 5, A =
-exp(normal); chunks of 8. Stored, in float32: y and the last state of the scan from a state that is
not 0 (its z is ignored, so none is given), gradients of sum(y * normal(10)) + sum(state *
normal(11)) to every input, and y and state of one gated step behind it.
"""

from pathlib import Path

import numpy as np
import torch
from recipes import normal
from transformers.models.mamba2.modeling_mamba2 import (
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

ROWS, TOKENS, HEADS, WIDTH, GROUPS, STATES = 2, 23, 4, 6, 2, 5
SHAPES = dict(
    x=(ROWS, TOKENS, HEADS, WIDTH),
    delta=(ROWS, TOKENS, HEADS),
    A=(HEADS,),
    B=(ROWS, TOKENS, GROUPS, STATES),
    C=(ROWS, TOKENS, GROUPS, STATES),
    D=(HEADS,),
    delta_bias=(HEADS,),
    h0=(ROWS, HEADS, WIDTH, STATES),
)


def main():
    given = {name: normal(seed, *size) for seed, (name, size) in enumerate(SHAPES.items(), 1)}
    given["A"] = -np.exp(given["A"])
    leaves = {name: torch.from_numpy(a).requires_grad_() for name, a in given.items()}
    x, delta, A, B, C, D, bias, h0 = leaves.values()
    y, last = mamba2_chunk_scan(
        x, delta, A, B, C, chunk_size=8, D=D, dt_bias=bias, dt_softplus=True, initial_states=h0,
        return_final_states=True,
    )  # fmt: skip
    loss = (y * torch.from_numpy(normal(10, *y.shape))).sum()
    loss = loss + (last * torch.from_numpy(normal(11, *last.shape))).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    z = torch.from_numpy(normal(9, ROWS, HEADS, WIDTH))
    per_entry = lambda a, *size: a[(..., *[None] * len(size))].expand(*a.shape, *size)  # noqa: E731
    with torch.no_grad():
        state = last.clone()
        step = mamba2_selective_state_update(
            state, x[:, 0], per_entry(delta[:, 0], WIDTH), per_entry(A, WIDTH, STATES), B[:, 0],
            C[:, 0], per_entry(D, WIDTH), dt_bias=per_entry(bias, WIDTH), dt_softplus=True, z=z,
        )  # fmt: skip
    arrays = dict(y=y, h=last, step_y=step, step_h=state)
    arrays |= {f"d{name}": grad for name, grad in zip(leaves, grads)}
    np.savez_compressed(
        Path(__file__).with_name("ssd.npz"),
        **{name: a.detach().float().numpy() for name, a in arrays.items()},
    )


if __name__ == "__main__":
    main()
