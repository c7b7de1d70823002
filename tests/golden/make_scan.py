"""Makes scan.npz: the selective scan of the transformers package.

    python -m tests.golden.make_scan          (needs torch and transformers; made with 5.24.0)

Inputs are `inputs(length)` below, from recipes.normal. For every length of LENGTHS output and last
state in float32: `y_LENGTH`, `h_LENGTH` of `mamba_selective_scan`, which starts from 0, and
`y0_LENGTH`, `h0_LENGTH` of `mamba_selective_state_update`, token by token from the state h0.
`d_NAME_LENGTH`: gradients in float64, by torch, of sum(cotangent y) + sum(h), of the recurrence
written out with a first state (the package's own goes through float32 in places).
"""

from pathlib import Path

import numpy as np

from tests.golden.recipes import normal

LENGTHS = (1, 3, 31, 64, 257)
GRADIENTS = (3, 64)
B, E, N = 2, 6, 4
NAMES = ("u", "delta", "z", "B", "C", "A", "D", "bias", "h0")


def inputs(length: int) -> dict[str, np.ndarray]:
    """u, delta, z [B,T,E], B, C [B,T,N], A [E,N], D, bias [E], h0 [B,E,N], cotangent [B,T,E]."""
    tokens, narrow = (B, length, E), (B, length, N)
    shapes = [tokens] * 3 + [narrow] * 2 + [(E, N), (E,), (E,), (B, E, N), tokens]
    made = {
        name: normal(100 + i, *shape)
        for i, (name, shape) in enumerate(zip((*NAMES, "cotangent"), shapes))
    }
    made["A"] = -np.exp(made["A"])
    return made


def main():
    """Writes the file."""
    import torch
    from transformers.models.mamba import modeling_mamba as mamba

    def tensors(length, dtype=torch.float32):
        return {k: torch.from_numpy(v).to(dtype) for k, v in inputs(length).items()}

    def scan(x):
        swap = lambda name: x[name].transpose(1, 2)  # noqa: E731
        given = (swap("u"), swap("delta"), x["A"], swap("B"), swap("C"), x["D"])
        options = dict(z=swap("z"), delta_bias=x["bias"], delta_softplus=True)
        y, h = mamba.mamba_selective_scan(*given, **options, return_last_state=True)
        return y.transpose(1, 2), h

    def steps(x):
        state, rows = x["h0"].clone(), []
        for t in range(x["u"].shape[1]):
            u, delta, z, B, C = (x[name][:, t] for name in NAMES[:5])
            options = dict(z=z, dt_bias=x["bias"], dt_softplus=True)
            given = (state, u, delta, x["A"], B, C, x["D"])
            rows.append(mamba.mamba_selective_state_update(*given, **options))
        return torch.stack(rows, 1), state

    def recurrence(x):
        delta, h, rows = torch.nn.functional.softplus(x["delta"] + x["bias"]), x["h0"], []
        for t in range(delta.shape[1]):
            written = (delta[:, t] * x["u"][:, t])[..., None] * x["B"][:, t, None]
            h = torch.exp(delta[:, t, :, None] * x["A"]) * h + written
            rows.append((h * x["C"][:, t, None]).sum(-1) + x["D"] * x["u"][:, t])
        return torch.stack(rows, 1) * torch.nn.functional.silu(x["z"]), h

    out = {}
    for length in LENGTHS:
        for function, mark in ((scan, ""), (steps, "0")):
            y, h = function(tensors(length))
            out[f"y{mark}_{length}"], out[f"h{mark}_{length}"] = y.numpy(), h.numpy()
    for length in GRADIENTS:
        x = tensors(length, torch.float64)
        leaves = [x[name].requires_grad_() for name in NAMES]
        y, h = recurrence(x)
        grads = torch.autograd.grad((y * x["cotangent"]).sum() + h.sum(), leaves)
        out |= {f"d_{name}_{length}": g.numpy() for name, g in zip(NAMES, grads)}
        assert np.abs(out[f"y0_{length}"] - y.detach().numpy()).max() < 1e-5
    np.savez_compressed(Path(__file__).parent / "scan.npz", **out)


if __name__ == "__main__":
    main()
