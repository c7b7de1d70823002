"""Makes siglip.npz: a tiny random SiglipVisionModel of the transformers package, in float64.

    python tests/golden/make_siglip.py           (needs torch and transformers; made with 5.24.0)

Holds the weights under their published names ("w:" + name, float16 values), NHWC images, the
tokens after the final norm, the pooled vector, and the pair loss with scores of two batches.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

CONFIG = SiglipVisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=20,
    patch_size=6,  # 20 is no multiple of 6: VALID drops two pixels
    attn_implementation="eager",
)


def pair_loss(x, y, log_temperature, bias):
    """Sigmoid loss as SiglipModel computes it: mean over rows of the sum over columns."""
    x, y = (v / v.norm(p=2, dim=-1, keepdim=True) for v in (x, y))
    scores = x @ y.t() * log_temperature.exp() + bias
    sign = 2 * torch.eye(len(x), dtype=scores.dtype) - 1
    return -torch.nn.functional.logsigmoid(sign * scores).sum(dim=-1).mean()


def main():
    rng = np.random.default_rng(0)
    model = SiglipVisionModel(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            value = (fan_in**-0.5 * rng.standard_normal(parameter.shape)).astype(np.float16)
            parameter.copy_(torch.from_numpy(value.astype(np.float64)))
        images = rng.uniform(-1, 1, (2, 20, 20, 3)).astype(np.float32)
        out = model(torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2))
        x, y = (torch.from_numpy(rng.standard_normal((5, 7))) for _ in range(2))
        loss = pair_loss(x, y, torch.tensor(1.3, dtype=torch.float64), -2.0)
    weights = {
        "w:vision_model." + k: v.numpy().astype(np.float16)  # the prefix published files have
        for k, v in model.state_dict().items()
    }
    path = Path(__file__).parent / "siglip.npz"
    np.savez_compressed(
        path,
        images=images,
        tokens=out.last_hidden_state.numpy().astype(np.float32),
        pooled=out.pooler_output.numpy().astype(np.float32),
        pair_x=x.numpy(),
        pair_y=y.numpy(),
        pair_loss=loss.numpy(),
        **weights,
    )
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
