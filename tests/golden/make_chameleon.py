"""Makes chameleon.npz: a tiny random ChameleonVQVAE of the transformers package, in float32.

    python tests/golden/make_chameleon.py        (needs torch and transformers; made with 5.24.0)

Weights are recipes.weights(shapes, 20) under their published names, the picture is
recipes.normal(21, 2, 32, 32, 3); stored are the encoder's latents (NHWC) in front of the quantiser,
the indices, and "name shape" of every tensor of the package's default model, which has no decoder.
"""

from pathlib import Path

import numpy as np
import recipes
import torch
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

CONFIG = ChameleonVQVAEConfig(
    base_channels=32,
    channel_multiplier=[1, 2],
    num_res_blocks=1,
    latent_channels=8,
    embed_dim=8,
    num_embeddings=32,
    resolution=32,
)


def main():
    model = ChameleonVQVAE(CONFIG).float().eval()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    tensors = recipes.weights(shapes, 20)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    image = torch.from_numpy(recipes.normal(21, 2, 32, 32, 3)).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(image))
        _, _, indices = model.quantize(latents)
    with torch.device("meta"):
        published = ChameleonVQVAE(ChameleonVQVAEConfig())
    names = [
        f"{k} {','.join(map(str, v.shape))}" for k, v in sorted(published.state_dict().items())
    ]
    path = Path(__file__).parent / "chameleon.npz"
    np.savez_compressed(
        path,
        latents=latents.permute(0, 2, 3, 1).numpy(),
        indices=indices.reshape(2, 16, 16).numpy().astype(np.int32),
        names=np.array(names),
    )
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
